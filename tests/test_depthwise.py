"""Depthwise convolution against the fp64 reference: outputs, gradients, layouts and precisions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import DEPTHWISE, DepthwiseCase
from helpers import HALF, LAYOUTS, Function, Tensors, check, lay_out, names, normal, relative_error

import effnet_ops

pytestmark = pytest.mark.usefixtures("poison")
by_case = pytest.mark.parametrize("case", DEPTHWISE, ids=names(DEPTHWISE))


def problem(case: DepthwiseCase) -> tuple[Function, Tensors]:
    channels = case.shape[1]
    tensors = {
        "x": normal(*case.shape),
        "weight": normal(channels, 1, *case.kernel),
        "bias": normal(channels) if case.bias else None,
    }
    return lambda t: effnet_ops.depthwise_conv2d(t["x"], t["weight"], t["bias"], **case.config), tensors


@by_case
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp32(case: DepthwiseCase, layout: str) -> None:
    check(*problem(case), torch.float32, layout)


@by_case
@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
def test_precisions(case: DepthwiseCase, dtype: torch.dtype) -> None:
    check(*problem(case), dtype)


@by_case
def test_reference_backend(case: DepthwiseCase) -> None:
    with effnet_ops.use_backend("reference"):
        check(*problem(case), torch.float32)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_parameters(dtype: torch.dtype, backend: str) -> None:
    check(*problem(DEPTHWISE[0]), dtype, parameter_dtype=dtype)


def test_reference_is_pytorch() -> None:
    x, weight, bias = normal(2, 6, 9, 8), normal(6, 1, 3, 3), normal(6)
    expected = F.silu(F.conv2d(x, weight, bias, (2, 1), (1, 0), (1, 2), groups=6))
    with effnet_ops.use_backend("reference"):
        out = effnet_ops.depthwise_conv2d(
            x, weight, bias, stride=(2, 1), padding=(1, 0), dilation=(1, 2), activation="silu"
        )
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("size", "kernel", "stride"), [(7, 3, 2), (8, 3, 2), (9, 5, 2), (10, 5, 3), (5, 5, 1), (1, 3, 2)]
)
def test_same_padding_is_tensorflows(size: int, kernel: int, stride: int, backend: str) -> None:
    """ceil(size / stride) outputs, and the odd pixel of padding after the image (tensorflow.nn.convolution)."""
    x, weight = normal(1, 8, size, size), normal(8, 1, kernel, kernel)
    out_size = -(-size // stride)
    total = max((out_size - 1) * stride + kernel - size, 0)
    before, after = total // 2, total - total // 2
    expected = F.conv2d(F.pad(x, (before, after, before, after)), weight, stride=stride, groups=8)
    out = effnet_ops.depthwise_conv2d(x, weight, stride=stride, padding="same")
    assert out.shape == (1, 8, out_size, out_size)
    assert relative_error(out, expected) <= 1e-13


def test_channel_multiplier_runs_the_reference() -> None:
    x, weight = normal(2, 4, 6, 5), normal(8, 1, 3, 3)
    expected = F.conv2d(x, weight, padding=1, groups=4)
    assert torch.equal(effnet_ops.depthwise_conv2d(x, weight, padding=1), expected)


def test_strided_parameters(backend: str) -> None:
    """A weight need not be contiguous: a slice of a larger one, or transposed in its window."""
    x = lay_out(normal(2, 16, 9, 8).float(), "channels_last")
    weight, bias = normal(16, 1, 3, 6).float()[..., ::2].transpose(2, 3), normal(32).float()[::2]
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1, groups=16)
    assert relative_error(effnet_ops.depthwise_conv2d(x, weight, bias, padding=1), exact) <= 2e-6


def test_expanded_gradient(backend: str) -> None:
    """The gradient of a sum is one number with strides of zero."""
    x = normal(2, 16, 7, 6).requires_grad_()
    weight = normal(16, 1, 3, 3).requires_grad_()
    effnet_ops.depthwise_conv2d(x, weight, padding=1).sum().backward()
    grads = torch.autograd.grad(F.conv2d(x, weight, padding=1, groups=16).sum(), (x, weight))
    assert relative_error(x.grad, grads[0]) <= 1e-12
    assert relative_error(weight.grad, grads[1]) <= 1e-12


@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "hardswish"])
def test_gradient_at_the_kinks(activation: str, backend: str) -> None:
    """Where an activation has no derivative (0, 6, -3, 3), the gradient is the one that PyTorch defines."""
    x = torch.tensor([-3.0, 0.0, 3.0, 6.0, -100.0, 100.0]).double().view(1, 1, 2, 3).repeat(1, 8, 1, 1).requires_grad_()
    weight = torch.ones(8, 1, 1, 1, dtype=torch.float64)
    effnet_ops.depthwise_conv2d(x, weight, activation=activation).sum().backward()
    (expected,) = torch.autograd.grad(getattr(F, activation)(x).sum(), x)
    assert torch.allclose(x.grad, expected, rtol=0, atol=1e-13)
