"""`CUDAGraphs` and ``optimize_for_inference(cuda_graph=True)`` with a stand-in for a GPU."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import effnet_ops
from effnet_ops import CUDAGraphs, cuda_graphs

SHAPES = [(1, 3, 32, 32), (2, 3, 32, 32), (1, 3, 64, 64)]


class StandIn(nn.Module):
    """Counts the calls of its host code, which a graph must not need."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.calls = nn.Parameter(torch.tensor(2.0)), 0

    def forward(self, x: Tensor) -> dict[str, Any]:
        self.calls += 1
        return {"sums": [self.scale * x.sum((1, 2, 3))], "count": len(x)}


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Graphs of the CPU: a replay computes again, into the same results. The shapes that were captured, in order."""
    captured: list[tuple[int, ...]] = []

    def capture(module: nn.Module, x: Tensor, pool: Any) -> cuda_graphs._Graph:
        assert pool in (None, "pool")
        captured.append(tuple(x.shape))
        images = x.clone()
        results = module(images)

        def replay() -> None:
            if isinstance(module, StandIn):
                results["sums"][0].copy_(module.scale * images.sum((1, 2, 3)))
            else:
                results.copy_(module(images))

        return cuda_graphs._Graph(images, results, replay, "pool")

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    monkeypatch.setattr(cuda_graphs, "why_not", lambda x: "")
    yield captured


def test_a_shape_is_captured_once(on_cpu: list[tuple[int, ...]]) -> None:
    module = StandIn()
    graphs = CUDAGraphs(module)
    first, second = torch.randn(SHAPES[0]), torch.randn(SHAPES[0])
    found = [graphs(x)["sums"][0] for x in (first, second, first)]
    assert on_cpu == [SHAPES[0]] and module.calls == 1
    for value, x in zip(found, (first, second, first), strict=True):
        assert torch.equal(value, 2 * x.sum((1, 2, 3)))


def test_layout_dtype_and_autocast_have_graphs_of_their_own(on_cpu: list[tuple[int, ...]]) -> None:
    graphs, x = CUDAGraphs(StandIn()), torch.randn(SHAPES[0])
    last = x.contiguous(memory_format=torch.channels_last)
    for value in (x, last, x.bfloat16(), x, last):
        graphs(value)
    assert len(on_cpu) == 3
    with torch.autocast("cpu", torch.bfloat16):
        graphs(x)
    assert len(on_cpu) == 4


def test_what_was_used_last_is_kept(on_cpu: list[tuple[int, ...]]) -> None:
    graphs = CUDAGraphs(StandIn(), most=2)
    for shape in (SHAPES[0], SHAPES[1], SHAPES[0], SHAPES[2], SHAPES[0], SHAPES[1]):
        graphs(torch.randn(shape))
    assert on_cpu == [SHAPES[0], SHAPES[1], SHAPES[2], SHAPES[1]] and len(graphs._graphs) == 2
    with pytest.raises(ValueError, match="most must be at least 1, got 0"):
        CUDAGraphs(StandIn(), most=0)


@pytest.mark.parametrize("change", ["load_state_dict", "to", "reset"])
def test_new_weights_make_new_graphs(change: str, on_cpu: list[tuple[int, ...]]) -> None:
    graphs, x = CUDAGraphs(StandIn()), torch.ones(SHAPES[0])
    graphs(x)
    if change == "load_state_dict":
        graphs.load_state_dict({"module.scale": torch.tensor(3.0)})
    elif change == "to":
        graphs.to(torch.float32)
    else:
        graphs.reset()
    graphs(x)
    assert len(on_cpu) == 2


def test_copies_begin_without_graphs(on_cpu: list[tuple[int, ...]]) -> None:
    graphs, x = CUDAGraphs(StandIn(), most=3), torch.ones(SHAPES[0])
    expected = graphs(x)["sums"][0]
    for other in (copy.deepcopy(graphs), pickle.loads(pickle.dumps(graphs))):
        assert other.most == 3 and torch.equal(other(x)["sums"][0], expected)
    assert len(on_cpu) == 3


def test_what_is_refused(on_cpu: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, x = CUDAGraphs(StandIn()), torch.ones(SHAPES[0])
    for images, settings, given in (((), {}, "nothing"), ((x, 1), {}, "Tensor, int"), ((x,), {"mask": x}, "mask=")):
        with pytest.raises(TypeError, match=f"takes one tensor of images, got .*{given}"):
            graphs(*images, **settings)
    with pytest.raises(RuntimeError, match="has no gradients"):
        graphs(x.clone().requires_grad_())

    def waits(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(cuda_graphs, "capture", waits)
    with pytest.raises(RuntimeError, match=r"StandIn cannot be captured .* images \(1, 3, 32, 32\): operation not per"):
        graphs(x)
    assert len(graphs._graphs) == 0


def test_images_on_the_cpu_are_refused() -> None:
    with pytest.raises(ValueError, match="the images are on cpu, and not on a GPU"):
        CUDAGraphs(StandIn())(torch.ones(SHAPES[0]))


def test_an_optimized_network(on_cpu: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    model = timm.create_model("efficientnet_b0").eval()
    graphs = effnet_ops.optimize_for_inference(model, cuda_graph=True)
    assert isinstance(graphs, CUDAGraphs) and graphs.optimization_report is graphs.module.optimization_report
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = graphs.module(x)
        assert all(torch.equal(graphs(x), expected) for _ in range(2))
    assert len(on_cpu) == 1
