#!/usr/bin/env bash
# timm 1.0.31 with set_grad_checkpointing updates the statistics of EfficientNet's blocks twice a step (torch 2.14.1).
#
# Guess: checkpointing changes memory and time, and nothing that is computed.
# Seen: "once: 2 layers, twice: 47 layers": only the first and the last normalisation, outside the checkpointed stages,
# see a batch once. "largest difference of a running variance: 25%" of what one update makes of it.
. "$(dirname "$0")/install" torch==2.14.1 torchvision==0.29.1 timm==1.0.31
"$python" -W ignore - <<'PYTHON'
from collections import Counter

import timm
import torch
from torch import nn

states = []
for checkpointing in (False, True):
    torch.manual_seed(0)
    model = timm.create_model("efficientnet_b0").train()
    model.set_grad_checkpointing(checkpointing)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    states.append([norm for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)])
counts = Counter(int(norm.num_batches_tracked) for norm in states[1])
pairs = zip(*states)
worst = max(((b.running_var - a.running_var).abs() / a.running_var).max().item() for a, b in pairs)
print("once:", counts[1], "layers, twice:", counts[2], "layers; largest difference of a running variance:", f"{worst:.0%}")
assert counts == {1: 2, 2: 47} and worst > 0.01, (counts, worst)
PYTHON
