"""The whole way from an operator's arguments to the emulated kernels: ops/cuda, csrc/cuda/bindings.cpp, the launches.

The bindings are compiled for tensors of the CPU. The kernels may touch what the bindings hand over, and nothing else.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import emulator
import pytest
import torch
from cases import DEPTHWISE, SQUEEZE_EXCITE, DepthwiseCase
from cases import SqueezeExciteCase as SECase
from fused_depthwise import CASES, Fused, check_backward, check_forward
from helpers import (
    FORWARD_TOLERANCE,
    HALF,
    LAYOUTS,
    Function,
    Tensors,
    check,
    expected_strides,
    names,
    relative_error,
)
from torch import Tensor

from effnet_ops import backends, checks
from effnet_ops.ops import cuda, gpu
from effnet_ops.ops._library import OPERATORS
from effnet_ops.ops.depthwise import DepthwiseCall, DepthwiseGradientCall

sys.path.insert(0, str(emulator.ROOT / "benchmarks" / "gpu"))

import choice


class Emulated(torch.autograd.Function):
    """An operator of ops/cuda with its gradient, as ops/_library.py would put them together."""

    @staticmethod
    def forward(ctx: Any, operator: str, config: tuple[Any, ...], *inputs: Tensor | None) -> Tensor:
        result = OPERATORS[operator].unpacking(cuda.implementation(operator))(*inputs, *config)
        y, saved = (result, ()) if isinstance(result, Tensor) else (result[0], result[1:])
        ctx.operator, ctx.config, ctx.count = operator, config, len(saved)
        ctx.save_for_backward(*inputs, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors[: len(ctx.saved_tensors) - ctx.count]
        saved = ctx.saved_tensors[len(inputs) :]
        needs = list(ctx.needs_input_grad[2:])
        name = f"{ctx.operator}_backward"
        backward = OPERATORS[name].unpacking(cuda.implementation(name))
        found = backward(grad, *inputs, *ctx.config, *saved, needs)
        return (None, None, *(value if need else None for value, need in zip(found, needs, strict=True)))


def on_emulation(public: Function, emulated: Function) -> Function:
    """The public function for the reference, which `check` asks for, and else the emulated one."""
    return lambda tensors: public(tensors) if backends.requested() == "reference" else emulated(tensors)


def depthwise(case: DepthwiseCase) -> tuple[Function, Tensors]:
    from test_depthwise import problem

    public, tensors = problem(case)
    stride, dilation = checks.pair("stride", case.stride, 1), checks.pair("dilation", case.dilation, 1)
    config = (stride, checks.padding_sides(case.padding), dilation, case.activation)

    def emulated(t: Tensors) -> Tensor:
        return Emulated.apply("depthwise_conv2d", config, t["x"], t["weight"], t["bias"])

    return on_emulation(public, emulated), tensors


def squeeze_excite(case: SECase) -> tuple[Function, Tensors]:
    from test_squeeze_excite import problem

    public, tensors = problem(case)
    config = (case.activation, case.gate)
    return on_emulation(public, lambda t: Emulated.apply("squeeze_excite", config, *t.values())), tensors


def covered(case: DepthwiseCase) -> bool:
    stride, dilation = checks.pair("stride", case.stride, 1), checks.pair("dilation", case.dilation, 1)
    return not backends._cuda_uncovered(backends.Window(case.kernel, stride, dilation))


COVERED = [case for case in DEPTHWISE if covered(case)]
SMALL = [case for case in COVERED if case.name != "large"]
by_dtype = pytest.mark.parametrize("dtype", HALF, ids=str)


def laid_out(cases: list[Any]) -> list[tuple[Any, str]]:
    return [(case, LAYOUTS[i % len(LAYOUTS)]) for i, case in enumerate(cases)]


def test_the_table_covers_all_windows() -> None:
    assert {(case.kernel[0], case.stride) for case in COVERED} == {(k, s) for k in (3, 5, 7) for s in (1, 2)}


@pytest.mark.usefixtures("bindings", "poison")
@pytest.mark.parametrize(("case", "layout"), laid_out(SMALL), ids=names(SMALL))
def test_depthwise(case: DepthwiseCase, layout: str) -> None:
    check(*depthwise(case), torch.float32, layout)


@pytest.mark.usefixtures("bindings", "poison")
@by_dtype
@pytest.mark.parametrize("case", SMALL[::5], ids=names(SMALL[::5]))
def test_depthwise_half(case: DepthwiseCase, dtype: torch.dtype) -> None:
    check(*depthwise(case), dtype)


@pytest.mark.usefixtures("bindings", "poison")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    check(*depthwise(COVERED[0]), torch.bfloat16, layout, parameter_dtype=torch.bfloat16)
    check(*squeeze_excite(SQUEEZE_EXCITE[0]), torch.bfloat16, layout, parameter_dtype=torch.bfloat16)


def operations(run: Callable[[], object]) -> set[str]:
    """The names of all operators that a call runs, down to the last."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        run()
    return {event.name for event in profile.events()}


COPIES = {"aten::clone", "aten::copy_", "aten::_to_copy"}


@pytest.mark.usefixtures("bindings", "poison")
@pytest.mark.parametrize("format_", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", [(2, 12, 9, 7), (3, 1, 6, 5)], ids=["several channels", "one channel"])
def test_no_layout_is_copied(shape: tuple[int, ...], format_: torch.memory_format) -> None:
    """Contiguous and channels_last tensors are read and written as they are, the gradient of an activation, too."""
    x, weight = torch.randn(shape).contiguous(memory_format=format_), torch.randn(shape[1], 1, 3, 3)
    config = ((1, 1), (1, 1, 1, 1), (1, 1), "silu")
    results: list[Tensor] = []

    def run(grad: Tensor) -> None:
        call = DepthwiseCall(x, weight, None, *config)
        y = cuda.implementation("depthwise_conv2d")(call)
        gradient = DepthwiseGradientCall(grad, call, (True, True, False))
        dx, _, _ = cuda.implementation("depthwise_conv2d_backward")(gradient)
        results.extend((y, dx))

    assert operations(lambda: run(torch.randn_like(x))) & COPIES == set()
    assert [result.stride() for result in results] == [expected_strides(x, x.shape)] * 2
    # A gradient that has no layout of its own has to be copied.
    assert operations(lambda: run(torch.ones(()).expand(shape))) & COPIES != set()


@pytest.mark.usefixtures("bindings", "poison")
def test_rows_too_wide_for_the_kernels_go_through_copies() -> None:
    """And results are contiguous all the same."""
    x, weight = torch.randn(1, 2, 2, 900), torch.randn(2, 1, 3, 3)
    results: list[Tensor] = []
    run = cuda.implementation("depthwise_conv2d")
    call = DepthwiseCall(x, weight, None, (1, 1), (1, 1, 1, 1), (1, 1), "none")
    seen = operations(lambda: results.append(run(call)))
    assert "aten::clone" in seen and results[0].is_contiguous()
    exact = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1, groups=2)
    assert relative_error(results[0], exact) <= FORWARD_TOLERANCE[torch.float32]


@pytest.mark.usefixtures("bindings", "poison")
@pytest.mark.parametrize(("case", "layout"), laid_out(SQUEEZE_EXCITE), ids=names(SQUEEZE_EXCITE))
def test_squeeze_excite(case: SECase, layout: str) -> None:
    check(*squeeze_excite(case), torch.float32, layout)


@pytest.mark.usefixtures("bindings", "poison")
@by_dtype
def test_squeeze_excite_half(dtype: torch.dtype) -> None:
    check(*squeeze_excite(SQUEEZE_EXCITE[0]), dtype)


@pytest.mark.usefixtures("bindings", "poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("check", [check_forward, check_backward])
def test_prologues_and_epilogues(check: Any, layout: torch.memory_format, case: Fused, dtype: torch.dtype) -> None:
    check(case, dtype, "cpu", layout)


@pytest.mark.usefixtures("bindings")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: torch.zeros(8, 1, 3, 5)}, "kernels must be square"),
        ({1: torch.zeros(7, 1, 3, 3)}, "weight must be"),
        ({2: torch.zeros(9)}, "bias must have 8 elements, got 9"),
        ({6: torch.zeros(1, 8, 4, 5)}, "grad does not have the size"),
        ({7: 3}, "strides are 1 or 2"),
        ({8: [0, 0, 0]}, "padding takes 4 numbers"),
        ({9: "mish"}, "unknown activation 'mish'"),
        ({0: torch.zeros(1, 8, 4, 4, dtype=torch.float64)}, "take float32, bfloat16 or float16"),
    ],
)
def test_direct_calls_that_do_not_fit(change: dict[int, Any], message: str) -> None:
    fitting = [torch.zeros(1, 8, 4, 4), torch.zeros(8, 1, 3, 3), *[None] * 5, 1, [1] * 4, "none", "none", False, False]
    torch.ops.effnet_ops.cuda_depthwise_forward(*fitting)
    arguments = [change.get(i, value) for i, value in enumerate(fitting)]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.effnet_ops.cuda_depthwise_forward(*arguments)


def test_committed_choice_is_that_of_model_and_rows(bindings: ctypes.CDLL) -> None:
    """If tiles or rows have changed: python benchmarks/gpu/choice.py --library <the bindings here>."""
    assert gpu.table() == choice.chosen(Path(bindings._name)), bindings._name


def test_model_counts_what_a_plan_says(bindings: ctypes.CDLL) -> None:
    """Images that are one tile each are read once, whatever the window; cut into strips, one has rows to read twice."""
    plans = choice.Plans(Path(bindings._name))
    for kernel in (3, 5, 7):
        many = choice.Geometry.of(choice.Window(8, 9, kernel, 1), 4096, 2)
        assert plans.depthwise(many, False) == (1, 2 * many.x_bytes, 2 * many.x_bytes)
        assert choice.triton_forward(many) == (1, 2 * many.x_bytes, 2 * many.x_bytes)
    one = choice.Geometry.of(choice.Window(8, 90, 5, 1), 1, 2)
    assert plans.depthwise(one, False).l2 > 2 * one.x_bytes and choice.triton_forward(one).l2 > 2 * one.x_bytes
