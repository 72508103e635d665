"""Whole Fused-MBConv blocks on interpreted Triton kernels against the fp64 reference."""

from __future__ import annotations

import pytest
import torch
from fused_mbconv import CASES, Case, bounds, function_of, tensors_of
from helpers import FORWARD_TOLERANCE, LAYOUTS, check, names, prepared, relative_error, run
from test_recorded_launches import at, interpreted, same  # noqa: F401
from torch import Tensor
from triton.runtime.interpreter import GridExecutor

import effnet_ops
from effnet_ops.kernels import convolution
from effnet_ops.ops import FusedMBConvCall, gpu, triton
from effnet_ops.ops._library import OPERATORS

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
SMALL = [
    Case("odd channels", (2, 5, 6, 7), 7, 5, residual=True, drop_path=True),
    Case("stride 2", (2, 3, 7, 6), 12, 9, stride=(2, 2)),
    Case("gate", (2, 8, 5, 5), 16, 8, reduced=3, residual=True, drop_path=True),
    Case("alone", (3, 6, 5, 7), 6, None, residual=True, drop_path=True),
    Case("stem", (2, 3, 9, 8), 10, None, stride=(2, 2), padding=1, activation="hardswish"),
    Case("head", (2, 24, 5, 5), 20, None, kernel=(1, 1), padding=0),
    Case("folded", (1, 8, 5, 6), 24, 8, norm=False, residual=True),
    Case("one pixel", (3, 4, 1, 1), 8, 4, stride=(2, 2)),
]
MIXED = [(case, DTYPES[i % 4], i % 3 > 0, LAYOUTS[i % 4]) for i, case in enumerate(SMALL)]
ALL = [(case, dtype, training) for case in (*SMALL, *CASES) for dtype in DTYPES for training in (False, True)]


@pytest.mark.parametrize(("case", "dtype", "training", "layout"), MIXED, ids=names(SMALL))
def test_block(case: Case, dtype: torch.dtype, training: bool, layout: str) -> None:
    check(function_of(case, training), tensors_of(case), dtype, layout, **bounds(dtype))


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype", "training"), ALL)
def test_block_in_every_way(case: Case, dtype: torch.dtype, training: bool) -> None:
    check(function_of(case, training), tensors_of(case), dtype, "channels_last", **bounds(dtype))


@pytest.mark.parametrize(("case", "dtype"), [(c, DTYPES[(i + 1) % 4]) for i, c in enumerate(SMALL)], ids=names(SMALL))
def test_inference(case: Case, dtype: torch.dtype) -> None:
    function, tensors = function_of(case, False), prepared(tensors_of(case), dtype, "sliced_channels_last")
    with torch.no_grad(), effnet_ops.use_backend("reference"):
        exact = function({name: value if value is None else value.double() for name, value in tensors.items()})
    with torch.no_grad():
        assert relative_error(function(tensors), exact) <= FORWARD_TOLERANCE[dtype]


@pytest.mark.parametrize(("name", "launches"), [("folded", 3), ("alone", 3), ("stride 2", 4), ("gate", 6)])
def test_launches_of_inference(name: str, launches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As kernels/fused_mbconv.py states."""
    case = next(case for case in SMALL if case.name == name)
    tensors, seen, launch = prepared(tensors_of(case), torch.float32, "channels_last"), [], GridExecutor.__call__
    monkeypatch.setattr(GridExecutor, "__call__", lambda *args, **kw: seen.append(args[0]) or launch(*args, **kw))
    with torch.no_grad():
        function_of(case, False)(tensors)
    assert len(seen) == launches


def test_a_weight_of_any_strides() -> None:
    """In channels_last it is read as it is, and the bits are the same."""
    weight = torch.randn(6, 5, 3, 2)
    last = weight.contiguous(memory_format=torch.channels_last)
    rows = convolution.weight_rows(last, torch.float32)
    assert rows.data_ptr() == last.data_ptr()
    for other in (weight, weight.mT.contiguous().mT):
        assert torch.equal(convolution.weight_rows(other, torch.float32), rows)
    assert torch.equal(convolution.weight_rows(weight, torch.bfloat16), rows.bfloat16())


def test_recompute_gives_the_same_bits() -> None:
    case = SMALL[0]
    tensors = prepared(tensors_of(case), torch.float32, "channels_last")
    saved = run(function_of(case, True), tensors)
    with effnet_ops.set_recompute("always"):
        made = run(function_of(case, True), tensors)
    assert torch.equal(saved[0], made[0]) and all(torch.equal(saved[1][key], made[1][key]) for key in saved[1])


def test_gradients_that_nobody_needs() -> None:
    """A network's first layer has no gradient for its input, and a frozen one none for its weight."""
    case = next(case for case in SMALL if case.name == "gate")
    tensors = prepared(tensors_of(case), torch.float32, "channels_last")
    _, expected = run(function_of(case, True), tensors)
    for wanted in (["expand.weight"], ["x"], ["reduce_weight"], ["project.weight"]):
        leaves = {key: value if value is None else value.detach().clone() for key, value in tensors.items()}
        for key in wanted:
            leaves[key].requires_grad_()
        y = function_of(case, True)(leaves)
        found = torch.autograd.grad(y, [leaves[key] for key in wanted], torch.ones_like(y))
        assert all(relative_error(value, expected[key]) < 1e-6 for key, value in zip(wanted, found, strict=True))


def test_no_images_and_a_gate_without_projection_run_the_reference() -> None:
    for case in (SMALL[1]._replace(shape=(0, 3, 7, 6)), SMALL[2]._replace(out=None, residual=False)):
        tensors = prepared(tensors_of(case), torch.float64, "channels_last")
        with effnet_ops.use_backend("cpu" if case.out else "reference"):
            expected = function_of(case, False)(tensors)
        call = arguments(case, torch.float64, False, tensors)
        found = OPERATORS["fused_mbconv_inference"].run(*call)
        assert found.shape == expected.shape and relative_error(found, expected.double()) <= 1e-12


def arguments(case: Case, dtype: torch.dtype, training: bool, tensors: dict[str, Tensor | None] | None = None) -> tuple:
    """Those of the block's operator, as PyTorch's dispatcher gives them."""
    calls: list[FusedMBConvCall] = []
    tensors = tensors or prepared(tensors_of(case), dtype, "channels_last")
    of = FusedMBConvCall.of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusedMBConvCall, "of", lambda *args, **kw: calls.append(of(*args, **kw)) or calls[0])
        patch.setattr(effnet_ops.functional, "_fused_runs_reference", lambda *_: False)
        with torch.no_grad():
            function_of(case, training)(tensors)
    flat = OPERATORS["fused_mbconv_inference"].signature.flatten(calls[0])
    return tuple(list(value) if isinstance(value, tuple) else value for value in flat)


@pytest.mark.parametrize("name", [pytest.param("gate", marks=pytest.mark.slow), "alone"])
def test_recorded_calls_give_the_same_bits(name: str, interpreted: list[str]) -> None:  # noqa: F811
    """Inference, training and its gradient, launched again from addresses alone."""
    case = next(case for case in SMALL if case.name == name)
    words = [f"fused_mbconv_{mode}" for mode in ("inference", "training", "backward")]
    plain = [OPERATORS[word].unpacking(triton.implementation(word)) for word in words]
    inference, forward, backward = (gpu.Replayed(function) for function in plain)
    for again in (False, True):
        block = arguments(case, torch.float32, False)
        assert same(inference.run(0, *block), plain[0](*block))
        block = arguments(case, torch.float32, True)
        made = forward.run(0, *block, True)
        assert same(made, plain[1](*block, True))
        grad = torch.randn(made[0].shape).contiguous(memory_format=torch.channels_last)
        needs = [block[i] is not None for i in OPERATORS["fused_mbconv_inference"].signature.differentiable]
        given = (grad, *block, *made[1:], needs)
        assert same(backward.run(0, *given), plain[2](*given))
        assert bool(interpreted) is again
