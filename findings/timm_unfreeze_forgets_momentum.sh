#!/usr/bin/env bash
# timm 1.0.31: freeze() followed by unfreeze() gives every BatchNorm PyTorch's momentum and a counter of 0.
#
# Guess: unfreeze undoes freeze, so a TensorFlow network keeps its momentum of 0.01.
# Seen (torch 2.14.1): "before: eps 0.001, momentum 0.01, counter 1; frozen and back: eps 0.001, momentum 0.1, counter 0", in
# all 49 layers. Weights, statistics and eps come back; FrozenBatchNormAct2d has no place for the other two.
. "$(dirname "$0")/install" torch==2.14.1 torchvision==0.29.1 timm==1.0.31
"$python" -W ignore - <<'PYTHON'
import timm
import torch
from torch import nn


def look(model: nn.Module) -> list[tuple]:
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    return [(norm.eps, norm.momentum, int(norm.num_batches_tracked)) for norm in norms]


torch.manual_seed(0)
model = timm.create_model("tf_efficientnet_b0", bn_momentum=0.01).train()
with torch.no_grad():
    model(torch.randn(2, 3, 64, 64))
before, state = look(model), {key: value.clone() for key, value in model.state_dict().items()}
timm.utils.freeze(model)
timm.utils.unfreeze(model)
after, changed = look(model), [key for key, value in model.state_dict().items() if not torch.equal(value, state[key])]
for when, found in (("before", before), ("frozen and back", after)):
    print(f"{when}: {len(found)} layers with eps, momentum, counter {set(found)}")
assert before == [(1e-3, 0.01, 1)] * 49 and after == [(1e-3, 0.1, 0)] * 49, (before, after)
assert len(changed) == 49 and all(key.endswith("num_batches_tracked") for key in changed), changed
PYTHON
