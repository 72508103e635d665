"""timm's blocks and layers: EfficientNet, MobileNetV2/V3, MNASNet, FBNet, MixNet, LCNet, TinyNet and relatives."""

from __future__ import annotations

from timm.layers import ConvNormAct, activations, activations_me
from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.drop import DropPath
from timm.layers.norm_act import BatchNormAct2d
from timm.layers.squeeze_excite import SEModule
from timm.models import _efficientnet_blocks as blocks
from timm.models import efficientnet, mobilenetv3
from torch import Tensor, nn

from effnet_ops.surgery.around import AROUND, NETWORK_POOLS, NETWORKS, AroundConvolution, AroundNorm, AroundPool
from effnet_ops.surgery.drop_path import bernoulli_scale
from effnet_ops.surgery.folded import METHODS, POOLS, FoldedPool
from effnet_ops.surgery.fused import (
    ACTIVATIONS,
    CHAINS,
    CONVOLUTIONS,
    GATES,
    NORMS,
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
    gate_name,
    identity,
    is_average,
    squeeze_excite_plan,
)
from effnet_ops.surgery.generic import FusedDepthwise, FusedSqueezeExcite

ACTIVATIONS.update(
    {
        activations.Swish: "silu",
        activations.HardSwish: "hardswish",
        activations_me.SwishMe: "silu",
        activations_me.HardSwishMe: "hardswish",
    }
)
GATES.update(
    {
        activations.Sigmoid: "sigmoid",
        activations.HardSigmoid: "hard_sigmoid",
        activations_me.HardSigmoidMe: "hard_sigmoid",
    }
)
NORMS[BatchNormAct2d] = lambda norm: [Part("drop", norm.drop), Part("act", norm.act)]
CONVOLUTIONS[Conv2dSame] = lambda conv: "same"
CHAINS.update(
    {
        ConvNormAct: (("conv", "bn"),),
        blocks.ConvBnAct: (("conv", "bn1"),),
        blocks.DepthwiseSeparableConv: (("conv_dw", "bn1"), ("conv_pw", "bn2")),
        blocks.InvertedResidual: (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3")),
        blocks.EdgeResidual: (("conv_exp", "bn1"), ("conv_pwl", "bn2")),
        efficientnet.EfficientNet: (("conv_stem", "bn1"), ("conv_head", "bn2")),
        efficientnet.EfficientNetFeatures: (("conv_stem", "bn1"),),
        mobilenetv3.MobileNetV3: (("conv_stem", "bn1"), ("conv_head", "norm_head")),
        mobilenetv3.MobileNetV3Features: (("conv_stem", "bn1"),),
    }
)
METHODS.update(
    {
        efficientnet.EfficientNet: ("forward_features",),
        mobilenetv3.MobileNetV3: ("forward_features", "forward_head"),
    }
)
NETWORKS.update((efficientnet.EfficientNet, efficientnet.EfficientNetFeatures))
NETWORKS.update((mobilenetv3.MobileNetV3, mobilenetv3.MobileNetV3Features))

UNSUPPORTED.update(
    {
        blocks.EdgeResidual: "EdgeResidual (FusedMBConv) is not fused as a block",
        blocks.CondConvResidual: "CondConvResidual chooses its weights for each image",
        blocks.UniversalInvertedResidual: "UniversalInvertedResidual is not fused as a block",
    }
)


class FoldedSelectPool(FoldedPool):
    """Made of the pool of timm's networks, where it is the average, flattened."""

    keepdim = False

    @staticmethod
    def averages(pool: SelectAdaptivePool2d) -> bool:
        return _keeps_size(pool) is False


def _keeps_size(pool: SelectAdaptivePool2d) -> bool | None:
    """Whether the average over the image is (N, C, 1, 1), or (N, C); None where the pool is none."""
    average, behind = pool.pool, pool.flatten
    if not is_average(average):
        return None
    if type(behind) is nn.Flatten:
        return None if (behind.start_dim, behind.end_dim) not in ((1, -1), (1, 3)) else False
    return True if type(behind) is nn.Identity else None


POOLS[SelectAdaptivePool2d] = FoldedSelectPool


@fuses(SelectAdaptivePool2d, NETWORK_POOLS)
class AroundSelectPool(AroundPool, SelectAdaptivePool2d):
    """The pool of timm's networks, where it is the average, flattened or not."""

    @classmethod
    def keeps_size(cls, module: nn.Module) -> bool | None:
        return _keeps_size(module)


@fuses(BatchNormAct2d, AROUND)
class AroundBatchNormAct2d(AroundNorm, BatchNormAct2d):
    """A normalisation with its activation."""


@fuses(Conv2dSame, AROUND)
class AroundConv2dSame(AroundConvolution, Conv2dSame):
    """A dense convolution with TensorFlow's SAME padding."""


@fuses(Conv2dSame)
class FusedConv2dSame(FusedDepthwise, Conv2dSame):
    """A depthwise convolution with TensorFlow's SAME padding."""


@fuses(blocks.SqueezeExcite)
class FusedSqueezeExciteBlock(FusedSqueezeExcite, blocks.SqueezeExcite):
    """The squeeze-and-excitation of EfficientNet and MobileNetV3."""

    @classmethod
    def describe(cls, module: nn.Module) -> SqueezeExcitePlan:
        parts = (Part(name, getattr(module, name)) for name in ("conv_reduce", "act1", "conv_expand"))
        return squeeze_excite_plan(*parts, gate_name(Part("gate", module.gate)))


@fuses(SEModule)
class FusedSEModule(FusedSqueezeExcite, SEModule):
    """The squeeze-and-excitation of SE-Nets, RegNets and others."""

    attributes = ("add_maxpool",)

    @classmethod
    def describe(cls, module: nn.Module) -> SqueezeExcitePlan:
        if module.add_maxpool:
            raise NotFusable("it pools with the maximum, too")
        identity(Part("bn", module.bn))
        parts = (Part(name, getattr(module, name)) for name in ("fc1", "act", "fc2"))
        return squeeze_excite_plan(*parts, gate_name(Part("gate", module.gate)))


def _stage(block: nn.Module, conv: str, norm: str) -> Stage:
    if type(getattr(block, norm)) is nn.SyncBatchNorm:
        raise NotFusable(
            f"{norm} is SyncBatchNorm: torch's convert_sync_batchnorm dropped the activation of BatchNormAct2d, "
            "timm.layers.convert_sync_batchnorm keeps it"
        )
    return Stage(Part(conv, getattr(block, conv)), Part(norm, getattr(block, norm)))


class _FusedBlock(FusedLayer):
    kind = "block"
    attributes = ("has_skip",)

    def run(self, x: Tensor) -> Tensor | None:
        """The block's output for x, or None where only the stock forward is right."""
        plan: BlockPlan | None = self.plan(x)
        if plan is None or plan.mixed():
            return None
        return plan.run(x, _drop_path_scale(self.drop_path, x) if plan.residual else None)


def _describe_block(block: nn.Module, expand: Stage | None, depthwise: Stage, project: Stage) -> BlockPlan:
    if block.conv_s2d is not None:
        raise NotFusable("conv_s2d moves space to depth before the block")
    identity(Part("aa", block.aa))
    if block.has_skip and type(block.drop_path) is not DropPath:
        identity(Part("drop_path", block.drop_path))
    squeeze_excite = described_squeeze_excite(Part("se", block.se))
    return block_plan(expand, depthwise, squeeze_excite, project, residual=block.has_skip)


def _drop_path_scale(drop_path: nn.Module, x: Tensor) -> Tensor | None:
    if type(drop_path) is nn.Identity or drop_path.drop_prob == 0.0 or not drop_path.training:
        return None
    return bernoulli_scale(x, 1 - drop_path.drop_prob, scale_by_keep=drop_path.scale_by_keep)


@fuses(blocks.InvertedResidual)
class FusedInvertedResidual(_FusedBlock, blocks.InvertedResidual):
    """MBConv with an expansion."""

    @classmethod
    def describe(cls, module: nn.Module) -> BlockPlan:
        stages = (_stage(module, *names) for names in (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3")))
        return _describe_block(module, *stages)


@fuses(blocks.DepthwiseSeparableConv)
class FusedDepthwiseSeparableConv(_FusedBlock, blocks.DepthwiseSeparableConv):
    """MBConv without an expansion."""

    @classmethod
    def describe(cls, module: nn.Module) -> BlockPlan:
        return _describe_block(module, None, _stage(module, "conv_dw", "bn1"), _stage(module, "conv_pw", "bn2"))
