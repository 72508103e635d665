"""MBConv, the inverted bottleneck with squeeze-and-excitation (Tan and Le, arXiv 1905.11946).

x -> expand 1x1 -> BN -> activation       narrow to wide, t times the channels (absent where t = 1)
  -> depthwise k x k -> BN -> activation  the only step that looks at neighbours
  -> squeeze-and-excitation               a gate per image and channel (absent in Lite)
  -> project 1x1 -> BN                    wide to narrow, linear
  -> drop path, + x                       where the shape is unchanged
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from effnet_ops.params import BatchNormParams, ConvNormParams, SqueezeExciteParams
from effnet_ops.reference.activation import activate, compute_dtype
from effnet_ops.reference.batch_norm import batch_norm, batch_statistics, sync_batch_norm
from effnet_ops.reference.depthwise import depthwise_conv2d
from effnet_ops.reference.pointwise import pointwise_conv2d
from effnet_ops.reference.squeeze_excite import squeeze_excite as squeeze_excite_reference

Statistics = tuple[Tensor, ...]


class Stages(NamedTuple):
    """What one pass through a block makes.

    ``y`` is in the dtype of x, all others in the compute dtype: what each convolution gives before its bias and
    normalisation, the mean and biased variance (C,) of the batch where a normalisation used them, with the number of
    values behind them where several processes share the batch, and the mean (N, C) that squeeze-and-excitation takes.
    None where the block has no such part.
    """

    y: Tensor
    statistics: list[Statistics | None]
    expanded: Tensor | None
    convolved: Tensor
    projected: Tensor
    pooled: Tensor | None


def mbconv(
    x: Tensor,
    expand: ConvNormParams | None,
    depthwise: ConvNormParams,
    squeeze_excite: SqueezeExciteParams | None,
    project: ConvNormParams,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    activation: str,
    gate: str,
    residual: bool,
    drop_path: Tensor | None,
    training: bool,
) -> Stages:
    """The block's output, with what it is made of.

    ``drop_path`` (N,) multiplies each image's branch before the residual is added: 0 or 1 / keep probability.
    """
    statistics: list[Statistics | None] = []

    def finish(h: Tensor, conv: ConvNormParams) -> Tensor:
        """The bias and the normalisation behind a convolution."""
        params: BatchNormParams | None = conv.norm
        if conv.bias is not None:
            h = h + conv.bias.to(h.dtype)[:, None, None]
        if params is None:
            statistics.append(None)
            return h
        if training and params.process_group is not None:
            h, *shared = sync_batch_norm(h, params.weight, params.bias, params.eps, params.process_group)
            statistics.append(tuple(shared))
            return h
        use_batch = training or params.running_mean is None
        statistics.append(batch_statistics(h) if use_batch else None)
        mean, variance = statistics[-1] or (params.running_mean.to(h.dtype), params.running_var.to(h.dtype))
        weight, bias = (None if p is None else p.to(h.dtype) for p in (params.weight, params.bias))
        return batch_norm(h, mean, variance, weight, bias, params.eps)

    h, expanded, pooled = x.to(compute_dtype(x.dtype)), None, None
    if expand is None:
        statistics.append(None)
    else:
        expanded = pointwise_conv2d(h, expand.weight, None, None, "none")
        h = activate(finish(expanded, expand), activation)
    convolved = depthwise_conv2d(h, depthwise.weight, None, stride, padding, (1, 1), "none")
    h = activate(finish(convolved, depthwise), activation)
    if squeeze_excite is not None:
        pooled = h.mean((2, 3))
        inner = squeeze_excite.activation or activation
        h = squeeze_excite_reference(h, *squeeze_excite[:4], inner, gate)
    projected = pointwise_conv2d(h, project.weight, None, None, "none")
    h = finish(projected, project)
    if drop_path is not None:
        h = h * drop_path.to(h.dtype)[:, None, None, None]
    if residual:
        h = h + x.to(h.dtype)
    return Stages(h.to(x.dtype), statistics, expanded, convolved, projected, pooled)


def drop_path_scale(x: Tensor, rate: float) -> Tensor:
    """Scale (N,) per image of x of stochastic depth: 0 with probability ``rate``, else 1 / (1 - rate)."""
    keep = 1.0 - rate
    # Made from x, so that vmap draws for each of its samples.
    return x.new_empty(x.shape[0], dtype=torch.float32).bernoulli_(keep).div_(keep)
