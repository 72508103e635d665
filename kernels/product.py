"""What products share: which tiles a program owns, what follows a product in its epilogue, and rules for tile sizes."""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl

from effnet_ops.kernels.activation import activate, activation_gradient, fold, inside, normalise, operand, widen
from effnet_ops.kernels.layout import cdiv, next_power_of_2
from effnet_ops.kernels.tuning import Architecture


@triton.jit
def place(parts, C: tl.constexpr, BLOCK: tl.constexpr):
    """What a program owns: its number among those of a block of channels, its image and part of it; its channels."""
    blocks: tl.constexpr = (C + BLOCK - 1) // BLOCK
    o_c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    i_program = tl.program_id(0) // blocks
    return i_program, i_program // parts, i_program % parts, o_c, inside(o_c, C)


@triton.jit
def tiles_of_part(i_part, tiles, parts):
    """The first tile of a part, and that after its last."""
    tiles_per_part = tl.cdiv(tiles, parts)
    first = i_part * tiles_per_part
    return first, tl.minimum(first + tiles_per_part, tiles)


@triton.jit
def vectors(p_rows, ROWS: tl.constexpr, o_c, m_c, C: tl.constexpr):
    """The first rows of a (rows, C) tensor, [1, BC] each; none where there is no such tensor."""
    found = ()
    if p_rows is not None:
        for row in tl.static_range(ROWS):
            found = found + (widen(tl.load(p_rows + row * C + o_c, mask=m_c, other=0.0))[None, :],)
    return found


@triton.jit
def norm_vectors(p_norm, o_c, m_c, C: tl.constexpr, KIND: tl.constexpr, FAST: tl.constexpr, FOLDED: tl.constexpr):
    """(mean, scale, shift) of a normalisation in front of an activation, for `normalise`; nothing without one."""
    norm = vectors(p_norm, 3, o_c, m_c, C)
    if FOLDED and p_norm is not None:
        norm = fold(norm, KIND, FAST)
    return norm


@triton.jit
def weight_tile(
    p_weight, o_row, m_row, o_column, m_column, ROW: tl.constexpr, COLUMN: tl.constexpr, TYPE: tl.constexpr
):
    """Weights as [rows, columns], with the strides of either."""
    o_w = o_row[:, None] * ROW + o_column[None, :] * COLUMN
    return operand(tl.load(p_weight + o_w, mask=m_row[:, None] & m_column[None, :], other=0.0), TYPE)


@triton.jit
def epilogue(
    b_acc, start, o_y, m_y, o_image, p_bias, bias, p_out_norm, out_norm, p_grad, p_image_scale, p_residual,
    C_OUT: tl.constexpr, OUT_ACTIVATION: tl.constexpr, FAST: tl.constexpr, FOLDED: tl.constexpr,
):  # fmt: skip
    """A tile of the product as it is stored: out_activation(out_norm(. + bias)) * image_scale + residual."""
    HALVED: tl.constexpr = FOLDED and p_out_norm is not None
    if p_bias is not None:
        b_acc += bias[0]
    if p_out_norm is not None:
        b_acc = normalise(b_acc, out_norm, FOLDED)
    if p_grad is not None:
        b_grad = widen(tl.load(p_grad + start * C_OUT + o_y, mask=m_y, other=0.0))
        b_acc = b_grad * activation_gradient(b_acc, OUT_ACTIVATION, FAST, HALVED)
    else:
        b_acc = activate(b_acc, OUT_ACTIVATION, FAST, HALVED)
    if p_image_scale is not None:
        b_acc = b_acc * tl.load(p_image_scale + o_image)
    if p_residual is not None:
        b_acc += widen(tl.load(p_residual + start * C_OUT + o_y, mask=m_y, other=0.0))
    return b_acc


@triton.jit
def store_statistics(
    p_partials, i_program, count, pivot, total, squares, o_out, m_out, C_OUT: tl.constexpr, BLOCK_OUT: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """A program's count, mean and squares around the mean, from sums around ``pivot``."""
    distance = total / tl.maximum(count, 1.0)
    p_mine = p_partials + i_program.to(tl.int64) * 3 * C_OUT + o_out
    tl.store(p_mine, tl.zeros([BLOCK_OUT], ACC) + count, mask=m_out)
    tl.store(p_mine + C_OUT, pivot + distance, mask=m_out)
    tl.store(p_mine + 2 * C_OUT, tl.maximum(squares - total * distance, 0.0), mask=m_out)


def block_width(channels: int, other: int, most: int) -> int:
    """The block of channels that wastes least: of padding, and of reading the other operand once a block."""
    sizes = [size for size in (16, 32, 64, 128, 256) if size <= most]
    return min(sizes, key=lambda size: cdiv(channels, size) * (size + other / 4))


def rows_of_tile(pixels: int, most: int) -> int:
    return max(16, min(most, next_power_of_2(pixels)))


def parts_of_image(images: int, tiles: int, blocks: int, arch: Architecture) -> int:
    """Into how many parts an image's tiles are split: those that are done first.

    Four programs a multiprocessor run at a time, and what does not fill them waits for a turn of its own; a program
    fills its pipeline, loads its weight and writes its sums in about the time of two tiles.
    """
    places = 4 * arch.multiprocessors

    def time(parts: int) -> float:
        return cdiv(images * parts * blocks, places) * (cdiv(tiles, parts) + 2)

    return min(range(1, min(tiles, cdiv(4 * places, images * blocks)) + 1), key=time)


def wide_tiles(shape: Mapping[str, int], arch: Architecture) -> bool:
    """Halves, on tensor cores, leave more registers than fp32; the interpreter only counts programs."""
    return shape["element_size"] == 2 or arch.name == "interpreter"


def few_programs(images: int, pixels: int, block_p: int, channels: int, block: int, arch: Architecture) -> bool:
    return images * cdiv(pixels, block_p) * cdiv(channels, block) < arch.multiprocessors
