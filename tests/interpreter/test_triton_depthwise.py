"""Depthwise convolution on interpreted Triton kernels: as an operator, and with all that the blocks fuse into it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import DEPTHWISE, DepthwiseCase
from fused import norm_of
from helpers import FORWARD_TOLERANCE, LAYOUTS, check, names, normal, relative_error
from test_depthwise import problem
from torch import Tensor

from effnet_ops.kernels import depthwise

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
# One precision and layout a case, in turn; all of them with `make test-all`.
SMALL = [case for case in DEPTHWISE if case.name != "large"]
MIXED = [(case, DTYPES[i % 4], LAYOUTS[i // 4 % 4]) for i, case in enumerate(SMALL)]
ALL = [(case, dtype, layout) for case in DEPTHWISE for dtype in DTYPES for layout in LAYOUTS]


@pytest.mark.parametrize(("case", "dtype", "layout"), MIXED, ids=names(SMALL))
def test_operator(case: DepthwiseCase, dtype: torch.dtype, layout: str) -> None:
    check(*problem(case), dtype, layout)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype", "layout"), ALL)
def test_operator_in_every_way(case: DepthwiseCase, dtype: torch.dtype, layout: str) -> None:
    check(*problem(case), dtype, layout)


# Lanes and slabs that divide nothing, several parts an image, several tiles a program, as on a GPU.
TILES = {
    "3x3": ((2, 11, 13, 24), 3, 1, {"block_p": 4, "block_c": 16, "rows": 4, "columns": 5}),
    "3x3_stride2": ((2, 13, 9, 20), 3, 2, {"block_p": 2, "block_c": 32, "rows": 7, "columns": 2}),
    "5x5": ((3, 5, 4, 10), 5, 1, {"block_p": 1, "block_c": 16, "rows": 3, "columns": 3}),
    "5x5_stride2": ((2, 12, 11, 16), 5, 2, {"block_p": 4, "block_c": 16, "rows": 2, "columns": 3}),
}


by_tile = pytest.mark.parametrize(("name", "dtype"), list(zip(TILES, DTYPES, strict=True)), ids=list(TILES))


def images(x: Tensor) -> Tensor:
    return x.double().permute(0, 3, 1, 2)


def normalise(x: Tensor, norm: Tensor) -> Tensor:
    mean, scale, shift = norm.double()[:, :, None, None]
    return (x - mean) * scale + shift


@by_tile
def test_forward_with_everything(name: str, dtype: torch.dtype) -> None:
    """Normalisation, activation and gate in front; bias, normalisation and activation behind; pool and statistics."""
    shape, kernel, stride, config = TILES[name]
    batch, _, _, channels = shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    norm, out_norm = norm_of(channels).to(wide), norm_of(channels).to(wide)
    x = (normal(*shape) + norm[0].double()).to(dtype)
    weight, bias = normal(channels, 1, kernel, kernel).to(wide), normal(channels).to(wide)
    gate = torch.rand(batch, channels, dtype=wide)
    padding = (kernel // 2, kernel // 2 - (stride == 2), kernel // 2, kernel // 2)
    window = {"stride": (stride, stride), "padding": padding}
    y, pool, partials = depthwise.forward(
        x, weight, **window, norm=norm, activation="silu", gate=gate, bias=bias, out_norm=out_norm,
        out_activation="hardswish", pool=True, statistics=True, config={**config, "num_warps": 4},
    )  # fmt: skip

    top, bottom, left, right = padding
    seen = F.silu(normalise(images(x), norm)) * gate.double()[:, :, None, None]
    a = F.conv2d(F.pad(seen, (left, right, top, bottom)), weight.double(), bias.double(), stride, groups=channels)
    exact = F.hardswish(normalise(a, out_norm))
    assert relative_error(images(y), exact) <= FORWARD_TOLERANCE[dtype]
    assert relative_error(pool.sum(1), exact.sum((2, 3))) <= FORWARD_TOLERANCE[dtype]
    count, mean, squares = partials.double().unbind(1)
    stored = images(y)
    variance, expected = torch.var_mean(stored, (0, 2, 3), correction=0)
    assert torch.equal(count.sum(0), torch.full_like(expected, stored[:, 0].numel()))
    total = (count * mean).sum(0) / count.sum(0)
    assert relative_error(total, expected) <= 2e-6
    assert relative_error((squares + count * (mean - total) ** 2).sum(0) / count.sum(0), variance) <= 2e-6


@by_tile
def test_backward_with_everything(name: str, dtype: torch.dtype) -> None:
    """From the gradient behind gate and pool to that in front of the first normalisation, with the sums it needs."""
    shape, kernel, stride, config = TILES[name]
    batch, height, width, channels = shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    norm, a_norm = norm_of(channels).to(wide), norm_of(channels).to(wide)
    coefficients = torch.stack([a_norm[0], *(normal(channels).to(wide) for _ in range(3))])
    weight = normal(channels, 1, kernel, kernel).to(wide)
    gate, pooled = torch.rand(batch, channels, dtype=wide), normal(batch, channels).to(wide)
    half = kernel // 2
    size = [(n + 2 * half - kernel) // stride + 1 for n in (height, width)]
    x = (normal(*shape) + norm[0].double()).to(dtype)
    a = (normal(batch, *size, channels) + a_norm[0].double()).to(dtype)
    grad, residual = normal(batch, *size, channels).to(dtype), normal(*shape).to(dtype)
    dx, dw, db, sums = depthwise.backward(
        grad, x, weight, size=(height, width), stride=(stride, stride), padding=(half,) * 4, a=a, a_norm=a_norm,
        a_activation="silu", coefficients=coefficients, gate=gate, pooled=pooled, norm=norm, activation="hardswish",
        residual=residual, bias=weight, needs=(True, True, True),
        config={**config, "programs": 3, "registers": 255, "num_warps": 4},
    )  # fmt: skip

    n2 = normalise(images(a), a_norm).requires_grad_()
    (slope,) = torch.autograd.grad(F.silu(n2).sum(), n2)
    n_grad = (images(grad) * gate.double()[:, :, None, None] + pooled.double()[:, :, None, None]) * slope
    mean, of_grad, of_a, constant = coefficients.double()[:, :, None, None]
    a_grad = of_grad * n_grad + of_a * (images(a) - mean) + constant
    n1 = normalise(images(x), norm).requires_grad_()
    filters = weight.double().requires_grad_()
    y = F.conv2d(F.hardswish(n1), filters, None, stride, half, groups=channels)
    exact, exact_weight = torch.autograd.grad(y, (n1, filters), a_grad)
    centred = images(x) - norm[0].double()[:, None, None]
    # Terms that cancel in A n + B (a - mean) + D are a few times larger than their sum.
    bound = 5 * FORWARD_TOLERANCE[dtype]
    assert relative_error(images(dx), exact + images(residual)) <= bound
    assert relative_error(dw, exact_weight) <= bound
    assert relative_error(db, a_grad.sum((0, 2, 3))) <= bound
    inner = exact + images(residual)
    assert relative_error(sums.sum(0)[0], inner.sum((0, 2, 3))) <= bound
    assert relative_error(sums.sum(0)[1], (inner * centred).sum((0, 2, 3))) <= bound


def test_statistics_do_not_cancel() -> None:
    """A mean a thousand times the deviation. A stored mean has 24 bits, so it is off by 6e-5 of the deviation at most.

    The difference of mean square and squared mean would be off by 6e-2.
    """
    x = (normal(2, 9, 9, 16) + 1000.0).float()
    weight = torch.ones(16, 1, 1, 1)
    _, _, partials = depthwise.forward(x, weight, stride=(1, 1), padding=(0,) * 4, statistics=True)
    count, mean, squares = partials.double().unbind(1)
    total = (count * mean).sum(0) / count.sum(0)
    variance = (squares + count * (mean - total) ** 2).sum(0) / count.sum(0)
    assert relative_error(variance, x.double().var((0, 1, 2), correction=0)) <= 6e-5


def test_offsets_of_large_images_have_64_bits() -> None:
    """An image of 2**31 elements or more cannot be made here; that its offsets are wide enough can be asked."""
    small, large = (torch.empty(1, n, n, 2048, device="meta") for n in (1023, 1024))
    assert str(depthwise._offset(small)) == "int32"
    assert str(depthwise._offset(small, large)) == "int64"
