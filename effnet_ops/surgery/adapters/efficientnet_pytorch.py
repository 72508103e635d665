"""efficientnet_pytorch (lukemelas): its block takes the drop rate at each call, and its padding is a module."""

from __future__ import annotations

from efficientnet_pytorch.model import EfficientNet, MBConvBlock
from efficientnet_pytorch.utils import Conv2dDynamicSamePadding, Conv2dStaticSamePadding, MemoryEfficientSwish, Swish
from torch import Tensor, nn

from effnet_ops.surgery.around import AROUND, NETWORKS, AroundConvolution
from effnet_ops.surgery.drop_path import uniform_scale
from effnet_ops.surgery.folded import METHODS, FoldedMBConv
from effnet_ops.surgery.fused import (
    ACTIVATIONS,
    CHAINS,
    CONVOLUTIONS,
    BlockPlan,
    FusedLayer,
    NotFusable,
    Part,
    Stage,
    block_plan,
    fuses,
    squeeze_excite_plan,
)
from effnet_ops.surgery.generic import FusedDepthwise, conv2d_padding

ACTIVATIONS.update({MemoryEfficientSwish: "silu", Swish: "silu"})


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


class FoldedMBConvBlock(FoldedMBConv):
    """The folded block; its drop rate is for training."""

    ignored = ("drop_connect_rate",)


@fuses(MBConvBlock)
class FusedMBConvBlock(FusedLayer, MBConvBlock):
    """EfficientNet's block."""

    kind = "block"
    attributes = ("_block_args", "has_se", "id_skip")
    folded = FoldedMBConvBlock

    @classmethod
    def describe(cls, module: nn.Module) -> BlockPlan:
        swish, args = Part("_swish", module._swish), module._block_args

        def part(name: str) -> Part:
            return Part(name, getattr(module, name))

        expand = Stage(part("_expand_conv"), part("_bn0"), swish) if args.expand_ratio != 1 else None
        squeeze_excite = None
        if module.has_se:
            squeeze_excite = squeeze_excite_plan(part("_se_reduce"), swish, part("_se_expand"), "sigmoid")
        # The stock compares the stride, which can be the list [1]: then it adds no residual, and nor does this.
        residual = bool(module.id_skip and args.stride == 1 and args.input_filters == args.output_filters)
        depthwise = Stage(part("_depthwise_conv"), part("_bn1"), swish)
        project = Stage(part("_project_conv"), part("_bn2"))
        return block_plan(expand, depthwise, squeeze_excite, project, residual=residual)

    def forward(self, inputs: Tensor, drop_connect_rate: float | None = None) -> Tensor:
        plan: BlockPlan | None = self.plan(inputs)
        if plan is None or plan.mixed():
            return MBConvBlock.forward(self, inputs, drop_connect_rate)
        drops = plan.residual and drop_connect_rate and self.training
        return plan.run(inputs, uniform_scale(inputs, drop_connect_rate) if drops else None)
