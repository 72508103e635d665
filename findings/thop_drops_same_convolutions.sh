#!/usr/bin/env bash
# thop 0.1.1.post2209072238 leaves timm's Conv2dSame and BatchNormAct2d out, of the parameters too.
#
# Guess: efficientnet_b0 and tf_efficientnet_b0 have the same layers, so thop gives both the same numbers, and 5288548
# parameters, which a call of p.numel() for each gives.
# Seen (timm 1.0.31, torch 2.14.1): "efficientnet_b0 385.9 M, 5246532 parameters; tf_efficientnet_b0 368.3 M, 5222244".
# Nothing is printed of it with verbose=False.
. "$(dirname "$0")/install" torch==2.14.1 torchvision==0.29.1 timm==1.0.31 thop==0.1.1.post2209072238 setuptools==80.9.0
"$python" -W ignore - <<'PYTHON'
import timm
import torch
from thop import profile

found = {}
for name in ("efficientnet_b0", "tf_efficientnet_b0"):
    model = timm.create_model(name).eval()
    macs, parameters = profile(model, (torch.randn(1, 3, 224, 224),), verbose=False)
    found[name] = round(macs / 1e6, 1), int(parameters)
    print(name, *found[name], "of", sum(p.numel() for p in model.parameters()))
assert found == {"efficientnet_b0": (385.9, 5246532), "tf_efficientnet_b0": (368.3, 5222244)}, found
PYTHON
