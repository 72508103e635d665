"""torchvision's layers and networks: EfficientNet, MobileNetV2, MobileNetV3, MNASNet."""

from __future__ import annotations

from torchvision.models import efficientnet, mnasnet, mobilenetv2, mobilenetv3
from torchvision.ops import Conv2dNormActivation, FrozenBatchNorm2d, StochasticDepth

from effnet_ops.surgery.around import AROUND, NETWORKS, AroundConvNorm
from effnet_ops.surgery.fused import NORMS, SEQUENCES, fuses
from effnet_ops.surgery.recognise import DROP_PATHS, FUSED_BLOCKS

SEQUENCES.add(Conv2dNormActivation)
NORMS[FrozenBatchNorm2d] = lambda norm: []
DROP_PATHS.add(StochasticDepth)
FUSED_BLOCKS.add(efficientnet.FusedMBConv)
NETWORKS.update((efficientnet.EfficientNet, mnasnet.MNASNet, mobilenetv2.MobileNetV2, mobilenetv3.MobileNetV3))


@fuses(Conv2dNormActivation, AROUND)
class AroundConv2dNormActivation(AroundConvNorm, Conv2dNormActivation):
    """The convolutions around the blocks, each with its normalisation and activation."""
