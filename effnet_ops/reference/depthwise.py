"""Depthwise convolution: every channel has a k x k filter of its own, and no two channels are mixed."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from effnet_ops.reference.activation import activate, compute_dtype
from effnet_ops.reference.convolution import pad_unevenly


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> Tensor:
    """activation(conv(x) + bias) for x (N, C, H, W), weight (C*m, 1, kh, kw), padding (top, bottom, left, right)."""
    dtype = compute_dtype(x.dtype)
    x_padded, sides = pad_unevenly(x.to(dtype), padding)
    bias = None if bias is None else bias.to(dtype)
    y = F.conv2d(x_padded, weight.to(dtype), bias, tuple(stride), sides, tuple(dilation), groups=x.shape[1])
    return activate(y, activation).to(x.dtype)
