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

from effnet_ops.params import ConvNormParams, SqueezeExciteParams
from effnet_ops.reference.activation import activate, compute_dtype
from effnet_ops.reference.batch_norm import Statistics, normalise
from effnet_ops.reference.depthwise import depthwise_conv2d
from effnet_ops.reference.pointwise import pointwise_conv2d
from effnet_ops.reference.squeeze_excite import squeeze_excite as squeeze_excite_reference


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
    dilation: Sequence[int] = (1, 1),
) -> Stages:
    """The block's output, with what it is made of.

    ``drop_path`` (N,) multiplies each image's branch before the residual is added: 0 or 1 / keep probability.
    """
    h, expanded, pooled, expand_used = x.to(compute_dtype(x.dtype)), None, None, None
    if expand is not None:
        expanded = pointwise_conv2d(h, expand.weight, None, None, "none")
        h, expand_used = normalise(expanded, expand, training)
        h = activate(h, activation)
    convolved = depthwise_conv2d(h, depthwise.weight, None, stride, padding, dilation, "none")
    h, depthwise_used = normalise(convolved, depthwise, training)
    h = activate(h, activation)
    if squeeze_excite is not None:
        pooled = h.mean((2, 3))
        inner = squeeze_excite.activation or activation
        h = squeeze_excite_reference(h, *squeeze_excite[:4], inner, gate)
    projected = pointwise_conv2d(h, project.weight, None, None, "none")
    h, project_used = normalise(projected, project, training)
    y = join(x, h, drop_path, residual)
    return Stages(y, [expand_used, depthwise_used, project_used], expanded, convolved, projected, pooled)


def join(x: Tensor, branch: Tensor, drop_path: Tensor | None, residual: bool) -> Tensor:
    """The end of a block: drop path, the residual x, and the dtype of x."""
    if drop_path is not None:
        branch = branch * drop_path.to(branch.dtype)[:, None, None, None]
    if residual:
        branch = branch + x.to(branch.dtype)
    return branch.to(x.dtype)


def drop_path_scale(x: Tensor, rate: float) -> Tensor:
    """Scale (N,) per image of x of stochastic depth: 0 with probability ``rate``, else 1 / (1 - rate)."""
    keep = 1.0 - rate
    # Made from x, so that vmap draws for each of its samples.
    return x.new_empty(x.shape[0], dtype=torch.float32).bernoulli_(keep).div_(keep)
