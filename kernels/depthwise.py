"""Depthwise convolution: forward, and one backward kernel for the gradients of input and weight.

Activations are contiguous (N, H, W, C). A program owns a slab of channels and a set of lanes. A lane walks down an
image: at each step it loads the rows of one vertical stride, a few columns wide, and adds what they contribute to the
output rows that are still open. Every loaded element is normalised and activated once, and serves all the outputs of
the lane that see it: (COLS + kw - 1) / COLS loads an output at stride 1, not kh * kw. docs/triton.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effnet_ops.checks import output_size
from effnet_ops.kernels import tuning
from effnet_ops.kernels.activation import (
    ACTIVATION_CODES,
    NONE,
    accumulator,
    activate,
    activation_gradient,
    fold,
    narrow,
    normalise,
)
from effnet_ops.kernels.launching import launch
from effnet_ops.kernels.layout import cdiv, next_power_of_2
from effnet_ops.kernels.reduction import sum_partials
from effnet_ops.kernels.tuning import Architecture, Config

_SIZES = ["height", "width", "out_height", "out_width", "top", "left"]


@triton.constexpr_function
def _row_is_used(row, kernel, stride, dilation):
    """Whether any tap of the kernel meets the row of this number within a stride."""
    return any(tap * dilation % stride == row for tap in range(kernel))


@triton.constexpr_function
def _used_rows(end, kernel, stride, dilation):
    """How many of a stride's rows before ``end`` some tap of the kernel meets."""
    return sum(any(tap * dilation % stride == row for tap in range(kernel)) for row in range(end))


@triton.jit
def _vector(pointer, row, c, C: tl.constexpr, DEFAULT: tl.constexpr, ACC: tl.constexpr):  # [1, BC]
    """One row of a (rows, C) tensor of values a channel, or ``DEFAULT`` where there is no such tensor."""
    if pointer is None:
        return tl.full(c.shape, DEFAULT, ACC)
    else:
        return tl.load(pointer + row * C + c, mask=c < C, other=0.0).to(ACC)


@triton.jit
def _norm(p_norm, c, C: tl.constexpr, KIND: tl.constexpr, FAST: tl.constexpr, FOLDED: tl.constexpr, ACC: tl.constexpr):
    """(mean, scale, shift) of a normalisation in front of an activation, for `normalise`."""
    norm = (_vector(p_norm, 0, c, C, 0, ACC), _vector(p_norm, 1, c, C, 1, ACC), _vector(p_norm, 2, c, C, 0, ACC))
    if FOLDED and p_norm is not None:
        norm = fold(norm, KIND, FAST)
    return norm


@triton.jit
def _weights(p_weight, c, C: tl.constexpr, TAPS: tl.constexpr, ACC: tl.constexpr):
    taps = ()
    for tap in tl.static_range(TAPS):
        taps = taps + (tl.load(p_weight + c * TAPS + tap, mask=c < C, other=0.0).to(ACC),)
    return taps


@triton.jit
def _load_row(p_image, h, w, c, m_lane, height, width, C: tl.constexpr, WIDTH: tl.constexpr):
    """``WIDTH`` neighbouring pixels of row h from column w on, zero outside the image."""
    row = ()
    m_row = m_lane & (h >= 0) & (h < height)
    p_row = p_image + ((h * width + w) * C + c)
    for i in tl.static_range(WIDTH):
        row = row + (tl.load(p_row + i * C, mask=m_row & (w + i >= 0) & (w + i < width), other=0.0),)
    return row


@triton.jit
def _load_step(
    p_image, h, w, c, m_lane, height, width, C: tl.constexpr, KH: tl.constexpr, SH: tl.constexpr, DH: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """The rows of one vertical stride, those that no tap meets left out."""
    rows = ()
    for j in tl.static_range(SH):
        if _row_is_used(j, KH, SH, DH):
            rows = rows + _load_row(p_image, h + j, w, c, m_lane, height, width, C, WIDTH)
    return rows


@triton.jit
def _prologue(
    rows, FIRST: tl.constexpr, h, w, height, width, p_norm, norm, p_gate, gate, ACTIVATION: tl.constexpr,
    FAST: tl.constexpr, FOLDED: tl.constexpr, ACC: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Row h, ``rows`` from FIRST on, from column w on, as the convolution sees it: activation(norm(x)) * gate."""
    seen = ()
    m_row = (h >= 0) & (h < height)
    for i in tl.static_range(WIDTH):
        u = rows[FIRST + i].to(ACC)
        if p_norm is not None:
            u = normalise(u, norm, FOLDED)
        u = activate(u, ACTIVATION, FAST, FOLDED and p_norm is not None)
        if p_gate is not None:
            u = u * gate
        if p_norm is not None:
            # Padding is zero behind the normalisation, not in front of it.
            u = tl.where(m_row & (w + i >= 0) & (w + i < width), u, 0.0)
        seen = seen + (u,)
    return seen


@triton.jit
def _add_row(
    sums, seen, taps, j: tl.constexpr, OPEN: tl.constexpr, COLS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
):  # fmt: skip
    """The sums of the open output rows with what row j of a step contributes to them."""
    added = ()
    for age in tl.static_range(OPEN):
        for column in tl.static_range(COLS):
            y = sums[age * COLS + column]
            if (age * SH + j) % DH == 0 and (age * SH + j) // DH < KH:
                for kw in tl.static_range(KW):
                    y += seen[column * SW + kw * DW] * taps[(age * SH + j) // DH * KW + kw]
            added = added + (y,)
    return added


@triton.jit
def _epilogue(
    y, o_y, m_y, p_bias, bias, p_out_norm, out_norm, p_grad, ACTIVATION: tl.constexpr, FAST: tl.constexpr,
    FOLDED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A finished output as it is stored: activation(out_norm(y + bias)), or grad times the slope there."""
    HALVED: tl.constexpr = FOLDED and p_out_norm is not None
    if p_bias is not None:
        y += bias
    if p_out_norm is not None:
        y = normalise(y, out_norm, FOLDED)
    if p_grad is not None:
        grad = tl.load(p_grad + o_y, mask=m_y, other=0.0).to(ACC)
        y = grad * activation_gradient(y, ACTIVATION, FAST, HALVED)
    else:
        y = activate(y, ACTIVATION, FAST, HALVED)
    return y


@triton.jit
def _finish_row(
    sums, kept, row, step, first_column, m_lane, o_out, c, out_height, out_width, p_y, p_pool, p_statistics, p_bias,
    bias, p_out_norm, out_norm, p_grad, C: tl.constexpr, ACTIVATION: tl.constexpr, FAST: tl.constexpr,
    FOLDED: tl.constexpr, ACC: tl.constexpr, OPEN: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Stores a row of outputs; (pool, origin, total, squares) of ``kept`` with what it adds to them."""
    pool, origin, total, squares = kept
    m_row = m_lane & (step >= OPEN - 1) & (row < out_height)
    o_row = (row * out_width + first_column) * C + c
    for column in tl.static_range(COLS):
        m_y = m_row & (first_column + column < out_width)
        o_y = o_out + (o_row + column * C)
        y = sums[(OPEN - 1) * COLS + column]
        y = _epilogue(y, o_y, m_y, p_bias, bias, p_out_norm, out_norm, p_grad, ACTIVATION, FAST, FOLDED, ACC)
        stored = narrow(y, p_y.dtype.element_ty)
        tl.store(p_y + o_y, stored, mask=m_y)
        if p_pool is not None:
            pool += tl.where(m_y, y, 0.0)
        if p_statistics is not None:
            # Of the values as stored, since those are what the normalisation will see.
            value = stored.to(ACC)
            if column == 0:
                origin = tl.where(step == OPEN - 1, value, origin)
            distance = tl.where(m_y, value - origin, 0.0)
            total += distance
            squares += distance * distance
    return pool, origin, total, squares


@triton.jit
def _copies(value, COUNT: tl.constexpr):
    copies = ()
    for _ in tl.static_range(COUNT):
        copies = copies + (value,)
    return copies


@triton.jit
def _shifted(sums, zero, OPEN: tl.constexpr, COLS: tl.constexpr):
    """The open rows, each a step older, with a new one."""
    shifted = _copies(zero, COLS)
    for i in tl.static_range((OPEN - 1) * COLS):
        shifted = shifted + (sums[i],)
    return shifted


@triton.jit(do_not_specialize=_SIZES)
def depthwise_fwd_kernel(
    p_x, p_weight, p_norm, p_gate, p_out_norm, p_bias, p_grad, p_y, p_pool, p_statistics, height, width, out_height,
    out_width, top, left, C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, ACTIVATION: tl.constexpr, OUT_ACTIVATION: tl.constexpr, OFFSET: tl.constexpr,
    ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """y = epilogue(conv(prologue(x))); a program: one (image, part of its lanes, slab of channels).

    A lane makes ``ROWS`` x ``COLS`` outputs. Of the output rows, ``OPEN`` are begun and not finished at any step.
    """
    DTYPE: tl.constexpr = p_y.dtype.element_ty
    FAST: tl.constexpr = DTYPE == tl.bfloat16
    FOLDED: tl.constexpr = DTYPE.primitive_bitwidth == 16
    OPEN: tl.constexpr = ((KH - 1) * DH + SH) // SH
    WIDTH: tl.constexpr = (COLS - 1) * SW + (KW - 1) * DW + 1
    SLABS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    columns = tl.cdiv(out_width, COLS)
    lanes = columns * tl.cdiv(out_height, ROWS)
    parts = tl.cdiv(lanes, BLOCK_P)
    # Programs that run side by side share pixels, and so the cache lines that two slabs have in common.
    i_slab = tl.program_id(0) % SLABS
    i_tile = tl.program_id(0) // SLABS
    i_image = (i_tile // parts).to(tl.int64)
    lane = (i_tile % parts) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]  # [BP, 1]
    c = i_slab * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]  # [1, BC]
    m_lane = (lane < lanes) & (c < C)  # [BP, BC]
    first_row = (lane // columns).to(OFFSET) * ROWS
    first_column = (lane % columns).to(OFFSET) * COLS

    norm = _norm(p_norm, c, C, ACTIVATION, FAST, FOLDED, ACC)
    out_norm = _norm(p_out_norm, c, C, OUT_ACTIVATION, FAST, FOLDED, ACC)
    gate = _vector(p_gate, i_image, c, C, 1, ACC)
    bias = _vector(p_bias, 0, c, C, 0, ACC)
    taps = _weights(p_weight, c, C, KH * KW, ACC)

    p_image = p_x + i_image * height * width * C
    o_out = i_image * out_height * out_width * C
    h = first_row * SH - top
    w = first_column * SW - left
    zero = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    sums = _copies(zero, OPEN * COLS)
    pool, origin, total, squares = zero, zero, zero, zero
    following = _load_step(p_image, h, w, c, m_lane, height, width, C, KH, SH, DH, WIDTH)
    for step in range(ROWS + OPEN - 1):
        # Loaded a step ahead: the next rows are on their way while these are multiplied.
        rows = following
        following = _load_step(
            p_image, h + SH, w, c, m_lane & (step < ROWS + OPEN - 2), height, width, C, KH, SH, DH, WIDTH
        )
        for j in tl.static_range(SH):
            if _row_is_used(j, KH, SH, DH):
                seen = _prologue(
                    rows, _used_rows(j, KH, SH, DH) * WIDTH, h + j, w, height, width, p_norm, norm, p_gate, gate,
                    ACTIVATION, FAST, FOLDED, ACC, WIDTH,
                )  # fmt: skip
                sums = _add_row(sums, seen, taps, j, OPEN, COLS, KH, KW, SH, SW, DH, DW)
        h += SH

        pool, origin, total, squares = _finish_row(
            sums, (pool, origin, total, squares), first_row + (step - (OPEN - 1)), step, first_column, m_lane, o_out, c,
            out_height, out_width, p_y, p_pool, p_statistics, p_bias, bias, p_out_norm, out_norm, p_grad, C,
            OUT_ACTIVATION, FAST, FOLDED, ACC, OPEN, COLS,
        )  # fmt: skip
        sums = _shifted(sums, zero, OPEN, COLS)

    o_c = i_slab * BLOCK_C + tl.arange(0, BLOCK_C)
    if p_pool is not None:
        tl.store(p_pool + i_tile.to(tl.int64) * C + o_c, tl.sum(pool, axis=0), mask=o_c < C)
    if p_statistics is not None:
        rows_made = tl.minimum(tl.maximum(out_height - first_row, 0), ROWS)
        columns_made = tl.minimum(out_width - first_column, COLS)
        count = tl.where(m_lane, (rows_made * columns_made).to(ACC), 0.0)
        p_mine = p_statistics + i_tile.to(tl.int64) * 3 * C
        _store_statistics(p_mine, o_c, count, origin, total, squares, C)


@triton.jit
def _store_statistics(p_partials, o_c, count, origin, total, squares, C: tl.constexpr):
    """Merges sums around the lanes' own first values into count, mean and squares around the mean (Chan et al., 1979).

    A first value is one of the n that are summed, so the squares around it are at most n times those around the mean:
    no more than that can cancel.
    """
    some = tl.maximum(count, 1.0)
    within = squares - total * total / some
    number = tl.maximum(tl.sum(count, axis=0), 1.0)
    # Means are compared as distances from a value among them, which has fewer digits to lose than they have.
    middle = tl.sum(origin * count, axis=0) / number
    offset = (origin - middle[None, :]) + total / some
    offset_mean = tl.sum(offset * count, axis=0) / number
    mean = middle + offset_mean
    distance = offset - offset_mean[None, :]
    tl.store(p_partials + o_c, number, mask=o_c < C)
    tl.store(p_partials + C + o_c, mean, mask=o_c < C)
    tl.store(
        p_partials + 2 * C + o_c,
        tl.sum(tl.where(count > 0, within + count * distance * distance, 0.0), axis=0),
        mask=o_c < C,
    )


@triton.jit
def _load_grad_row(p_grad, p_a, h, w, c, m_lane, height, width, C: tl.constexpr, WIDTH: tl.constexpr):
    """A row of the gradient and, behind it, the row of what the epilogue's normalisation was applied to."""
    row = _load_row(p_grad, h, w, c, m_lane, height, width, C, WIDTH)
    if p_a is not None:
        row = row + _load_row(p_a, h, w, c, m_lane, height, width, C, WIDTH)
    return row


@triton.jit
def _convolution_gradient(
    row, h, w, height, width, behind, p_a, p_a_norm, p_coefficients, p_gate,
    ACTIVATION: tl.constexpr, FAST: tl.constexpr, FOLDED: tl.constexpr, ACC: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """From the gradient behind norm, activation and gate to that of the convolution, zero outside the image."""
    a_norm, of_grad, of_a, constant, gate, pooled = behind
    gradients = ()
    for i in tl.static_range(WIDTH):
        g = row[i].to(ACC)
        if p_a is not None:
            a = row[WIDTH + i].to(ACC)
            if p_gate is not None:
                g = g * gate + pooled
            if p_a_norm is not None:
                g = g * activation_gradient(normalise(a, a_norm, FOLDED), ACTIVATION, FAST, FOLDED)
            if p_coefficients is not None:
                if not FOLDED:
                    a = a - a_norm[0]
                g = of_grad * g + (of_a * a + constant)
            g = tl.where((h >= 0) & (h < height) & (w + i >= 0) & (w + i < width), g, 0.0)
        gradients = gradients + (g,)
    return gradients


@triton.jit
def _gradients_above(
    p_grad, p_a, out_row, column, c, m_lane, height, width, behind, p_a_norm, p_coefficients, p_gate, C: tl.constexpr,
    ACTIVATION: tl.constexpr, FAST: tl.constexpr, FOLDED: tl.constexpr, ACC: tl.constexpr, OPEN: tl.constexpr,
    GRADS: tl.constexpr,
):  # fmt: skip
    """The gradients of the rows above ``out_row`` that its pixels meet, too."""
    kept = ()
    for age in tl.static_range(1, OPEN):
        row = out_row - (OPEN - age)
        loaded = _load_grad_row(p_grad, p_a, row, column, c, m_lane, height, width, C, GRADS)
        kept = kept + _convolution_gradient(
            loaded, row, column, height, width, behind, p_a, p_a_norm, p_coefficients, p_gate, ACTIVATION, FAST, FOLDED,
            ACC, GRADS,
        )  # fmt: skip
    return kept


@triton.jit
def _meet(
    u, kept, taps, products, p_dw, zero, b: tl.constexpr, j: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr,
    SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, OPEN: tl.constexpr, GRADS: tl.constexpr,
    REACH: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """The gradient of pixel b of row j in a stripe, and ``products`` with what the pixel adds to the taps'.

    Each pixel meets the output gradients of its window: dx gathers them times the weights, dw times the pixel, u.
    """
    dx = zero
    updated = ()
    for tap in tl.static_range(TAPS):
        product = products[tap]
        if (tap // KW) * DH % SH == j and (b - tap % KW * DW) % SW == 0:
            g = kept[(OPEN - 1 - (tap // KW) * DH // SH) * GRADS + (b - tap % KW * DW) // SW + REACH]
            dx += g * taps[tap]
            if p_dw is not None:
                product += g * u
        updated = updated + (product,)
    return dx, updated


@triton.jit
def _pixel(
    p_pixel, m_x, zero, p_norm, norm, p_dw, ACTIVATION: tl.constexpr, FAST: tl.constexpr, FOLDED: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """A pixel, norm(x) and activation(norm(x)), as far as they are needed; zeros where there is no x."""
    pixel, n, u = zero, zero, zero
    if p_pixel is not None:
        pixel = tl.load(p_pixel, mask=m_x, other=0.0).to(ACC)
        n = pixel
        if p_norm is not None:
            n = normalise(pixel, norm, FOLDED)
        if p_dw is not None:
            u = activate(n, ACTIVATION, FAST, FOLDED and p_norm is not None)
            if p_norm is not None:
                u = tl.where(m_x, u, 0.0)
    return pixel, n, u


@triton.jit
def _stripe(
    kept, taps, products, total, moment, h, w, c, m_lane, height, width, o_image, p_image, p_norm, norm, p_residual,
    p_dx, p_dw, p_sums, zero, j: tl.constexpr, C: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, ACTIVATION: tl.constexpr, FAST: tl.constexpr, FOLDED: tl.constexpr,
    ACC: tl.constexpr, COLS: tl.constexpr, OPEN: tl.constexpr, GRADS: tl.constexpr, REACH: tl.constexpr,
    TAPS: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of row j of a stride; ``products``, ``total`` and ``moment`` with what it adds to them."""
    HALVED: tl.constexpr = FOLDED and p_norm is not None
    m_row = m_lane & (h + j >= 0) & (h + j < height)
    o_row = ((h + j) * width + w) * C + c
    for b in tl.static_range(COLS * SW):
        m_x = m_row & (w + b >= 0) & (w + b < width)
        o_x = o_row + b * C
        p_pixel = p_image + o_x if p_image is not None else None
        pixel, n, u = _pixel(p_pixel, m_x, zero, p_norm, norm, p_dw, ACTIVATION, FAST, FOLDED, ACC)
        dx, products = _meet(u, kept, taps, products, p_dw, zero, b, j, KW, SH, SW, DH, DW, OPEN, GRADS, REACH, TAPS)
        if p_dx is not None:
            if p_norm is not None or ACTIVATION != NONE:
                dx = tl.where(m_x, dx * activation_gradient(n, ACTIVATION, FAST, HALVED), 0.0)
            if p_residual is not None:
                dx += tl.load(p_residual + o_image + o_x, mask=m_x, other=0.0).to(ACC)
            tl.store(p_dx + o_image + o_x, narrow(dx, p_dx.dtype.element_ty), mask=m_x)
            if p_sums is not None:
                total += dx
                moment += dx * (pixel - norm[0])
    return products, total, moment


@triton.jit
def _behind(p_coefficients, c, C: tl.constexpr, FOLDED: tl.constexpr, ACC: tl.constexpr):
    """What the gradient and what was normalised are multiplied with, and the constant; see `_convolution_gradient`."""
    of_grad = _vector(p_coefficients, 1, c, C, 1, ACC)
    of_a = _vector(p_coefficients, 2, c, C, 0, ACC)
    constant = _vector(p_coefficients, 3, c, C, 0, ACC)
    if FOLDED and p_coefficients is not None:
        constant -= of_a * _vector(p_coefficients, 0, c, C, 0, ACC)
    return of_grad, of_a, constant


@triton.jit
def _newest_kept(kept, OPEN: tl.constexpr, GRADS: tl.constexpr):
    """All but the oldest row of gradients."""
    newer = ()
    for i in tl.static_range(GRADS, OPEN * GRADS):
        newer = newer + (kept[i],)
    return newer


@triton.jit
def _store_gradients(
    p_dw, p_db, p_sums, i_walker, o_c, products, bias, total, moment, C: tl.constexpr, TAPS: tl.constexpr
):
    """A program's sums over the lanes: of the weight's gradient, of the bias' and of dx."""
    if p_dw is not None:
        p_mine = p_dw + (i_walker * C + o_c) * TAPS
        for tap in tl.static_range(TAPS):
            tl.store(p_mine + tap, tl.sum(products[tap], axis=0), mask=o_c < C)
    if p_db is not None:
        tl.store(p_db + i_walker * C + o_c, tl.sum(bias, axis=0), mask=o_c < C)
    if p_sums is not None:
        p_mine = p_sums + i_walker * 2 * C + o_c
        tl.store(p_mine, tl.sum(total, axis=0), mask=o_c < C)
        tl.store(p_mine + C, tl.sum(moment, axis=0), mask=o_c < C)


@triton.jit(do_not_specialize=[*_SIZES, "batch", "walkers"])
def depthwise_bwd_kernel(
    p_grad, p_a, p_x, p_weight, p_a_norm, p_coefficients, p_gate, p_pooled, p_norm, p_residual, p_dx, p_dw, p_db,
    p_sums, batch, walkers, height, width, out_height, out_width, top, left, C: tl.constexpr, KH: tl.constexpr,
    KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    A_ACTIVATION: tl.constexpr, ACTIVATION: tl.constexpr, OFFSET: tl.constexpr, ACC: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Gradients of input and weight; a program: one slab of channels, every ``walkers``-th tile of the batch.

    A lane makes the gradients of ROWS * SH x COLS * SW input pixels, a stripe of SH rows at a step. Each pixel
    meets the output gradients of its window once: dx gathers them times the weights, dw times the pixel. The last
    ``OPEN`` rows of output gradients are kept, so each is loaded and computed once for the lane.
    """
    FAST: tl.constexpr = p_grad.dtype.element_ty == tl.bfloat16
    FOLDED: tl.constexpr = p_grad.dtype.element_ty.primitive_bitwidth == 16
    OPEN: tl.constexpr = ((KH - 1) * DH + SH) // SH
    REACH: tl.constexpr = (KW - 1) * DW // SW
    GRADS: tl.constexpr = COLS + REACH
    TAPS: tl.constexpr = KH * KW
    SLABS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    # Outputs that lie in the padding alone have no pixel, but their share of the bias.
    columns = tl.cdiv(tl.maximum(tl.cdiv(width + left, SW), out_width), COLS)
    lanes = columns * tl.cdiv(tl.maximum(tl.cdiv(height + top, SH), out_height), ROWS)
    parts = tl.cdiv(lanes, BLOCK_P)
    i_slab = tl.program_id(0) % SLABS
    i_walker = tl.program_id(0) // SLABS
    c = i_slab * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]  # [1, BC]

    a_norm = _norm(p_a_norm, c, C, A_ACTIVATION, FAST, FOLDED, ACC)
    of_grad, of_a, constant = _behind(p_coefficients, c, C, FOLDED, ACC)
    norm = _norm(p_norm, c, C, ACTIVATION, FAST, FOLDED, ACC)
    taps = _weights(p_weight, c, C, TAPS, ACC)

    zero = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    products = _copies(zero, TAPS)
    bias, total, moment = zero, zero, zero
    for item in range(i_walker, batch * parts, walkers):
        i_image = (item // parts).to(tl.int64)
        lane = (item % parts) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]  # [BP, 1]
        m_lane = (lane < lanes) & (c < C)  # [BP, BC]
        gate = _vector(p_gate, i_image, c, C, 1, ACC)
        pooled = _vector(p_pooled, i_image, c, C, 0, ACC)
        behind = (a_norm, of_grad, of_a, constant, gate, pooled)
        out_row = (lane // columns).to(OFFSET) * ROWS
        first_column = (lane % columns).to(OFFSET) * COLS
        g_column = first_column - REACH
        h = out_row * SH - top
        w = first_column * SW - left
        o_image = i_image * height * width * C
        o_grad = i_image * out_height * out_width * C
        p_image = p_x + o_image if p_x is not None else None
        p_b = p_a + o_grad if p_a is not None else None
        p_g = p_grad + o_grad
        kept = _gradients_above(
            p_g, p_b, out_row, g_column, c, m_lane, out_height, out_width, behind, p_a_norm, p_coefficients, p_gate, C,
            A_ACTIVATION, FAST, FOLDED, ACC, OPEN, GRADS,
        )  # fmt: skip
        following = _load_grad_row(p_g, p_b, out_row, g_column, c, m_lane, out_height, out_width, C, GRADS)
        for step in range(ROWS):
            row, m_next = following, m_lane & (step < ROWS - 1)
            following = _load_grad_row(p_g, p_b, out_row + 1, g_column, c, m_next, out_height, out_width, C, GRADS)
            kept = kept + _convolution_gradient(
                row, out_row, g_column, out_height, out_width, behind, p_a, p_a_norm, p_coefficients, p_gate,
                A_ACTIVATION, FAST, FOLDED, ACC, GRADS,
            )  # fmt: skip
            if p_db is not None:
                for i in tl.static_range(REACH, GRADS):
                    bias += kept[(OPEN - 1) * GRADS + i]
            for j in tl.static_range(SH):
                products, total, moment = _stripe(
                    kept, taps, products, total, moment, h, w, c, m_lane, height, width, o_image, p_image, p_norm,
                    norm, p_residual, p_dx, p_dw, p_sums, zero, j, C, KW, SH, SW, DH, DW, ACTIVATION, FAST, FOLDED, ACC,
                    COLS, OPEN, GRADS, REACH, TAPS,
                )  # fmt: skip
            h += SH
            out_row += 1
            kept = _newest_kept(kept, OPEN, GRADS)

    o_c = i_slab * BLOCK_C + tl.arange(0, BLOCK_C)
    _store_gradients(p_dw, p_db, p_sums, i_walker, o_c, products, bias, total, moment, C, TAPS)


class _Window(NamedTuple):
    """The geometry of a convolution, vertical before horizontal; ``padding`` is (top, bottom, left, right)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(cls, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> _Window:
        return cls(tuple(weight.shape[2:]), tuple(stride), tuple(padding), tuple(dilation))

    def constants(self) -> dict[str, int]:
        values = (*self.kernel, *self.stride, *self.dilation)
        return dict(zip(("KH", "KW", "SH", "SW", "DH", "DW"), values, strict=True))

    def key(self, x: Tensor, size: Sequence[int]) -> dict[str, int]:
        """What a configuration is chosen by; ``size`` is the output's."""
        pairs = {"kernel": self.kernel, "stride": self.stride, "dilation": self.dilation}
        return {
            "batch": x.shape[0],
            "channels": x.shape[3],
            "height": size[0],
            "width": size[1],
            **tuning.element(x),
            **{f"{name}_{axis}": n for name, pair in pairs.items() for axis, n in zip("hw", pair, strict=True)},
        }


def _offset(*tensors: Tensor) -> tl.dtype:
    """int64 where an element's offset inside one image can be 2**31 or more."""
    return tl.int64 if any(t.numel() // t.shape[0] >= 2**31 for t in tensors) else tl.int32


def _constants(config: Config) -> dict[str, int | None]:
    """A configuration as a launch takes it."""
    return {
        "BLOCK_P": config["block_p"],
        "BLOCK_C": config["block_c"],
        "ROWS": config["rows"],
        "COLS": config["columns"],
        "num_warps": config["num_warps"],
        "maxnreg": config.get("registers"),
    }


def forward(
    x: Tensor,
    weight: Tensor,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int] = (1, 1),
    norm: Tensor | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    out_norm: Tensor | None = None,
    out_activation: str = "none",
    grad: Tensor | None = None,
    pool: bool = False,
    statistics: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """out_activation(out_norm(conv(gate * activation(norm(x))) + bias)).

    Args:
        x: (N, H, W, C) contiguous. weight: (C, 1, kh, kw) contiguous.
        norm, out_norm: (3, C), rows mean, scale, shift: n = (a - mean) * scale + shift.
        gate: (N, C). bias: (C,).
        grad: (N, Ho, Wo, C): the result is grad * out_activation'(..) instead.
        pool: also return the sums (N, parts, C) of the result over the pixels of each part.
        statistics: also return (programs, 3, C), rows count, mean and sum of squares around it, of the stored result.
    """
    window = _Window.of(weight, stride, padding, dilation)
    batch, height, width, channels = x.shape
    size = output_size((height, width), window.kernel, window.stride, window.padding, window.dilation)
    y = torch.empty((batch, *size, channels), dtype=x.dtype, device=x.device)
    config = config or tuning.choose("depthwise_forward", window.key(x, size), x.device)
    lanes = cdiv(size[0], config["rows"]) * cdiv(size[1], config["columns"])
    parts = cdiv(lanes, config["block_p"])
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    sums = torch.empty((batch, parts, channels), dtype=dtype, device=x.device) if pool else None
    partials = torch.empty((batch * parts, 3, channels), dtype=dtype, device=x.device) if statistics else None
    if batch == 0:
        return y, sums, partials
    grid = (batch * parts * cdiv(channels, config["block_c"]),)
    launch(depthwise_fwd_kernel, grid,
        x, weight, norm, gate, out_norm, bias, grad, y, sums, partials, height, width, *size, window.padding[0],
        window.padding[2], C=channels, **window.constants(), ACTIVATION=ACTIVATION_CODES[activation],
        OUT_ACTIVATION=ACTIVATION_CODES[out_activation], OFFSET=_offset(x, y), ACC=accumulator(x.dtype),
        **_constants(config),
    )  # fmt: skip
    return y, sums, partials


def backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor,
    *,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int] = (1, 1),
    a: Tensor | None = None,
    a_norm: Tensor | None = None,
    a_activation: str = "none",
    coefficients: Tensor | None = None,
    gate: Tensor | None = None,
    pooled: Tensor | None = None,
    norm: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    needs: Sequence[bool] = (True, True, False),
    config: Config | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of y = conv(activation(norm(x))) + bias, from that of y or of what follows y.

    Args:
        grad: (N, Ho, Wo, C) contiguous. With ``a`` (the stored y, same size) it is the gradient behind normalisation,
            activation and gate, and the gradient of y is A n_grad + B (a - mean) + D, where
            n_grad = (grad * gate + pooled) * a_activation'(a_norm(a)) and ``coefficients`` (4, C) are mean, A, B, D.
        x: (N, H, W, C) contiguous, or None where only its gradient is asked for; ``size`` is its (H, W).
        a_norm, norm: (3, C), rows mean, scale, shift. gate, pooled: (N, C).
        residual: (N, H, W, C), added to the gradient of x.
        bias: only its dtype matters. needs: gradients of x, weight, bias.

    Returns:
        The gradients of norm(x), which is that of x where there is no norm and no activation, of weight and of bias,
        and with ``norm`` the sums (programs, 2, C) of the first and of it times (x - mean).
    """
    window = _Window.of(weight, stride, padding, dilation)
    batch, channels, out_size = grad.shape[0], grad.shape[3], grad.shape[1:3]
    key = {**window.key(grad, out_size), "fused": int(a is not None)}
    config = config or tuning.choose("depthwise_backward", key, grad.device)
    steps = [
        max(cdiv(n + before, s), out)
        for n, before, s, out in zip(size, window.padding[::2], window.stride, out_size, strict=True)
    ]
    lanes = cdiv(steps[0], config["rows"]) * cdiv(steps[1], config["columns"])
    slabs = cdiv(channels, config["block_c"])
    items = batch * cdiv(lanes, config["block_p"])
    walkers = max(min(items, cdiv(config["programs"], slabs)), 1)

    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32

    def empty(wanted: bool, *shape: int, dtype: torch.dtype = dtype) -> Tensor | None:
        return torch.empty(shape, dtype=dtype, device=grad.device) if wanted else None

    dx = empty(needs[0], batch, *size, channels, dtype=grad.dtype)
    dw = empty(needs[1], walkers, *weight.shape)
    db = empty(needs[2], walkers, channels)
    sums = empty(needs[0] and norm is not None, walkers, 2, channels)
    pixels = x if norm is not None or activation != "none" or needs[1] else None
    launch(depthwise_bwd_kernel, (walkers * slabs,),
        grad, a, pixels, weight, a_norm, coefficients, gate, pooled, norm,
        residual, dx, dw, db, sums, batch, walkers, *size, *out_size, window.padding[0], window.padding[2],
        C=channels, **window.constants(), A_ACTIVATION=ACTIVATION_CODES[a_activation],
        ACTIVATION=ACTIVATION_CODES[activation], OFFSET=_offset(grad, dx if dx is not None else grad),
        ACC=accumulator(grad.dtype), **_constants(config),
    )  # fmt: skip
    dw = None if dw is None else sum_partials(dw, weight.dtype)
    db = None if db is None else sum_partials(db, weight.dtype if bias is None else bias.dtype)
    return dx, dw, db, sums


_THREADS = 128


def _blocks(channels: int, lanes: int, elements: int) -> dict[str, int]:
    """How ``elements`` are divided into lanes and channels so that fewest are idle; ties go to whole cache lines."""

    def idle(block_c: int) -> tuple[float, int]:
        block_p = elements // block_c
        used = channels * lanes / (cdiv(channels, block_c) * block_c * cdiv(lanes, block_p) * block_p)
        return -round(used, 2), abs(block_c - 64)

    block_c = min((size for size in (16, 32, 64, 128, 256) if size <= elements), key=idle)
    return {"block_p": elements // block_c, "block_c": block_c}


def _interpreted(shape: Mapping[str, int]) -> Config:
    """Few operations, since each takes as long as thousands of numbers: whole images, and little that is unrolled."""
    columns = 2 if shape["kernel_w"] <= 3 else 1
    lanes = cdiv(shape["height"], 2) * cdiv(shape["width"], columns)
    return {
        "block_p": min(next_power_of_2(lanes), 256),
        "block_c": min(next_power_of_2(shape["channels"]), 128),
        "rows": 2,
        "columns": columns,
        "num_warps": 4,
    }


def _tile(shape: Mapping[str, int], columns: int, steps: int, vector: int, warm_up: int, programs: int) -> Config:
    """Lanes as tall as leaves enough programs for the GPU, since every lane loads ``warm_up`` rows before its first."""
    warps = _THREADS // 32
    while True:
        rows = min(steps, 32)
        while True:
            lanes = columns * cdiv(steps, rows)
            blocks = _blocks(shape["channels"], lanes, 32 * warps * vector)
            slabs = cdiv(shape["channels"], blocks["block_c"])
            found = shape["batch"] * slabs * cdiv(lanes, blocks["block_p"])
            if found >= programs or rows <= 2 * max(warm_up, 1):
                break
            rows = cdiv(rows, 2)
        if found >= programs or warps == 1:
            # The last lane is as tall as the others where that is possible.
            rows = cdiv(steps, cdiv(steps, rows))
            return {**blocks, "rows": rows, "num_warps": warps}
        warps //= 2


@tuning.heuristic("depthwise_forward")
def _forward_rule(shape: Mapping[str, int], arch: Architecture) -> Config:
    """Lanes as wide as 150 registers allow; the estimate is fitted to what was compiled for sm_90."""
    if arch.name == "interpreter":
        return _interpreted(shape)
    taps, (open_rows, reach) = shape["kernel_h"] * shape["kernel_w"], _extent(shape)
    vector = 1 if taps > 30 or shape["element_size"] == 8 else 2

    def registers(columns: int) -> int:
        width = (columns - 1) * shape["stride_w"] + reach
        ahead = shape["stride_h"] * width * (3 if shape["element_size"] == 2 else 4)
        return 30 + vector * (open_rows * columns + taps + width) + ahead

    def loads(columns: int) -> int:
        return cdiv(shape["width"], columns) * ((columns - 1) * shape["stride_w"] + reach)

    columns = min((n for n in range(1, 9) if n == 1 or registers(n) <= 150), key=lambda n: (loads(n), -n))
    lanes = cdiv(shape["width"], columns)
    tile = _tile(shape, lanes, shape["height"], vector, open_rows - 1, 4 * arch.multiprocessors)
    exact = shape["float16"] or shape["element_size"] > 2
    if not exact and taps <= 30 and max(shape["dilation_h"], shape["dilation_w"]) == 1:
        return {**tile, "columns": columns}
    # Left to itself, the compiler spills a few in order to fit one program more.
    many = taps > 9 and shape["stride_h"] > 1
    return {**tile, "columns": columns, "registers": 255 if many else 168}


@tuning.heuristic("depthwise_backward")
def _backward_rule(shape: Mapping[str, int], arch: Architecture) -> Config:
    """The widest lanes that did not spill when compiled for sm_90, with a normalisation behind or without."""
    if arch.name == "interpreter":
        return {**_interpreted(shape), "programs": 2, "registers": 255}
    taps, (open_rows, _) = shape["kernel_h"] * shape["kernel_w"], _extent(shape)
    dilated = max(shape["dilation_h"], shape["dilation_w"]) > 1
    large = taps > 9 or dilated
    size = shape["element_size"]
    narrow_lanes = size == 8 or taps > 30 or (large and size == 4) or (taps >= 25 and dilated)
    columns = 4 // shape["stride_w"] if not shape["fused"] else 2 // (shape["stride_w"] if large else 1)
    if taps > 30 or dilated:
        columns = min(columns, 1 if taps >= 25 and shape["fused"] else 2)
    columns = max(1, min(columns, shape["width"]))
    per_multiprocessor = 2 if large or (shape["float16"] and shape["fused"] and shape["stride_h"] > 1) else 3
    programs = per_multiprocessor * arch.multiprocessors
    lanes = cdiv(shape["width"], columns)
    tile = _tile(shape, lanes, shape["height"], 1 if narrow_lanes else 2, open_rows - 1, programs)
    # No more programs than these are launched, so each may have its share of the registers. Left to itself, the
    # compiler spills a few in order to fit one program more.
    registers = min(65536 // (per_multiprocessor * 32 * tile["num_warps"]) // 8 * 8, 255)
    return {**tile, "columns": columns, "programs": programs, "registers": registers}


def _extent(shape: Mapping[str, int]) -> tuple[int, int]:
    """Output rows that one step of input rows contributes to, and the width of the window."""
    rows = (shape["kernel_h"] - 1) * shape["dilation_h"] + shape["stride_h"]
    return rows // shape["stride_h"], (shape["kernel_w"] - 1) * shape["dilation_w"] + 1
