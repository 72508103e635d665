#!/usr/bin/env bash
# torch.utils.flop_counter (torch 2.14.1) counts the gradient of a depthwise convolution as if it were dense.
#
# Guess: the two gradients of a convolution cost twice its forward pass.
# Seen, 64 channels on 8x8 with a 3x3 window: "forward 73728, backward 4792320": 65 times, where 2 times is right. One of
# the two gradients is counted for all pairs of channels. A training step of EfficientNet-B0 reads 32 GFLOP for 2.3.
. "$(dirname "$0")/install" torch==2.14.1
"$python" -W ignore - <<'PYTHON'
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

conv = nn.Conv2d(64, 64, 3, padding=1, groups=64)
x = torch.randn(1, 64, 8, 8, requires_grad=True)
with FlopCounterMode(display=False) as forward:
    y = conv(x)
with FlopCounterMode(display=False) as backward:
    y.sum().backward()
found = forward.get_total_flops(), backward.get_total_flops()
print("forward", found[0], "backward", found[1], "ratio", found[1] / found[0])
assert found == (2 * 64 * 9 * 64, 65 * 2 * 64 * 9 * 64), found
PYTHON
