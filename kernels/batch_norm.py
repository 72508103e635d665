"""Batch normalisation: statistics and coefficients from partial sums, and the walks over activations that are left.

A ``norm`` is (3, C): mean, scale = gamma * rstd and shift = beta, for (a - mean) * scale + shift. ``coefficients`` are
(4, C): mean, A, B and D, for the gradient A * grad + B * (a - mean) + D. Both in the compute dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effnet_ops.kernels import tuning
from effnet_ops.kernels.activation import ACTIVATION_CODES, NONE, activate, activation_gradient, narrow, widen
from effnet_ops.kernels.launching import launch
from effnet_ops.kernels.layout import cdiv
from effnet_ops.kernels.tuning import Architecture, Config


@triton.jit
def _vector(p, o_c, m_c, otherwise: tl.constexpr, DTYPE: tl.constexpr):
    """A parameter (C,), or what it is where there is none."""
    if p is not None:
        return tl.load(p + o_c, mask=m_c, other=0.0).to(DTYPE)
    else:
        return tl.full([o_c.shape[0]], otherwise, DTYPE)


@triton.jit
def finalize_kernel(
    p_partials,
    p_gamma,
    p_beta,
    p_norm,
    p_mean,
    p_var,
    p_running_mean,
    p_running_var,
    parts,
    C: tl.constexpr,
    EPS: tl.constexpr,
    MOMENTUM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Merges (parts, 3, C) counts, means and squared deviations by Chan's formula, in fp64: there are few of them."""
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_count = tl.zeros([BLOCK_S, BLOCK_C], tl.float64)
    b_sum = tl.zeros([BLOCK_S, BLOCK_C], tl.float64)
    for i in range(0, parts, BLOCK_S):
        o_s = i + tl.arange(0, BLOCK_S)
        m = (o_s < parts)[:, None] & m_c[None, :]
        p_s = p_partials + o_s.to(tl.int64)[:, None] * (3 * C) + o_c[None, :]
        count = tl.load(p_s, mask=m, other=0.0).to(tl.float64)
        b_count += count
        b_sum += count * tl.load(p_s + C, mask=m, other=0.0).to(tl.float64)
    n = tl.maximum(tl.sum(b_count, 0), 1.0)
    b_mean = tl.sum(b_sum, 0) / n
    b_squares = tl.zeros([BLOCK_S, BLOCK_C], tl.float64)
    for i in range(0, parts, BLOCK_S):
        o_s = i + tl.arange(0, BLOCK_S)
        m = (o_s < parts)[:, None] & m_c[None, :]
        p_s = p_partials + o_s.to(tl.int64)[:, None] * (3 * C) + o_c[None, :]
        delta = tl.load(p_s + C, mask=m, other=0.0).to(tl.float64) - b_mean[None, :]
        b_squares += tl.load(p_s, mask=m, other=0.0).to(tl.float64) * delta * delta
        b_squares += tl.load(p_s + 2 * C, mask=m, other=0.0).to(tl.float64)
    b_var = tl.sum(b_squares, 0) / n

    ACC: tl.constexpr = p_norm.dtype.element_ty
    tl.store(p_mean + o_c, b_mean.to(ACC), mask=m_c)
    tl.store(p_var + o_c, b_var.to(ACC), mask=m_c)
    scale = _vector(p_gamma, o_c, m_c, 1.0, ACC) / tl.sqrt(b_var.to(ACC) + EPS)
    tl.store(p_norm + o_c, b_mean.to(ACC), mask=m_c)
    tl.store(p_norm + C + o_c, scale, mask=m_c)
    tl.store(p_norm + 2 * C + o_c, _vector(p_beta, o_c, m_c, 0.0, ACC), mask=m_c)
    if p_running_mean is not None:
        old_mean = tl.load(p_running_mean + o_c, mask=m_c, other=0.0).to(tl.float64)
        old_var = tl.load(p_running_var + o_c, mask=m_c, other=0.0).to(tl.float64)
        unbiased = b_var * (n / tl.maximum(n - 1.0, 1.0))
        new_mean = (old_mean + MOMENTUM * (b_mean - old_mean)).to(ACC)
        new_var = (old_var + MOMENTUM * (unbiased - old_var)).to(ACC)
        tl.store(p_running_mean + o_c, narrow(new_mean, p_running_mean.dtype.element_ty), mask=m_c)
        tl.store(p_running_var + o_c, narrow(new_var, p_running_var.dtype.element_ty), mask=m_c)


@triton.jit
def finalize_backward_kernel(
    p_partials,
    p_norm,
    p_var,
    p_gamma_grad,
    p_beta_grad,
    p_coefficients,
    parts,
    count,
    C: tl.constexpr,
    EPS: tl.constexpr,
    CONSTANT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """From (parts, 2, C) sums of n and n (a - mean), n the gradient behind it: (1) and (2) of mbconv.md."""
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_sum = tl.zeros([BLOCK_S, BLOCK_C], tl.float64)
    b_moment = tl.zeros([BLOCK_S, BLOCK_C], tl.float64)
    for i in range(0, parts, BLOCK_S):
        o_s = i + tl.arange(0, BLOCK_S)
        m = (o_s < parts)[:, None] & m_c[None, :]
        p_s = p_partials + o_s.to(tl.int64)[:, None] * (2 * C) + o_c[None, :]
        b_sum += tl.load(p_s, mask=m, other=0.0).to(tl.float64)
        b_moment += tl.load(p_s + C, mask=m, other=0.0).to(tl.float64)
    sum_ = tl.sum(b_sum, 0)
    moment = tl.sum(b_moment, 0)
    ACC: tl.constexpr = p_norm.dtype.element_ty
    rstd = tl.full([BLOCK_C], 1.0, tl.float64)
    if p_var is not None:
        rstd = (1.0 / tl.sqrt(tl.load(p_var + o_c, mask=m_c, other=1.0).to(ACC) + EPS)).to(tl.float64)
    scale = tl.load(p_norm + C + o_c, mask=m_c, other=0.0).to(tl.float64)
    tl.store(p_coefficients + o_c, tl.load(p_norm + o_c, mask=m_c, other=0.0), mask=m_c)
    tl.store(p_coefficients + C + o_c, scale.to(ACC), mask=m_c)
    of_a = tl.zeros([BLOCK_C], tl.float64)
    constant = tl.zeros([BLOCK_C], tl.float64)
    if not CONSTANT:
        of_a = -scale * rstd * rstd * moment / count
        constant = -scale * sum_ / count
    tl.store(p_coefficients + 2 * C + o_c, of_a.to(ACC), mask=m_c)
    tl.store(p_coefficients + 3 * C + o_c, constant.to(ACC), mask=m_c)
    if p_gamma_grad is not None:
        gamma_grad = (moment * rstd).to(ACC)
        tl.store(p_gamma_grad + o_c, narrow(gamma_grad, p_gamma_grad.dtype.element_ty), mask=m_c)
    if p_beta_grad is not None:
        tl.store(p_beta_grad + o_c, narrow(sum_.to(ACC), p_beta_grad.dtype.element_ty), mask=m_c)


@triton.jit
def _constant_norm(p_gamma, p_beta, p_mean, p_var, p_norm, o, C, EPS: tl.constexpr):
    m = o < C
    ACC: tl.constexpr = p_norm.dtype.element_ty
    scale = _vector(p_gamma, o, m, 1.0, ACC)
    if p_var is not None:
        scale = scale / tl.sqrt(_vector(p_var, o, m, 1.0, ACC) + EPS)
    tl.store(p_norm + o, _vector(p_mean, o, m, 0.0, ACC), mask=m)
    tl.store(p_norm + C + o, scale, mask=m)
    tl.store(p_norm + 2 * C + o, _vector(p_beta, o, m, 0.0, ACC), mask=m)


@triton.jit
def constant_norms_kernel(
    p_gamma_1, p_beta_1, p_mean_1, p_var_1, p_norm_1, c_1,
    p_gamma_2, p_beta_2, p_mean_2, p_var_2, p_norm_2, c_2,
    p_gamma_3, p_beta_3, p_mean_3, p_var_3, p_norm_3, c_3,
    EPS_1: tl.constexpr,
    EPS_2: tl.constexpr,
    EPS_3: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The norms of up to three convolutions from running statistics, in one launch."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _constant_norm(p_gamma_1, p_beta_1, p_mean_1, p_var_1, p_norm_1, o, c_1, EPS_1)
    if p_norm_2 is not None:
        _constant_norm(p_gamma_2, p_beta_2, p_mean_2, p_var_2, p_norm_2, o, c_2, EPS_2)
    if p_norm_3 is not None:
        _constant_norm(p_gamma_3, p_beta_3, p_mean_3, p_var_3, p_norm_3, o, c_3, EPS_3)


@triton.jit
def apply_kernel(
    p_a,
    p_norm,
    p_image_scale,
    p_residual,
    p_y,
    rows,
    image_pixels,
    C: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """activation(norm(a)) * image_scale + residual, elementwise."""
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    i_row = tl.program_id(0) // blocks * BLOCK_P
    o_c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    o_p = tl.arange(0, BLOCK_P)
    m = (o_p < rows - i_row)[:, None] & m_c[None, :]
    start = i_row.to(tl.int64) * C
    o = o_p[:, None] * C + o_c[None, :]
    b_a = widen(tl.load(p_a + start + o, mask=m, other=0.0))
    mean = tl.load(p_norm + o_c, mask=m_c, other=0.0)[None, :]
    scale = tl.load(p_norm + C + o_c, mask=m_c, other=0.0)[None, :]
    shift = tl.load(p_norm + 2 * C + o_c, mask=m_c, other=0.0)[None, :]
    b_y = activate((b_a - mean) * scale + shift, ACTIVATION, p_a.dtype.element_ty == tl.bfloat16)
    if p_image_scale is not None:
        o_image = tl.minimum(i_row + o_p, rows - 1) // image_pixels
        b_y = b_y * tl.load(p_image_scale + o_image)[:, None]
    if p_residual is not None:
        b_y += widen(tl.load(p_residual + start + o, mask=m, other=0.0))
    tl.store(p_y + start + o, narrow(b_y, p_y.dtype.element_ty), mask=m)


@triton.jit
def gradient_sums_kernel(
    p_grad,
    p_a,
    p_norm,
    p_image_scale,
    p_partials,
    rows,
    image_pixels,
    parts,
    C: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sums over a part of the rows of n and of n (a - mean), (parts, 2, C); n as in `gradient_sums`."""
    ACC: tl.constexpr = p_norm.dtype.element_ty
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    i_part = tl.program_id(0) // blocks
    o_c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    o_p = tl.arange(0, BLOCK_P)
    o = o_p[:, None] * C + o_c[None, :]
    mean = tl.load(p_norm + o_c, mask=m_c, other=0.0)[None, :]
    if ACTIVATION != NONE:
        scale = tl.load(p_norm + C + o_c, mask=m_c, other=0.0)[None, :]
        shift = tl.load(p_norm + 2 * C + o_c, mask=m_c, other=0.0)[None, :]
    b_sum = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    b_moment = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    tiles = tl.cdiv(rows, BLOCK_P)
    tiles_per_part = tl.cdiv(tiles, parts)
    first = i_part * tiles_per_part
    for i_tile in tl.range(first, tl.minimum(first + tiles_per_part, tiles), num_stages=STAGES):
        i_row = i_tile * BLOCK_P
        m = (o_p < rows - i_row)[:, None] & m_c[None, :]
        start = i_row.to(tl.int64) * C
        b_n = widen(tl.load(p_grad + start + o, mask=m, other=0.0))
        b_a = widen(tl.load(p_a + start + o, mask=m, other=0.0))
        if p_image_scale is not None:
            o_image = tl.minimum(i_row + o_p, rows - 1) // image_pixels
            b_n = b_n * tl.load(p_image_scale + o_image)[:, None]
        if ACTIVATION != NONE:
            FAST: tl.constexpr = p_a.dtype.element_ty == tl.bfloat16
            b_n = b_n * activation_gradient((b_a - mean) * scale + shift, ACTIVATION, FAST)
        b_sum += b_n
        b_moment += b_n * (b_a - mean)
    p_mine = p_partials + i_part.to(tl.int64) * 2 * C + o_c
    tl.store(p_mine, tl.sum(b_sum, 0), mask=m_c)
    tl.store(p_mine + C, tl.sum(b_moment, 0), mask=m_c)


@triton.jit
def input_gradient_kernel(
    p_grad,
    p_a,
    p_norm,
    p_coefficients,
    p_gate,
    p_pooled,
    p_image_scale,
    p_da,
    rows,
    image_pixels,
    C: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """da = A n + B (a - mean) + D, elementwise; n as in `input_gradient`."""
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    i_row = tl.program_id(0) // blocks * BLOCK_P
    o_c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    o_p = tl.arange(0, BLOCK_P)
    m = (o_p < rows - i_row)[:, None] & m_c[None, :]
    start = i_row.to(tl.int64) * C
    o = o_p[:, None] * C + o_c[None, :]
    o_image = tl.minimum(i_row + o_p, rows - 1) // image_pixels
    b_n = widen(tl.load(p_grad + start + o, mask=m, other=0.0))
    b_a = widen(tl.load(p_a + start + o, mask=m, other=0.0))
    if p_image_scale is not None:
        b_n = b_n * tl.load(p_image_scale + o_image)[:, None]
    if p_gate is not None:
        o_gate = o_image[:, None] * C + o_c[None, :]
        b_n = b_n * tl.load(p_gate + o_gate, mask=m, other=0.0) + tl.load(p_pooled + o_gate, mask=m, other=0.0)
    mean = tl.load(p_norm + o_c, mask=m_c, other=0.0)[None, :]
    if ACTIVATION != NONE:
        scale = tl.load(p_norm + C + o_c, mask=m_c, other=0.0)[None, :]
        shift = tl.load(p_norm + 2 * C + o_c, mask=m_c, other=0.0)[None, :]
        FAST: tl.constexpr = p_a.dtype.element_ty == tl.bfloat16
        b_n = b_n * activation_gradient((b_a - mean) * scale + shift, ACTIVATION, FAST)
    of_grad = tl.load(p_coefficients + C + o_c, mask=m_c, other=0.0)[None, :]
    of_a = tl.load(p_coefficients + 2 * C + o_c, mask=m_c, other=0.0)[None, :]
    constant = tl.load(p_coefficients + 3 * C + o_c, mask=m_c, other=0.0)[None, :]
    b_da = of_grad * b_n + (of_a * (b_a - mean) + constant)
    tl.store(p_da + start + o, narrow(b_da, p_da.dtype.element_ty), mask=m)


def wide(x: Tensor) -> torch.dtype:
    """The compute dtype of x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


_BLOCK_S, _BLOCK_C = 16, 32


class Finalized(NamedTuple):
    """``norm`` (3, C), and the batch's mean and biased variance (C,), in the compute dtype."""

    norm: Tensor
    mean: Tensor
    var: Tensor


def finalize(
    partials: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    running: tuple[Tensor, Tensor, float] | None = None,
) -> Finalized:
    """Statistics of a batch from partial ones (programs, 3, C): count, mean, and squared deviations from that mean.

    ``running`` is (mean, var, momentum): the two (C,) are moved towards the batch's, var towards the unbiased one.
    """
    parts, _, channels = partials.shape
    norm, mean, var = (partials.new_empty(size) for size in ((3, channels), channels, channels))
    running_mean, running_var, momentum = running or (None, None, 0.0)
    launch(finalize_kernel, (cdiv(channels, _BLOCK_C),),
        partials, gamma, beta, norm, mean, var, running_mean, running_var, parts,
        C=channels, EPS=eps, MOMENTUM=momentum, BLOCK_S=_BLOCK_S, BLOCK_C=_BLOCK_C, num_warps=4,
    )  # fmt: skip
    return Finalized(norm, mean, var)


class Backward(NamedTuple):
    """Gradients of gamma and beta (C,), None where their dtype was None, and ``coefficients`` (4, C)."""

    gamma: Tensor | None
    beta: Tensor | None
    coefficients: Tensor


def finalize_backward(
    partials: Tensor,
    norm: Tensor,
    var: Tensor | None,
    eps: float,
    count: int,
    *,
    constant: bool,
    gamma_dtype: torch.dtype | None,
    beta_dtype: torch.dtype | None,
) -> Backward:
    """Gradients of a normalisation's parameters, and what its input's gradient is made of.

    Args:
        partials: (programs, 2, C) sums of n and of n (a - mean), n the gradient of the normalisation's result.
        norm: (3, C). var: (C,), the variance behind norm, or None where there is no normalisation but a bias.
        count: values a channel.
        constant: mean and variance do not depend on the batch.
    """
    parts, _, channels = partials.shape
    gamma, beta = (
        None if dtype is None else torch.empty(channels, dtype=dtype, device=norm.device)
        for dtype in (gamma_dtype, beta_dtype)
    )
    coefficients = norm.new_empty(4, channels)
    launch(finalize_backward_kernel, (cdiv(channels, _BLOCK_C),),
        partials, norm, var, gamma, beta, coefficients, parts, count,
        C=channels, EPS=eps, CONSTANT=constant, BLOCK_S=_BLOCK_S, BLOCK_C=_BLOCK_C, num_warps=4,
    )  # fmt: skip
    return Backward(gamma, beta, coefficients)


class ConstantNorm(NamedTuple):
    """Vectors (C,), None for a scale of 1, a shift of 0, a mean of 0; without var there is no division either."""

    channels: int
    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    eps: float


def constant_norms(norms: Sequence[ConstantNorm], like: Tensor) -> list[Tensor]:
    """``norm`` (3, C) of each of one to three norms, for activations such as ``like``, in one launch."""
    results = [torch.empty((3, norm.channels), dtype=wide(like), device=like.device) for norm in norms]
    arguments: list[Tensor | int | None] = []
    for norm, result in zip(norms, results, strict=True):
        arguments += [norm.gamma, norm.beta, norm.mean, norm.var, result, norm.channels]
    arguments += [None, None, None, None, None, 0] * (3 - len(norms))
    eps = [norm.eps for norm in norms] + [0.0] * (3 - len(norms))
    grid = (cdiv(max(norm.channels for norm in norms), 128),)
    launch(constant_norms_kernel, grid, *arguments, *eps, 128, num_warps=4)
    return results


def channel_block(channels: int) -> int:
    """The block of channels of an elementwise walk that wastes fewest lanes, and the largest such."""
    return min((32, 64, 128), key=lambda size: (cdiv(channels, size) * size, -size))


@tuning.heuristic("batch_norm_apply")
def _apply_rule(shape: Mapping[str, int], arch: Architecture) -> Config:
    block_c = channel_block(shape["channels"])
    return {"block_p": max(16, 4096 // block_c), "block_c": block_c, "num_warps": 4}


@tuning.heuristic("batch_norm_input_gradient")
def _input_gradient_rule(shape: Mapping[str, int], arch: Architecture) -> Config:
    block_c = channel_block(shape["channels"])
    return {"block_p": max(16, 2048 // block_c), "block_c": block_c, "num_warps": 4}


@tuning.heuristic("batch_norm_gradient_sums")
def _gradient_sums_rule(shape: Mapping[str, int], arch: Architecture) -> Config:
    block_c = channel_block(shape["channels"])
    block_p = max(16, 2048 // block_c)
    tiles, blocks = cdiv(shape["pixels"], block_p), cdiv(shape["channels"], block_c)
    parts = max(1, min(tiles, cdiv(8 * arch.multiprocessors, blocks)))
    return {"block_p": block_p, "block_c": block_c, "parts": parts, "stages": 3, "num_warps": 4}


def apply(
    a: Tensor,
    norm: Tensor,
    activation: str = "none",
    image_scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(norm(a)) * image_scale + residual for a (images, pixels, C), contiguous, in its dtype."""
    images, pixels, channels = a.shape
    shape = {"pixels": images * pixels, "channels": channels, "element_size": a.element_size()}
    config = tuning.choose("batch_norm_apply", shape, a.device)
    y = torch.empty_like(a)
    grid = (cdiv(images * pixels, config["block_p"]) * cdiv(channels, config["block_c"]),)
    launch(apply_kernel, grid,
        a, norm, image_scale, residual, y, images * pixels, pixels,
        C=channels, ACTIVATION=ACTIVATION_CODES[activation], BLOCK_P=config["block_p"], BLOCK_C=config["block_c"],
        num_warps=config["num_warps"],
    )  # fmt: skip
    return y


_SUMS_REGISTERS = 80
"""As many as Triton 3.9 takes without a limit, and then spills one more; with it, 72 to 76 are enough."""


def gradient_sums(
    grad: Tensor, a: Tensor, norm: Tensor, image_scale: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """Partial sums (programs, 2, C), for `finalize_backward`, of n and of n (a - mean).

    n = image_scale * grad * activation'(norm(a)) is the gradient behind the normalisation.
    """
    images, pixels, channels = a.shape
    shape = {"pixels": images * pixels, "channels": channels, "element_size": a.element_size()}
    config = tuning.choose("batch_norm_gradient_sums", shape, a.device)
    partials = norm.new_empty(config["parts"], 2, channels)
    launch(gradient_sums_kernel, (config["parts"] * cdiv(channels, config["block_c"]),),
        grad, a, norm, image_scale, partials, images * pixels, pixels, config["parts"],
        C=channels, ACTIVATION=ACTIVATION_CODES[activation], BLOCK_P=config["block_p"], BLOCK_C=config["block_c"],
        STAGES=config["stages"], num_warps=config["num_warps"],
        maxnreg=_SUMS_REGISTERS if a.element_size() == 2 and activation == "none" else None,
    )  # fmt: skip
    return partials


def input_gradient(
    grad: Tensor,
    a: Tensor,
    norm: Tensor,
    coefficients: Tensor,
    activation: str = "none",
    *,
    gate: Tensor | None = None,
    pooled: Tensor | None = None,
    image_scale: Tensor | None = None,
) -> Tensor:
    """A n + B (a - mean) + D for n = (image_scale * grad * gate + pooled) * activation'(norm(a)), in the dtype of a.

    ``grad`` and ``a`` are (images, pixels, C), contiguous; ``gate`` and ``pooled`` (images, C), both or neither.
    """
    images, pixels, channels = a.shape
    shape = {"pixels": images * pixels, "channels": channels, "element_size": a.element_size()}
    config = tuning.choose("batch_norm_input_gradient", shape, a.device)
    da = torch.empty_like(a)
    launch(input_gradient_kernel, (cdiv(images * pixels, config["block_p"]) * cdiv(channels, config["block_c"]),),
        grad, a, norm, coefficients, gate, pooled, image_scale, da, images * pixels, pixels,
        C=channels, ACTIVATION=ACTIVATION_CODES[activation], BLOCK_P=config["block_p"], BLOCK_C=config["block_c"],
        num_warps=config["num_warps"],
    )  # fmt: skip
    return da
