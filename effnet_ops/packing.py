"""Weights in the order in which the CPU kernels read them: packed once, multiplied often.

A product has a weight (columns, depth), in panels of 16 columns: (panels, depth, 16), zeros behind the last column.
For bfloat16, neighbouring terms lie beside each other, since one instruction multiplies and adds such pairs:
(panels, ceil(depth / 2), 16, 2). The layout is the same for every processor.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

PANEL = 16


def pack(weight: Tensor) -> Tensor:
    """Panels of ``weight`` (columns, depth), in its dtype."""
    columns, depth = weight.shape
    if weight.dtype is torch.bfloat16:
        padded = pad(weight, (0, depth % 2, 0, -columns % PANEL))
        return padded.view(-1, PANEL, (depth + 1) // 2, 2).transpose(1, 2).contiguous()
    return pad(weight, (0, 0, 0, -columns % PANEL)).view(-1, PANEL, depth).transpose(1, 2).contiguous()


def unpack(packed: Tensor, columns: int, depth: int) -> Tensor:
    """The weight (columns, depth) that `pack` packed."""
    rows = packed.transpose(1, 2)
    return rows.reshape(rows.shape[0] * PANEL, -1)[:columns, :depth].contiguous()


def is_packed(weight: Tensor) -> bool:
    """Whether a product's weight is packed, and not (columns, depth)."""
    return weight.dim() > 2


def pack_convolution(weight: Tensor) -> Tensor:
    """Panels of a dense convolution's weight (out, in, kh, kw), the terms in the order (kh, kw, in)."""
    return pack(weight.permute(0, 2, 3, 1).flatten(1))


def unpack_convolution(packed: Tensor, out: int, channels: int, kernel: tuple[int, int]) -> Tensor:
    """The weight (out, in, kh, kw) that `pack_convolution` packed."""
    rows = unpack(packed, out, channels * kernel[0] * kernel[1])
    return rows.view(out, *kernel, channels).permute(0, 3, 1, 2).contiguous()


def pack_depthwise(weight: Tensor) -> Tensor:
    """(C, 1, kh, kw) as (kh, kw, C)."""
    return weight.squeeze(1).permute(1, 2, 0).contiguous()


def unpack_depthwise(packed: Tensor) -> Tensor:
    """The weight (C, 1, kh, kw) that `pack_depthwise` packed."""
    return packed.permute(2, 0, 1).unsqueeze(1).contiguous()
