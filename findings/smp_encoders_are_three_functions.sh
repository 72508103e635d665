#!/usr/bin/env bash
# segmentation_models_pytorch 0.6.0: its encoders called B0 are different functions of the same weights.
#
# Guess: "timm-tf_efficientnet_lite0" is TensorFlow's convention (eps 1e-3, SAME padding), as tf_ says; at output_stride=16
# all B0 encoders dilate the same layers.
# Seen (timm 1.0.31): "timm-tf_efficientnet_lite0: eps 1e-05, Conv2d", against "tu-tf_efficientnet_lite0: eps 0.001,
# Conv2dSame". Depthwise convolutions with dilation 2 at output stride 16: "efficientnet-b0 7, timm-efficientnet-b0 5,
# tu-efficientnet_b0 4".
. "$(dirname "$0")/install" torch==2.14.1 torchvision==0.29.1 timm==1.0.31 segmentation_models_pytorch==0.6.0
"$python" -W ignore - <<'PYTHON'
import segmentation_models_pytorch as smp
from torch import nn


def encoder(name: str, **arguments) -> nn.Module:
    return smp.encoders.get_encoder(name, weights=None, **arguments)


conventions = {}
for name in ("timm-tf_efficientnet_lite0", "tu-tf_efficientnet_lite0"):
    modules = list(encoder(name).modules())
    eps = {module.eps for module in modules if isinstance(module, nn.BatchNorm2d)}
    kinds = {type(module).__name__ for module in modules if isinstance(module, nn.Conv2d) and max(module.stride) == 2}
    conventions[name] = eps, kinds
    print(name, eps, kinds)
dilated = {}
for name in ("efficientnet-b0", "timm-efficientnet-b0", "tu-efficientnet_b0"):
    convs = [module for module in encoder(name, output_stride=16).modules() if isinstance(module, nn.Conv2d)]
    dilated[name] = sum(conv.groups > 1 and conv.dilation == (2, 2) for conv in convs)
    print(name, dilated[name])
assert conventions == {
    "timm-tf_efficientnet_lite0": ({1e-5}, {"Conv2d"}),
    "tu-tf_efficientnet_lite0": ({1e-3}, {"Conv2dSame"}),
}, conventions
assert dilated == {"efficientnet-b0": 7, "timm-efficientnet-b0": 5, "tu-efficientnet_b0": 4}, dilated
PYTHON
