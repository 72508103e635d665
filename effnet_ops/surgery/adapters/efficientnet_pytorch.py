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

from effnet_ops.surgery.around import NETWORKS
from effnet_ops.surgery.folded import METHODS
from effnet_ops.surgery.fused import ACTIVATIONS, CHAINS
from effnet_ops.surgery.generic import dynamic_padding, register_convolution, static_padding
from effnet_ops.surgery.recognise import DROP_PATHS

ACTIVATIONS.update({MemoryEfficientSwish: "silu", Swish: "silu"})
DROP_PATHS.add(drop_connect)


register_convolution(Conv2dStaticSamePadding, static_padding)
register_convolution(Conv2dDynamicSamePadding, dynamic_padding)
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
