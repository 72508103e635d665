"""Dense k x k convolution as an implicit matrix product: forward, input and weight gradient.

Activations are contiguous (N, H, W, C). The rows of a product are the pixels of one image; what it sums over are the
taps of the window times the channels, in one axis, so that few channels waste nothing. No matrix of windows is in
memory: each element of an operand is loaded from the pixel that the tap meets. docs/triton.md has the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from effnet_ops.checks import output_size
from effnet_ops.kernels import tuning
from effnet_ops.kernels.activation import ACTIVATION_CODES, inside, narrow, operand, widen
from effnet_ops.kernels.batch_norm import wide
from effnet_ops.kernels.launching import launch
from effnet_ops.kernels.layout import cdiv
from effnet_ops.kernels.pointwise import precision
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

_SIZES = ["height", "width", "out_height", "out_width", "top", "left"]


@triton.jit
def _gathered(
    p_image, h_row, w_row, m_row, h_tap, w_tap, o_c, m_k, height, width, C: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip  # [BP, BK]
    """Channel ``o_c`` of the pixel at (h_row + h_tap, w_row + w_tap), 0 outside the image, ready for a product."""
    h = h_row[:, None] + h_tap[None, :]
    w = w_row[:, None] + w_tap[None, :]
    m = (h >= 0) & (h < height) & (w >= 0) & (w < width) & m_row[:, None] & m_k[None, :]
    o_row = (h_row.to(OFFSET) * width + w_row) * C
    o_tap = (h_tap.to(OFFSET) * width + w_tap) * C + o_c
    return operand(tl.load(p_image + (o_row[:, None] + o_tap[None, :]), mask=m, other=0.0), p_image.dtype.element_ty)


@triton.jit
def weight_rows_kernel(
    p_weight, p_rows, out_stride, in_stride, h_stride, w_stride, SIZE: tl.constexpr, C_IN: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A weight (C_OUT, C_IN, KH, KW) of any strides as (C_OUT, KH, KW, C_IN)."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < SIZE
    i_in, tap, i_out = o % C_IN, o // C_IN % (KH * KW), o // (C_IN * KH * KW)
    o_w = i_out * out_stride + i_in * in_stride + tap // KW * h_stride + tap % KW * w_stride
    b_w = widen(tl.load(p_weight + o_w, mask=m, other=0.0))
    tl.store(p_rows + o, narrow(b_w, p_rows.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=_SIZES)
def convolution_fwd_kernel(
    p_x, p_weight, p_y, p_bias, p_out_norm, p_image_scale, p_residual, p_partials, height, width, out_height, out_width,
    top, left, parts, C_IN: tl.constexpr, C_OUT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr,
    SW: tl.constexpr, OUT_ACTIVATION: tl.constexpr, OFFSET: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_OUT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = epilogue(conv(x)); a program: one (image, part of its output pixels, block of output channels)."""
    TYPE: tl.constexpr = p_x.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if TYPE == tl.float64 else tl.float32
    FAST: tl.constexpr = TYPE == tl.bfloat16
    FOLDED: tl.constexpr = TYPE.primitive_bitwidth == 16
    K: tl.constexpr = KH * KW * C_IN
    i_program, i_image, i_part, o_out, m_out = place(parts, C_OUT, BLOCK_OUT)
    out_norm = norm_vectors(p_out_norm, o_out, m_out, C_OUT, OUT_ACTIVATION, FAST, FOLDED)
    bias = vectors(p_bias, 1, o_out, m_out, C_OUT)
    p_image = p_x + i_image.to(tl.int64) * height * width * C_IN
    pixels = out_height * out_width
    pivot = tl.zeros([BLOCK_OUT], ACC)
    total = tl.zeros([BLOCK_OUT], ACC)
    squares = tl.zeros([BLOCK_OUT], ACC)

    first, last = tiles_of_part(i_part, tl.cdiv(pixels, BLOCK_P), parts)
    for i_tile in tl.range(first, last, num_stages=1):
        o_p = tl.arange(0, BLOCK_P)
        valid = tl.minimum(pixels - i_tile * BLOCK_P, BLOCK_P)
        m_p = o_p < valid
        row, column = (i_tile * BLOCK_P + o_p) // out_width, (i_tile * BLOCK_P + o_p) % out_width
        b_acc = tl.zeros([BLOCK_P, BLOCK_OUT], ACC)
        for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            o_k = k + tl.arange(0, BLOCK_K)
            m_k = inside(o_k, K)
            tap = o_k // C_IN
            b_x = _gathered(
                p_image, row * SH - top, column * SW - left, m_p, tap // KW, tap % KW, o_k % C_IN, m_k, height, width,
                C_IN, OFFSET,
            )  # fmt: skip
            b_w = weight_tile(p_weight, o_k, m_k, o_out, m_out, 1, K, TYPE)
            b_acc = tl.dot(b_x, b_w, b_acc, input_precision=PRECISION, out_dtype=ACC)
        start = i_image.to(tl.int64) * pixels + i_tile * BLOCK_P
        m_y = m_p[:, None] & m_out[None, :]
        o_y = o_p[:, None] * C_OUT + o_out[None, :]
        b_acc = epilogue(
            b_acc, start, o_y, m_y, i_image, p_bias, bias, p_out_norm, out_norm, None, p_image_scale, p_residual, C_OUT,
            OUT_ACTIVATION, FAST, FOLDED,
        )  # fmt: skip
        b_y = narrow(b_acc, p_y.dtype.element_ty)
        tl.store(p_y + start * C_OUT + o_y, b_y, mask=m_y)
        if p_partials is not None:
            # As in pointwise_fwd_kernel; a tile's sum over threads is little beside the product behind it.
            b_v = widen(b_y)
            if i_tile == first:
                pivot = tl.sum(tl.where(m_p[:, None], b_v, 0.0), 0) / valid.to(ACC)
            b_distance = tl.where(m_p[:, None], b_v - pivot[None, :], 0.0)
            total += tl.sum(b_distance, 0)
            squares += tl.sum(b_distance * b_distance, 0)

    if p_partials is not None:
        count = tl.maximum(tl.minimum(pixels, last * BLOCK_P) - first * BLOCK_P, 0).to(ACC)
        store_statistics(p_partials, i_program, count, pivot, total, squares, o_out, m_out, C_OUT, BLOCK_OUT, ACC)


@triton.jit
def _phase(phase, before, length, K: tl.constexpr, S: tl.constexpr):
    """Along one axis, of the input pixels phase, phase + S, ...: how many there are, and what reads them.

    That is the tap ``first`` and every S-th one behind it, ``taps`` in all; the first pixel is met by ``first`` of the
    output ``output``. ``before`` is the padding.
    """
    first = (phase + before) % S
    return (length - phase + S - 1) // S, first, (K - first + S - 1) // S, (phase + before) // S


@triton.jit(do_not_specialize=_SIZES)
def convolution_bwd_kernel_input(
    p_grad, p_weight, p_dx, p_residual, height, width, out_height, out_width, top, left, parts, C_IN: tl.constexpr,
    C_OUT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, OFFSET: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_IN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dx = conv^T(grad) (+ residual); a program: one (image, phase, part of its pixels, block of input channels).

    The pixels of a phase have the same place within a stride. The same taps meet them all, and no other is multiplied.
    """
    TYPE: tl.constexpr = p_grad.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if TYPE == tl.float64 else tl.float32
    _, i_image, i_part, o_in, m_in = place(parts * (SH * SW), C_IN, BLOCK_IN)
    h_phase, w_phase = i_part % (SH * SW) // SW, i_part % SW
    rows, h_first, h_taps, h_output = _phase(h_phase, top, height, KH, SH)
    columns, w_first, w_taps, w_output = _phase(w_phase, left, width, KW, SW)
    # Images may have fewer pixels, and windows fewer taps, than strides are long: then there is nothing to divide.
    some_columns, some_taps = tl.maximum(columns, 1), tl.maximum(w_taps, 1)
    pixels, taps = rows * columns, h_taps * w_taps
    p_image = p_grad + i_image.to(tl.int64) * out_height * out_width * C_OUT
    o_image = i_image.to(tl.int64) * height * width * C_IN

    first, last = tiles_of_part(i_part // (SH * SW), tl.cdiv(pixels, BLOCK_P), parts)
    for i_tile in tl.range(first, last, num_stages=1):
        o_p = i_tile * BLOCK_P + tl.arange(0, BLOCK_P)
        m_p = o_p < pixels
        row, column = o_p // some_columns, o_p % some_columns
        b_acc = tl.zeros([BLOCK_P, BLOCK_IN], ACC)
        for k in tl.range(0, taps * C_OUT, BLOCK_K, num_stages=STAGES):
            o_k = k + tl.arange(0, BLOCK_K)
            o_out, m_k = o_k % C_OUT, o_k < taps * C_OUT
            h_tap, w_tap = o_k // C_OUT // some_taps, o_k // C_OUT % some_taps
            b_g = _gathered(
                p_image, row + h_output, column + w_output, m_p, -h_tap, -w_tap, o_out, m_k, out_height, out_width,
                C_OUT, OFFSET,
            )  # fmt: skip
            o_weight = (o_out * KH + (h_first + h_tap * SH)) * KW + (w_first + w_tap * SW)
            b_w = weight_tile(p_weight, o_weight, m_k, o_in, m_in, C_IN, 1, TYPE)
            b_acc = tl.dot(b_g, b_w, b_acc, input_precision=PRECISION, out_dtype=ACC)
        m_x = m_p[:, None] & m_in[None, :]
        o_pixel = ((row * SH + h_phase).to(OFFSET) * width + (column * SW + w_phase)) * C_IN
        o_x = o_pixel[:, None] + o_in[None, :]
        if p_residual is not None:
            b_acc += widen(tl.load(p_residual + o_image + o_x, mask=m_x, other=0.0))
        tl.store(p_dx + o_image + o_x, narrow(b_acc, p_dx.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=_SIZES)
def convolution_bwd_kernel_weight(
    p_grad, p_x, p_partials, images, height, width, out_height, out_width, top, left, splits, C_IN: tl.constexpr,
    C_OUT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, OFFSET: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_OUT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Sums over a range of tiles of grad^T x, (splits, C_OUT, C_IN, KH, KW), for a second stage to add."""
    TYPE: tl.constexpr = p_grad.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if TYPE == tl.float64 else tl.float32
    K: tl.constexpr = KH * KW * C_IN
    blocks_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    blocks_out: tl.constexpr = (C_OUT + BLOCK_OUT - 1) // BLOCK_OUT
    i_out = tl.program_id(0) // blocks_k % blocks_out
    i_split = tl.program_id(0) // (blocks_k * blocks_out)
    o_k = tl.program_id(0) % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = inside(o_k, K)
    tap, o_in = o_k // C_IN, o_k % C_IN
    o_out = i_out * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    m_out = inside(o_out, C_OUT)
    pixels = out_height * out_width
    b_weight = tl.zeros([BLOCK_OUT, BLOCK_K], ACC)

    tiles_per_image = tl.cdiv(pixels, BLOCK_P)
    first, last = tiles_of_part(i_split, images * tiles_per_image, splits)
    for i_tile in tl.range(first, last, num_stages=STAGES):
        i_image = (i_tile // tiles_per_image).to(tl.int64)
        i_row = i_tile % tiles_per_image * BLOCK_P
        o_p = tl.arange(0, BLOCK_P)
        m_p = o_p < pixels - i_row
        row, column = (i_row + o_p) // out_width, (i_row + o_p) % out_width
        p_rows = p_grad + (i_image * pixels + i_row) * C_OUT
        m_g = m_p[:, None] & m_out[None, :]
        b_g = operand(tl.load(p_rows + (o_p[:, None] * C_OUT + o_out[None, :]), mask=m_g, other=0.0), TYPE)
        b_x = _gathered(
            p_x + i_image * height * width * C_IN, row * SH - top, column * SW - left, m_p, tap // KW, tap % KW, o_in,
            m_k, height, width, C_IN, OFFSET,
        )  # fmt: skip
        b_weight = tl.dot(tl.trans(b_g), b_x, b_weight, input_precision=PRECISION, out_dtype=ACC)

    o_w = (o_out[:, None] * C_IN + o_in[None, :]) * (KH * KW) + tap[None, :]
    p_mine = p_partials + i_split.to(tl.int64) * C_OUT * K
    tl.store(p_mine + o_w, b_weight, mask=m_out[:, None] & m_k[None, :])


def _product_rule(
    shape: Mapping[str, int], arch: Architecture, reduced: int, kept: int, images: int, pixels: int
) -> Config:
    """Tiles of a product of (images x pixels, reduced) with (reduced, kept).

    In 16 bits they are the largest of which two programs with eight warps share a multiprocessor's registers, so that
    one multiplies while the other stores.
    """
    most_rows, most_kept = (128, 64) if wide_tiles(shape, arch) else (32, 32)
    block_p, block_kept = rows_of_tile(pixels, most_rows), block_width(kept, reduced, most_kept)
    while block_p > 16 and few_programs(images, pixels, block_p, kept, block_kept, arch):
        block_p //= 2
    while block_kept > 32 and few_programs(images, pixels, block_p, kept, block_kept, arch):
        block_kept //= 2
    return {
        "block_p": block_p,
        "block_reduced": 32,
        "block_kept": block_kept,
        "parts": parts_of_image(images, cdiv(pixels, block_p), cdiv(kept, block_kept), arch),
        "num_warps": 8 if block_p * block_kept > 4096 else 4,
        "stages": 3 if shape["element_size"] == 2 else 2,
    }


@tuning.heuristic("convolution_forward")
def _forward_rule(shape: Mapping[str, int], arch: Architecture) -> Config:
    reduced = shape["taps"] * shape["channels_in"]
    return _product_rule(shape, arch, reduced, shape["channels_out"], shape["images"], shape["out_pixels"])


@tuning.heuristic("convolution_input_gradient")
def _input_gradient_rule(shape: Mapping[str, int], arch: Architecture) -> Config:
    """Each phase of the stride is as an image of its own."""
    phases = shape["phases"]
    reduced = cdiv(shape["taps"], phases) * shape["channels_out"]
    pixels = cdiv(shape["pixels"], phases)
    config = _product_rule(shape, arch, reduced, shape["channels_in"], shape["images"] * phases, pixels)
    # Left to itself, the compiler spills a few in order to fit one more program.
    return {**config, "registers": 128}


@tuning.heuristic("convolution_weight_gradient")
def _weight_gradient_rule(shape: Mapping[str, int], arch: Architecture) -> Config:
    reduced = shape["taps"] * shape["channels_in"]
    most = 128 if wide_tiles(shape, arch) else 32
    block_k = block_width(reduced, shape["channels_out"], most)
    block_out = block_width(shape["channels_out"], reduced, most)
    if block_k * block_out > 64 * 128:
        block_out = 64
    block_p = rows_of_tile(shape["out_pixels"], 64 if wide_tiles(shape, arch) else 32)
    blocks = cdiv(reduced, block_k) * cdiv(shape["channels_out"], block_out)
    tiles = shape["images"] * cdiv(shape["out_pixels"], block_p)
    return {
        "block_p": block_p,
        "block_k": block_k,
        "block_out": block_out,
        "splits": max(1, min(tiles, cdiv(4 * arch.multiprocessors, blocks))),
        "num_warps": 8 if max(block_k, block_out) > 64 else 4,
        "stages": 3 if shape["element_size"] == 2 else 2,
    }


def _shape(x: Tensor, size: Sequence[int], out_size: Sequence[int], weight: Tensor, stride: Sequence[int]) -> Config:
    c_out, c_in, *kernel = weight.shape
    return {
        "images": x.shape[0],
        "pixels": size[0] * size[1],
        "out_pixels": out_size[0] * out_size[1],
        "channels_in": c_in,
        "channels_out": c_out,
        "taps": kernel[0] * kernel[1],
        "phases": stride[0] * stride[1],
        **tuning.element(x),
    }


def _constants(weight: Tensor, stride: Sequence[int], *activations: Tensor) -> dict[str, object]:
    """What all three launches take; offsets inside one image are int64 where they can be 2**31 or more."""
    c_out, c_in, *kernel = weight.shape
    large = any(t.numel() // t.shape[0] >= 2**31 for t in activations)
    return {
        "C_IN": c_in,
        "C_OUT": c_out,
        "KH": kernel[0],
        "KW": kernel[1],
        "SH": stride[0],
        "SW": stride[1],
        "OFFSET": tl.int64 if large else tl.int32,
        "PRECISION": precision(activations[0].dtype),
    }


_BLOCK = 1024


def weight_rows(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (Cout, Cin, kh, kw) as the products take it: (Cout, kh, kw, Cin), contiguous, in ``dtype``."""
    rows = weight.permute(0, 2, 3, 1)
    if weight.dtype == dtype and rows.is_contiguous():
        return rows
    c_out, c_in, *kernel = weight.shape
    rows = torch.empty((c_out, *kernel, c_in), dtype=dtype, device=weight.device)
    size = weight.numel()
    launch(weight_rows_kernel, (cdiv(size, _BLOCK),),
        weight, rows, *weight.stride(), SIZE=size, C_IN=c_in, KH=kernel[0], KW=kernel[1], BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return rows


def forward(
    x: Tensor,
    weight: Tensor,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    bias: Tensor | None = None,
    out_norm: Tensor | None = None,
    out_activation: str = "none",
    image_scale: Tensor | None = None,
    residual: Tensor | None = None,
    statistics: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """out_activation(out_norm(conv(x) + bias)) * image_scale + residual, each part optional.

    Args:
        x: (N, H, W, Cin), contiguous, not empty. weight: (Cout, Cin, kh, kw). padding: (top, bottom, left, right).
        bias: (Cout,). out_norm: (3, Cout), rows mean, scale and shift, in the compute dtype.
        image_scale: (N,), in the compute dtype. residual: (N, Ho, Wo, Cout).
        statistics: also count, mean and sum of squared deviations of the result, a channel, in parts.

    Returns:
        y (N, Ho, Wo, Cout) in the dtype of x, and the partial statistics (programs, 3, Cout) or None.
    """
    batch, *size, _ = x.shape
    c_out, _, *kernel = weight.shape
    out_size = output_size(size, kernel, stride, padding, (1, 1))
    config = tuning.choose("convolution_forward", _shape(x, size, out_size, weight, stride), x.device)
    y = torch.empty((batch, *out_size, c_out), dtype=x.dtype, device=x.device)
    parts, partials = config["parts"], None
    if statistics:
        partials = torch.empty((batch * parts, 3, c_out), dtype=wide(x), device=x.device)
    launch(convolution_fwd_kernel, (batch * parts * cdiv(c_out, config["block_kept"]),),
        x, weight_rows(weight, x.dtype), y, bias, out_norm, image_scale, residual, partials, *size, *out_size,
        padding[0], padding[2], parts,
        **_constants(weight, stride, x, y),
        OUT_ACTIVATION=ACTIVATION_CODES[out_activation],
        BLOCK_P=config["block_p"],
        BLOCK_K=config["block_reduced"],
        BLOCK_OUT=config["block_kept"],
        STAGES=config["stages"],
        num_warps=config["num_warps"],
        maxnreg=config.get("registers"),
    )  # fmt: skip
    return y, partials


def input_gradient(
    grad: Tensor,
    weight: Tensor,
    *,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    residual: Tensor | None = None,
) -> Tensor:
    """dx (N, H, W, Cin) + residual for grad (N, Ho, Wo, Cout), contiguous; ``size`` is (H, W)."""
    batch, *out_size, _ = grad.shape
    c_in = weight.shape[1]
    shape = _shape(grad, size, out_size, weight, stride)
    config = tuning.choose("convolution_input_gradient", shape, grad.device)
    dx = torch.empty((batch, *size, c_in), dtype=grad.dtype, device=grad.device)
    programs = batch * shape["phases"] * config["parts"]
    launch(convolution_bwd_kernel_input, (programs * cdiv(c_in, config["block_kept"]),),
        grad, weight_rows(weight, grad.dtype), dx, residual, *size, *out_size, padding[0], padding[2], config["parts"],
        **_constants(weight, stride, grad, dx),
        BLOCK_P=config["block_p"],
        BLOCK_K=config["block_reduced"],
        BLOCK_IN=config["block_kept"],
        STAGES=config["stages"],
        num_warps=config["num_warps"],
        maxnreg=config.get("registers"),
    )  # fmt: skip
    return dx


def weight_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, *, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """dW in the shape and dtype of ``weight``, contiguous, for grad (N, Ho, Wo, Cout) and x (N, H, W, Cin)."""
    batch, *size, c_in = x.shape
    out_size, c_out = grad.shape[1:3], weight.shape[0]
    shape = _shape(x, size, out_size, weight, stride)
    config = tuning.choose("convolution_weight_gradient", shape, x.device)
    splits = config["splits"]
    partials = torch.empty((splits, *weight.shape), dtype=wide(x), device=x.device)
    blocks = cdiv(shape["taps"] * c_in, config["block_k"]) * cdiv(c_out, config["block_out"])
    launch(convolution_bwd_kernel_weight, (splits * blocks,),
        grad, x, partials, batch, *size, *out_size, padding[0], padding[2], splits,
        **_constants(weight, stride, grad, x),
        BLOCK_P=config["block_p"],
        BLOCK_K=config["block_k"],
        BLOCK_OUT=config["block_out"],
        STAGES=config["stages"],
        num_warps=config["num_warps"],
        maxnreg=config.get("registers"),
    )  # fmt: skip
    return sum_partials(partials, weight.dtype)
