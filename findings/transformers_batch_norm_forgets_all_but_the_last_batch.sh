#!/usr/bin/env bash
# transformers 5.24.0: EfficientNetModel has TensorFlow's momentum, 0.99, in PyTorch's meaning, and drops single elements
# where the others drop the branch of an image.
#
# Guess: eps 1e-3 and momentum 0.01 as in TensorFlow; drop path by image; EfficientNetConfig() is B0.
# Seen (torch 2.14.1): "34 layers with momentum 0.99, 15 with 0.1": after one batch of variance 4 a running variance is
# 3.97, not 1.03. At rate 0.1875, a share of 0.18 to 0.19 of the elements within each image is zero, and no image is
# whole or empty. EfficientNetConfig() is B7.
. "$(dirname "$0")/install" torch==2.14.1 transformers==5.24.0
"$python" -W ignore - <<'PYTHON'
from collections import Counter

import torch
from torch import nn
from transformers import EfficientNetConfig, EfficientNetModel

default = EfficientNetConfig()
print("default:", default.width_coefficient, default.depth_coefficient, default.image_size)
assert (default.width_coefficient, default.depth_coefficient, default.image_size) == (2.0, 3.1, 600)
torch.manual_seed(0)
b0 = EfficientNetConfig(width_coefficient=1.0, depth_coefficient=1.0, image_size=224, hidden_dim=1280)
model = EfficientNetModel(b0).train()
norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
momenta = Counter((norm.eps, norm.momentum) for norm in norms)
x = torch.randn(8, norms[0].num_features, 16, 16)
norms[0](x * (2 / x.std((0, 2, 3), keepdim=True)))
variance = norms[0].running_var.mean().item()
print("eps and momentum of layers:", dict(momenta), "; running variance after a batch of variance 4:", round(variance, 2))
assert momenta == {(1e-3, 0.99): 34, (1e-3, 0.1): 15} and abs(variance - 3.97) < 0.01, (momenta, variance)

drop = [module for module in model.modules() if isinstance(module, nn.Dropout)][-1]
shares = (drop(torch.ones(8, 320, 7, 7)) == 0).float().mean((1, 2, 3))
print("rate", drop.p, "; share of zeros in each image:", [round(share, 2) for share in shares.tolist()])
assert drop.p == 0.1875 and ((shares > 0.15) & (shares < 0.23)).all(), shares
PYTHON
