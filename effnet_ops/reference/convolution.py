"""Dense convolution with bias and activation, such as a network's first layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from effnet_ops.reference.activation import activate, compute_dtype


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor, stride: Sequence[int], padding: Sequence[int], activation: str
) -> Tensor:
    """activation(conv(x) + bias), x (N, Cin, H, W), weight (Cout, Cin, kh, kw), padding (top, bottom, left, right)."""
    dtype = compute_dtype(x.dtype)
    top, bottom, left, right = padding
    x_padded = F.pad(x.to(dtype), (left, right, top, bottom))
    return activate(F.conv2d(x_padded, weight.to(dtype), bias.to(dtype), tuple(stride)), activation).to(x.dtype)
