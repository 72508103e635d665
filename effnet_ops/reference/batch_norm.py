"""Batch normalisation (Ioffe and Szegedy, arXiv 1502.03167) with its statistics as explicit inputs and outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from effnet_ops.params import ConvNormParams

Statistics = tuple[Tensor, Tensor]


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of x (N, C, H, W) over batch and both spatial axes; zeros for an empty batch."""
    if x.shape[0] == 0:
        return x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1])
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    return mean, variance


def batch_norm(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias, each vector (C,), for x (N, C, H, W)."""
    scale = torch.rsqrt(variance + eps)
    if weight is not None:
        scale = scale * weight
    y = (x - mean[:, None, None]) * scale[:, None, None]
    return y if bias is None else y + bias[:, None, None]


def normalise(h: Tensor, conv: ConvNormParams, training: bool) -> tuple[Tensor, Statistics | None]:
    """The bias and the normalisation behind a convolution that gave h; and the batch's statistics, where they are used.

    Those are its mean and biased variance (C,).
    """
    if conv.bias is not None:
        h = h + conv.bias.to(h.dtype)[:, None, None]
    params = conv.norm
    if params is None:
        return h, None
    used = batch_statistics(h) if training or params.running_mean is None else None
    mean, variance = used or (params.running_mean.to(h.dtype), params.running_var.to(h.dtype))
    weight, bias = (None if p is None else p.to(h.dtype) for p in (params.weight, params.bias))
    return batch_norm(h, mean, variance, weight, bias, params.eps), used
