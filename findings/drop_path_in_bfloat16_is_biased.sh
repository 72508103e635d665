#!/usr/bin/env bash
# Drop path in bfloat16 changes the mean of a branch (timm 1.0.31, torchvision 0.29.1, efficientnet_pytorch 0.7.1).
#
# Guess: a branch is kept with probability 1 - p and divided by it, so its mean stays as it is; each element of bfloat16 is
# rounded, up or down by chance.
# Seen for the rate of B0's second block, p = 0.0125 (torch 2.14.1): the factor of a kept branch is 1.015625 where
# 1.012658 is right, for all images alike, so the mean is 1.003 with timm and torchvision. efficientnet_pytorch adds a random
# number of bfloat16, whose steps are 1/256, and drops with 3/256 = 0.0117 instead.
# A factor in float32, multiplied before the one rounding, has neither.
. "$(dirname "$0")/install" torch==2.14.1 torchvision==0.29.1 timm==1.0.31 efficientnet_pytorch==0.7.1
"$python" -W ignore - <<'PYTHON'
import torch
from efficientnet_pytorch.utils import drop_connect
from timm.layers import DropPath
from torchvision.ops import StochasticDepth

torch.manual_seed(0)
rate, images = 0.0125, 4_000_000
libraries = {
    "timm": DropPath(rate).train(),
    "torchvision": StochasticDepth(rate, "row").train(),
    "efficientnet_pytorch": lambda x: drop_connect(x, rate, training=True),
}
found = {}
for dtype in (torch.float32, torch.bfloat16):
    for name, drop in libraries.items():
        y = drop(torch.ones(images, 1, 1, 1, dtype=dtype)).double()
        found[name, dtype] = y.max().item(), (y == 0).double().mean().item(), y.mean().item()
        factor, dropped, mean = found[name, dtype]
        print(f"{name} in {dtype}: factor {factor:.6f}, dropped {dropped:.5f}, mean {mean:.4f}")
# Four million draws: 0.00006 is one standard deviation of a frequency, and of the mean.
for name in libraries:
    factor, dropped, mean = found[name, torch.float32]
    assert abs(dropped - rate) < 5e-4 and abs(mean - 1) < 5e-4, (name, found)
    factor, dropped, mean = found[name, torch.bfloat16]
    assert factor == 1.015625 and mean > 1.0022, (name, found)
    assert abs(dropped - (3 / 256 if name == "efficientnet_pytorch" else rate)) < 4e-4, (name, found)
PYTHON
