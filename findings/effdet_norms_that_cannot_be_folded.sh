#!/usr/bin/env bash
# effdet 0.4.1's EfficientDet-D0 has two conventions of normalisation, and 30 normalisations that fold into no convolution.
#
# Guess: a network has one eps and one momentum, and a convolution in front of each BatchNorm that belongs to it.
# Seen (torch 2.14.1, timm 1.0.31): "efficientdet_d0: backbone eps 1e-05, momentum 0.1, the rest 0.001, 0.01";
# tf_efficientdet_d0 has one eps and two momenta. The three convolutions of each head run on five scales with five
# normalisations each: 30 of 108, so folding each into "its" convolution makes another network.
. "$(dirname "$0")/install" torch==2.14.1 torchvision==0.29.1 timm==1.0.31 effdet==0.4.1
"$python" -W ignore - <<'PYTHON'
import effdet
import torch
from torch import nn

found = {}
for name in ("efficientdet_d0", "tf_efficientdet_d0"):
    model = effdet.create_model(name, pretrained=False, pretrained_backbone=False).eval()
    norms = {
        part: {(module.eps, module.momentum) for module in child.modules() if isinstance(module, nn.BatchNorm2d)}
        for part, child in model.named_children()
    }
    backbone = norms.pop("backbone")
    found[name] = backbone, set.union(*norms.values())
    print(name, "backbone", backbone, ", the rest", found[name][1])
assert found["efficientdet_d0"] == ({(1e-5, 0.1)}, {(1e-3, 0.01)}), found
assert found["tf_efficientdet_d0"] == ({(1e-3, 0.1)}, {(1e-3, 0.01)}), found

followers: dict[int, set[int]] = {}
last = []


def after(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
    if isinstance(module, nn.Conv2d):
        last[:] = [id(module)]
    else:
        followers.setdefault(last[0], set()).add(id(module))


for module in model.modules():
    if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
        module.register_forward_hook(after)
with torch.no_grad():
    model(torch.randn(1, 3, 512, 512))
shared = [len(norms) for norms in followers.values() if len(norms) > 1]
print(len(shared), "convolutions with", set(shared), "normalisations each, of", sum(map(len, followers.values())))
assert shared == [5] * 6 and sum(map(len, followers.values())) == 108, shared
PYTHON
