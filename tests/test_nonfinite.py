"""NaN and infinity spread exactly as far as they do in PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import ACTIVATIONS, MBConvCase
from helpers import mbconv_function, mbconv_tensors, normal
from torch import Tensor

import effnet_ops

SPECIAL = [float("nan"), float("inf"), float("-inf")]
LARGE = [1e4, -1e4, 3e38, -3e38, 1e-40, -0.0]


def assert_like_reference(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with effnet_ops.use_backend("reference"):
        expected = function(x)
    for layout in (torch.contiguous_format, torch.channels_last):
        out = function(x.contiguous(memory_format=layout))
        assert torch.allclose(out, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


def with_value(value: float) -> Tensor:
    x = normal(2, 24, 7, 6).float()
    x[1, 19, 3, 2] = value
    return x


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("value", [*SPECIAL, *LARGE], ids=str)
def test_depthwise(value: float, activation: str) -> None:
    weight, bias = normal(24, 1, 3, 3).float(), normal(24).float()
    config = dict(padding=1, activation=activation)
    assert_like_reference(lambda x: effnet_ops.depthwise_conv2d(x, weight, bias, **config), with_value(value))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("value", [*SPECIAL, *LARGE], ids=str)
def test_pointwise(value: float, activation: str) -> None:
    """One product a pixel, so that a sum of 24 terms keeps its sign and size whatever its order."""
    weight = torch.zeros(20, 24, 1, 1)
    weight[:, 19] = torch.linspace(0.5, 1.0, 20)[:, None, None]
    assert_like_reference(lambda x: effnet_ops.pointwise_conv2d(x, weight, activation=activation), with_value(value))


@pytest.mark.parametrize("gate", ["sigmoid", "hard_sigmoid"])
@pytest.mark.parametrize("value", SPECIAL, ids=str)
def test_squeeze_excite(value: float, gate: str) -> None:
    """The whole image is lost, and no other: the pool sees every pixel."""
    params = [normal(4, 24, 1, 1).float(), None, normal(24, 4, 1, 1).float(), None]
    x = with_value(value)
    assert_like_reference(lambda x: effnet_ops.squeeze_excite(x, *params, gate=gate), x)
    assert effnet_ops.squeeze_excite(x, *params, gate=gate)[0].isfinite().all()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("value", SPECIAL, ids=str)
def test_mbconv(value: float, training: bool) -> None:
    case = MBConvCase("", (2, 24, 7, 6), 24, 48, 6, residual=True)
    tensors = {name: t if t is None else t.float() for name, t in mbconv_tensors(case).items()}
    function = mbconv_function(case, training)
    with effnet_ops.use_backend("reference"):
        expected = function(tensors | {"x": with_value(value)})
    out = function(tensors | {"x": with_value(value)})
    assert torch.equal(out.isnan(), expected.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_activations_over_the_whole_line(dtype: torch.dtype) -> None:
    """Each activation, through a 1x1 filter of 1, at every magnitude that the dtype has."""
    top = min(torch.finfo(dtype).max, 1e30)
    magnitudes = torch.logspace(-8, torch.tensor(top).log10().item() * 0.999, 2000, dtype=torch.float64)
    points = torch.cat([-magnitudes, magnitudes, torch.linspace(-100, 100, 4096, dtype=torch.float64)])
    x = points[: points.numel() // 16 * 16].to(dtype).view(1, 16, -1, 1)
    weight = torch.ones(16, 1, 1, 1, dtype=dtype)
    bound = {torch.float32: 3e-6, torch.float64: 1e-13, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
    for activation in ACTIVATIONS:
        out = effnet_ops.depthwise_conv2d(x, weight, activation=activation).double()
        with effnet_ops.use_backend("reference"):
            exact = effnet_ops.depthwise_conv2d(x.double(), weight.double(), activation=activation)
        # The last point at which exp(-x) is finite in fp32: SiLU is 2.6e-37 there, and zero beyond.
        smallest = max(torch.finfo(dtype).tiny, 3e-37 if dtype in (torch.float32, torch.bfloat16) else 0.0)
        # exp(-y) has the error of y times y, which for GELU is a product of several roundings.
        roundings = {"gelu": 4, "gelu_tanh": 10}.get(activation, 1)
        assert ((out - exact).abs() <= roundings * bound * exact.abs() + smallest).all(), activation
