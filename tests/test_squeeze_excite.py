"""Squeeze-and-excitation against the fp64 reference: outputs, gradients, layouts and precisions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import SQUEEZE_EXCITE, SqueezeExciteCase
from helpers import HALF, LAYOUTS, Function, Tensors, check, names, normal, relative_error

import effnet_ops
from effnet_ops import reference

pytestmark = pytest.mark.usefixtures("poison")
by_case = pytest.mark.parametrize("case", SQUEEZE_EXCITE, ids=names(SQUEEZE_EXCITE))


def problem(case: SqueezeExciteCase) -> tuple[Function, Tensors]:
    channels = case.shape[1]
    tensors = {
        "x": normal(*case.shape) + 0.5,
        "reduce_weight": normal(case.reduced, channels, 1, 1) / channels**0.5,
        "reduce_bias": normal(case.reduced) if case.bias else None,
        "expand_weight": normal(channels, case.reduced, 1, 1) / case.reduced**0.5,
        "expand_bias": normal(channels) if case.bias else None,
    }
    config = dict(activation=case.activation, gate=case.gate)
    return lambda t: effnet_ops.squeeze_excite(*t.values(), **config), tensors


@by_case
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp32(case: SqueezeExciteCase, layout: str) -> None:
    check(*problem(case), torch.float32, layout)


@by_case
@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
def test_precisions(case: SqueezeExciteCase, dtype: torch.dtype) -> None:
    check(*problem(case), dtype)


@by_case
def test_reference_backend(case: SqueezeExciteCase) -> None:
    with effnet_ops.use_backend("reference"):
        check(*problem(case), torch.float32)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_parameters(dtype: torch.dtype, backend: str) -> None:
    check(*problem(SQUEEZE_EXCITE[0]), dtype, parameter_dtype=dtype)


def test_reference_has_the_exact_slope_of_the_hard_sigmoid() -> None:
    """PyTorch's has float32(1/6) in fp64, too, which is 3e-8 off (2.11 to 2.14.1); all else of ours is exact there."""
    x = normal(1000).mul_(3).requires_grad_()
    for name, function in (*reference.GATES.items(), *reference.ACTIVATIONS.items()):
        (slope,) = torch.autograd.grad(function(x).sum(), x)
        exact = exact_slope(name, x.detach())
        assert relative_error(slope, exact) < 1e-15, name
    (slope,) = torch.autograd.grad(F.hardsigmoid(x).sum(), x)
    assert 1e-9 < relative_error(slope, exact_slope("hard_sigmoid", x.detach())) < 1e-7


def exact_slope(name: str, x: torch.Tensor) -> torch.Tensor:
    sigmoid = 1 / (1 + (-x).exp())
    below, density = 0.5 * torch.erfc(-x / 2**0.5), (-x * x / 2).exp() / (2 * torch.pi) ** 0.5
    inner = (8 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
    gated = 1 / (1 + (-inner).exp())
    slopes = {
        "gelu": below + x * density,
        "gelu_tanh": gated * (1 + x * (1 - gated) * (8 / torch.pi) ** 0.5 * (1 + 3 * 0.044715 * x * x)),
        "none": torch.ones_like(x),
        "relu": (x > 0).double(),
        "relu6": ((x > 0) & (x < 6)).double(),
        "silu": sigmoid * (1 + x * (1 - sigmoid)),
        "hardswish": torch.where(x <= -3, 0.0, torch.where(x >= 3, 1.0, (2 * x + 3) / 6)),
        "sigmoid": sigmoid * (1 - sigmoid),
        "hard_sigmoid": ((x > -3) & (x < 3)).double() / 6,
    }
    return slopes[name]


def test_reference_is_pytorch() -> None:
    x, reduce_weight, reduce_bias = normal(2, 6, 4, 3), normal(3, 6, 1, 1), normal(3)
    expand_weight, expand_bias = normal(6, 3, 1, 1), normal(6)
    hidden = F.relu(F.conv2d(F.adaptive_avg_pool2d(x, 1), reduce_weight, reduce_bias))
    expected = x * F.hardsigmoid(F.conv2d(hidden, expand_weight, expand_bias))
    params = (reduce_weight, reduce_bias, expand_weight, expand_bias)
    with effnet_ops.use_backend("reference"):
        out = effnet_ops.squeeze_excite(x, *params, activation="relu", gate="hard_sigmoid")
    assert relative_error(out, expected) <= 1e-15


@pytest.mark.parametrize("gate", ["sigmoid", "hard_sigmoid"])
def test_saturated_gate(gate: str, backend: str) -> None:
    """Gates far beyond saturation are exactly 0 or 1, with finite gradients."""
    x = normal(2, 8, 3, 3).float().requires_grad_()
    expand_bias = torch.tensor([-200.0, 200.0] * 4)
    params = (torch.zeros(2, 8, 1, 1), torch.zeros(2), torch.zeros(8, 2, 1, 1), expand_bias)
    out = effnet_ops.squeeze_excite(x, *params, gate=gate)
    out.sum().backward()
    kept = torch.tensor([0.0, 1.0] * 4)[:, None, None]
    assert torch.equal(out, x * kept)
    assert torch.equal(x.grad, kept.expand_as(x))
