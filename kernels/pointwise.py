"""1x1 convolution as a matrix product that carries its neighbours with it: forward, input and weight gradient.

Activations are (images, pixels, channels), contiguous. A program owns one block of output channels and walks over tiles
of pixels of one image; where nothing depends on the image, the batch counts as one image. docs/triton.md has the
formulas and the bytes.
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
    INTERPRETED,
    activate,
    activation_gradient,
    narrow,
    widen,
)
from effnet_ops.kernels.batch_norm import wide
from effnet_ops.kernels.reduction import sum_partials
from effnet_ops.kernels.tuning import Architecture, Config


@triton.jit
def _normalise(x, p_norm, o_c, m_c, C: tl.constexpr):
    """(x - mean) * scale + shift with p_norm (3, C); centred, since |mean| can be far larger than the deviation."""
    mean = tl.load(p_norm + o_c, mask=m_c, other=0.0)[None, :]
    scale = tl.load(p_norm + C + o_c, mask=m_c, other=0.0)[None, :]
    shift = tl.load(p_norm + 2 * C + o_c, mask=m_c, other=0.0)[None, :]
    return (x - mean) * scale + shift


@triton.jit
def _image_of_rows(i_image, i_row, o_p, pixels, image_pixels, GATHER: tl.constexpr):
    """The image that each row of a tile belongs to: one number, or with GATHER, where tiles cross images, [BP, 1]."""
    if GATHER:
        return (tl.minimum(i_row + o_p, pixels - 1) // image_pixels)[:, None]
    else:
        return i_image


@triton.jit
def _input_tile(
    p_x, o_x, m_x, p_norm, p_gate, o_image, o_c, m_c, C: tl.constexpr, ACTIVATION: tl.constexpr, DOT: tl.constexpr
):  # [BP, BC]
    """activation(norm(x)) * gate of each row's image, ready for a product."""
    b_x = tl.load(p_x + o_x, mask=m_x, other=0.0)
    if p_norm is not None or p_gate is not None or ACTIVATION != 0:
        b_x = widen(b_x)
        if p_norm is not None:
            b_x = _normalise(b_x, p_norm, o_c, m_c, C)
        b_x = activate(b_x, ACTIVATION, p_x.dtype.element_ty == tl.bfloat16)
        if p_gate is not None:
            b_x = b_x * tl.load(p_gate + o_image * C + o_c[None, :], mask=m_x, other=0.0)
    return b_x.to(DOT)


@triton.jit
def _gradient_tile(
    p_grad, p_a, o_g, m_g, p_coefficients, p_image_scale, o_image, o_c, m_c, C: tl.constexpr, DOT: tl.constexpr
):  # [BP, BC]
    """The gradient before a normalisation, A * grad + B * (a - mean) + D with p_coefficients (4, C); 0 where masked."""
    b_g = tl.load(p_grad + o_g, mask=m_g, other=0.0)
    if p_image_scale is not None:
        b_g = widen(b_g) * tl.load(p_image_scale + o_image)
    if p_coefficients is not None:
        b_a = widen(tl.load(p_a + o_g, mask=m_g, other=0.0))
        mean = tl.load(p_coefficients + o_c, mask=m_c, other=0.0)[None, :]
        of_grad = tl.load(p_coefficients + C + o_c, mask=m_c, other=0.0)[None, :]
        of_a = tl.load(p_coefficients + 2 * C + o_c, mask=m_c, other=0.0)[None, :]
        constant = tl.load(p_coefficients + 3 * C + o_c, mask=m_c, other=0.0)[None, :]
        b_g = tl.where(m_g, of_grad * widen(b_g) + (of_a * (b_a - mean) + constant), 0.0)
    return b_g.to(DOT)


@triton.jit
def pointwise_fwd_kernel(
    p_x,
    p_weight,
    p_y,
    p_norm,
    p_gate,
    p_bias,
    p_out_norm,
    p_image_scale,
    p_residual,
    p_grad,
    p_partials,
    pixels,
    image_pixels,
    parts,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OUT_ACTIVATION: tl.constexpr,
    GATHER: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y = epilogue(W prologue(x)); a program: one (image, part of its pixels, block of output channels)."""
    ACC: tl.constexpr = tl.float64 if p_x.dtype.element_ty == tl.float64 else tl.float32
    FAST: tl.constexpr = p_x.dtype.element_ty == tl.bfloat16
    blocks: tl.constexpr = (C_OUT + BLOCK_OUT - 1) // BLOCK_OUT
    i_block = tl.program_id(0) % blocks
    i_program = tl.program_id(0) // blocks
    i_part = i_program % parts
    i_image = i_program // parts
    o_out = i_block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    m_out = o_out < C_OUT
    o_in = tl.arange(0, BLOCK_IN)
    ONE_STEP: tl.constexpr = C_IN <= BLOCK_IN
    if ONE_STEP:
        m_weight = (o_in[:, None] < C_IN) & m_out[None, :]
        b_weight = tl.load(p_weight + o_out[None, :] * C_IN + o_in[:, None], mask=m_weight, other=0.0).to(DOT)
    count = tl.full([], 0.0, ACC)
    b_mean = tl.zeros([BLOCK_OUT], ACC)
    b_squares = tl.zeros([BLOCK_OUT], ACC)

    tiles = tl.cdiv(pixels, BLOCK_P)
    tiles_per_part = tl.cdiv(tiles, parts)
    first = i_part * tiles_per_part
    last = tl.minimum(first + tiles_per_part, tiles)
    for i_tile in tl.range(first, last, num_stages=STAGES if ONE_STEP else 1):
        start = i_image.to(tl.int64) * pixels + i_tile * BLOCK_P
        valid = tl.minimum(pixels - i_tile * BLOCK_P, BLOCK_P)
        o_p = tl.arange(0, BLOCK_P)
        m_p = o_p < valid
        p_tile = p_x + start * C_IN
        o_image = _image_of_rows(i_image, i_tile * BLOCK_P, o_p, pixels, image_pixels, GATHER)
        b_acc = tl.zeros([BLOCK_P, BLOCK_OUT], ACC)
        if ONE_STEP:
            m_in = o_in < C_IN
            m_x = m_p[:, None] & m_in[None, :]
            o_x = o_p[:, None] * C_IN + o_in[None, :]
            b_x = _input_tile(p_tile, o_x, m_x, p_norm, p_gate, o_image, o_in, m_in, C_IN, ACTIVATION, DOT)
            b_acc = tl.dot(b_x, b_weight, b_acc, input_precision=PRECISION, out_dtype=ACC)
        else:
            for k in tl.range(0, C_IN, BLOCK_IN, num_stages=STAGES):
                o_k = k + o_in
                m_k = o_k < C_IN
                m_x = m_p[:, None] & m_k[None, :]
                o_x = o_p[:, None] * C_IN + o_k[None, :]
                b_x = _input_tile(p_tile, o_x, m_x, p_norm, p_gate, o_image, o_k, m_k, C_IN, ACTIVATION, DOT)
                m_weight = m_k[:, None] & m_out[None, :]
                b_w = tl.load(p_weight + o_out[None, :] * C_IN + o_k[:, None], mask=m_weight, other=0.0).to(DOT)
                b_acc = tl.dot(b_x, b_w, b_acc, input_precision=PRECISION, out_dtype=ACC)

        m_y = m_p[:, None] & m_out[None, :]
        o_y = o_p[:, None] * C_OUT + o_out[None, :]
        if p_bias is not None:
            b_acc += widen(tl.load(p_bias + o_out, mask=m_out, other=0.0))[None, :]
        if p_out_norm is not None:
            b_acc = _normalise(b_acc, p_out_norm, o_out, m_out, C_OUT)
        if p_grad is not None:
            b_grad = widen(tl.load(p_grad + start * C_OUT + o_y, mask=m_y, other=0.0))
            b_acc = b_grad * activation_gradient(b_acc, OUT_ACTIVATION, FAST)
        else:
            b_acc = activate(b_acc, OUT_ACTIVATION, FAST)
        if p_image_scale is not None:
            b_acc = b_acc * tl.load(p_image_scale + o_image)
        if p_residual is not None:
            b_acc += widen(tl.load(p_residual + start * C_OUT + o_y, mask=m_y, other=0.0))
        b_y = narrow(b_acc, p_y.dtype.element_ty)
        tl.store(p_y + start * C_OUT + o_y, b_y, mask=m_y)

        if p_partials is not None:
            # Of the values as stored, since those are what the normalisation will see.
            b_v = tl.where(m_p[:, None], widen(b_y), 0.0)
            rows = valid.to(ACC)
            tile_mean = tl.sum(b_v, 0) / rows
            deviation = tl.where(m_p[:, None], b_v - tile_mean[None, :], 0.0)
            delta = tile_mean - b_mean
            share = rows / (count + rows)
            b_squares += tl.sum(deviation * deviation, 0) + delta * delta * (count * share)
            b_mean += delta * share
            count += rows

    if p_partials is not None:
        p_mine = p_partials + i_program.to(tl.int64) * 3 * C_OUT + o_out
        tl.store(p_mine, tl.zeros([BLOCK_OUT], ACC) + count, mask=m_out)
        tl.store(p_mine + C_OUT, b_mean, mask=m_out)
        tl.store(p_mine + 2 * C_OUT, b_squares, mask=m_out)


@triton.jit
def pointwise_bwd_kernel_input(
    p_grad,
    p_a,
    p_weight,
    p_dx,
    p_coefficients,
    p_image_scale,
    p_residual,
    p_through,
    p_through_norm,
    p_sums,
    pixels,
    image_pixels,
    parts,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    THROUGH_ACTIVATION: tl.constexpr,
    SUMS: tl.constexpr,
    GATHER: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx = W^T prologue(grad) (+ residual); a program: one (image, part of its pixels, block of input channels).

    With p_through, dx is the gradient behind an activation (and a gate) of p_through, and the sums over the program's
    pixels that its own normalisation and gate need are formed as dx is made: SUMS of them, (programs, SUMS, C_IN).
    """
    ACC: tl.constexpr = tl.float64 if p_grad.dtype.element_ty == tl.float64 else tl.float32
    FAST: tl.constexpr = p_grad.dtype.element_ty == tl.bfloat16
    blocks: tl.constexpr = (C_IN + BLOCK_IN - 1) // BLOCK_IN
    i_block = tl.program_id(0) % blocks
    i_program = tl.program_id(0) // blocks
    i_part = i_program % parts
    i_image = i_program // parts
    o_in = i_block * BLOCK_IN + tl.arange(0, BLOCK_IN)
    m_in = o_in < C_IN
    o_out = tl.arange(0, BLOCK_OUT)
    ONE_STEP: tl.constexpr = C_OUT <= BLOCK_OUT
    if ONE_STEP:
        m_weight = (o_out[:, None] < C_OUT) & m_in[None, :]
        b_weight = tl.load(p_weight + o_out[:, None] * C_IN + o_in[None, :], mask=m_weight, other=0.0).to(DOT)
    b_s1 = tl.zeros([BLOCK_IN], ACC)
    b_s2 = tl.zeros([BLOCK_IN], ACC)
    b_s3 = tl.zeros([BLOCK_IN], ACC)
    b_s4 = tl.zeros([BLOCK_IN], ACC)
    b_s5 = tl.zeros([BLOCK_IN], ACC)

    tiles = tl.cdiv(pixels, BLOCK_P)
    tiles_per_part = tl.cdiv(tiles, parts)
    first = i_part * tiles_per_part
    last = tl.minimum(first + tiles_per_part, tiles)
    for i_tile in tl.range(first, last, num_stages=STAGES if ONE_STEP else 1):
        start = i_image.to(tl.int64) * pixels + i_tile * BLOCK_P
        o_p = tl.arange(0, BLOCK_P)
        m_p = o_p < pixels - i_tile * BLOCK_P
        p_g = p_grad + start * C_OUT
        o_image = _image_of_rows(i_image, i_tile * BLOCK_P, o_p, pixels, image_pixels, GATHER)
        p_a_tile = p_a
        if p_coefficients is not None:
            p_a_tile = p_a + start * C_OUT
        b_acc = tl.zeros([BLOCK_P, BLOCK_IN], ACC)
        if ONE_STEP:
            m_out = o_out < C_OUT
            m_g = m_p[:, None] & m_out[None, :]
            o_g = o_p[:, None] * C_OUT + o_out[None, :]
            b_g = _gradient_tile(
                p_g, p_a_tile, o_g, m_g, p_coefficients, p_image_scale, o_image, o_out, m_out, C_OUT, DOT
            )
            b_acc = tl.dot(b_g, b_weight, b_acc, input_precision=PRECISION, out_dtype=ACC)
        else:
            for k in tl.range(0, C_OUT, BLOCK_OUT, num_stages=STAGES):
                o_k = k + o_out
                m_k = o_k < C_OUT
                m_g = m_p[:, None] & m_k[None, :]
                o_g = o_p[:, None] * C_OUT + o_k[None, :]
                b_g = _gradient_tile(
                    p_g, p_a_tile, o_g, m_g, p_coefficients, p_image_scale, o_image, o_k, m_k, C_OUT, DOT
                )
                m_weight = m_k[:, None] & m_in[None, :]
                b_w = tl.load(p_weight + o_k[:, None] * C_IN + o_in[None, :], mask=m_weight, other=0.0).to(DOT)
                b_acc = tl.dot(b_g, b_w, b_acc, input_precision=PRECISION, out_dtype=ACC)

        m_x = m_p[:, None] & m_in[None, :]
        o_x = o_p[:, None] * C_IN + o_in[None, :]
        if p_residual is not None:
            b_acc += widen(tl.load(p_residual + start * C_IN + o_x, mask=m_x, other=0.0))
        b_dx = narrow(b_acc, p_dx.dtype.element_ty)
        tl.store(p_dx + start * C_IN + o_x, b_dx, mask=m_x)

        if p_through is not None:
            b_u = widen(tl.load(p_through + start * C_IN + o_x, mask=m_x, other=0.0))
            b_n = _normalise(b_u, p_through_norm, o_in, m_in, C_IN)
            mean = tl.load(p_through_norm + o_in, mask=m_in, other=0.0)[None, :]
            b_slope = tl.where(m_x, activation_gradient(b_n, THROUGH_ACTIVATION, FAST), 0.0)
            b_z = widen(b_dx)
            b_s2 += tl.sum(b_z * b_slope, 0)
            b_s4 += tl.sum(b_z * b_slope * (b_u - mean), 0)
            if SUMS == 5:
                b_s1 += tl.sum(tl.where(m_x, b_z * activate(b_n, THROUGH_ACTIVATION, FAST), 0.0), 0)
                b_s3 += tl.sum(b_slope, 0)
                b_s5 += tl.sum(b_slope * (b_u - mean), 0)

    if p_through is not None:
        p_mine = p_sums + i_program.to(tl.int64) * SUMS * C_IN + o_in
        if SUMS == 5:
            tl.store(p_mine, b_s1, mask=m_in)
            tl.store(p_mine + C_IN, b_s2, mask=m_in)
            tl.store(p_mine + 2 * C_IN, b_s3, mask=m_in)
            tl.store(p_mine + 3 * C_IN, b_s4, mask=m_in)
            tl.store(p_mine + 4 * C_IN, b_s5, mask=m_in)
        else:
            tl.store(p_mine, b_s2, mask=m_in)
            tl.store(p_mine + C_IN, b_s4, mask=m_in)


@triton.jit
def pointwise_bwd_kernel_weight(
    p_grad,
    p_a,
    p_x,
    p_partials,
    p_bias_partials,
    p_coefficients,
    p_image_scale,
    p_norm,
    p_gate,
    images,
    pixels,
    image_pixels,
    splits,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATHER: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sums over a range of tiles of prologue(grad)^T prologue(x), (splits, C_OUT, C_IN), for a second stage to add."""
    ACC: tl.constexpr = tl.float64 if p_grad.dtype.element_ty == tl.float64 else tl.float32
    blocks_in: tl.constexpr = (C_IN + BLOCK_IN - 1) // BLOCK_IN
    blocks_out: tl.constexpr = (C_OUT + BLOCK_OUT - 1) // BLOCK_OUT
    i_in = tl.program_id(0) % blocks_in
    i_out = tl.program_id(0) // blocks_in % blocks_out
    i_split = tl.program_id(0) // (blocks_in * blocks_out)
    o_in = i_in * BLOCK_IN + tl.arange(0, BLOCK_IN)
    m_in = o_in < C_IN
    o_out = i_out * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    m_out = o_out < C_OUT
    b_weight = tl.zeros([BLOCK_OUT, BLOCK_IN], ACC)
    b_bias = tl.zeros([BLOCK_OUT], ACC)

    tiles_per_image = tl.cdiv(pixels, BLOCK_P)
    tiles = images * tiles_per_image
    tiles_per_split = tl.cdiv(tiles, splits)
    first = i_split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tiles)
    for i_tile in tl.range(first, last, num_stages=STAGES):
        i_image = i_tile // tiles_per_image
        i_row = (i_tile % tiles_per_image) * BLOCK_P
        start = i_image.to(tl.int64) * pixels + i_row
        o_p = tl.arange(0, BLOCK_P)
        m_p = o_p < pixels - i_row
        m_g = m_p[:, None] & m_out[None, :]
        o_g = o_p[:, None] * C_OUT + o_out[None, :]
        p_a_tile = p_a
        if p_coefficients is not None:
            p_a_tile = p_a + start * C_OUT
        o_image = _image_of_rows(i_image, i_row, o_p, pixels, image_pixels, GATHER)
        p_g = p_grad + start * C_OUT
        b_g = _gradient_tile(p_g, p_a_tile, o_g, m_g, p_coefficients, p_image_scale, o_image, o_out, m_out, C_OUT, DOT)
        m_x = m_p[:, None] & m_in[None, :]
        o_x = o_p[:, None] * C_IN + o_in[None, :]
        p_tile = p_x + start * C_IN
        b_x = _input_tile(p_tile, o_x, m_x, p_norm, p_gate, o_image, o_in, m_in, C_IN, ACTIVATION, DOT)
        b_weight = tl.dot(tl.trans(b_g), b_x, b_weight, input_precision=PRECISION, out_dtype=ACC)
        if p_bias_partials is not None:
            b_bias += tl.sum(b_g.to(ACC), 0)

    o_w = o_out[:, None] * C_IN + o_in[None, :]
    p_mine = p_partials + i_split.to(tl.int64) * C_OUT * C_IN
    tl.store(p_mine + o_w, b_weight, mask=m_out[:, None] & m_in[None, :])
    if p_bias_partials is not None:
        tl.store(p_bias_partials + i_split.to(tl.int64) * C_OUT + o_out, b_bias, mask=m_out & (i_in == 0))


def precision(dtype: torch.dtype) -> str:
    """How products of fp32 are taken: TF32 where torch.backends.cuda.matmul allows it; by default it does not."""
    if dtype != torch.float32:
        return "ieee"
    setting = torch.backends.cuda.matmul.fp32_precision
    return "tf32" if (torch.backends.fp32_precision if setting == "none" else setting) == "tf32" else "ieee"


def product_dtype(dtype: torch.dtype) -> tl.dtype:
    """What a product's operands are rounded to: the activations' dtype, which the interpreter can only do in fp32."""
    if dtype == torch.float64:
        return tl.float64
    if dtype == torch.float32 or INTERPRETED:
        return tl.float32
    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float16


def _width(channels: int, other: int, most: int) -> int:
    """The block of channels that wastes least: of padding, and of reading the other operand once a block."""
    sizes = [size for size in (16, 32, 64, 128, 256) if size <= most]
    return min(sizes, key=lambda size: triton.cdiv(channels, size) * (size + other / 4))


def _rows(pixels: int, most: int) -> int:
    return max(16, min(most, triton.next_power_of_2(pixels)))


def _parts(images: int, tiles: int, blocks: int, arch: Architecture) -> int:
    """Into how many parts an image's tiles are split: enough for four programs a multiprocessor, else long walks."""
    wanted = triton.cdiv(4 * arch.multiprocessors, images * blocks)
    return max(1, min(tiles, max(wanted, triton.cdiv(tiles, 64))))


def _wide_tiles(shape: Mapping[str, int], arch: Architecture) -> bool:
    """Halves, on tensor cores, leave more registers than fp32; the interpreter only counts programs."""
    return shape["element_size"] == 2 or arch.name == "interpreter"


def _few(images: int, pixels: int, block_p: int, channels: int, block: int, arch: Architecture) -> bool:
    return images * triton.cdiv(pixels, block_p) * triton.cdiv(channels, block) < arch.multiprocessors


def _product_rule(
    shape: Mapping[str, int],
    arch: Architecture,
    reduced: int,
    kept: int,
    most_rows: int,
    most_kept: int,
    four_warps: int,
) -> Config:
    """Tiles of a product of (images x pixels, reduced) with (reduced, kept).

    The limits keep each operand and the result at 16 to 64 registers a thread: more spill (tests compile them all).
    ``four_warps`` is the largest tile that four warps work on.
    """
    images, pixels, size = shape["images"], shape["pixels"], shape["element_size"]
    block_kept = _width(kept, reduced, most_kept)
    most_reduced = 64 if _wide_tiles(shape, arch) else 32
    block_reduced = max(16, min(most_reduced, triton.next_power_of_2(reduced)))
    block_p = _rows(pixels, most_rows)
    while block_p > 16 and _few(images, pixels, block_p, kept, block_kept, arch):
        block_p //= 2
    while block_kept > 32 and _few(images, pixels, block_p, kept, block_kept, arch):
        block_kept //= 2
    blocks = triton.cdiv(kept, block_kept)
    return {
        "block_p": block_p,
        "block_reduced": block_reduced,
        "block_kept": block_kept,
        "parts": _parts(images, triton.cdiv(pixels, block_p), blocks, arch),
        "num_warps": 4 if block_p * max(block_kept, block_reduced) <= four_warps else 8,
        "stages": 3 if size == 2 else 2,
    }


@tuning.heuristic("pointwise_forward")
def _forward_rule(shape: Mapping[str, int], arch: Architecture) -> Config:
    limits = (128, 64) if _wide_tiles(shape, arch) else (64, 32)
    return _product_rule(shape, arch, shape["channels_in"], shape["channels_out"], *limits, 4096)


@tuning.heuristic("pointwise_input_gradient")
def _input_gradient_rule(shape: Mapping[str, int], arch: Architecture) -> Config:
    """Smaller than the forward's: two tensors are read for each operand, and sums need more tiles of the result."""
    limits = (64, 64) if _wide_tiles(shape, arch) else (32, 32)
    return _product_rule(shape, arch, shape["channels_out"], shape["channels_in"], *limits, 2048)


@tuning.heuristic("pointwise_weight_gradient")
def _weight_gradient_rule(shape: Mapping[str, int], arch: Architecture) -> Config:
    images, pixels, size = shape["images"], shape["pixels"], shape["element_size"]
    most = 128 if _wide_tiles(shape, arch) else 32
    block_in = _width(shape["channels_in"], shape["channels_out"], most)
    block_out = _width(shape["channels_out"], shape["channels_in"], most)
    if block_in * block_out > 64 * 128:
        block_in = 64
    block_p = _rows(pixels, 64 if _wide_tiles(shape, arch) else 32)
    blocks = triton.cdiv(shape["channels_in"], block_in) * triton.cdiv(shape["channels_out"], block_out)
    tiles = images * triton.cdiv(pixels, block_p)
    return {
        "block_p": block_p,
        "block_in": block_in,
        "block_out": block_out,
        "splits": max(1, min(tiles, triton.cdiv(4 * arch.multiprocessors, blocks))),
        "num_warps": 8 if max(block_in, block_out) > 64 else 4,
        "stages": 3 if size == 2 else 2,
    }


def _shape(images: int, pixels: int, weight: Tensor, like: Tensor) -> dict[str, int]:
    return {
        "images": images,
        "pixels": pixels,
        "channels_in": weight.shape[1],
        "channels_out": weight.shape[0],
        "element_size": like.element_size(),
    }


_SMALL_IMAGE = 128


def _images(x: Tensor, of_image: bool) -> tuple[int, int, bool]:
    """(images, pixels, GATHER) as kernels see x: one image of all pixels where nothing depends on the image.

    Images smaller than a tile are put together, too, and each row looks its image up.
    """
    images, pixels = x.shape[:2]
    together = not of_image or pixels < _SMALL_IMAGE
    return (1, images * pixels, of_image) if together else (images, pixels, False)


_MANY_PIXELS = 8192


def _weight_as_read(weight: Tensor, x: Tensor, block_reduced: int, reduced: int) -> Tensor:
    """The weight in x's dtype where that pays for a launch: where it is read again for each of many tiles."""
    again = reduced > block_reduced and x.shape[0] * x.shape[1] >= _MANY_PIXELS
    return weight.to(x.dtype) if again and not INTERPRETED else weight


def forward(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Tensor | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    out_norm: Tensor | None = None,
    out_activation: str = "none",
    image_scale: Tensor | None = None,
    residual: Tensor | None = None,
    grad: Tensor | None = None,
    statistics: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """out_activation(out_norm(W (activation(norm(x)) * gate) + bias)) * image_scale + residual, each part optional.

    Args:
        x: (images, pixels, Cin), contiguous, not empty.
        weight: (Cout, Cin) or (Cout, Cin, 1, 1), contiguous.
        norm, out_norm: (3, Cin) and (3, Cout), rows mean, scale and shift, in the compute dtype.
        gate: (images, Cin), image_scale: (images,), in the compute dtype. bias: (Cout,).
        residual: (images, pixels, Cout).
        grad: (images, pixels, Cout): the result is grad * out_activation'(...) in place of out_activation(...).
        statistics: also count, mean and sum of squared deviations of the result, a channel, in parts.

    Returns:
        y (images, pixels, Cout) in the dtype of x, and the partial statistics (programs, 3, Cout) or None.
    """
    images, pixels, gather = _images(x, gate is not None or image_scale is not None)
    config = tuning.choose("pointwise_forward", _shape(images, pixels, weight, x), x.device)
    c_out, c_in = weight.shape[:2]
    weight = _weight_as_read(weight, x, config["block_reduced"], c_in)
    y = torch.empty((*x.shape[:2], c_out), dtype=x.dtype, device=x.device)
    parts = config["parts"]
    partials = None
    if statistics:
        partials = torch.empty((images * parts, 3, c_out), dtype=wide(x), device=x.device)
    grid = (images * parts * triton.cdiv(c_out, config["block_kept"]),)
    pointwise_fwd_kernel[grid](
        x, weight, y, norm, gate, bias, out_norm, image_scale, residual, grad, partials, pixels, x.shape[1], parts,
        C_IN=c_in,
        C_OUT=c_out,
        ACTIVATION=ACTIVATION_CODES[activation],
        OUT_ACTIVATION=ACTIVATION_CODES[out_activation],
        GATHER=gather,
        DOT=product_dtype(x.dtype),
        PRECISION=precision(x.dtype),
        BLOCK_P=config["block_p"],
        BLOCK_IN=config["block_reduced"],
        BLOCK_OUT=config["block_kept"],
        STAGES=config["stages"],
        num_warps=config["num_warps"],
    )  # fmt: skip
    return y, partials


class Through(NamedTuple):
    """The input that a product read: act(norm(a)), times a gate where ``per_image``. See `input_gradient`."""

    a: Tensor
    norm: Tensor
    activation: str
    per_image: bool


def input_gradient(
    grad: Tensor,
    weight: Tensor,
    *,
    coefficients: Tensor | None = None,
    a: Tensor | None = None,
    image_scale: Tensor | None = None,
    residual: Tensor | None = None,
    through: Through | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dx = W^T g + residual, with g = A (image_scale grad) + B (a - mean) + D.

    Args:
        grad: (images, pixels, Cout), contiguous, not empty.
        weight: (Cout, Cin) or (Cout, Cin, 1, 1), contiguous.
        coefficients: (4, Cout), rows mean, A, B and D, with ``a`` (images, pixels, Cout): a normalisation's backward.
        residual: (images, pixels, Cin).
        through: for sums of dx with the slope s = activation'(norm(a)) of the input, formed where dx is.

    Returns:
        dx (images, pixels, Cin) in the dtype of grad, and with ``through`` sums over pixels, where c = a - mean: per
        image (images, parts, 5, Cin) of dx act(norm(a)), dx s, s, dx s c, s c; else (programs, 2, Cin) of dx s, dx s c.
    """
    per_image = through is not None and through.per_image
    images, pixels, gather = _images(grad, image_scale is not None)
    if per_image:
        images, pixels, gather = *grad.shape[:2], False
    shape = {**_shape(images, pixels, weight, grad), "sums": (5 if per_image else 2) if through else 0}
    config = tuning.choose("pointwise_input_gradient", shape, grad.device)
    c_out, c_in = weight.shape[:2]
    weight = _weight_as_read(weight, grad, config["block_reduced"], c_out)
    dx = torch.empty((*grad.shape[:2], c_in), dtype=grad.dtype, device=grad.device)
    parts, rows = config["parts"], 5 if per_image else 2
    sums = None
    if through is not None:
        size = (images, parts, 5, c_in) if per_image else (images * parts, 2, c_in)
        sums = torch.empty(size, dtype=wide(grad), device=grad.device)
    through_a, through_norm, activation = (None, None, "none") if through is None else through[:3]
    grid = (images * parts * triton.cdiv(c_in, config["block_kept"]),)
    pointwise_bwd_kernel_input[grid](
        grad, a, weight, dx, coefficients, image_scale, residual, through_a, through_norm, sums,
        pixels, grad.shape[1], parts,
        C_IN=c_in,
        C_OUT=c_out,
        THROUGH_ACTIVATION=ACTIVATION_CODES[activation],
        SUMS=rows,
        GATHER=gather,
        DOT=product_dtype(grad.dtype),
        PRECISION=precision(grad.dtype),
        BLOCK_P=config["block_p"],
        BLOCK_IN=config["block_kept"],
        BLOCK_OUT=config["block_reduced"],
        STAGES=config["stages"],
        num_warps=config["num_warps"],
    )  # fmt: skip
    return dx, sums


def weight_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    coefficients: Tensor | None = None,
    a: Tensor | None = None,
    image_scale: Tensor | None = None,
    norm: Tensor | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dW = sum over pixels of g z^T, with g as in `input_gradient` and z = activation(norm(x)) * gate as in `forward`.

    Returns:
        dW in the shape and dtype of ``weight``, and the sum of g over pixels in those of ``bias``, or None without one.
    """
    images, pixels, gather = _images(x, gate is not None or image_scale is not None)
    config = tuning.choose("pointwise_weight_gradient", _shape(images, pixels, weight, x), x.device)
    c_out, c_in = weight.shape[:2]
    splits = config["splits"]
    partials = torch.empty((splits, *weight.shape), dtype=wide(x), device=x.device)
    bias_partials = None
    if bias is not None:
        bias_partials = torch.empty((splits, c_out), dtype=wide(x), device=x.device)
    blocks = triton.cdiv(c_in, config["block_in"]) * triton.cdiv(c_out, config["block_out"])
    pointwise_bwd_kernel_weight[(splits * blocks,)](
        grad, a, x, partials, bias_partials, coefficients, image_scale, norm, gate,
        images, pixels, x.shape[1], splits,
        C_IN=c_in,
        C_OUT=c_out,
        ACTIVATION=ACTIVATION_CODES[activation],
        GATHER=gather,
        DOT=product_dtype(x.dtype),
        PRECISION=precision(x.dtype),
        BLOCK_P=config["block_p"],
        BLOCK_IN=config["block_in"],
        BLOCK_OUT=config["block_out"],
        STAGES=config["stages"],
        num_warps=config["num_warps"],
    )  # fmt: skip
    bias_gradient = None if bias is None else sum_partials(bias_partials, bias.dtype)
    return sum_partials(partials, weight.dtype), bias_gradient
