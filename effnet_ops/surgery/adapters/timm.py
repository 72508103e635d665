"""timm's blocks and layers: EfficientNet, MobileNetV2/V3, MNASNet, FBNet, MixNet, LCNet, TinyNet and relatives."""

from __future__ import annotations

from timm.layers import ConvNormAct, activations, activations_me
from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.drop import DropPath
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct
from timm.models import _efficientnet_blocks as blocks
from timm.models import efficientnet, mobilenetv3
from torch import nn

from effnet_ops.surgery.around import (
    AROUND,
    NETWORK_POOLS,
    NETWORKS,
    SYNC_NORMS,
    AroundNorm,
    AroundPool,
    AroundSyncNorm,
)
from effnet_ops.surgery.folded import METHODS, POOLS, FoldedPool
from effnet_ops.surgery.fused import (
    ACTIVATIONS,
    CHAINS,
    GATES,
    NORMS,
    UNSUPPORTED,
    Part,
    fused_class,
    fuses,
    is_average,
)
from effnet_ops.surgery.generic import register_convolution
from effnet_ops.surgery.recognise import DROP_PATHS, FUSED_BLOCKS

ACTIVATIONS.update(
    {
        activations.Swish: "silu",
        activations.HardSwish: "hardswish",
        activations_me.SwishMe: "silu",
        activations_me.HardSwishMe: "hardswish",
        activations.GELU: "gelu",
        activations.GELUTanh: "gelu_tanh",
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
NORMS[SyncBatchNormAct] = lambda norm: [Part(n, getattr(norm, n)) for n in ("drop", "act") if hasattr(norm, n)]
NORMS[FrozenBatchNormAct2d] = lambda norm: [Part("act", norm.act)]
DROP_PATHS.add(DropPath)
AROUND[BatchNormAct2d] = fused_class(AroundNorm, BatchNormAct2d)
SYNC_NORMS[SyncBatchNormAct] = fused_class(AroundSyncNorm, SyncBatchNormAct)
register_convolution(Conv2dSame, lambda conv: "same")
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

FUSED_BLOCKS.update((blocks.ConvBnAct, blocks.EdgeResidual))
UNSUPPORTED[blocks.CondConvResidual] = "CondConvResidual chooses its weights for each image"


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
