"""Fused-MBConv (Gupta and Tan; EfficientNetV2, Tan and Le, arXiv 2104.00298): MBConv without a depthwise convolution.

x -> expand k x k -> BN -> activation     dense: one convolution in place of MBConv's expansion and depthwise step
  -> squeeze-and-excitation               absent in EfficientNetV2
  -> project 1x1 -> BN                    linear; absent where the expansion is 1
  -> drop path, + x                       where the shape is unchanged
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from effnet_ops.params import ConvNormParams, SqueezeExciteParams
from effnet_ops.reference.activation import activate, compute_dtype
from effnet_ops.reference.batch_norm import Statistics, normalise
from effnet_ops.reference.convolution import convolution
from effnet_ops.reference.mbconv import join
from effnet_ops.reference.pointwise import pointwise_conv2d
from effnet_ops.reference.squeeze_excite import squeeze_excite as squeeze_excite_reference


class FusedStages(NamedTuple):
    """What one pass through a block makes, as `effnet_ops.reference.Stages`."""

    y: Tensor
    statistics: list[Statistics | None]
    expanded: Tensor
    projected: Tensor | None
    pooled: Tensor | None


def fused_mbconv(
    x: Tensor,
    expand: ConvNormParams,
    squeeze_excite: SqueezeExciteParams | None,
    project: ConvNormParams | None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    activation: str,
    gate: str,
    residual: bool,
    drop_path: Tensor | None,
    training: bool,
) -> FusedStages:
    """The block's output, with what it is made of.

    ``drop_path`` (N,) multiplies each image's branch before the residual is added: 0 or 1 / keep probability.
    """
    h, projected, pooled, project_used = x.to(compute_dtype(x.dtype)), None, None, None
    expanded = convolution(h, expand.weight, None, stride, padding, "none")
    h, expand_used = normalise(expanded, expand, training)
    h = activate(h, activation)
    if squeeze_excite is not None:
        pooled = h.mean((2, 3))
        inner = squeeze_excite.activation or activation
        h = squeeze_excite_reference(h, *squeeze_excite[:4], inner, gate)
    if project is not None:
        projected = pointwise_conv2d(h, project.weight, None, None, "none")
        h, project_used = normalise(projected, project, training)
    y = join(x, h, drop_path, residual)
    return FusedStages(y, [expand_used, project_used], expanded, projected, pooled)
