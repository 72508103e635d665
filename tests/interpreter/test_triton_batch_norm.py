"""Batch normalisation's kernels against PyTorch's in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fused import norm_of
from helpers import HALF, normal, relative_error

from effnet_ops.kernels import batch_norm

pytestmark = pytest.mark.usefixtures("poison")

IMAGES, PIXELS, CHANNELS = 3, 41, 40


def partial_statistics(a: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    """(parts, 3, C) count, mean and squared deviations of the rows between two cuts; a part may be empty."""
    parts = []
    for rows in torch.tensor_split(a, cuts):
        mean = rows.mean(0) if len(rows) else torch.zeros(a.shape[1], dtype=a.dtype)
        parts.append(torch.stack([torch.full_like(mean, len(rows)), mean, ((rows - mean) ** 2).sum(0)]))
    return torch.stack(parts).contiguous()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_finalize(dtype: torch.dtype) -> None:
    """Variances from 1e-7 to 500 around means that are far from zero, and one dead channel."""
    deviation = 10 ** torch.linspace(-3.5, 1.35, CHANNELS).double()
    deviation[3] = 0
    a = normal(IMAGES * PIXELS, CHANNELS) * deviation + normal(CHANNELS) * 10 * deviation
    gamma, beta = normal(CHANNELS).to(dtype) * 5, normal(CHANNELS).to(dtype)
    running = [normal(CHANNELS).to(dtype), torch.rand(CHANNELS).to(dtype)]
    expected = [value.double() for value in running]
    F.batch_norm(a, *expected, None, None, True, 0.1)
    found = batch_norm.finalize(partial_statistics(a, [5, 5, 60]).to(dtype), gamma, beta, 1e-3, (*running, 0.1))
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    variance, mean = torch.var_mean(a, 0, correction=0)
    for value, exact in ((found.mean, mean), (found.var, variance), *zip(running, expected, strict=True)):
        assert relative_error(value, exact) <= tolerance
    scale = gamma.double() / (variance + 1e-3).sqrt()
    assert relative_error(found.norm, torch.stack([mean, scale, beta.double()])) <= tolerance


def test_finalize_without_parameters_and_of_one_value() -> None:
    partials = torch.tensor([[[1.0], [3.0], [0.0]]])
    running = (torch.zeros(1), torch.ones(1), 0.5)
    norm, mean, var = batch_norm.finalize(partials, None, None, 0.25, running)
    assert norm.flatten().tolist() == [3.0, 2.0, 0.0] and (mean.item(), var.item()) == (3.0, 0.0)
    assert (running[0].item(), running[1].item()) == (1.5, 0.5)


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
def test_backward(dtype: torch.dtype, constant: bool) -> None:
    """Sums, parameters' gradients and coefficients, with drop path in front."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    a = (normal(IMAGES, PIXELS, CHANNELS) + normal(CHANNELS) * 3).to(dtype)
    grad, image_scale = normal(*a.shape).to(dtype), torch.tensor([1.25, 0.0, 1.25], dtype=wide)
    gamma, beta = normal(CHANNELS), normal(CHANNELS)
    variance, mean = torch.var_mean(a.double(), (0, 1), correction=0)
    given = batch_norm.ConstantNorm(CHANNELS, gamma.to(wide), beta.to(wide), mean.to(wide), variance.to(wide), 1e-3)
    (norm,) = batch_norm.constant_norms([given], a)

    leaves = [a.double().flatten(0, 1), gamma.to(wide).double(), beta]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    y = F.batch_norm(leaves[0], mean.clone(), variance.clone(), *leaves[1:], not constant, 0.0, 1e-3)
    weighted = (grad.double() * image_scale.double()[:, None, None]).flatten(0, 1)
    a_grad, gamma_grad, beta_grad = torch.autograd.grad(y, leaves, weighted)

    partials = batch_norm.gradient_sums(grad, a, norm, image_scale)
    found = batch_norm.finalize_backward(
        partials, norm, variance.to(wide), 1e-3, IMAGES * PIXELS, constant=constant, gamma_dtype=wide, beta_dtype=wide
    )
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert relative_error(found.gamma, gamma_grad) <= tolerance
    assert relative_error(found.beta, beta_grad) <= tolerance
    centre, of_grad, of_a, shift = found.coefficients.double()
    rebuilt = of_grad * weighted + of_a * (a.double().flatten(0, 1) - centre) + shift
    assert relative_error(rebuilt, a_grad) <= tolerance


def test_backward_of_a_bias() -> None:
    grad, a = normal(2, 9, 5), normal(2, 9, 5)
    (norm,) = batch_norm.constant_norms([batch_norm.ConstantNorm(5, None, normal(5), None, None, 0.0)], a)
    partials = batch_norm.gradient_sums(grad, a, norm)
    found = batch_norm.finalize_backward(
        partials, norm, None, 0.0, 18, constant=True, gamma_dtype=None, beta_dtype=torch.float32
    )
    assert found.gamma is None and found.beta.dtype == torch.float32
    assert relative_error(found.beta, grad.sum((0, 1))) <= 1e-6
    assert found.coefficients.tolist() == [[0.0] * 5, [1.0] * 5, [0.0] * 5, [0.0] * 5]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
def test_apply(dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    norm = norm_of(13).to(wide)
    a, residual = normal(3, 29, 13).to(dtype), normal(3, 29, 13).to(dtype)
    image_scale = torch.tensor([1.25, 0.0, 1.25], dtype=wide)
    found = batch_norm.apply(a, norm, "silu", image_scale, residual)
    mean, scale, shift = norm.double()
    exact = F.silu((a.double() - mean) * scale + shift) * image_scale.double()[:, None, None] + residual.double()
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]
    assert relative_error(found, exact) <= tolerance


def test_three_constant_norms_in_one_launch() -> None:
    sizes = (8, 200, 13)
    norms = [
        batch_norm.ConstantNorm(n, normal(n), normal(n), normal(n), torch.rand(n).double() + 1e-7, eps)
        for n, eps in zip(sizes, (1e-3, 1e-5, 0.0), strict=True)
    ]
    for norm, found in zip(norms, batch_norm.constant_norms(norms, normal(1)), strict=True):
        exact = torch.stack([norm.mean, norm.gamma / (norm.var + norm.eps).sqrt(), norm.beta])
        assert relative_error(found, exact) <= 1e-15
