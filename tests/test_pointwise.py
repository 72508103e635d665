"""Pointwise convolution against the fp64 reference: outputs, gradients, layouts and precisions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import POINTWISE, PointwiseCase
from helpers import HALF, LAYOUTS, Function, Tensors, check, lay_out, names, normal, relative_error

import effnet_ops

pytestmark = pytest.mark.usefixtures("poison")
by_case = pytest.mark.parametrize("case", POINTWISE, ids=names(POINTWISE))


def problem(case: PointwiseCase) -> tuple[Function, Tensors]:
    batch, channels, height, width = case.shape
    tensors = {
        "x": normal(*case.shape),
        "weight": normal(case.out, channels, 1, 1) / channels**0.5,
        "bias": normal(case.out) if case.bias else None,
        "residual": normal(batch, case.out, height, width) if case.residual else None,
    }

    def function(t: Tensors) -> torch.Tensor:
        return effnet_ops.pointwise_conv2d(
            t["x"], t["weight"], t["bias"], residual=t["residual"], activation=case.activation
        )

    return function, tensors


@by_case
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp32(case: PointwiseCase, layout: str) -> None:
    check(*problem(case), torch.float32, layout)


@by_case
@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
def test_precisions(case: PointwiseCase, dtype: torch.dtype) -> None:
    check(*problem(case), dtype)


@by_case
def test_reference_backend(case: PointwiseCase) -> None:
    with effnet_ops.use_backend("reference"):
        check(*problem(case), torch.float32)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_parameters(dtype: torch.dtype, backend: str) -> None:
    check(*problem(POINTWISE[0]), dtype, parameter_dtype=dtype)


def test_reference_is_pytorch() -> None:
    x, weight, bias, residual = normal(2, 6, 4, 3), normal(5, 6, 1, 1), normal(5), normal(2, 5, 4, 3)
    expected = F.hardswish(F.conv2d(x, weight, bias)) + residual
    with effnet_ops.use_backend("reference"):
        out = effnet_ops.pointwise_conv2d(x, weight, bias, residual=residual, activation="hardswish")
    assert torch.equal(out, expected)


def test_residual_in_another_layout(backend: str) -> None:
    x, residual = lay_out(normal(2, 8, 5, 6), "sliced_channels_last"), lay_out(normal(2, 4, 5, 6), "sliced")
    weight = normal(4, 8, 1, 1)
    out = effnet_ops.pointwise_conv2d(x, weight, residual=residual)
    assert relative_error(out, F.conv2d(x, weight) + residual) <= 1e-13


def test_residual_that_is_x(backend: str) -> None:
    x, weight = normal(2, 8, 5, 6).requires_grad_(), normal(8, 8, 1, 1)
    out = effnet_ops.pointwise_conv2d(x, weight, residual=x, activation="silu")
    (grad,) = torch.autograd.grad(out.sum(), x)
    (expected,) = torch.autograd.grad((F.silu(F.conv2d(x, weight)) + x).sum(), x)
    assert relative_error(grad, expected) <= 1e-12


def test_strided_parameters(backend: str) -> None:
    """A weight may be the transpose of another product's."""
    x = lay_out(normal(2, 12, 5, 6).float(), "channels_last")
    weight, bias = normal(12, 20, 1, 1).float().transpose(0, 1), normal(40).float()[::2]
    exact = F.conv2d(x.double(), weight.double(), bias.double())
    assert relative_error(effnet_ops.pointwise_conv2d(x, weight, bias), exact) <= 2e-6
