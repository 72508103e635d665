"""Batch normalisation (Ioffe and Szegedy, arXiv 1502.03167) with its statistics as explicit inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from effnet_ops import distributed, internals
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


# Operators, which torch.compile leaves as they are: of an autograd.Function that it traces, torch 2.11 made the
# gradients zero.
_library = torch.library.Library("effnet_ops", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_library.define(
    "sync_batch_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, str process_group) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_library.define(
    "sync_batch_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, Tensor count, "
    "str process_group, bool[] needs) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def _sync(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: str) -> tuple[Tensor, ...]:
    """y, mean, biased variance and 1 / deviation (C,), and how many values a channel has, of all processes' batches."""
    dtype, channels = compute_dtype(x.dtype), x.shape[1]
    own = x.numel() // max(channels, 1)
    values = torch.zeros(1 + 2 * channels, dtype=torch.float64, device=x.device)
    if own:
        variance, mean = torch.var_mean(x.to(dtype), (0, 2, 3), correction=0)
        values[0], values[1 : 1 + channels], values[1 + channels :] = own, mean, variance.double() * own
    distributed.merge_statistics(internals.process_group(group), values)
    count, mean, deviations = values[0].clone(), values[1 : 1 + channels].to(dtype, copy=True), values[1 + channels :]
    variance = (deviations / count.clamp(min=1)).to(dtype)
    rstd = (variance.double() + eps).rsqrt().to(dtype)
    scale = rstd if weight is None else rstd * weight.to(dtype)
    y = (x.to(dtype) - mean[:, None, None]) * scale[:, None, None]
    y = y if bias is None else y + bias.to(dtype)[:, None, None]
    return y.to(x.dtype), mean, variance, rstd, count


def _sync_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    count: Tensor,
    group: str,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The gradients of x, weight and bias that ``needs`` asks for, else empty."""
    grad = grad.to(mean.dtype)
    normalised = (x.to(mean.dtype) - mean[:, None, None]) * rstd[:, None, None]
    shift, scale = grad.sum((0, 2, 3)), (grad * normalised).sum((0, 2, 3))
    grad_x = x.new_empty(0)
    if needs[0]:
        sums = torch.cat((shift, scale)).double()
        distributed.add_sums(internals.process_group(group), sums)
        means = (sums / count.clamp(min=1)).to(mean.dtype)[:, None, None].split(len(shift))
        factor = rstd if weight is None else rstd * weight.to(rstd.dtype)
        grad_x = ((grad - means[0] - normalised * means[1]) * factor[:, None, None]).to(x.dtype)
    return grad_x, *(value if need else x.new_empty(0) for value, need in zip((scale, shift), needs[1:], strict=True))


def _sync_fake(x: Tensor, weight: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    vector = x.new_empty(x.shape[1], dtype=compute_dtype(x.dtype))
    others = (torch.empty_like(vector), torch.empty_like(vector), x.new_empty((), dtype=torch.float64))
    return torch.empty_like(x), vector, *others


def _sync_backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    count: Tensor,
    group: str,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    made = (torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean))
    return tuple(value if need else x.new_empty(0) for value, need in zip(made, needs, strict=True))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, ctx.group = inputs
    _, mean, variance, rstd, count = output
    ctx.save_for_backward(x, weight, mean, rstd, count)
    ctx.kinds = [None if value is None else value.dtype for value in (weight, bias)]
    ctx.mark_non_differentiable(mean, variance, rstd, count)


def _differentiate(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    found = torch.ops.effnet_ops.sync_batch_norm_backward(grad, *ctx.saved_tensors, ctx.group, needs)
    kinds = (found[0].dtype, *ctx.kinds)
    return *(g.to(kind) if need else None for g, kind, need in zip(found, kinds, needs, strict=True)), None, None


def _register(name: str, run: Callable[..., tuple[Tensor, ...]], fake: Callable[..., tuple[Tensor, ...]]) -> None:
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"effnet_ops::{name}", fake, lib=_library)


_register("sync_batch_norm", _sync, _sync_fake)
_register("sync_batch_norm_backward", _sync_backward, _sync_backward_fake)
torch.library.register_autograd("effnet_ops::sync_batch_norm", _differentiate, setup_context=_keep, lib=_library)


def sync_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Batch normalisation of x (N, C, H, W) with the statistics of all processes of ``group``; N may be 0 in some.

    Returns:
        y in the dtype of x, the mean and the biased variance (C,), and how many values of a channel there are.
    """
    y, mean, variance, _, count = torch.ops.effnet_ops.sync_batch_norm(x, weight, bias, eps, group.group_name)
    return y, mean, variance, count


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
