"""The 1x1 convolution on interpreted Triton kernels: as an operator, and with all that the blocks fuse into it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import POINTWISE, PointwiseCase
from fused import Fused, fused
from helpers import FORWARD_TOLERANCE, HALF, LAYOUTS, check, names, normal, relative_error
from test_pointwise import problem
from torch import Tensor

from effnet_ops.kernels import pointwise, tuning

pytestmark = pytest.mark.usefixtures("poison")

OTHERS = (*HALF, torch.float64)
MIXED = [(case, LAYOUTS[i % 4], OTHERS[i % 3], LAYOUTS[(i + 1) % 4]) for i, case in enumerate(POINTWISE)]
# One step and several over the reduced channels; images larger and smaller than a tile; tiles that do not divide.
SHAPES = {
    "one_step": (3, 150, 24, 40),
    "many_steps": (2, 131, 200, 24),
    "small_images": (5, 9, 72, 19),
    "wide": (2, 20, 13, 150),
}
DTYPES = (torch.float64, torch.float32, *HALF)
QUICK = (torch.float32, torch.bfloat16)
"""The others differ in what is loaded and stored alone, which other tests have for each of them."""


@pytest.mark.parametrize(("case", "layout", "other", "other_layout"), MIXED, ids=names(POINTWISE))
def test_operator(case: PointwiseCase, layout: str, other: torch.dtype, other_layout: str) -> None:
    check(*problem(case), torch.float32, layout)
    check(*problem(case), other, other_layout)


def bound(dtype: torch.dtype) -> float:
    """Sums over pixels and channels that take part in a normalisation's gradient cancel to a fifth or so."""
    return 5 * FORWARD_TOLERANCE[dtype]


@pytest.fixture(params=SHAPES, ids=list(SHAPES))
def shape(request: pytest.FixtureRequest) -> tuple[int, int, int, int]:
    return SHAPES[request.param]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_with_everything(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Normalisation, activation and gate in front; normalisation, drop path and residual behind; and statistics."""
    t = fused(*shape, dtype)
    y, partials = pointwise.forward(
        t.x, t.weight, norm=t.norm, activation="silu", gate=t.gate, out_norm=t.out_norm,
        image_scale=t.image_scale, residual=t.residual, statistics=True,
    )  # fmt: skip
    exact = (
        t.exact_norm(t.exact_input("silu") @ t.weight.double().T, t.out_norm) * t.scale_of_rows() + t.residual.double()
    )
    assert relative_error(y, exact) <= bound(dtype)
    values = y.double().flatten(0, 1)
    count, mean, squares = partials.double().unbind(1)
    total = (count * mean).sum(0) / count.sum(0)
    variance = (squares + count * (mean - total) ** 2).sum(0) / count.sum(0)
    assert torch.equal(count.sum(0), torch.full_like(total, values.shape[0]))
    assert relative_error(total, values.mean(0)) <= 1e-6
    assert relative_error(variance, values.var(0, correction=0)) <= 1e-6


def test_statistics_far_from_zero() -> None:
    """E[y^2] - E[y]^2 would leave nothing of a variance of 1 around a mean of 3000."""
    x = torch.ones(2, 300, 1)
    x[0, ::2] = -1
    y, partials = pointwise.forward(x, torch.ones(3, 1), bias=torch.full((3,), 3000.0), statistics=True)
    count, mean, squares = partials.double().unbind(1)
    total = (count * mean).sum(0) / 600
    variance = (squares + count * (mean - total) ** 2).sum(0) / 600
    assert relative_error(variance, y.double().flatten(0, 1).var(0, correction=0)) <= 1e-5


@pytest.mark.parametrize("activation", ["relu6", "silu", "hardswish"])
def test_forward_with_gradient_epilogue(activation: str) -> None:
    x, weight, bias, grad = normal(2, 21, 8), normal(12, 8), normal(12), normal(2, 21, 12)
    found, _ = pointwise.forward(x, weight, bias=bias, out_activation=activation, grad=grad)
    pre = F.linear(x, weight, bias).requires_grad_()
    activate = {"relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish}[activation]
    (expected,) = torch.autograd.grad(activate(pre), pre, grad)
    assert relative_error(found, expected) <= 1e-13


@pytest.mark.parametrize(
    "dtype", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in DTYPES], ids=str
)
@pytest.mark.parametrize("per_image", [True, False])
def test_input_gradient_with_everything(shape: tuple[int, int, int, int], dtype: torch.dtype, per_image: bool) -> None:
    t = fused(*shape, dtype)
    through = pointwise.Through(t.x, t.norm, "silu", per_image)
    dx, sums = pointwise.input_gradient(
        t.grad, t.weight, coefficients=t.coefficients, a=t.a, image_scale=t.image_scale, through=through
    )
    assert relative_error(dx, t.exact_gradient() @ t.weight.double()) <= bound(dtype)
    exact = exact_sums(t, dx.double())
    if per_image:
        assert relative_error(sums.sum(1), exact) <= max(bound(dtype) / 10, 1e-6)
    else:
        assert relative_error(sums.sum(0), exact[:, [1, 3]].sum(0)) <= max(bound(dtype) / 10, 1e-6)


def exact_sums(t: Fused, dx: Tensor) -> Tensor:
    """(images, 5, Cin): the sums s1 to s5 of docs/mbconv.md, with a - mean in place of its normalised form."""
    n = t.exact_norm(t.x.double(), t.norm).requires_grad_()
    u = F.silu(n)
    (slope,) = torch.autograd.grad(u.sum(), n)
    centred = t.x.double() - t.norm[0].double()
    return torch.stack([dx * u.detach(), dx * slope, slope, dx * slope * centred, slope * centred], 1).sum(2)


def test_input_gradient_with_residual(shape: tuple[int, int, int, int]) -> None:
    t = fused(*shape, torch.float32)
    dx, sums = pointwise.input_gradient(t.grad, t.weight, residual=t.x)
    assert sums is None
    assert relative_error(dx, t.grad.double() @ t.weight.double() + t.x.double()) <= 2e-6


@pytest.mark.parametrize(
    "dtype", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in DTYPES], ids=str
)
@pytest.mark.parametrize("gated", [True, False])
def test_both_gradients_with_everything(shape: tuple[int, int, int, int], dtype: torch.dtype, gated: bool) -> None:
    """One launch that makes what two make. With a gate the sums are of each image, else of each program."""
    t = fused(*shape, dtype)
    gate = t.gate if gated else None
    dx, dw, sums = pointwise.both_gradients(
        t.grad, t.x, t.weight, coefficients=t.coefficients, a=t.a, image_scale=t.image_scale,
        norm=t.norm, activation="silu", gate=gate,
    )  # fmt: skip
    gradient = t.exact_gradient()
    exact_x = t.exact_input("silu") / (1.0 if gated else t.gate.double()[:, None])
    assert relative_error(dx, gradient @ t.weight.double()) <= bound(dtype)
    assert dw.dtype == t.weight.dtype and dw.shape == t.weight.shape
    assert relative_error(dw, gradient.flatten(0, 1).T @ exact_x.flatten(0, 1)) <= bound(dtype)
    exact = exact_sums(t, gradient @ t.weight.double())
    found, exact = (sums.sum(1), exact) if gated else (sums.sum(0), exact[:, [1, 3]].sum(0))
    assert relative_error(found, exact) <= bound(dtype)


def test_both_gradients_with_residual(shape: tuple[int, int, int, int]) -> None:
    """As the expansion needs them: of an input as it is stored."""
    t = fused(*shape, torch.float64)
    behind = {"coefficients": t.coefficients, "a": t.a}
    dx, dw, sums = pointwise.both_gradients(t.grad, t.x, t.weight, **behind, residual=t.x)
    assert sums is None
    assert relative_error(dx, pointwise.input_gradient(t.grad, t.weight, **behind, residual=t.x)[0]) <= 1e-14
    assert relative_error(dw, pointwise.weight_gradient(t.grad, t.x, t.weight, **behind)[0]) <= 1e-14


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_gradient_with_everything(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    t = fused(*shape, dtype)
    bias = torch.zeros(shape[3], dtype=t.weight.dtype)
    dw, db = pointwise.weight_gradient(
        t.grad, t.x, t.weight, coefficients=t.coefficients, a=t.a, image_scale=t.image_scale,
        norm=t.norm, activation="silu", gate=t.gate, bias=bias,
    )  # fmt: skip
    gradient = t.exact_gradient().flatten(0, 1)
    assert dw.dtype == t.weight.dtype and dw.shape == t.weight.shape
    assert relative_error(dw, gradient.T @ t.exact_input("silu").flatten(0, 1)) <= bound(dtype)
    assert relative_error(db, gradient.sum(0)) <= bound(dtype)


def test_results_do_not_depend_on_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    t = fused(3, 70, 40, 24, torch.float64)
    expected, _ = pointwise.forward(t.x, t.weight, norm=t.norm, gate=t.gate)
    tiles = {"block_p": 16, "block_reduced": 16, "block_kept": 16, "parts": 3, "stages": 2, "num_warps": 4}
    monkeypatch.setattr(tuning, "choose", lambda *_: tiles)
    found, _ = pointwise.forward(t.x, t.weight, norm=t.norm, gate=t.gate)
    assert relative_error(found, expected) <= 1e-15
