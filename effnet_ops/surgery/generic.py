"""Layers of PyTorch itself: a depthwise nn.Conv2d, and the convolutions, normalisations and pools around blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from effnet_ops import functional
from effnet_ops.checks import integers
from effnet_ops.surgery.around import AROUND, NETWORK_POOLS, AroundConvolution, AroundNorm, AroundPool
from effnet_ops.surgery.fused import (
    CONVOLUTIONS,
    LAYERS,
    DepthwisePlan,
    FusedLayer,
    NotFusable,
    Part,
    convolution_padding,
    convolution_pair,
    fused_class,
    fuses,
    parameter,
)


def conv2d_padding(conv: nn.Conv2d) -> tuple[int, ...]:
    """(top, bottom, left, right) of an nn.Conv2d, whose ``padding`` can be "same" or "valid"."""
    part, padding = Part("it", conv), conv.padding
    if not isinstance(padding, str):
        vertical, horizontal = convolution_pair(part, "padding", 0)
        return (vertical, vertical, horizontal, horizontal)
    if padding == "valid":
        return (0, 0, 0, 0)
    if padding != "same" or convolution_pair(part, "stride") != (1, 1):
        raise NotFusable(f"it has padding {padding!r} and stride {conv.stride}")
    kernel, dilation = parameter(conv, "weight").shape[2:], convolution_pair(part, "dilation")
    vertical, horizontal = (d * (k - 1) for k, d in zip(kernel, dilation, strict=True))
    # PyTorch puts the odd pixel at the bottom and right.
    return (vertical // 2, vertical - vertical // 2, horizontal // 2, horizontal - horizontal // 2)


def static_padding(conv: nn.Conv2d) -> tuple[int, ...]:
    """That of the convolutions of efficientnet_pytorch and its copies: a module, made for one image size."""
    sides, pad = conv2d_padding(conv), conv.static_padding
    if type(pad) is nn.Identity:
        return sides
    if type(pad) is not nn.ZeroPad2d:
        raise NotFusable(f"static_padding is {type(pad).__name__}")
    left, right, top, bottom = pad.padding
    return tuple(own + added for own, added in zip(sides, (top, bottom, left, right), strict=True))


def dynamic_padding(conv: nn.Conv2d) -> str:
    """TensorFlow's SAME, as the convolutions of the same libraries compute it at each call."""
    if any(conv2d_padding(conv)):
        raise NotFusable(f"it pads by {conv.padding} more than SAME")
    return "same"


class FusedDepthwise(FusedLayer):
    """Base of the depthwise convolutions; a library's own class differs in its padding only."""

    kind = "depthwise"
    attributes = ("stride", "padding", "dilation", "groups", "padding_mode")

    @classmethod
    def concerns(cls, module: nn.Module) -> bool:
        return module.groups == module.in_channels > 1

    @classmethod
    def describe(cls, module: nn.Module) -> DepthwisePlan:
        if not module.groups == module.in_channels == module.out_channels:
            raise NotFusable(f"it makes {module.out_channels} channels of {module.in_channels}, more than one each")
        part = Part("it", module)
        padding = convolution_padding(part)
        return DepthwisePlan(convolution_pair(part, "stride"), padding, convolution_pair(part, "dilation"))

    def run(self, x: Tensor) -> Tensor | None:
        """The convolution of x, or None where only the stock forward is right."""
        plan = self.plan(x)
        return None if plan is None else functional.depthwise_conv2d(x, self.weight, self.bias, **plan._asdict())


def register_convolution(cls: type[nn.Conv2d], padding: Callable[[Any], functional.Padding]) -> None:
    """Know a library's convolution, which differs from nn.Conv2d in its padding only."""
    CONVOLUTIONS[cls] = padding
    LAYERS[cls], AROUND[cls] = fused_class(FusedDepthwise, cls), fused_class(AroundConvolution, cls)


CONVOLUTIONS[nn.Conv2d] = conv2d_padding


@fuses(nn.Conv2d)
class FusedConv2d(FusedDepthwise, nn.Conv2d):
    """A depthwise nn.Conv2d."""


@fuses(nn.Conv2d, AROUND)
class AroundConv2d(AroundConvolution, nn.Conv2d):
    """A pointwise nn.Conv2d, or a dense one of few channels."""


@fuses(nn.BatchNorm2d, AROUND)
class AroundBatchNorm2d(AroundNorm, nn.BatchNorm2d):
    """An nn.BatchNorm2d."""


@fuses(nn.AdaptiveAvgPool2d, NETWORK_POOLS)
class AroundAdaptiveAvgPool2d(AroundPool, nn.AdaptiveAvgPool2d):
    """An nn.AdaptiveAvgPool2d with one output pixel."""

    attributes = ("output_size",)

    @classmethod
    def keeps_size(cls, module: nn.Module) -> bool | None:
        return True if integers(module.output_size, 2) == (1, 1) else None
