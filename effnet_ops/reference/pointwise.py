"""Pointwise (1x1) convolution: one matrix product that mixes the channels of each pixel."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from effnet_ops.reference.activation import activate, compute_dtype


def pointwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    """activation(W x + bias) + residual for x (N, Cin, H, W) and weight (Cout, Cin, 1, 1)."""
    dtype = compute_dtype(x.dtype)
    bias = None if bias is None else bias.to(dtype)
    y = activate(F.conv2d(x.to(dtype), weight.to(dtype), bias), activation)
    if residual is not None:
        y = y + residual.to(dtype)
    return y.to(x.dtype)
