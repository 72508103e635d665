"""Fused-MBConv, and a dense convolution with its normalisation, against the fp64 reference: outputs and gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from fused_mbconv import CASES, NAMED, Case, bounds, function_of, tensors_of
from helpers import (
    FORWARD_TOLERANCE,
    HALF,
    LAYOUTS,
    check,
    names,
    normal,
    prepared,
    relative_error,
    run,
)
from torch import Tensor

import effnet_ops
from effnet_ops import _native, packing
from effnet_ops.ops import packed
from effnet_ops.ops.calls import PackedConv

assert _native.module is not None, _native.why_missing
C = _native.module
pytestmark = pytest.mark.usefixtures("poison")


by_case = pytest.mark.parametrize("case", CASES, ids=names(CASES))
by_mode = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


@pytest.fixture(params=C.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = C.isa()
    C.set_isa(request.param)
    yield request.param
    C.set_isa(before)


@by_case
@by_mode
def test_fp32(case: Case, training: bool, isa: str) -> None:
    check(function_of(case, training), tensors_of(case), torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["residual", "stem"])
def test_layouts(name: str, layout: str) -> None:
    check(function_of(NAMED[name], True), tensors_of(NAMED[name]), torch.float32, layout)


@by_case
@by_mode
@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
def test_precisions(case: Case, training: bool, dtype: torch.dtype) -> None:
    check(function_of(case, training), tensors_of(case), dtype, **bounds(dtype))


@by_case
def test_inference(case: Case, isa: str) -> None:
    """Without anything to differentiate the kernels of inference run."""
    for dtype in (torch.float32, torch.float64, *HALF):
        tensors = prepared(tensors_of(case), dtype, "channels_last")
        exact = {name: value if value is None else value.double() for name, value in tensors.items()}
        with torch.no_grad(), effnet_ops.use_backend("reference"):
            expected = function_of(case, False)(exact)
        with torch.no_grad():
            y = function_of(case, False)(tensors)
        assert y.dtype is dtype and relative_error(y, expected) <= FORWARD_TOLERANCE[dtype]


def packed_call(case: Case, dtype: torch.dtype, wide: torch.dtype) -> packed.FusedPackedCall:
    """A folded block, the products packed in ``dtype`` and the gate's in ``wide``."""
    tensors = tensors_of(case)

    def conv(name: str, weight: Tensor, product: torch.dtype) -> PackedConv:
        pack = packing.pack_convolution if name == "expand" else lambda w: packing.pack(w.flatten(1))
        return PackedConv(pack(weight.to(product)), normal(weight.shape[0]).to(wide) * 0.2)

    reduce = excite = project = None
    if case.reduced:
        reduce, excite = (conv("", tensors[name], wide) for name in ("reduce_weight", "expand_weight"))
    if case.out is not None:
        project = conv("", tensors["project.weight"], dtype)
    expand, sides = conv("expand", tensors["expand.weight"], dtype), effnet_ops.checks.padding_sides(case.padding)
    x = tensors["x"].to(torch.bfloat16 if dtype is torch.bfloat16 else wide)
    x = x.contiguous(memory_format=torch.channels_last)
    settings = (case.kernel, case.stride, sides, case.residual, case.activation, "relu", "hard_sigmoid")
    return packed.FusedPackedCall(x, expand, reduce, excite, project, *settings)


@by_case
def test_packed(case: Case, isa: str) -> None:
    for dtype, wide in ((torch.float32, torch.float32), (torch.float64,) * 2, (torch.bfloat16, torch.float32)):
        call = packed_call(case, dtype, wide)
        y, expected = packed.fused_mbconv(call), call.reference()
        assert y.shape == expected.shape and relative_error(y, expected.double()) <= FORWARD_TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["residual", "stem", "uneven"])
def test_same_bits_for_any_number_of_threads(name: str) -> None:
    case = NAMED[name]
    case = case._replace(shape=(3, case.shape[1], 37, 40))
    tensors = prepared(tensors_of(case), torch.float32, "channels_last")
    found, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            y, grads = run(function_of(case, True), tensors)
        finally:
            torch.set_num_threads(before)
        found.append([y, *grads.values()])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("name", ["residual", "stem"])
def test_recompute_gives_the_same_bits(name: str) -> None:
    case, tensors = NAMED[name], prepared(tensors_of(NAMED[name]), torch.float32, "channels_last")
    saved = run(function_of(case, True), tensors)
    with effnet_ops.set_recompute("always"):
        made = run(function_of(case, True), tensors)
    assert torch.equal(saved[0], made[0])
    assert all(torch.equal(saved[1][key], made[1][key]) for key in saved[1])


@by_mode
def test_gradcheck(training: bool) -> None:
    case = Case("small", (2, 3, 5, 4), 5, 3, stride=(1, 1), residual=True)
    tensors = tensors_of(case)
    wanted = [key for key, value in tensors.items() if value is not None and "running" not in key]
    leaves = [tensors[key].clone().requires_grad_() for key in wanted]
    function = function_of(case, training)
    assert torch.autograd.gradcheck(lambda *p: function({**tensors, **dict(zip(wanted, p, strict=True))}), leaves)


@by_mode
def test_no_images(training: bool) -> None:
    case = NAMED["stride 2"]._replace(shape=(0, 16, 11, 12))
    y, grads = run(function_of(case, False), prepared(tensors_of(case), torch.float32, "channels_last"))
    assert y.shape == (0, 24, 6, 6) and not any(value.any() for value in grads.values())


def test_nan_stays_in_its_image() -> None:
    case = NAMED["stride 2"]
    tensors = prepared(tensors_of(case), torch.float32, "channels_last")
    tensors["x"][1] = float("nan")
    with torch.no_grad():
        y = function_of(case, False)(tensors)
    assert y[0].isfinite().all() and y[1].isnan().all()


def test_gradients_that_nobody_needs() -> None:
    """A network's first layer has no gradient for its input, and a frozen one none for its weight."""
    case, tensors = NAMED["stem"], prepared(tensors_of(NAMED["stem"]), torch.float32, "contiguous")
    _, expected = run(function_of(case, True), tensors)
    for wanted in (["expand.weight"], ["x"], ["expand.gamma", "expand.beta"]):
        leaves = {key: value if value is None else value.detach().clone() for key, value in tensors.items()}
        for key in wanted:
            leaves[key].requires_grad_()
        y = function_of(case, True)(leaves)
        found = torch.autograd.grad(y, [leaves[key] for key in wanted], torch.ones_like(y))
        assert all(torch.equal(value, expected[key]) for key, value in zip(wanted, found, strict=True))


def test_squeeze_excite_without_projection_runs_the_reference() -> None:
    case = NAMED["gate"]._replace(out=None, residual=False)
    check(function_of(case, False), tensors_of(case), torch.float64)
