"""Squeeze-and-excitation on interpreted Triton kernels: as an operator, and the pieces that blocks use."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import SQUEEZE_EXCITE, SqueezeExciteCase
from fused import norm_of
from helpers import HALF, LAYOUTS, check, names, normal, relative_error
from test_squeeze_excite import problem

from effnet_ops.kernels import squeeze_excite
from effnet_ops.reference import GATES

pytestmark = pytest.mark.usefixtures("poison")

OTHERS = (*HALF, torch.float64)
MIXED = [(case, LAYOUTS[i % 4], OTHERS[i % 3], LAYOUTS[(i + 1) % 4]) for i, case in enumerate(SQUEEZE_EXCITE)]


@pytest.mark.parametrize(("case", "layout", "other", "other_layout"), MIXED, ids=names(SQUEEZE_EXCITE))
def test_operator(case: SqueezeExciteCase, layout: str, other: torch.dtype, other_layout: str) -> None:
    check(*problem(case), torch.float32, layout)
    check(*problem(case), other, other_layout)


def test_pool_behind_a_normalisation() -> None:
    norm = norm_of(24)
    x = (normal(3, 150, 24) + norm[0]).bfloat16()
    pooled = squeeze_excite.pool(x, norm.float(), "silu").sum(1) / 150
    n = (x.double() - norm[0].float().double()) * norm[1].float().double() + norm[2].float().double()
    assert relative_error(pooled, F.silu(n).mean(1)) <= 1e-6


@pytest.mark.parametrize("images", [1, 3, 150], ids="images={}".format)
@pytest.mark.parametrize("gate", ["sigmoid", "hard_sigmoid"])
def test_gate_backward(images: int, gate: str) -> None:
    """Weights, the pooled tensor and the five sums of B3, from a u behind a normalisation and an activation."""
    pixels, channels, reduced = 7, 40, 6
    norm = norm_of(channels)
    a = normal(images, pixels, channels) + norm[0]
    weights = [normal(reduced, channels) / 4, normal(reduced), normal(channels, reduced), normal(channels)]
    leaves = [w.requires_grad_() for w in weights]
    n = ((a - norm[0]) * norm[1] + norm[2]).requires_grad_()
    u = F.silu(n)
    hidden = F.silu(F.linear(u.mean(1), *leaves[:2]))
    z = u * GATES[gate](F.linear(hidden, *leaves[2:]))[:, None]
    z_grad = normal(*z.shape)
    n_grad, *expected = torch.autograd.grad(z, [n, *leaves], z_grad)

    with torch.no_grad():
        (slope,) = torch.autograd.functional.vjp(F.silu, n.detach(), torch.ones_like(n))[1:]
        centred = a - norm[0]
        rows = (z_grad * u, z_grad * slope, slope, z_grad * slope * centred, slope * centred)
        sums = torch.stack(rows, 1).reshape(images, 5, pixels, channels).sum(2)
        # In two parts, as two programs would leave them.
        parts = torch.stack([sums * 0.25, sums * 0.75], 1).contiguous()
        given = squeeze_excite.Parameters(*(w.detach() for w in weights), "silu", gate)
        found = squeeze_excite.gate_backward(parts, pixels, u.mean(1).contiguous(), given)
    for value, exact in zip(found[:4], expected, strict=True):
        assert relative_error(value, exact) <= 1e-12
    moments = torch.stack([n_grad.sum(1), (n_grad * centred).sum(1)], 1)
    assert relative_error(found.partials, moments) <= 1e-12
    rebuilt = (z_grad * found.gate[:, None] + found.pooled[:, None]) * slope
    assert relative_error(rebuilt, n_grad) <= 1e-12
