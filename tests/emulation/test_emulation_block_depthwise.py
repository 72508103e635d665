"""A block's depthwise convolution on the emulated CUDA kernels: each combination of neighbours that a block has."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from fused_depthwise import Fused, check_statistics, convolved, derivative, normalised, vectors
from helpers import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, normal, relative_error
from torch import Tensor

from effnet_ops import reference
from effnet_ops.kernels.layout import nchw, nhwc
from effnet_ops.ops.cuda import block_depthwise

pytestmark = pytest.mark.usefixtures("bindings", "poison")

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
SHAPES = (
    Fused((2, 16, 9, 11), 3, 1),
    Fused((2, 13, 15, 13), 5, 2, "hardswish"),
    Fused((3, 24, 1, 1), 3, 1),
    Fused((2, 1, 7, 6), 3, 2, "relu6"),
    Fused((2, 20, 2, 2), 5, 2),
    Fused((1, 67, 8, 5), 5, 1, "relu"),
)


class Kind(NamedTuple):
    """A block with or without expansion, squeeze-and-excitation and residual; norms of the batch, or constant."""

    expands: bool = True
    squeezes: bool = True
    residual: bool = False
    frozen: bool = False


KINDS = {
    "expansion": Kind(),
    "expansion_lite": Kind(squeezes=False),
    "expansion_frozen": Kind(frozen=True),
    "plain": Kind(expands=False),
    "plain_residual": Kind(expands=False, residual=True),
    "plain_lite_frozen": Kind(expands=False, squeezes=False, residual=True, frozen=True),
}
# A precision each, in turn.
MIXED = [
    pytest.param(kind, case, DTYPES[(i + j) % 3], id=f"{name}-{case}")
    for i, (name, kind) in enumerate(KINDS.items())
    for j, case in enumerate(SHAPES)
]


def pixels(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An activation (N, C, H, W) as the kernels of a block take it, and the same in fp64."""
    cast = value.to(dtype)
    return nhwc(cast).clone(), cast.double()


def exact_input(kind: Kind, case: Fused, x: Tensor, norm: Tensor) -> Tensor:
    return reference.activate(normalised(x, norm), case.activation) if kind.expands else x


def window(case: Fused) -> dict[str, tuple[int, ...]]:
    return {"stride": (case.stride,) * 2, "padding": case.padding}


def is_plain(value: Tensor) -> bool:
    """Whether strides, too, are those of a fresh tensor."""
    return value.stride() == torch.empty(value.shape).stride()


@pytest.mark.parametrize(("kind", "case", "dtype"), MIXED)
def test_training_forward(kind: Kind, case: Fused, dtype: torch.dtype) -> None:
    channels, bound = case.shape[1], FORWARD_TOLERANCE[dtype]
    x, exact_x = pixels(normal(*case.shape), dtype)
    weight, norm = normal(channels, 1, case.kernel, case.kernel).float(), vectors(3, channels).float()
    before = {"norm": norm, "activation": case.activation} if kind.expands else {}
    y, pool, partials = block_depthwise.forward(x, weight, **window(case), **before, statistics=not kind.frozen)
    expected = convolved(case, exact_input(kind, case, exact_x, norm.double()), weight.double())
    assert relative_error(nchw(y), expected) <= bound and y.dtype == dtype and is_plain(y)
    assert pool is None and (partials is None) == kind.frozen
    if not kind.frozen:
        check_statistics(partials.double(), nchw(y).double(), bound)


@pytest.mark.parametrize("normalises", [True, False], ids=["norm", "bias"])
@pytest.mark.parametrize(("kind", "case", "dtype"), MIXED[:2] + MIXED[8:10] + MIXED[22:])
def test_inference(kind: Kind, case: Fused, dtype: torch.dtype, normalises: bool) -> None:
    channels, bound = case.shape[1], FORWARD_TOLERANCE[dtype]
    x, exact_x = pixels(normal(*case.shape), dtype)
    weight, bias, norm = (
        t.float() for t in (normal(channels, 1, *(case.kernel,) * 2), normal(channels), vectors(3, channels))
    )
    behind = {"out_norm": norm, "bias": None} if normalises else {"out_norm": None, "bias": bias}
    y, pool, partials = block_depthwise.forward(
        x, weight, **window(case), **behind, out_activation=case.activation, pool=kind.squeezes
    )
    expected = convolved(case, exact_x, weight.double())
    expected = normalised(expected, norm.double()) if normalises else expected + bias.double()[:, None, None]
    expected = reference.activate(expected, case.activation)
    assert relative_error(nchw(y), expected) <= bound and is_plain(y)
    assert partials is None and (pool is None) != kind.squeezes
    if kind.squeezes:
        assert relative_error(pool.sum(1), expected.sum((2, 3))) <= bound


class Gradient(NamedTuple):
    """A backward pass: its arguments; in fp64 the gradients of norm(x) and of the weight, and sums with ``norm``."""

    arguments: tuple[Tensor, Tensor, Tensor]
    fused: dict[str, Tensor | str | None]
    dx: Tensor
    dw: Tensor
    sums: Tensor
    size_of_sums: float


def gradient(kind: Kind, case: Fused, dtype: torch.dtype, parameter_dtype: torch.dtype = torch.float32) -> Gradient:
    (batch, channels), kernel = case.shape[:2], (case.kernel,) * 2
    weight = normal(channels, 1, *kernel).to(parameter_dtype)
    (x, exact_x), (residual, exact_residual) = (pixels(normal(*case.shape), dtype) for _ in range(2))
    size = convolved(case, exact_x, weight.double()).shape
    (grad, exact_grad), (a, exact_a) = (pixels(normal(*size), dtype) for _ in range(2))
    a_norm, norm, gate = vectors(3, channels).float(), vectors(3, channels).float(), torch.rand(batch, channels)
    pooled = normal(batch, channels).float()
    coefficients = torch.cat([a_norm[:1], vectors(3, channels).float()])
    if kind.frozen:
        coefficients[2:] = 0.0

    n = exact_grad
    if kind.squeezes:
        n = n * gate.double()[:, :, None, None] + pooled.double()[:, :, None, None]
    n = n * derivative(normalised(exact_a, a_norm.double()), case.activation)
    mean, of_grad, of_a, constant = (row[:, None, None] for row in coefficients.double())
    before = normalised(exact_x, norm.double()) if kind.expands else exact_x
    leaves = [value.clone().requires_grad_() for value in (before, weight.double())]
    y = convolved(case, reference.activate(leaves[0], case.activation if kind.expands else "none"), leaves[1])
    dx, dw = torch.autograd.grad(y, leaves, of_grad * n + of_a * (exact_a - mean) + constant)
    dx = dx + exact_residual if kind.residual else dx
    centred = exact_x - norm.double()[0][:, None, None]
    fused = {
        "a": a, "a_norm": a_norm, "a_activation": case.activation, "coefficients": coefficients,
        "gate": gate if kind.squeezes else None, "pooled": pooled if kind.squeezes else None,
        "norm": norm if kind.expands else None, "activation": case.activation if kind.expands else "none",
        "residual": residual if kind.residual else None,
    }  # fmt: skip
    sums = torch.stack([dx.sum((0, 2, 3)), (dx * centred).sum((0, 2, 3))])
    # Of many terms of both signs: against what they would be without cancelling.
    uncancelled = torch.stack([dx.abs().sum((0, 2, 3))] * 2).norm().item()
    return Gradient((grad, x, weight), fused, dx, dw, sums, uncancelled)


@pytest.mark.parametrize(("kind", "case", "dtype"), MIXED)
def test_backward(kind: Kind, case: Fused, dtype: torch.dtype) -> None:
    exact = gradient(kind, case, dtype)
    place = {"size": case.shape[2:], **window(case)}
    dx, dw, db, sums = block_depthwise.backward(*exact.arguments, **place, **exact.fused, needs=(True, True, False))
    bound = GRADIENT_TOLERANCE[dtype]
    assert relative_error(nchw(dx), exact.dx) <= bound and dx.dtype == dtype and is_plain(dx)
    assert relative_error(dw, exact.dw) <= bound and dw.shape == exact.dw.shape and db is None
    assert (sums is not None) == kind.expands
    if kind.expands:
        assert relative_error(sums.sum(0), exact.sums, exact.size_of_sums) <= bound


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False)], ids=["x", "weight"])
@pytest.mark.parametrize("name", ["expansion", "plain_lite_frozen"])
def test_one_gradient(name: str, needs: tuple[bool, bool, bool]) -> None:
    case = SHAPES[0]
    exact = gradient(KINDS[name], case, torch.float32)
    place = {"size": case.shape[2:], **window(case)}
    dx, dw, _, sums = block_depthwise.backward(*exact.arguments, **place, **exact.fused, needs=needs)
    assert (dx is None, dw is None, sums is None) == (not needs[0], not needs[1], not needs[0] or name != "expansion")
    for value, expected in ((None if dx is None else nchw(dx), exact.dx), (dw, exact.dw)):
        assert value is None or relative_error(value, expected) <= GRADIENT_TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_parameters(dtype: torch.dtype) -> None:
    """The gradient of the weight has the weight's dtype."""
    case = SHAPES[0]
    exact = gradient(KINDS["expansion"], case, dtype, dtype)
    place = {"size": case.shape[2:], **window(case)}
    dx, dw, _, _ = block_depthwise.backward(*exact.arguments, **place, **exact.fused)
    assert dw.dtype == dtype and relative_error(dw, exact.dw) <= GRADIENT_TOLERANCE[dtype]
    assert relative_error(nchw(dx), exact.dx) <= GRADIENT_TOLERANCE[dtype]
