"""What a recording does with kernels that are operators of their own; `interpreter/` has the launches of Triton."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from effnet_ops.kernels import launching
from effnet_ops.ops import gpu

OUTSIDE = torch.ones(3, 4, 5)


@pytest.fixture(autouse=True)
def calls() -> Iterator[list[str]]:
    """Operators with names such as those of `ops/cuda`, for the CPU; the names of those that were called."""
    called: list[str] = []

    def scale(x: Tensor, other: Tensor | None, factor: float) -> tuple[Tensor, Tensor]:
        called.append("scale")
        y = torch.empty_like(x).copy_(x).mul_(factor)
        return (y if other is None else y.add_(other.sum())), x.flatten().cumsum(0)

    with torch.library._scoped_library("effnet_ops", "FRAGMENT") as library:
        library.define("cuda_test_scale(Tensor x, Tensor? other, float factor) -> (Tensor, Tensor)")
        library.define("cuda_test_alias(Tensor x) -> (Tensor, Tensor)")
        library.define("cuda_test_twice(Tensor x) -> (Tensor, Tensor)")
        library.define("cuda_test_list(Tensor[] x) -> (Tensor, Tensor)")
        library.define("cuda_test_in_place(Tensor(a!) x) -> ()")
        library.impl("cuda_test_scale", scale, "CPU")
        library.impl("cuda_test_alias", lambda x: (x.clone(), x.view(-1)), "CPU")
        library.impl("cuda_test_twice", lambda x: (y := x.clone(), y.view(-1)), "CPU")
        library.impl("cuda_test_list", lambda x: (x[0].clone(), x[1].clone()), "CPU")
        library.impl("cuda_test_in_place", lambda x: None, "CPU")
        yield called


def scaled(x: Tensor, other: Tensor | None = None, factor: float = 2.0) -> tuple[Tensor, Tensor]:
    return torch.ops.effnet_ops.cuda_test_scale(x, other, factor)


def twice(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A view of an argument, a part of what a call has made, results as they are and in another order of axes."""
    y, sums = scaled(x.permute(0, 2, 1), weight, 3.0)
    z, more = scaled(y.permute(0, 2, 1).flatten()[7:31].view(4, 6), sums[5:9], 0.5)
    return z, y.permute(1, 2, 0), more[None]


def same(found: Any, expected: Any) -> bool:
    pairs = list(zip(found, expected, strict=True))
    return all(torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype for a, b in pairs)


@pytest.mark.parametrize("layout", ["whole", "slice"])
def test_calls_again_what_a_call_has_called(layout: str, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def arguments() -> tuple[Tensor, Tensor]:
        larger = torch.randn(5, 4, 7)
        return (larger[1:4, :, 1:6] if layout == "slice" else torch.randn(3, 4, 5)), torch.randn(6)

    replayed = gpu.Replayed(twice)
    first = arguments()
    assert same(replayed.run(0, *first), twice(*first))
    assert all(recording is not None for recording in replayed._recordings.values())
    monkeypatch.setattr(replayed, "_function", None)
    for _ in range(2):
        given = arguments()
        expected = twice(*given)
        calls.clear()
        assert same(replayed.run(0, *given), expected) and calls == ["scale", "scale"]


def test_memory_is_given_back_behind_its_last_use() -> None:
    """As a block's activations, which would else stay until its end."""
    alive: list[int] = []
    known: list[Any] = []

    def chain(x: Tensor) -> Tensor:
        for _ in range(4):
            x, _ = scaled(x)
        return x

    replayed, x = gpu.Replayed(chain), torch.randn(3, 4)
    replayed.run(0, x)
    (recording,) = replayed._recordings.values()

    def watched(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            results = run(*args)
            known.append(torch.multiprocessing.reductions.StorageWeakRef(results[0].untyped_storage()))
            alive.append(sum(not storage.expired() for storage in known))
            return results

        return call

    recording._steps[:] = [step._replace(run=watched(step.run)) for step in recording._steps]
    replayed.run(0, x)
    assert alive == [1, 2, 2, 2]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: scaled(OUTSIDE)[0], "neither an argument nor made by the call"),
        (lambda x: scaled(x.as_strided((61,), (1,)))[0], "more of a tensor's memory than the tensor has"),
        (lambda x: scaled(x.view(torch.float16))[0], "as another dtype"),
        (lambda x: scaled(x[1:])[0], "neither an argument nor made by the call"),
        (lambda x: torch.ops.effnet_ops.cuda_test_alias(x)[0], "gives a tensor that is not a new one"),
        (lambda x: torch.ops.effnet_ops.cuda_test_twice(x)[0], "gives a tensor that is not a new one"),
        (lambda x: torch.ops.effnet_ops.cuda_test_list([x, x])[0], "takes tensors by name or in lists"),
        (lambda x: torch.ops.effnet_ops.cuda_test_in_place(x) or scaled(x)[0], "is neither a launch nor a view"),
        (lambda x: scaled(x)[0][1:], "a result is a part of what the call made"),
        (lambda x: scaled(x)[0].view(torch.int32), "a result is a part of what the call made"),
        (lambda x: (y := scaled(x)[0], y.flatten()), "a result is not a tensor of its own"),
    ],
)
def test_what_may_not_be_the_same_again_is_not_recorded(function: Callable[[Tensor], Any], reason: str) -> None:
    x = torch.randn(2, 3, 4, 5)[0]
    with launching.Recorder([x]) as recorder:
        result = function(x)
    with pytest.raises(launching.Unrecordable, match=reason):
        recorder.finish(result)
