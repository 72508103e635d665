"""geffnet (gen-efficientnet-pytorch): timm's ancestor, with activations beside the norms and gates as functions."""

from __future__ import annotations

from geffnet import efficientnet_builder as blocks
from geffnet.activations import activations, activations_jit, activations_me
from geffnet.conv2d_layers import Conv2dSame
from geffnet.gen_efficientnet import GenEfficientNet
from geffnet.mobilenetv3 import MobileNetV3

from effnet_ops.surgery.around import NETWORKS
from effnet_ops.surgery.folded import METHODS
from effnet_ops.surgery.fused import ACTIVATIONS, CHAINS, UNSUPPORTED
from effnet_ops.surgery.generic import register_convolution
from effnet_ops.surgery.recognise import DROP_PATHS, FUSED_BLOCKS, GATE_FUNCTIONS

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
register_convolution(Conv2dSame, lambda conv: "same")
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
DROP_PATHS.add(blocks.drop_connect)
GATE_FUNCTIONS += [
    (activations.sigmoid, "sigmoid"),
    (activations.hard_sigmoid, "hard_sigmoid"),
    (activations_me.hard_sigmoid_me, "hard_sigmoid"),
    (activations_jit.hard_sigmoid_jit, "hard_sigmoid"),
]
FUSED_BLOCKS.update((blocks.ConvBnAct, blocks.EdgeResidual))
UNSUPPORTED[blocks.CondConvResidual] = "CondConvResidual chooses its weights for each image"
