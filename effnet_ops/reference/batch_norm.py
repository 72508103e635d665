"""Batch normalisation (Ioffe and Szegedy, arXiv 1502.03167) with its statistics as explicit inputs and outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from effnet_ops import distributed
from effnet_ops.params import ConvNormParams
from effnet_ops.reference.activation import compute_dtype

Statistics = tuple[Tensor, ...]
"""Mean and biased variance (C,) of a batch, and behind them, where processes share them, how many values there are."""


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


class _SyncBatchNorm(torch.autograd.Function):
    """(x, weight, bias, eps, name of the group) to (y, mean, biased variance, count) of all processes' batches."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: str
    ) -> tuple[Tensor, ...]:
        dtype, channels = compute_dtype(x.dtype), x.shape[1]
        own = x.numel() // max(channels, 1)
        values = torch.zeros(1 + 2 * channels, dtype=torch.float64, device=x.device)
        if own:
            variance, mean = torch.var_mean(x.to(dtype), (0, 2, 3), correction=0)
            values[0], values[1 : 1 + channels], values[1 + channels :] = own, mean, variance.double() * own
        distributed.share_statistics(values, group)
        count = values[0].clone()
        mean = values[1 : 1 + channels].to(dtype)
        variance = (values[1 + channels :] / count.clamp(min=1)).to(dtype)
        rstd = (variance.double() + eps).rsqrt().to(dtype)
        ctx.group = group
        ctx.save_for_backward(x, weight, mean, rstd, count)
        ctx.mark_non_differentiable(mean, variance, count)
        ctx.set_materialize_grads(False)
        scale = rstd if weight is None else rstd * weight.to(dtype)
        y = (x.to(dtype) - mean[:, None, None]) * scale[:, None, None]
        y = y if bias is None else y + bias.to(dtype)[:, None, None]
        return y.to(x.dtype), mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd, count = ctx.saved_tensors
        grad = (torch.zeros_like(x) if grad is None else grad).to(mean.dtype)
        normalised = (x.to(mean.dtype) - mean[:, None, None]) * rstd[:, None, None]
        shift, scale = grad.sum((0, 2, 3)), (grad * normalised).sum((0, 2, 3))
        grad_x = None
        if ctx.needs_input_grad[0]:
            sums = torch.cat((shift, scale)).double()
            distributed.share_sums(sums, ctx.group)
            means = (sums / count.clamp(min=1)).to(mean.dtype)[:, None, None].split(len(shift))
            factor = rstd if weight is None else rstd * weight.to(rstd.dtype)
            grad_x = ((grad - means[0] - normalised * means[1]) * factor[:, None, None]).to(x.dtype)
        wanted = ctx.needs_input_grad[1:3]
        grads = (value.to(weight.dtype) if want else None for value, want in zip((scale, shift), wanted, strict=True))
        return grad_x, *grads, None, None


def sync_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Batch normalisation of x (N, C, H, W) with the statistics of all processes of ``group``; N may be 0 in some.

    Returns:
        y in the dtype of x, the mean and the biased variance (C,), and how many values of a channel there are.
    """
    return _SyncBatchNorm.apply(x, weight, bias, eps, group.group_name)


def normalise(h: Tensor, conv: ConvNormParams, training: bool) -> tuple[Tensor, Statistics | None]:
    """The bias and the normalisation behind a convolution that gave h; and the batch's statistics, where used."""
    if conv.bias is not None:
        h = h + conv.bias.to(h.dtype)[:, None, None]
    params = conv.norm
    if params is None:
        return h, None
    if training and params.process_group is not None:
        y, *shared = sync_batch_norm(h, params.weight, params.bias, params.eps, params.process_group)
        return y, tuple(shared)
    used = batch_statistics(h) if training or params.running_mean is None else None
    mean, variance = used or (params.running_mean.to(h.dtype), params.running_var.to(h.dtype))
    weight, bias = (None if p is None else p.to(h.dtype) for p in (params.weight, params.bias))
    return batch_norm(h, mean, variance, weight, bias, params.eps), used
