"""Squeeze-and-excitation: pool, both small products with the gate in one launch, and their gradients.

Pools are sums in parts, (images, parts, C), as the kernels that make the activations leave them behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effnet_ops.kernels import tuning
from effnet_ops.kernels.activation import (
    ACTIVATION_CODES,
    GATE_CODES,
    activate,
    activation_gradient,
    gate,
    gate_gradient,
    narrow,
    widen,
)
from effnet_ops.kernels.batch_norm import channel_block, wide
from effnet_ops.kernels.launching import launch
from effnet_ops.kernels.layout import cdiv, next_power_of_2
from effnet_ops.kernels.tuning import Architecture, Config


@triton.jit
def pool_kernel(
    p_x,
    p_other,
    p_norm,
    p_partials,
    pixels,
    parts,
    C: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sums over a part of an image's pixels of activation(norm(x)), or of x * other; (images, parts, C)."""
    ACC: tl.constexpr = p_partials.dtype.element_ty
    FAST: tl.constexpr = p_x.dtype.element_ty == tl.bfloat16
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    i_program = tl.program_id(0) // blocks
    i_part = i_program % parts
    i_image = i_program // parts
    o_c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    o_p = tl.arange(0, BLOCK_P)
    o = o_p[:, None] * C + o_c[None, :]
    if p_norm is not None:
        mean = tl.load(p_norm + o_c, mask=m_c, other=0.0)[None, :]
        scale = tl.load(p_norm + C + o_c, mask=m_c, other=0.0)[None, :]
        shift = tl.load(p_norm + 2 * C + o_c, mask=m_c, other=0.0)[None, :]
    b_sum = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    tiles = tl.cdiv(pixels, BLOCK_P)
    tiles_per_part = tl.cdiv(tiles, parts)
    first = i_part * tiles_per_part
    for i_tile in tl.range(first, tl.minimum(first + tiles_per_part, tiles), num_stages=STAGES):
        i_row = i_tile * BLOCK_P
        m = (o_p < pixels - i_row)[:, None] & m_c[None, :]
        start = (i_image.to(tl.int64) * pixels + i_row) * C
        b_x = widen(tl.load(p_x + start + o, mask=m, other=0.0))
        if p_norm is not None:
            b_x = activate((b_x - mean) * scale + shift, ACTIVATION, FAST)
        if p_other is not None:
            b_x = b_x * widen(tl.load(p_other + start + o, mask=m, other=0.0))
        b_sum += tl.where(m, b_x, 0.0)
    tl.store(p_partials + i_program.to(tl.int64) * C + o_c, tl.sum(b_sum, 0), mask=m_c)


@triton.jit
def scale_kernel(
    p_x,
    p_gate,
    p_shift,
    p_y,
    rows,
    image_pixels,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """x * gate + shift, both (images, C) and looked up by each row's image."""
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    i_row = tl.program_id(0) // blocks * BLOCK_P
    o_c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    o_p = tl.arange(0, BLOCK_P)
    m = (o_p < rows - i_row)[:, None] & (o_c < C)[None, :]
    start = i_row.to(tl.int64) * C
    o = o_p[:, None] * C + o_c[None, :]
    o_gate = (tl.minimum(i_row + o_p, rows - 1) // image_pixels)[:, None] * C + o_c[None, :]
    b_y = widen(tl.load(p_x + start + o, mask=m, other=0.0)) * tl.load(p_gate + o_gate, mask=m, other=0.0)
    if p_shift is not None:
        b_y += tl.load(p_shift + o_gate, mask=m, other=0.0)
    tl.store(p_y + start + o, narrow(b_y, p_y.dtype.element_ty), mask=m)


@triton.jit
def _pooled(p_partials, o_i, m_i, o_c, m_c, pixels, parts, C: tl.constexpr, ACC: tl.constexpr):  # [G, BC]
    # Several parts at once: one after the other, each addition would wait for its load.
    AT_ONCE: tl.constexpr = (15 + o_i.shape[0]) // o_i.shape[0]
    b_pooled = tl.zeros([o_i.shape[0], o_c.shape[0]], ACC)
    m = m_i[:, None, None] & m_c[None, None, :]
    for first in range(0, parts, AT_ONCE):
        o_part = first + tl.arange(0, AT_ONCE)[None, :, None]
        o = ((o_i * parts)[:, None, None] + o_part).to(tl.int64) * C + o_c[None, None, :]
        b_pooled += tl.sum(tl.load(p_partials + o, mask=m & (o_part < parts), other=0.0), 1)
    return b_pooled / pixels


@triton.jit
def _expand_tile(p_expand, p_expand_bias, b_hidden, o_c, m_c, o_r, m_r, R: tl.constexpr):  # [G, BC]
    b_w = widen(tl.load(p_expand + o_c[:, None] * R + o_r[None, :], mask=m_c[:, None] & m_r[None, :], other=0.0))
    b_q = tl.sum(b_w[None, :, :] * b_hidden[:, None, :], 2)
    if p_expand_bias is not None:
        b_q += widen(tl.load(p_expand_bias + o_c, mask=m_c, other=0.0))[None, :]
    return b_q


@triton.jit
def gate_fwd_kernel(
    p_partials,
    p_reduce,
    p_reduce_bias,
    p_expand,
    p_expand_bias,
    p_pooled,
    p_gate,
    images,
    pixels,
    parts,
    slices,
    C: tl.constexpr,
    R: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """gate(expand(activation(reduce(pooled)))); a program: BLOCK_I images, and a slice of the channels of the gate.

    The reduction is done again for each slice, so that a batch of one image is more than one program.
    """
    ACC: tl.constexpr = p_pooled.dtype.element_ty
    o_i = tl.program_id(0) // slices * BLOCK_I + tl.arange(0, BLOCK_I)
    i_slice = tl.program_id(0) % slices
    m_i = o_i < images
    o_r = tl.arange(0, BLOCK_R)
    m_r = o_r < R
    b_hidden = tl.zeros([BLOCK_I, BLOCK_R], ACC)
    for i_c in range(0, C, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        b_pooled = _pooled(p_partials, o_i, m_i, o_c, m_c, pixels, parts, C, ACC)
        p_mine = p_pooled + o_i[:, None] * C + o_c[None, :]
        tl.store(p_mine, b_pooled, mask=m_i[:, None] & m_c[None, :] & (i_slice == 0))
        b_w = widen(tl.load(p_reduce + o_r[:, None] * C + o_c[None, :], mask=m_r[:, None] & m_c[None, :], other=0.0))
        b_hidden += tl.sum(b_w[None, :, :] * b_pooled[:, None, :], 2)
    if p_reduce_bias is not None:
        b_hidden += widen(tl.load(p_reduce_bias + o_r, mask=m_r, other=0.0))[None, :]
    b_hidden = activate(b_hidden, ACTIVATION)
    for i_c in range(i_slice * BLOCK_C, C, slices * BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        b_q = _expand_tile(p_expand, p_expand_bias, b_hidden, o_c, m_c, o_r, m_r, R)
        tl.store(p_gate + o_i[:, None] * C + o_c[None, :], gate(b_q, GATE), mask=m_i[:, None] & m_c[None, :])


@triton.jit
def _summed(p_sums, row: tl.constexpr, o_i, m, o_c, parts, ROWS: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr):
    """Row ``row`` of the sums (images, parts, ROWS, C), over the parts; [G, BC]."""
    b_sum = tl.zeros([o_i.shape[0], o_c.shape[0]], ACC)
    for i in range(0, parts):
        o = ((o_i * parts + i).to(tl.int64)[:, None] * ROWS + row) * C + o_c[None, :]
        b_sum += tl.load(p_sums + o, mask=m, other=0.0)
    return b_sum


@triton.jit
def gate_bwd_kernel(
    p_sums,
    p_pooled,
    p_reduce,
    p_reduce_bias,
    p_expand,
    p_expand_bias,
    p_expanded_grad,
    p_reduced_grad,
    p_hidden,
    p_gate,
    p_pooled_grad,
    p_partials,
    images,
    pixels,
    parts,
    C: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Step B3 of docs/mbconv.md for BLOCK_I images, but for the sums over images that the weights need."""
    ACC: tl.constexpr = p_pooled.dtype.element_ty
    o_i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    m_i = o_i < images
    o_r = tl.arange(0, BLOCK_R)
    m_r = o_r < R
    b_reduced = tl.zeros([BLOCK_I, BLOCK_R], ACC)
    for i_c in range(0, C, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        b_pooled = tl.load(p_pooled + o_i[:, None] * C + o_c[None, :], mask=m_i[:, None] & m_c[None, :], other=0.0)
        b_w = widen(tl.load(p_reduce + o_r[:, None] * C + o_c[None, :], mask=m_r[:, None] & m_c[None, :], other=0.0))
        b_reduced += tl.sum(b_w[None, :, :] * b_pooled[:, None, :], 2)
    if p_reduce_bias is not None:
        b_reduced += widen(tl.load(p_reduce_bias + o_r, mask=m_r, other=0.0))[None, :]
    b_hidden = activate(b_reduced, ACTIVATION)

    b_hidden_grad = tl.zeros([BLOCK_I, BLOCK_R], ACC)
    for i_c in range(0, C, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        m = m_i[:, None] & m_c[None, :]
        o_ic = o_i[:, None] * C + o_c[None, :]
        b_q = _expand_tile(p_expand, p_expand_bias, b_hidden, o_c, m_c, o_r, m_r, R)
        b_expanded_grad = _summed(p_sums, 0, o_i, m, o_c, parts, ROWS, C, ACC) * gate_gradient(b_q, GATE)
        tl.store(p_expanded_grad + o_ic, b_expanded_grad, mask=m)
        tl.store(p_gate + o_ic, gate(b_q, GATE), mask=m)
        b_w = widen(tl.load(p_expand + o_c[:, None] * R + o_r[None, :], mask=m_c[:, None] & m_r[None, :], other=0.0))
        b_hidden_grad += tl.sum(b_w[None, :, :] * b_expanded_grad[:, :, None], 1)
    b_reduced_grad = b_hidden_grad * activation_gradient(b_reduced, ACTIVATION)
    o_ir = o_i[:, None] * R + o_r[None, :]
    m_ir = m_i[:, None] & m_r[None, :]
    tl.store(p_reduced_grad + o_ir, b_reduced_grad, mask=m_ir)
    tl.store(p_hidden + o_ir, b_hidden, mask=m_ir)

    for i_c in range(0, C, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        m = m_i[:, None] & m_c[None, :]
        o_ic = o_i[:, None] * C + o_c[None, :]
        b_w = widen(tl.load(p_reduce + o_r[:, None] * C + o_c[None, :], mask=m_r[:, None] & m_c[None, :], other=0.0))
        b_pooled_grad = tl.sum(b_w[None, :, :] * b_reduced_grad[:, :, None], 1) / pixels
        tl.store(p_pooled_grad + o_ic, b_pooled_grad, mask=m)
        if ROWS == 5:
            b_q = _expand_tile(p_expand, p_expand_bias, b_hidden, o_c, m_c, o_r, m_r, R)
            b_gate = gate(b_q, GATE)
            b_sum = b_gate * _summed(p_sums, 1, o_i, m, o_c, parts, ROWS, C, ACC)
            b_sum += b_pooled_grad * _summed(p_sums, 2, o_i, m, o_c, parts, ROWS, C, ACC)
            b_moment = b_gate * _summed(p_sums, 3, o_i, m, o_c, parts, ROWS, C, ACC)
            b_moment += b_pooled_grad * _summed(p_sums, 4, o_i, m, o_c, parts, ROWS, C, ACC)
            tl.store(p_partials + o_i[:, None] * (2 * C) + o_c[None, :], b_sum, mask=m)
            tl.store(p_partials + o_i[:, None] * (2 * C) + C + o_c[None, :], b_moment, mask=m)


@triton.jit
def gate_bwd_kernel_weight(
    p_expanded_grad,
    p_reduced_grad,
    p_hidden,
    p_pooled,
    p_reduce_grad,
    p_reduce_bias_grad,
    p_expand_grad,
    p_expand_bias_grad,
    images,
    C: tl.constexpr,
    R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The gradients of both weights and biases for a block of channels: products over the images."""
    ACC: tl.constexpr = p_pooled.dtype.element_ty
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    o_r = tl.arange(0, BLOCK_R)
    m_r = o_r < R
    b_expand = tl.zeros([BLOCK_C, BLOCK_R], ACC)
    b_reduce = tl.zeros([BLOCK_R, BLOCK_C], ACC)
    b_expand_bias = tl.zeros([BLOCK_C], ACC)
    b_reduce_bias = tl.zeros([BLOCK_R], ACC)
    for i in range(0, images, BLOCK_I):
        o_i = i + tl.arange(0, BLOCK_I)
        m_ic = (o_i < images)[:, None] & m_c[None, :]
        m_ir = (o_i < images)[:, None] & m_r[None, :]
        o_ic = o_i[:, None] * C + o_c[None, :]
        o_ir = o_i[:, None] * R + o_r[None, :]
        b_expanded_grad = tl.load(p_expanded_grad + o_ic, mask=m_ic, other=0.0)
        b_reduced_grad = tl.load(p_reduced_grad + o_ir, mask=m_ir, other=0.0)
        b_hidden = tl.load(p_hidden + o_ir, mask=m_ir, other=0.0)
        b_pooled = tl.load(p_pooled + o_ic, mask=m_ic, other=0.0)
        b_expand = tl.dot(tl.trans(b_expanded_grad), b_hidden, b_expand, input_precision="ieee", out_dtype=ACC)
        b_reduce = tl.dot(tl.trans(b_reduced_grad), b_pooled, b_reduce, input_precision="ieee", out_dtype=ACC)
        b_expand_bias += tl.sum(b_expanded_grad, 0)
        b_reduce_bias += tl.sum(b_reduced_grad, 0)
    o_cr = o_c[:, None] * R + o_r[None, :]
    m_cr = m_c[:, None] & m_r[None, :]
    tl.store(p_expand_grad + o_cr, narrow(b_expand, p_expand_grad.dtype.element_ty), mask=m_cr)
    o_rc = o_r[:, None] * C + o_c[None, :]
    m_rc = m_r[:, None] & m_c[None, :]
    tl.store(p_reduce_grad + o_rc, narrow(b_reduce, p_reduce_grad.dtype.element_ty), mask=m_rc)
    if p_expand_bias_grad is not None:
        tl.store(p_expand_bias_grad + o_c, narrow(b_expand_bias, p_expand_bias_grad.dtype.element_ty), mask=m_c)
    if p_reduce_bias_grad is not None:
        first = m_r & (tl.program_id(0) == 0)
        tl.store(p_reduce_bias_grad + o_r, narrow(b_reduce_bias, p_reduce_bias_grad.dtype.element_ty), mask=first)


@tuning.heuristic("squeeze_excite_pool")
def _pool_rule(shape: Mapping[str, int], arch: Architecture) -> Config:
    block_c = channel_block(shape["channels"])
    block_p = max(16, min(2048 // block_c, next_power_of_2(shape["pixels"])))
    tiles, blocks = cdiv(shape["pixels"], block_p), cdiv(shape["channels"], block_c)
    wanted = cdiv(8 * arch.multiprocessors, shape["images"] * blocks)
    parts = max(1, min(tiles, 64, max(wanted, cdiv(tiles, 64))))
    return {"block_p": block_p, "block_c": block_c, "parts": parts, "stages": 3, "num_warps": 4}


@tuning.heuristic("squeeze_excite_scale")
def _scale_rule(shape: Mapping[str, int], arch: Architecture) -> Config:
    block_c = channel_block(shape["channels"])
    return {"block_p": max(16, 4096 // block_c), "block_c": block_c, "num_warps": 4}


@tuning.heuristic("squeeze_excite_gate")
def _gate_rule(shape: Mapping[str, int], arch: Architecture) -> Config:
    """More images a program where there are enough: each reads both weights."""
    block_r = next_power_of_2(shape["reduced"])
    block_c = max(16, min(128, 4096 // block_r, next_power_of_2(shape["channels"])))
    block_i = 4 if shape["images"] >= arch.multiprocessors and block_r <= 256 else 1
    programs = cdiv(shape["images"], block_i)
    most = cdiv(shape["channels"], block_c)
    slices = max(1, min(most, cdiv(arch.multiprocessors, programs), 8))
    return {"block_i": block_i, "block_c": block_c, "slices": slices, "num_warps": 8 if block_i * block_r > 128 else 4}


def _pool_shape(x: Tensor) -> dict[str, int]:
    images, pixels, channels = x.shape
    return {"images": images, "pixels": pixels, "channels": channels, "element_size": x.element_size()}


def pool(x: Tensor, norm: Tensor | None = None, activation: str = "none", other: Tensor | None = None) -> Tensor:
    """Sums over pixels of activation(norm(x)), or of x * other, in parts: (images, parts, C) in the compute dtype.

    x: (images, pixels, C), contiguous, not empty, like ``other``. norm: (3, C), without which there is no activation.
    """
    images, pixels, channels = x.shape
    config = tuning.choose("squeeze_excite_pool", _pool_shape(x), x.device)
    partials = torch.empty((images, config["parts"], channels), dtype=wide(x), device=x.device)
    grid = (images * config["parts"] * cdiv(channels, config["block_c"]),)
    launch(pool_kernel, grid,
        x, other, norm, partials, pixels, config["parts"],
        C=channels, ACTIVATION=ACTIVATION_CODES[activation], BLOCK_P=config["block_p"], BLOCK_C=config["block_c"],
        STAGES=config["stages"], num_warps=config["num_warps"],
    )  # fmt: skip
    return partials


def scale(x: Tensor, gate: Tensor, shift: Tensor | None = None) -> Tensor:
    """x * gate + shift for x (images, pixels, C), contiguous, and gate and shift (images, C) in the compute dtype."""
    images, pixels, channels = x.shape
    shape = {"pixels": images * pixels, "channels": channels, "element_size": x.element_size()}
    config = tuning.choose("squeeze_excite_scale", shape, x.device)
    y = torch.empty_like(x)
    grid = (cdiv(images * pixels, config["block_p"]) * cdiv(channels, config["block_c"]),)
    launch(scale_kernel, grid,
        x, gate, shift, y, images * pixels, pixels,
        C=channels, BLOCK_P=config["block_p"], BLOCK_C=config["block_c"], num_warps=config["num_warps"],
    )  # fmt: skip
    return y


_MOST_REGISTERS = 255
"""Left to itself, the compiler spills some in order to fit one program more."""


class Parameters(NamedTuple):
    """reduce (R, C), expand (C, R), with or without two trailing axes of 1, and their biases, all contiguous."""

    reduce_weight: Tensor
    reduce_bias: Tensor | None
    expand_weight: Tensor
    expand_bias: Tensor | None
    activation: str
    gate: str


def gate_forward(partials: Tensor, pixels: int, parameters: Parameters) -> tuple[Tensor, Tensor]:
    """The mean over pixels and the gate, (images, C) both, from sums (images, parts, C)."""
    images, parts, channels = partials.shape
    reduced = parameters.reduce_weight.shape[0]
    shape = {"images": images, "channels": channels, "reduced": reduced}
    config = tuning.choose("squeeze_excite_gate", shape, partials.device)
    pooled, gate = partials.new_empty(images, channels), partials.new_empty(images, channels)
    grid = (cdiv(images, config["block_i"]) * config["slices"],)
    launch(gate_fwd_kernel, grid,
        partials, *parameters[:4], pooled, gate, images, pixels, parts, config["slices"],
        C=channels, R=reduced, ACTIVATION=ACTIVATION_CODES[parameters.activation], GATE=GATE_CODES[parameters.gate],
        BLOCK_I=config["block_i"], BLOCK_C=config["block_c"], BLOCK_R=next_power_of_2(reduced),
        num_warps=config["num_warps"], maxnreg=_MOST_REGISTERS,
    )  # fmt: skip
    return pooled, gate


class GateGradients(NamedTuple):
    """Gradients of the parameters, and what the gradient of the pooled tensor is made of, (images, C).

    ``pooled`` is the gradient of the mean over pixels, divided by their number. ``partials`` (images, 2, C) are the
    sums that the normalisation before the pool needs, None where ``sums`` had one row.
    """

    reduce_weight: Tensor
    reduce_bias: Tensor | None
    expand_weight: Tensor
    expand_bias: Tensor | None
    gate: Tensor
    pooled: Tensor
    partials: Tensor | None


def gate_backward(sums: Tensor, pixels: int, pooled: Tensor, parameters: Parameters) -> GateGradients:
    """The gradients of `gate_forward` and of the gate's use.

    Args:
        sums: (images, parts, rows, C). With one row: sums over pixels of z u, where u * gate is what was used and z its
            gradient. With five also those of z s, s, z s c and s c: see `pointwise.input_gradient`.
        pooled: (images, C), as the forward made it.
    """
    images, parts, rows, channels = sums.shape
    reduced = parameters.reduce_weight.shape[0]
    shape = {"images": images, "channels": channels, "reduced": reduced}
    config = tuning.choose("squeeze_excite_gate", shape, sums.device)
    expanded_grad, gate, pooled_grad = (pooled.new_empty(images, channels) for _ in range(3))
    reduced_grad, hidden = (pooled.new_empty(images, reduced) for _ in range(2))
    partials = pooled.new_empty(images, 2, channels) if rows == 5 else None
    block_r = next_power_of_2(reduced)
    launch(gate_bwd_kernel, (cdiv(images, config["block_i"]),),
        sums, pooled, *parameters[:4], expanded_grad, reduced_grad, hidden, gate, pooled_grad, partials,
        images, pixels, parts,
        C=channels, R=reduced, ROWS=rows,
        ACTIVATION=ACTIVATION_CODES[parameters.activation], GATE=GATE_CODES[parameters.gate],
        BLOCK_I=config["block_i"], BLOCK_C=config["block_c"], BLOCK_R=block_r, num_warps=config["num_warps"],
        maxnreg=_MOST_REGISTERS,
    )  # fmt: skip
    gradients = [None if p is None else torch.empty_like(p) for p in parameters[:4]]
    # Both gradients stay in registers, with 255 of them for each thread.
    block_c = 32 if block_r <= 128 else 16
    launch(gate_bwd_kernel_weight, (cdiv(channels, block_c),),
        expanded_grad, reduced_grad, hidden, pooled, *gradients, images,
        C=channels, R=reduced, BLOCK_I=16, BLOCK_C=block_c, BLOCK_R=max(16, block_r),
        num_warps=4 if block_r <= 256 else 8,
    )  # fmt: skip
    return GateGradients(*gradients, gate, pooled_grad, partials)
