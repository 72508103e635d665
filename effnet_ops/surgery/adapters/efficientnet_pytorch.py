"""efficientnet_pytorch (lukemelas): its padding is a module, or computed at each call."""

from __future__ import annotations

from efficientnet_pytorch.model import EfficientNet, MBConvBlock
from efficientnet_pytorch.utils import (
    Conv2dDynamicSamePadding,
    Conv2dStaticSamePadding,
    MemoryEfficientSwish,
    Swish,
    drop_connect,
)
from torch import nn

from effnet_ops.surgery.around import AROUND, NETWORKS, AroundConvolution
from effnet_ops.surgery.folded import METHODS
from effnet_ops.surgery.fused import ACTIVATIONS, CHAINS, CONVOLUTIONS, NotFusable, fuses
from effnet_ops.surgery.generic import FusedDepthwise, conv2d_padding
from effnet_ops.surgery.recognise import DROP_PATHS

ACTIVATIONS.update({MemoryEfficientSwish: "silu", Swish: "silu"})
DROP_PATHS.add(drop_connect)


def _static_padding(conv: nn.Conv2d) -> tuple[int, ...]:
    sides, pad = conv2d_padding(conv), conv.static_padding
    if type(pad) is nn.Identity:
        return sides
    if type(pad) is not nn.ZeroPad2d:
        raise NotFusable(f"static_padding is {type(pad).__name__}")
    left, right, top, bottom = pad.padding
    return tuple(own + added for own, added in zip(sides, (top, bottom, left, right), strict=True))


def _dynamic_padding(conv: nn.Conv2d) -> str:
    if any(conv2d_padding(conv)):
        raise NotFusable(f"it pads by {conv.padding} more than SAME")
    return "same"


CONVOLUTIONS.update({Conv2dStaticSamePadding: _static_padding, Conv2dDynamicSamePadding: _dynamic_padding})
CHAINS.update(
    {
        MBConvBlock: (
            ("_expand_conv", "_bn0", "_swish"),
            ("_depthwise_conv", "_bn1", "_swish"),
            ("_project_conv", "_bn2"),
        ),
        EfficientNet: (("_conv_stem", "_bn0", "_swish"), ("_conv_head", "_bn1", "_swish")),
    }
)
METHODS[EfficientNet] = ("extract_features",)
NETWORKS.add(EfficientNet)


@fuses(Conv2dStaticSamePadding)
class FusedConv2dStaticSamePadding(FusedDepthwise, Conv2dStaticSamePadding):
    """A depthwise convolution with SAME padding for the image size that the model was made for."""


@fuses(Conv2dDynamicSamePadding)
class FusedConv2dDynamicSamePadding(FusedDepthwise, Conv2dDynamicSamePadding):
    """A depthwise convolution with SAME padding for any image size."""


@fuses(Conv2dStaticSamePadding, AROUND)
class AroundConv2dStaticSamePadding(AroundConvolution, Conv2dStaticSamePadding):
    """A dense convolution with SAME padding for the image size that the model was made for."""


@fuses(Conv2dDynamicSamePadding, AROUND)
class AroundConv2dDynamicSamePadding(AroundConvolution, Conv2dDynamicSamePadding):
    """A dense convolution with SAME padding for any image size."""
