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
    NONE,
    activate,
    activation_gradient,
    inside,
    narrow,
    normalise,
    once,
    operand,
    widen,
)
from effnet_ops.kernels.batch_norm import wide
from effnet_ops.kernels.launching import launch
from effnet_ops.kernels.layout import cdiv
from effnet_ops.kernels.product import (
    block_width,
    epilogue,
    few_programs,
    norm_vectors,
    parts_of_image,
    place,
    rows_of_tile,
    store_statistics,
    tiles_of_part,
    vectors,
    weight_tile,
    wide_tiles,
)
from effnet_ops.kernels.reduction import sum_partials
from effnet_ops.kernels.tuning import Architecture, Config


@triton.jit
def _image_of_rows(i_image, i_row, o_p, pixels, image_pixels, GATHER: tl.constexpr):
    """The image that each row of a tile belongs to: one number, or with GATHER, where tiles cross images, [BP, 1]."""
    if GATHER:
        return (tl.minimum(i_row + o_p, pixels - 1) // image_pixels)[:, None]
    else:
        return i_image


@triton.jit
def _of_image(p_rows, o_image, o_c, m_c, C: tl.constexpr):
    """What (images, C) holds for a tile's rows: [1, BC], or [BP, BC] where tiles cross images."""
    if p_rows is not None:
        return tl.load(p_rows + (o_image * C + o_c[None, :]), mask=m_c[None, :], other=0.0)
    else:
        return 1.0


@triton.jit
def _input_tile(
    p_x, start, o_p, m_p, o_c, m_c, C: tl.constexpr, p_norm, norm, p_gate, gate, ACTIVATION: tl.constexpr,
    ANCHOR: tl.constexpr,
):  # fmt: skip  # [BP, BC]
    """activation(norm(x)) * gate of each row's image, ready for a product."""
    TYPE: tl.constexpr = p_x.dtype.element_ty
    FAST: tl.constexpr = TYPE == tl.bfloat16
    FOLDED: tl.constexpr = TYPE.primitive_bitwidth == 16
    m_x = m_p[:, None] & m_c[None, :]
    b_x = tl.load(p_x + start * C + (o_p[:, None] * C + o_c[None, :]), mask=m_x, other=0.0)
    if p_norm is not None or p_gate is not None or ACTIVATION != NONE:
        b_x = widen(b_x)
        if p_norm is not None:
            b_x = normalise(b_x, norm, FOLDED)
        b_x = activate(b_x, ACTIVATION, FAST, FOLDED and p_norm is not None)
        if p_gate is not None:
            b_x = b_x * gate
        return once(operand(b_x, TYPE), ANCHOR)
    else:
        return operand(b_x, TYPE)


@triton.jit
def _coefficients(p_coefficients, p_image_scale, i_image, o_c, m_c, C: tl.constexpr, FOLDED: tl.constexpr):
    """(mean, A, B, D) for `_gradient_tile`, A times what a program's only image is scaled by; FOLDED as in `fold`."""
    rows = vectors(p_coefficients, 4, o_c, m_c, C)
    if p_coefficients is not None:
        of_grad, constant = rows[1], rows[3]
        if p_image_scale is not None:
            of_grad = of_grad * tl.load(p_image_scale + i_image)
        if FOLDED:
            constant = constant - rows[2] * rows[0]
        rows = (rows[0], of_grad, rows[2], constant)
    return rows


@triton.jit
def _gradient_tile(
    p_grad, p_a, start, o_p, m_p, o_c, m_c, C: tl.constexpr, p_coefficients, coefficients, p_image_scale, o_image,
    ANCHOR: tl.constexpr,
):  # fmt: skip  # [BP, BC]
    """The gradient before a normalisation, A * scale * grad + B * (a - mean) + D, scale that of each row's image.

    It is 0 where masked.
    """
    TYPE: tl.constexpr = p_grad.dtype.element_ty
    FOLDED: tl.constexpr = TYPE.primitive_bitwidth == 16
    m_g = m_p[:, None] & m_c[None, :]
    o_g = o_p[:, None] * C + o_c[None, :]
    b_g = tl.load(p_grad + start * C + o_g, mask=m_g, other=0.0)
    if p_image_scale is not None:
        b_g = widen(b_g) * tl.load(p_image_scale + o_image)
    if p_coefficients is not None:
        mean, of_grad, of_a, constant = coefficients
        b_a = widen(tl.load(p_a + start * C + o_g, mask=m_g, other=0.0))
        if not FOLDED:
            b_a = b_a - mean
        b_g = tl.where(m_g, of_grad * widen(b_g) + (of_a * b_a + constant), 0.0)
    if p_image_scale is not None or p_coefficients is not None:
        return once(operand(b_g, TYPE), ANCHOR)
    else:
        return operand(b_g, TYPE)


@triton.jit
def _through(b_x, norm, ACTIVATION: tl.constexpr, FAST: tl.constexpr, FOLDED: tl.constexpr):
    """u = activation(norm(x)), its slope by norm(x), and x - mean: what a gradient is multiplied with for sums."""
    b_n = normalise(widen(b_x), norm, FOLDED)
    b_u = activate(b_n, ACTIVATION, FAST, FOLDED)
    return b_u, activation_gradient(b_n, ACTIVATION, FAST, FOLDED), widen(b_x) - norm[0]


@triton.jit
def _resident_weights(
    p_weight, o_k, o_column, m_column, ROW: tl.constexpr, COLUMN: tl.constexpr, TYPE: tl.constexpr,
    C: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The tiles of a weight whose rows are reduced, one a step."""
    weights = ()
    for step in tl.static_range(STEPS):
        o_row = step * BLOCK + o_k
        weights = weights + (weight_tile(p_weight, o_row, inside(o_row, C), o_column, m_column, ROW, COLUMN, TYPE),)
    return weights


@triton.jit
def _input_product(
    p_x, start, o_p, m_p, o_image, o_in, p_norm, norm, p_gate, gate, p_weight, weights, o_out, m_out,
    C_IN: tl.constexpr, ACTIVATION: tl.constexpr, GATHER: tl.constexpr, ANCHOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr, RESIDENT: tl.constexpr,
    STAGES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip  # [BP, BO]
    """W prologue(x) of a tile. With RESIDENT, ``weights`` has the weight; ``norm`` and ``gate`` are one step's."""
    TYPE: tl.constexpr = p_x.dtype.element_ty
    FAST: tl.constexpr = TYPE == tl.bfloat16
    FOLDED: tl.constexpr = TYPE.primitive_bitwidth == 16
    STEPS: tl.constexpr = (C_IN + BLOCK_IN - 1) // BLOCK_IN
    HOISTED: tl.constexpr = STEPS == 1
    b_acc = tl.zeros([BLOCK_P, BLOCK_OUT], ACC)
    if RESIDENT:
        for step in tl.static_range(STEPS):
            o_k = step * BLOCK_IN + o_in
            m_k = inside(o_k, C_IN)
            if not HOISTED:
                norm = norm_vectors(p_norm, o_k, m_k, C_IN, ACTIVATION, FAST, FOLDED)
            if GATHER or not HOISTED:
                gate = _of_image(p_gate, o_image, o_k, m_k, C_IN)
            b_x = _input_tile(p_x, start, o_p, m_p, o_k, m_k, C_IN, p_norm, norm, p_gate, gate, ACTIVATION, ANCHOR)
            b_acc = tl.dot(b_x, weights[step], b_acc, input_precision=PRECISION, out_dtype=ACC)
    else:
        for k in tl.range(0, C_IN, BLOCK_IN, num_stages=STAGES):
            o_k = k + o_in
            m_k = inside(o_k, C_IN)
            k_norm = norm_vectors(p_norm, o_k, m_k, C_IN, ACTIVATION, FAST, FOLDED)
            k_gate = _of_image(p_gate, o_image, o_k, m_k, C_IN)
            b_x = _input_tile(p_x, start, o_p, m_p, o_k, m_k, C_IN, p_norm, k_norm, p_gate, k_gate, ACTIVATION, ANCHOR)
            b_w = weight_tile(p_weight, o_k, m_k, o_out, m_out, 1, C_IN, TYPE)
            b_acc = tl.dot(b_x, b_w, b_acc, input_precision=PRECISION, out_dtype=ACC)
    return b_acc


@triton.jit
def pointwise_fwd_kernel(
    p_x, p_weight, p_y, p_norm, p_gate, p_bias, p_out_norm, p_image_scale, p_residual, p_grad, p_partials, pixels,
    image_pixels, parts, C_IN: tl.constexpr, C_OUT: tl.constexpr, ACTIVATION: tl.constexpr,
    OUT_ACTIVATION: tl.constexpr, GATHER: tl.constexpr, ANCHOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr, RESIDENT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """y = epilogue(W prologue(x)); a program: one (image, part of its pixels, block of output channels).

    With RESIDENT the weight is loaded once, and the loads of all steps over the input channels belong to the loop over
    tiles, so that those of the next tiles are in flight while a tile is finished.
    """
    TYPE: tl.constexpr = p_x.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if TYPE == tl.float64 else tl.float32
    FAST: tl.constexpr = TYPE == tl.bfloat16
    FOLDED: tl.constexpr = TYPE.primitive_bitwidth == 16
    STEPS: tl.constexpr = (C_IN + BLOCK_IN - 1) // BLOCK_IN
    HOISTED: tl.constexpr = STEPS == 1
    i_program, i_image, i_part, o_out, m_out = place(parts, C_OUT, BLOCK_OUT)
    o_in = tl.arange(0, BLOCK_IN)
    m_in = inside(o_in, C_IN)
    out_norm = norm_vectors(p_out_norm, o_out, m_out, C_OUT, OUT_ACTIVATION, FAST, FOLDED)
    bias = vectors(p_bias, 1, o_out, m_out, C_OUT)
    weights, norm, gate = (), (), 1.0
    if RESIDENT:
        weights = _resident_weights(p_weight, o_in, o_out, m_out, 1, C_IN, TYPE, C_IN, BLOCK_IN, STEPS)
    if HOISTED:
        norm = norm_vectors(p_norm, o_in, m_in, C_IN, ACTIVATION, FAST, FOLDED)
        if not GATHER:
            gate = _of_image(p_gate, i_image, o_in, m_in, C_IN)
    pivot = tl.zeros([BLOCK_OUT], ACC)
    b_total = tl.zeros([BLOCK_P, BLOCK_OUT], ACC)
    b_squares = tl.zeros([BLOCK_P, BLOCK_OUT], ACC)

    first, last = tiles_of_part(i_part, tl.cdiv(pixels, BLOCK_P), parts)
    for i_tile in tl.range(first, last, num_stages=STAGES if RESIDENT else 1):
        start = i_image.to(tl.int64) * pixels + i_tile * BLOCK_P
        valid = tl.minimum(pixels - i_tile * BLOCK_P, BLOCK_P)
        o_p = tl.arange(0, BLOCK_P)
        m_p = o_p < valid
        o_image = _image_of_rows(i_image, i_tile * BLOCK_P, o_p, pixels, image_pixels, GATHER)
        b_acc = _input_product(
            p_x, start, o_p, m_p, o_image, o_in, p_norm, norm, p_gate, gate, p_weight, weights, o_out, m_out, C_IN,
            ACTIVATION, GATHER, ANCHOR, PRECISION, BLOCK_P, BLOCK_IN, BLOCK_OUT, RESIDENT, STAGES, ACC,
        )  # fmt: skip
        m_y = m_p[:, None] & m_out[None, :]
        o_y = o_p[:, None] * C_OUT + o_out[None, :]
        b_acc = epilogue(
            b_acc, start, o_y, m_y, o_image, p_bias, bias, p_out_norm, out_norm, p_grad, p_image_scale, p_residual,
            C_OUT, OUT_ACTIVATION, FAST, FOLDED,
        )  # fmt: skip
        b_y = narrow(b_acc, p_y.dtype.element_ty)
        tl.store(p_y + start * C_OUT + o_y, b_y, mask=m_y)

        if p_partials is not None:
            # Of the values as stored, since those are what the normalisation will see. Sums stay with the thread that
            # made the values, around the mean of the first tile, from which the others are not far: n tiles have at
            # least 1/n of their variance from the first one's distance, so that at most a factor n cancels.
            b_v = widen(b_y)
            if i_tile == first:
                pivot = tl.sum(tl.where(m_p[:, None], b_v, 0.0), 0) / valid.to(ACC)
            b_distance = tl.where(m_p[:, None], b_v - pivot[None, :], 0.0)
            b_total += b_distance
            b_squares += b_distance * b_distance

    if p_partials is not None:
        count = tl.maximum(tl.minimum(pixels, last * BLOCK_P) - first * BLOCK_P, 0).to(ACC)
        total, squares = tl.sum(b_total, 0), tl.sum(b_squares, 0)
        store_statistics(p_partials, i_program, count, pivot, total, squares, o_out, m_out, C_OUT, BLOCK_OUT, ACC)


@triton.jit
def _gradient_product(
    p_grad, p_a, start, o_p, m_p, i_image, o_image, p_coefficients, coefficients, p_one_scale, p_row_scale, p_weight,
    weights, o_in, m_in, factors, products, C_IN: tl.constexpr, C_OUT: tl.constexpr, FACTORS: tl.constexpr,
    ONES: tl.constexpr, ANCHOR: tl.constexpr, PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr, RESIDENT: tl.constexpr, STAGES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """W^T g of a tile [BP, BI], where g is `_gradient_tile`'s, and ``products`` with g^T times each factor added.

    Both kernels that make the input's gradient walk over the output channels here. With RESIDENT, ``weights`` has the
    weight, without it there are no factors; ``coefficients`` are those of one step. With ONES, the channel behind the
    last one has a gradient of 1.
    """
    TYPE: tl.constexpr = p_grad.dtype.element_ty
    FOLDED: tl.constexpr = TYPE.primitive_bitwidth == 16
    STEPS: tl.constexpr = (C_OUT + BLOCK_OUT - 1) // BLOCK_OUT
    o_out = tl.arange(0, BLOCK_OUT)
    b_acc = tl.zeros([BLOCK_P, BLOCK_IN], ACC)
    updated = ()
    if RESIDENT:
        for step in tl.static_range(STEPS):
            o_k = step * BLOCK_OUT + o_out
            m_k = inside(o_k, C_OUT)
            if STEPS > 1:
                coefficients = _coefficients(p_coefficients, p_one_scale, i_image, o_k, m_k, C_OUT, FOLDED)
            b_g = _gradient_tile(
                p_grad, p_a, start, o_p, m_p, o_k, m_k, C_OUT, p_coefficients, coefficients, p_row_scale, o_image,
                ANCHOR,
            )  # fmt: skip
            if ONES and step == STEPS - 1:
                b_g = tl.where(m_p[:, None] & (o_k[None, :] == C_OUT), 1.0, b_g).to(b_g.dtype)
            b_acc = tl.dot(b_g, weights[step], b_acc, input_precision=PRECISION, out_dtype=ACC)
            for i in tl.static_range(FACTORS):
                product = products[step * FACTORS + i]
                product = tl.dot(tl.trans(b_g), factors[i], product, input_precision=PRECISION, out_dtype=ACC)
                updated = updated + (product,)
    else:
        for k in tl.range(0, C_OUT, BLOCK_OUT, num_stages=STAGES):
            o_k = k + o_out
            m_k = inside(o_k, C_OUT)
            k_coefficients = _coefficients(p_coefficients, p_one_scale, i_image, o_k, m_k, C_OUT, FOLDED)
            b_g = _gradient_tile(
                p_grad, p_a, start, o_p, m_p, o_k, m_k, C_OUT, p_coefficients, k_coefficients, p_row_scale, o_image,
                ANCHOR,
            )  # fmt: skip
            b_w = weight_tile(p_weight, o_k, m_k, o_in, m_in, C_IN, 1, TYPE)
            b_acc = tl.dot(b_g, b_w, b_acc, input_precision=PRECISION, out_dtype=ACC)
    return b_acc, updated


@triton.jit
def pointwise_bwd_kernel_input(
    p_grad, p_a, p_weight, p_x, p_dx, p_coefficients, p_image_scale, p_residual, p_norm, p_sums, pixels, image_pixels,
    parts, C_IN: tl.constexpr, C_OUT: tl.constexpr, ACTIVATION: tl.constexpr, SUMS: tl.constexpr,
    GATHER: tl.constexpr, ANCHOR: tl.constexpr, PRECISION: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr, RESIDENT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx = W^T prologue(grad) (+ residual); a program: one (image, part of its pixels, block of input channels).

    With p_norm, dx is the gradient behind an activation (and a gate) of x, and the sums over the program's pixels that
    x's normalisation and gate need are formed as dx is made: SUMS of them, (programs, SUMS, C_IN).
    """
    TYPE: tl.constexpr = p_grad.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if TYPE == tl.float64 else tl.float32
    FAST: tl.constexpr = TYPE == tl.bfloat16
    FOLDED: tl.constexpr = TYPE.primitive_bitwidth == 16
    STEPS: tl.constexpr = (C_OUT + BLOCK_OUT - 1) // BLOCK_OUT
    i_program, i_image, i_part, o_in, m_in = place(parts, C_IN, BLOCK_IN)
    ONE_SCALE: tl.constexpr = not GATHER and p_coefficients is not None
    p_one_scale = p_image_scale if ONE_SCALE else None
    p_row_scale = None if ONE_SCALE else p_image_scale
    o_out = tl.arange(0, BLOCK_OUT)
    norm = norm_vectors(p_norm, o_in, m_in, C_IN, ACTIVATION, FAST, FOLDED)
    weights, coefficients = (), ()
    if RESIDENT:
        weights = _resident_weights(p_weight, o_out, o_in, m_in, C_IN, 1, TYPE, C_OUT, BLOCK_OUT, STEPS)
    if STEPS == 1:
        coefficients = _coefficients(p_coefficients, p_one_scale, i_image, o_out, inside(o_out, C_OUT), C_OUT, FOLDED)
    b_s1 = tl.zeros([BLOCK_P, BLOCK_IN], ACC)
    b_s2 = tl.zeros([BLOCK_P, BLOCK_IN], ACC)
    b_s3 = tl.zeros([BLOCK_P, BLOCK_IN], ACC)
    b_s4 = tl.zeros([BLOCK_P, BLOCK_IN], ACC)
    b_s5 = tl.zeros([BLOCK_P, BLOCK_IN], ACC)

    first, last = tiles_of_part(i_part, tl.cdiv(pixels, BLOCK_P), parts)
    for i_tile in tl.range(first, last, num_stages=STAGES if RESIDENT else 1):
        start = i_image.to(tl.int64) * pixels + i_tile * BLOCK_P
        o_p = tl.arange(0, BLOCK_P)
        m_p = o_p < pixels - i_tile * BLOCK_P
        o_image = _image_of_rows(i_image, i_tile * BLOCK_P, o_p, pixels, image_pixels, GATHER)
        b_acc, _ = _gradient_product(
            p_grad, p_a, start, o_p, m_p, i_image, o_image, p_coefficients, coefficients, p_one_scale, p_row_scale,
            p_weight, weights, o_in, m_in, (), (), C_IN, C_OUT, 0, False, ANCHOR, PRECISION, BLOCK_P, BLOCK_IN,
            BLOCK_OUT, RESIDENT, STAGES, ACC,
        )  # fmt: skip
        m_x = m_p[:, None] & m_in[None, :]
        o_x = o_p[:, None] * C_IN + o_in[None, :]
        if p_residual is not None:
            b_acc += widen(tl.load(p_residual + start * C_IN + o_x, mask=m_x, other=0.0))
        b_dx = narrow(b_acc, p_dx.dtype.element_ty)
        tl.store(p_dx + start * C_IN + o_x, b_dx, mask=m_x)
        if p_norm is not None:
            # Sums stay with the thread that made the values until the walk is over: a sum over threads for each tile
            # would cost more than all the rest.
            b_x = tl.load(p_x + start * C_IN + o_x, mask=m_x, other=0.0)
            b_u, b_slope, b_centred = _through(b_x, norm, ACTIVATION, FAST, FOLDED)
            b_slope = tl.where(m_x, b_slope, 0.0)
            b_behind = widen(b_dx) * b_slope
            b_s2 += b_behind
            b_s4 += b_behind * b_centred
            if SUMS == 5:
                b_s1 += widen(b_dx) * b_u
                b_s3 += b_slope
                b_s5 += b_slope * b_centred

    if p_norm is not None:
        sums = (tl.sum(b_s2, 0), tl.sum(b_s4, 0))
        if SUMS == 5:
            sums = (tl.sum(b_s1, 0), tl.sum(b_s2, 0), tl.sum(b_s3, 0), tl.sum(b_s4, 0), tl.sum(b_s5, 0))
        _store_sums(p_sums + i_program.to(tl.int64) * SUMS * C_IN + o_in, sums, m_in, SUMS, C_IN)


@triton.jit
def _store_sums(p_mine, sums, m_c, SUMS: tl.constexpr, C: tl.constexpr):
    for i in tl.static_range(SUMS):
        tl.store(p_mine + i * C, sums[i], mask=m_c)


@triton.jit
def _store_weight_gradient(
    p_part, p_gate, i_image, o_in, m_in, products, C_IN: tl.constexpr, C_OUT: tl.constexpr, FACTORS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """The program's part (C_OUT, C_IN) of the weight's gradient: the first of each step's products, times the gate."""
    STEPS: tl.constexpr = (C_OUT + BLOCK_OUT - 1) // BLOCK_OUT
    for step in tl.static_range(STEPS):
        o_k = step * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        b_dw = products[step * FACTORS]
        if p_gate is not None:
            b_dw = b_dw * _of_image(p_gate, i_image, o_in, m_in, C_IN)
        o_w = o_k[:, None] * C_IN + o_in[None, :]
        tl.store(p_part + o_w, b_dw, mask=inside(o_k, C_OUT)[:, None] & m_in[None, :])


@triton.jit
def _sums_of_products(
    products, weights, b_s3, b_s5, C_OUT: tl.constexpr, SUMS: tl.constexpr, ONES: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The sums of `pointwise_bwd_kernel_input` from three products a step, and what no product has summed."""
    STEPS: tl.constexpr = (C_OUT + BLOCK_OUT - 1) // BLOCK_OUT
    sums = (tl.zeros([BLOCK_IN], ACC), tl.zeros([BLOCK_IN], ACC), tl.zeros([BLOCK_IN], ACC))
    for step in tl.static_range(STEPS):
        b_w = weights[step].to(ACC)
        added = ()
        for i in tl.static_range(3):
            added = added + (sums[i] + tl.sum(products[step * 3 + i] * b_w, 0),)
        sums = added
    if ONES:
        row: tl.constexpr = (STEPS - 1) * 3
        m_one = (tl.arange(0, BLOCK_OUT) == C_OUT % BLOCK_OUT)[:, None]
        s3 = tl.sum(tl.where(m_one, products[row + 1], 0.0), 0)
        s5 = tl.sum(tl.where(m_one, products[row + 2], 0.0), 0)
        sums = (sums[0], sums[1], s3, sums[2], s5)
    elif SUMS == 5:
        sums = (sums[0], sums[1], tl.sum(b_s3, 0), sums[2], tl.sum(b_s5, 0))
    else:
        sums = (sums[1], sums[2])
    return sums


@triton.jit
def pointwise_bwd_kernel_both(
    p_grad, p_a, p_weight, p_x, p_dx, p_dw, p_coefficients, p_image_scale, p_residual, p_norm, p_gate, p_sums, pixels,
    image_pixels, parts, C_IN: tl.constexpr, C_OUT: tl.constexpr, ACTIVATION: tl.constexpr, SUMS: tl.constexpr,
    GATHER: tl.constexpr, ANCHOR: tl.constexpr, PRECISION: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx as `pointwise_bwd_kernel_input` makes it and, in the same walk, the program's part of the weight's gradient.

    The part is (C_OUT, C_IN) of (programs, C_OUT, C_IN). Sums of dx with something over pixels are columns of W times
    the product of the gradient with that something, so that tensor cores make them, too.
    """
    TYPE: tl.constexpr = p_grad.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if TYPE == tl.float64 else tl.float32
    FAST: tl.constexpr = TYPE == tl.bfloat16
    FOLDED: tl.constexpr = TYPE.primitive_bitwidth == 16
    STEPS: tl.constexpr = (C_OUT + BLOCK_OUT - 1) // BLOCK_OUT
    FACTORS: tl.constexpr = 1 if p_norm is None else 3
    # Where a block of output channels has room for a column of ones, the product also sums the factors themselves.
    ONES: tl.constexpr = SUMS == 5 and C_OUT % BLOCK_OUT != 0
    i_program, i_image, i_part, o_in, m_in = place(parts, C_IN, BLOCK_IN)
    ONE_SCALE: tl.constexpr = not GATHER and p_coefficients is not None
    p_one_scale = p_image_scale if ONE_SCALE else None
    p_row_scale = None if ONE_SCALE else p_image_scale
    o_out = tl.arange(0, BLOCK_OUT)
    norm = norm_vectors(p_norm, o_in, m_in, C_IN, ACTIVATION, FAST, FOLDED)
    weights = _resident_weights(p_weight, o_out, o_in, m_in, C_IN, 1, TYPE, C_OUT, BLOCK_OUT, STEPS)
    coefficients = ()
    if STEPS == 1:
        coefficients = _coefficients(p_coefficients, p_one_scale, i_image, o_out, inside(o_out, C_OUT), C_OUT, FOLDED)
    products = ()
    for _ in tl.static_range(STEPS * FACTORS):
        products = products + (tl.zeros([BLOCK_OUT, BLOCK_IN], ACC),)
    b_s3 = tl.zeros([BLOCK_P, BLOCK_IN], ACC)
    b_s5 = tl.zeros([BLOCK_P, BLOCK_IN], ACC)

    first, last = tiles_of_part(i_part, tl.cdiv(pixels, BLOCK_P), parts)
    for i_tile in tl.range(first, last, num_stages=STAGES):
        start = i_image.to(tl.int64) * pixels + i_tile * BLOCK_P
        o_p = tl.arange(0, BLOCK_P)
        m_p = o_p < pixels - i_tile * BLOCK_P
        o_image = _image_of_rows(i_image, i_tile * BLOCK_P, o_p, pixels, image_pixels, GATHER)
        m_x = m_p[:, None] & m_in[None, :]
        o_x = o_p[:, None] * C_IN + o_in[None, :]
        b_x = tl.load(p_x + start * C_IN + o_x, mask=m_x, other=0.0)
        if p_norm is None:
            factors = (operand(b_x, TYPE),)
        else:
            b_u, b_slope, b_centred = _through(b_x, norm, ACTIVATION, FAST, FOLDED)
            if SUMS == 5 and not ONES:
                b_slope = tl.where(m_x, b_slope, 0.0)
                b_s3 += b_slope
                b_s5 += b_slope * b_centred
            factors = (
                once(operand(b_u, TYPE), ANCHOR),
                once(operand(b_slope, TYPE), ANCHOR),
                once(operand(b_slope * b_centred, TYPE), ANCHOR),
            )
        b_acc, products = _gradient_product(
            p_grad, p_a, start, o_p, m_p, i_image, o_image, p_coefficients, coefficients, p_one_scale, p_row_scale,
            p_weight, weights, o_in, m_in, factors, products, C_IN, C_OUT, FACTORS, ONES, ANCHOR, PRECISION, BLOCK_P,
            BLOCK_IN, BLOCK_OUT, True, STAGES, ACC,
        )  # fmt: skip
        if p_residual is not None:
            b_acc += widen(tl.load(p_residual + start * C_IN + o_x, mask=m_x, other=0.0))
        tl.store(p_dx + start * C_IN + o_x, narrow(b_acc, p_dx.dtype.element_ty), mask=m_x)

    p_part = p_dw + i_program.to(tl.int64) * C_OUT * C_IN
    _store_weight_gradient(p_part, p_gate, i_image, o_in, m_in, products, C_IN, C_OUT, FACTORS, BLOCK_OUT)
    if p_norm is not None:
        sums = _sums_of_products(products, weights, b_s3, b_s5, C_OUT, SUMS, ONES, BLOCK_OUT, BLOCK_IN, ACC)
        _store_sums(p_sums + i_program.to(tl.int64) * SUMS * C_IN + o_in, sums, m_in, SUMS, C_IN)


@triton.jit
def pointwise_bwd_kernel_weight(
    p_grad, p_a, p_x, p_partials, p_bias_partials, p_coefficients, p_image_scale, p_norm, p_gate, images, pixels,
    image_pixels, splits, C_IN: tl.constexpr, C_OUT: tl.constexpr, ACTIVATION: tl.constexpr, GATHER: tl.constexpr,
    ANCHOR: tl.constexpr, PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums over a range of tiles of prologue(grad)^T prologue(x), (splits, C_OUT, C_IN), for a second stage to add."""
    TYPE: tl.constexpr = p_grad.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if TYPE == tl.float64 else tl.float32
    FAST: tl.constexpr = TYPE == tl.bfloat16
    FOLDED: tl.constexpr = TYPE.primitive_bitwidth == 16
    blocks_in: tl.constexpr = (C_IN + BLOCK_IN - 1) // BLOCK_IN
    blocks_out: tl.constexpr = (C_OUT + BLOCK_OUT - 1) // BLOCK_OUT
    i_in = tl.program_id(0) % blocks_in
    i_out = tl.program_id(0) // blocks_in % blocks_out
    i_split = tl.program_id(0) // (blocks_in * blocks_out)
    o_in = i_in * BLOCK_IN + tl.arange(0, BLOCK_IN)
    m_in = inside(o_in, C_IN)
    o_out = i_out * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    m_out = inside(o_out, C_OUT)
    norm = norm_vectors(p_norm, o_in, m_in, C_IN, ACTIVATION, FAST, FOLDED)
    coefficients = _coefficients(p_coefficients, None, 0, o_out, m_out, C_OUT, FOLDED)
    b_weight = tl.zeros([BLOCK_OUT, BLOCK_IN], ACC)
    b_bias = tl.zeros([BLOCK_P, BLOCK_OUT], ACC)

    tiles_per_image = tl.cdiv(pixels, BLOCK_P)
    tiles = images * tiles_per_image
    first, last = tiles_of_part(i_split, tiles, splits)
    for i_tile in tl.range(first, last, num_stages=STAGES):
        i_image = i_tile // tiles_per_image
        i_row = (i_tile % tiles_per_image) * BLOCK_P
        start = i_image.to(tl.int64) * pixels + i_row
        o_p = tl.arange(0, BLOCK_P)
        m_p = o_p < pixels - i_row
        o_image = _image_of_rows(i_image, i_row, o_p, pixels, image_pixels, GATHER)
        b_g = _gradient_tile(
            p_grad, p_a, start, o_p, m_p, o_out, m_out, C_OUT, p_coefficients, coefficients, p_image_scale, o_image,
            ANCHOR,
        )  # fmt: skip
        gate = _of_image(p_gate, o_image, o_in, m_in, C_IN)
        b_x = _input_tile(p_x, start, o_p, m_p, o_in, m_in, C_IN, p_norm, norm, p_gate, gate, ACTIVATION, ANCHOR)
        b_weight = tl.dot(tl.trans(b_g), b_x, b_weight, input_precision=PRECISION, out_dtype=ACC)
        if p_bias_partials is not None:
            b_bias += b_g.to(ACC)

    o_w = o_out[:, None] * C_IN + o_in[None, :]
    p_mine = p_partials + i_split.to(tl.int64) * C_OUT * C_IN
    tl.store(p_mine + o_w, b_weight, mask=m_out[:, None] & m_in[None, :])
    if p_bias_partials is not None:
        p_bias = p_bias_partials + i_split.to(tl.int64) * C_OUT + o_out
        tl.store(p_bias, tl.sum(b_bias, 0), mask=m_out & (i_in == 0))


def precision(dtype: torch.dtype) -> str:
    """How products of fp32 are taken: TF32 where torch.backends.cuda.matmul allows it; by default it does not."""
    if dtype != torch.float32:
        return "ieee"
    setting = torch.backends.cuda.matmul.fp32_precision
    return "tf32" if (torch.backends.fp32_precision if setting == "none" else setting) == "tf32" else "ieee"


def _anchors(arch: Architecture) -> bool:
    """Whether `once` holds its value in place; the pipeliner for sm_100 and later cannot take what does."""
    return arch.name.startswith("sm_") and int(arch.name.removeprefix("sm_")) < 100


def _anchor(device: torch.device) -> bool:
    return _anchors(tuning.architecture(device))


_RESIDENT_STEPS = 5
"""Into how many tiles of reduced channels a weight that stays in the program may be cut: each is code of its own."""


def _resident(reduced: int, block_reduced: int) -> bool:
    return cdiv(reduced, block_reduced) <= _RESIDENT_STEPS


def _steps(channels: int, most: int, least: int = 16) -> int:
    """The block of reduced channels: the least padding among those that make few steps, or else the largest."""
    few = [size for size in (16, 32, 64) if least <= size <= most and _resident(channels, size)]
    return min(few, key=lambda size: cdiv(channels, size) * (size + 4), default=most)


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
    block_kept = block_width(kept, reduced, most_kept)
    # In 16 bits each of 128 or 256 threads loads 16 bytes at a time.
    threads = 128 if most_rows * block_kept <= four_warps else 256
    most_reduced, least_reduced = (64, max(16, 8 * threads // most_rows)) if wide_tiles(shape, arch) else (32, 16)
    block_reduced = _steps(reduced, most_reduced, least_reduced)
    block_p = rows_of_tile(pixels, most_rows)
    while block_p > 16 and few_programs(images, pixels, block_p, kept, block_kept, arch):
        block_p //= 2
    while block_kept > 32 and few_programs(images, pixels, block_p, kept, block_kept, arch):
        block_kept //= 2
    stages = 3 if size == 2 else 2
    if _resident(reduced, block_reduced):
        # Three programs share a multiprocessor's memory, whose pipelines hold all the reduced channels.
        row_bytes = cdiv(reduced, block_reduced) * block_reduced * size
        if stages * block_p * row_bytes > arch.shared_bytes // 3:
            stages = 2
        while block_p > 32 and stages * block_p * row_bytes > arch.shared_bytes // 3:
            block_p //= 2
    else:
        # The weight's tiles are on their way, too.
        block_p, four_warps = max(16, min(block_p, 4096 // block_kept)), min(four_warps, 2048)
    blocks = cdiv(kept, block_kept)
    return {
        "block_p": block_p,
        "block_reduced": block_reduced,
        "block_kept": block_kept,
        "parts": parts_of_image(images, cdiv(pixels, block_p), blocks, arch),
        "num_warps": 4 if block_p * block_kept <= four_warps and block_p * block_reduced <= 4096 else 8,
        "stages": stages,
    }


@tuning.heuristic("pointwise_forward")
def _forward_rule(shape: Mapping[str, int], arch: Architecture) -> Config:
    c_in, c_out = shape["channels_in"], shape["channels_out"]
    limits = (128, 64) if wide_tiles(shape, arch) else (32, 32)
    config = _product_rule(shape, arch, c_in, c_out, *limits, 1024 if shape["float16"] else 4096)
    if shape["float16"]:
        spills = not _anchors(arch) and config["num_warps"] == 8
    else:
        spills = shape["element_size"] == 4 and not _resident(c_in, config["block_reduced"])
    # Left to itself, the compiler spills a few in order to fit one program more.
    return {**config, "registers": 255} if spills else config


@tuning.heuristic("pointwise_input_gradient")
def _input_gradient_rule(shape: Mapping[str, int], arch: Architecture) -> Config:
    """Smaller than the forward's: two tensors are read for each operand, and sums need up to five tiles more."""
    rows = 32 if shape["sums"] or not wide_tiles(shape, arch) else 64
    limits = (rows, 64 if wide_tiles(shape, arch) else 32, 1024 if shape["sums"] else 2048)
    config = _product_rule(shape, arch, shape["channels_out"], shape["channels_in"], *limits)
    return {**config, "registers": 255} if shape["sums"] and shape["element_size"] == 4 else config


@tuning.heuristic("pointwise_both_gradients")
def _both_gradients_rule(shape: Mapping[str, int], arch: Architecture) -> Config:
    """As for the input gradient, with registers for the weight's; ``fits`` says whether one launch is better than two.

    What it saves is a second reading of the operands; what it costs is that every program writes a whole gradient of
    the weight, where the weight gradient's own launch divides the weight among programs, too.
    """
    c_in, c_out, size = shape["channels_in"], shape["channels_out"], shape["element_size"]
    config = _input_gradient_rule(shape, arch)
    if shape["sums"]:
        config |= {"block_p": 64, "block_reduced": 16} if c_out <= 16 else {"block_p": 32}
        config["num_warps"] = 4
        if shape["float16"] and not _anchors(arch):
            config["stages"] = 2
    else:
        config |= {"block_reduced": 16 if c_out <= 160 else 32, "num_warps": 4 if c_out <= 160 else 8, "stages": 2}
    steps, blocks = cdiv(c_out, config["block_reduced"]), cdiv(c_in, config["block_kept"])
    config["parts"] = parts_of_image(shape["images"], cdiv(shape["pixels"], config["block_p"]), blocks, arch)
    accumulators = steps * config["block_reduced"] * config["block_kept"] // (32 * config["num_warps"])
    accumulators *= 3 if shape["sums"] else 1
    saved = shape["images"] * shape["pixels"] * (2 * c_out + c_in) * size
    written = 2 * 4 * shape["images"] * config["parts"] * c_in * c_out
    pays = 4 * written <= saved or arch.name == "interpreter"
    # With the sums' operands beside them, 48 registers of accumulators spilled.
    fits = size == 2 and steps <= 10 and accumulators <= (32 if shape["sums"] else 64)
    return {**config, "fits": int(fits and pays)}


@tuning.heuristic("pointwise_weight_gradient")
def _weight_gradient_rule(shape: Mapping[str, int], arch: Architecture) -> Config:
    images, pixels, size = shape["images"], shape["pixels"], shape["element_size"]
    most = 128 if wide_tiles(shape, arch) else 32
    block_in = block_width(shape["channels_in"], shape["channels_out"], most)
    block_out = block_width(shape["channels_out"], shape["channels_in"], most)
    if block_in * block_out > 64 * 128:
        block_in = 64
    block_p = rows_of_tile(pixels, 64 if wide_tiles(shape, arch) else 32)
    blocks = cdiv(shape["channels_in"], block_in) * cdiv(shape["channels_out"], block_out)
    tiles = images * cdiv(pixels, block_p)
    # Of each stage grad, a and x, and one operand more on its way to the product.
    three_stages = (3 * (block_in + 2 * block_out) + max(block_in, block_out)) * block_p * size
    return {
        "block_p": block_p,
        "block_in": block_in,
        "block_out": block_out,
        "splits": max(1, min(tiles, cdiv(4 * arch.multiprocessors, blocks))),
        "num_warps": 8 if max(block_in, block_out) > 64 else 4,
        "stages": 3 if size == 2 and three_stages <= arch.shared_bytes else 2,
    }


def _shape(images: int, pixels: int, weight: Tensor, like: Tensor) -> dict[str, int]:
    return {
        "images": images,
        "pixels": pixels,
        "channels_in": weight.shape[1],
        "channels_out": weight.shape[0],
        **tuning.element(like),
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
    grid = (images * parts * cdiv(c_out, config["block_kept"]),)
    launch(pointwise_fwd_kernel, grid,
        x, weight, y, norm, gate, bias, out_norm, image_scale, residual, grad, partials, pixels, x.shape[1], parts,
        C_IN=c_in,
        C_OUT=c_out,
        ACTIVATION=ACTIVATION_CODES[activation],
        OUT_ACTIVATION=ACTIVATION_CODES[out_activation],
        GATHER=gather,
        ANCHOR=_anchor(x.device),
        PRECISION=precision(x.dtype),
        BLOCK_P=config["block_p"],
        BLOCK_IN=config["block_reduced"],
        BLOCK_OUT=config["block_kept"],
        RESIDENT=_resident(c_in, config["block_reduced"]),
        STAGES=config["stages"],
        num_warps=config["num_warps"],
        maxnreg=config.get("registers"),
    )  # fmt: skip
    return y, partials


class Through(NamedTuple):
    """The input that a product read: activation(norm(a)), times a gate where ``per_image``. See `input_gradient`."""

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
    x, norm, activation, per_image = (None, None, "none", False) if through is None else through
    shape = _gradient_shape(grad, weight, image_scale is not None, per_image, norm is not None)
    config = tuning.choose("pointwise_input_gradient", shape, grad.device)
    weight = _weight_as_read(weight, grad, config["block_reduced"], weight.shape[0])
    dx, sums, _ = _launch_input_gradient(
        config, shape, grad, a, weight, x, coefficients, image_scale, residual, norm, None, activation, per_image
    )
    return dx, sums


def both_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    coefficients: Tensor | None = None,
    a: Tensor | None = None,
    image_scale: Tensor | None = None,
    residual: Tensor | None = None,
    norm: Tensor | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`input_gradient` and `weight_gradient` in one launch that reads everything once; only where `both_fit`.

    Returns:
        dx, dW, and with ``norm`` the sums of `input_gradient`, five an image with a ``gate``, else two.
    """
    shape = _gradient_shape(grad, weight, image_scale is not None, gate is not None, norm is not None)
    config = tuning.choose("pointwise_both_gradients", shape, grad.device)
    dx, sums, products = _launch_input_gradient(
        config, shape, grad, a, weight, x, coefficients, image_scale, residual, norm, gate, activation,
        gate is not None, both=True,
    )  # fmt: skip
    return dx, sum_partials(products, weight.dtype), sums


def both_fit(grad: Tensor, weight: Tensor, *, of_image: bool, per_image: bool, normalised: bool) -> bool:
    """Whether `both_gradients` pays: the whole weight gradient fits registers, and its parts are little to write.

    Args:
        of_image: whether there is an image_scale. per_image: whether there is a gate. normalised: whether a norm.
    """
    shape = _gradient_shape(grad, weight, of_image, per_image, normalised)
    config = tuning.choose("pointwise_both_gradients", shape, grad.device)
    return bool(config["fits"])


def _gradient_shape(grad: Tensor, weight: Tensor, of_image: bool, per_image: bool, normalised: bool) -> dict[str, int]:
    images, pixels, gather = (*grad.shape[:2], False) if per_image else _images(grad, of_image)
    sums = (5 if per_image else 2) if normalised else 0
    return {**_shape(images, pixels, weight, grad), "sums": sums, "gather": int(gather)}


def _launch_input_gradient(
    config: Config,
    shape: Mapping[str, int],
    grad: Tensor,
    a: Tensor | None,
    weight: Tensor,
    x: Tensor | None,
    coefficients: Tensor | None,
    image_scale: Tensor | None,
    residual: Tensor | None,
    norm: Tensor | None,
    gate: Tensor | None,
    activation: str,
    per_image: bool,
    both: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx, and if any the sums and the parts of the weight's gradient."""
    c_out, c_in = weight.shape[:2]
    programs = shape["images"] * config["parts"]
    dx = torch.empty((*grad.shape[:2], c_in), dtype=grad.dtype, device=grad.device)
    sums = products = None
    if norm is not None:
        size = (shape["images"], config["parts"], 5, c_in) if per_image else (programs, 2, c_in)
        sums = torch.empty(size, dtype=wide(grad), device=grad.device)
    if both:
        products = torch.empty((programs, *weight.shape), dtype=wide(grad), device=grad.device)
    grid = (programs * cdiv(c_in, config["block_kept"]),)
    constants = dict(
        C_IN=c_in,
        C_OUT=c_out,
        ACTIVATION=ACTIVATION_CODES[activation],
        SUMS=shape["sums"],
        GATHER=bool(shape["gather"]),
        ANCHOR=_anchor(grad.device),
        PRECISION=precision(grad.dtype),
        BLOCK_P=config["block_p"],
        BLOCK_IN=config["block_kept"],
        BLOCK_OUT=config["block_reduced"],
        STAGES=config["stages"],
        num_warps=config["num_warps"],
        maxnreg=config.get("registers"),
    )
    pixels = (shape["pixels"], grad.shape[1], config["parts"])
    if both:
        launch(pointwise_bwd_kernel_both, grid,
            grad, a, weight, x, dx, products, coefficients, image_scale, residual, norm, gate, sums, *pixels,
            **constants,
        )  # fmt: skip
    else:
        launch(pointwise_bwd_kernel_input, grid,
            grad, a, weight, x, dx, coefficients, image_scale, residual, norm, sums, *pixels, **constants,
            RESIDENT=_resident(c_out, config["block_reduced"]),
        )  # fmt: skip
    return dx, sums, products


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
    blocks = cdiv(c_in, config["block_in"]) * cdiv(c_out, config["block_out"])
    launch(pointwise_bwd_kernel_weight, (splits * blocks,),
        grad, a, x, partials, bias_partials, coefficients, image_scale, norm, gate,
        images, pixels, x.shape[1], splits,
        C_IN=c_in,
        C_OUT=c_out,
        ACTIVATION=ACTIVATION_CODES[activation],
        GATHER=gather,
        ANCHOR=_anchor(x.device),
        PRECISION=precision(x.dtype),
        BLOCK_P=config["block_p"],
        BLOCK_IN=config["block_in"],
        BLOCK_OUT=config["block_out"],
        STAGES=config["stages"],
        num_warps=config["num_warps"],
    )  # fmt: skip
    bias_gradient = None if bias is None else sum_partials(bias_partials, bias.dtype)
    return sum_partials(partials, weight.dtype), bias_gradient
