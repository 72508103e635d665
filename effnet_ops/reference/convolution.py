"""Dense convolution with bias and activation, such as a network's first layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from effnet_ops.reference.activation import activate, compute_dtype


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], activation: str
) -> Tensor:
    """activation(conv(x) + bias), x (N, Cin, H, W), weight (Cout, Cin, kh, kw), padding (top, bottom, left, right)."""
    dtype = compute_dtype(x.dtype)
    x_padded, sides = pad_unevenly(x.to(dtype), padding)
    bias = None if bias is None else bias.to(dtype)
    return activate(F.conv2d(x_padded, weight.to(dtype), bias, tuple(stride), sides), activation).to(x.dtype)


def pad_unevenly(x: Tensor, padding: Sequence[int]) -> tuple[Tensor, tuple[int, int]]:
    """x padded by (top, bottom, left, right), or, where opposite sides are equal, x and what conv2d pads itself."""
    top, bottom, left, right = padding
    # Comparing sizes that torch.export leaves open would fix them.
    if all(isinstance(side, int) for side in padding) and (top, left) == (bottom, right):
        return x, (top, left)
    return F.pad(x, (left, right, top, bottom)), (0, 0)
