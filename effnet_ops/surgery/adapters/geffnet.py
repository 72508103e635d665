"""geffnet (gen-efficientnet-pytorch): timm's ancestor, with activations beside the norms and gates as functions."""

from __future__ import annotations

from collections.abc import Callable

from geffnet import efficientnet_builder as blocks
from geffnet.activations import activations, activations_jit, activations_me
from geffnet.conv2d_layers import Conv2dSame
from geffnet.gen_efficientnet import GenEfficientNet
from geffnet.mobilenetv3 import MobileNetV3
from torch import Tensor, nn

from effnet_ops.surgery.around import AROUND, NETWORKS, AroundConvolution
from effnet_ops.surgery.drop_path import uniform_scale
from effnet_ops.surgery.folded import METHODS
from effnet_ops.surgery.fused import (
    ACTIVATIONS,
    CHAINS,
    CONVOLUTIONS,
    UNSUPPORTED,
    BlockPlan,
    FusedLayer,
    NotFusable,
    Part,
    SqueezeExcitePlan,
    Stage,
    block_plan,
    described_squeeze_excite,
    fuses,
    squeeze_excite_plan,
)
from effnet_ops.surgery.generic import FusedDepthwise, FusedSqueezeExcite

ACTIVATIONS.update(
    {
        activations.Swish: "silu",
        activations_me.SwishMe: "silu",
        activations_jit.SwishJit: "silu",
        activations.HardSwish: "hardswish",
        activations_me.HardSwishMe: "hardswish",
        activations_jit.HardSwishJit: "hardswish",
    }
)
CONVOLUTIONS[Conv2dSame] = lambda conv: "same"
CHAINS.update(
    {
        blocks.ConvBnAct: (("conv", "bn1", "act1"),),
        blocks.DepthwiseSeparableConv: (("conv_dw", "bn1", "act1"), ("conv_pw", "bn2")),
        blocks.InvertedResidual: (("conv_pw", "bn1", "act1"), ("conv_dw", "bn2", "act2"), ("conv_pwl", "bn3")),
        blocks.EdgeResidual: (("conv_exp", "bn1", "act1"), ("conv_pwl", "bn2")),
        GenEfficientNet: (("conv_stem", "bn1", "act1"), ("conv_head", "bn2", "act2")),
        MobileNetV3: (("conv_stem", "bn1", "act1"),),
    }
)
METHODS.update({GenEfficientNet: ("features",), MobileNetV3: ("features",)})
NETWORKS.update((GenEfficientNet, MobileNetV3))
_GATES: tuple[tuple[Callable[..., Tensor], str], ...] = (
    (activations.sigmoid, "sigmoid"),
    (activations.hard_sigmoid, "hard_sigmoid"),
    (activations_me.hard_sigmoid_me, "hard_sigmoid"),
    (activations_jit.hard_sigmoid_jit, "hard_sigmoid"),
)
"""Pairs and no dictionary, because Dynamo cannot hash a scripted function."""

UNSUPPORTED.update(
    {
        blocks.EdgeResidual: "EdgeResidual (FusedMBConv) is not fused as a block",
        blocks.CondConvResidual: "CondConvResidual chooses its weights for each image",
    }
)


@fuses(Conv2dSame)
class FusedConv2dSame(FusedDepthwise, Conv2dSame):
    """A depthwise convolution with TensorFlow's SAME padding."""


@fuses(Conv2dSame, AROUND)
class AroundConv2dSame(AroundConvolution, Conv2dSame):
    """A dense convolution with TensorFlow's SAME padding."""


@fuses(blocks.SqueezeExcite)
class FusedSqueezeExciteBlock(FusedSqueezeExcite, blocks.SqueezeExcite):
    """geffnet's squeeze-and-excitation, whose gate is a function."""

    attributes = ("gate_fn",)

    @classmethod
    def describe(cls, module: nn.Module) -> SqueezeExcitePlan:
        gate = next((name for function, name in _GATES if function is module.gate_fn), None)
        if gate is None:
            raise NotFusable(f"gate_fn is {module.gate_fn}, a gate that is not fused")
        parts = (Part(name, getattr(module, name)) for name in ("conv_reduce", "act1", "conv_expand"))
        return squeeze_excite_plan(*parts, gate)


class _FusedBlock(FusedLayer):
    kind = "block"
    attributes = ("has_residual",)

    def run(self, x: Tensor) -> Tensor | None:
        """The block's output for x, or None where only the stock forward is right."""
        plan: BlockPlan | None = self.plan(x)
        if plan is None or plan.mixed():
            return None
        drops = plan.residual and self.drop_connect_rate > 0.0 and self.training
        return plan.run(x, uniform_scale(x, self.drop_connect_rate) if drops else None)


def _describe_block(block: nn.Module, stages: list[tuple[str, str, str | None]]) -> BlockPlan:
    def part(name: str | None) -> Part | None:
        return None if name is None else Part(name, getattr(block, name))

    *expand, depthwise, project = (Stage(*map(part, names)) for names in stages)
    squeeze_excite = described_squeeze_excite(part("se"))
    return block_plan(
        expand[0] if expand else None, depthwise, squeeze_excite, project, residual=bool(block.has_residual)
    )


@fuses(blocks.InvertedResidual)
class FusedInvertedResidual(_FusedBlock, blocks.InvertedResidual):
    """MBConv with an expansion."""

    @classmethod
    def describe(cls, module: nn.Module) -> BlockPlan:
        stages = [("conv_pw", "bn1", "act1"), ("conv_dw", "bn2", "act2"), ("conv_pwl", "bn3", None)]
        return _describe_block(module, stages)


@fuses(blocks.DepthwiseSeparableConv)
class FusedDepthwiseSeparableConv(_FusedBlock, blocks.DepthwiseSeparableConv):
    """MBConv without an expansion."""

    @classmethod
    def describe(cls, module: nn.Module) -> BlockPlan:
        return _describe_block(module, [("conv_dw", "bn1", "act1"), ("conv_pw", "bn2", "act2")])
