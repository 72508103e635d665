"""What is launched again without host code gives the bits of the whole call, for other tensors of the same sizes."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import MBCONV
from helpers import mbconv_groups, mbconv_tensors, prepared
from torch import Tensor

from effnet_ops.kernels import launching
from effnet_ops.ops import gpu, triton
from effnet_ops.ops._library import OPERATORS
from effnet_ops.ops.mbconv import MBConvCall

CASES = {case.name: case for case in MBCONV}


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Recorded launches are interpreted, from addresses alone; the names of those that were."""
    dtypes: list[torch.dtype | None] = []
    launched: list[str] = []
    remember = launching.Recorder.launched

    def remembering(self: Any, kernel: Any, compiled: Any, grid: Any, args: Any, settings: Any) -> None:
        given = [*args, *(settings[name] for name in kernel.arg_names[len(args) :])]
        dtypes[:] = [value.dtype if isinstance(value, Tensor) else None for value in given]
        remember(self, kernel, compiled, grid, args, settings)

    def runner(kernel: Any, compiled: Any, grid: Any) -> Any:
        kinds = list(dtypes)

        def run(stream: int, arguments: list[Any]) -> None:
            launched.append(kernel.__name__)
            given = [v if kind is None else at(v, kind) for v, kind in zip(arguments, kinds, strict=True)]
            kernel[grid](*given)

        return run

    monkeypatch.setattr(launching.Recorder, "launched", remembering)
    monkeypatch.setattr(launching, "runner", runner)
    yield launched


def at(address: int, dtype: torch.dtype) -> Tensor:
    """The number of this type at an address."""
    return torch.frombuffer((ctypes.c_char * dtype.itemsize).from_address(address), dtype=dtype)


def arguments(name: str, dtype: torch.dtype, training: bool) -> tuple[Any, ...]:
    """Those of an operator of a block, on fresh tensors."""
    case = CASES[name]
    tensors = prepared(mbconv_tensors(case), dtype, "channels_last")
    groups = mbconv_groups(case, tensors)
    call = MBConvCall.of(
        tensors["x"],
        *(groups[name] for name in ("expand", "depthwise", "squeeze_excite", "project")),
        stride=(case.stride,) * 2,
        padding=(),
        activation=case.activation,
        gate=case.gate,
        residual=case.residual,
        drop_path=tensors["drop_path"],
        training=training,
    )
    # As PyTorch's dispatcher gives them.
    flat = OPERATORS["mbconv_inference"].signature.flatten(call)
    return tuple(list(value) if isinstance(value, tuple) else value for value in flat)


def same(found: Any, expected: Any) -> bool:
    if isinstance(found, Tensor):
        found, expected = (found,), (expected,)
    pairs = list(zip(found, expected, strict=True))
    return all(torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", [pytest.param("residual", marks=pytest.mark.slow), "no_expansion_residual", "lite", "folded", "b0_style"]
)
def test_inference(name: str, dtype: torch.dtype, interpreted: list[str]) -> None:
    check_inference(name, dtype, interpreted)


def check_inference(name: str, dtype: torch.dtype, interpreted: list[str]) -> None:
    function = OPERATORS["mbconv_inference"].unpacking(triton.implementation("mbconv_inference"))
    replayed = gpu.Replayed(function)
    first, second = (arguments(name, dtype, False) for _ in range(2))
    assert same(replayed.run(0, *first), function(*first)) and not interpreted
    assert same(replayed.run(0, *second), function(*second)) and interpreted


@pytest.mark.usefixtures("cuda_depthwise")
@pytest.mark.parametrize(("name", "dtype"), [("b0_style", torch.bfloat16), ("folded_no_expansion", torch.float32)])
def test_inference_with_a_call(name: str, dtype: torch.dtype, interpreted: list[str]) -> None:
    """The depthwise convolution is called again, and what is launched around it has its results."""
    check_inference(name, dtype, interpreted)


@pytest.mark.parametrize("save_expanded", [True, False])
@pytest.mark.parametrize("name", [pytest.param("residual", marks=pytest.mark.slow), "no_expansion_residual"])
def test_training_step(name: str, save_expanded: bool, interpreted: list[str]) -> None:
    check_training_step(name, save_expanded, interpreted)


@pytest.mark.usefixtures("cuda_depthwise")
@pytest.mark.parametrize("name", ["one_pixel", "no_expansion_residual"])
def test_training_step_with_calls(name: str, interpreted: list[str]) -> None:
    check_training_step(name, True, interpreted)


def check_training_step(name: str, save_expanded: bool, interpreted: list[str]) -> None:
    names = "mbconv_training", "mbconv_backward"
    operators = [OPERATORS[name].unpacking(triton.implementation(name)) for name in names]
    forward, backward = (gpu.Replayed(operator) for operator in operators)
    for again in (False, True):
        block = arguments(name, torch.float32, True)
        made = forward.run(0, *block, save_expanded)
        assert same(made, operators[0](*block, save_expanded))
        grad = torch.randn(made[0].shape).contiguous(memory_format=torch.channels_last)
        needs = [block[i] is not None for i in OPERATORS["mbconv_inference"].signature.differentiable]
        given = (grad, *block, *made[1:], needs)
        assert same(backward.run(0, *given), operators[1](*given))
        assert bool(interpreted) is again
