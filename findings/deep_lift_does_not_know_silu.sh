#!/usr/bin/env bash
# captum 0.9.0: DeepLift takes EfficientNets, and their attributions do not add up to the change of the output.
#
# Guess: SiLU and ReLU6 are rescaled like ReLU, or refused with an error; what is left of completeness is the squeeze and
# excitation's product, so it holds for Lite0, which has none.
# Seen (torch 2.14.1, timm 1.0.31, fp64): "efficientnet_b0: change -0.87, attributed -19; efficientnet_lite0: change 0.3,
# attributed 7.8; efficientnet_lite0 with ReLU: change 0.2, attributed 0.2". Neither SiLU nor ReLU6 is in captum's table.
# Both pass with a plain gradient, and no warning names them.
. "$(dirname "$0")/install" torch==2.14.1 torchvision==0.29.1 timm==1.0.31 captum==0.9.0
"$python" -W ignore - <<'PYTHON'
import timm
import torch
from captum.attr import DeepLift
from torch import nn


def trained_like(name: str, **arguments) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **arguments).double().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model(torch.randn(8, 3, 64, 64, dtype=torch.float64))
    return model.eval()


found = {}
kinds = {
    "efficientnet_b0": {},
    "efficientnet_lite0": {},
    "efficientnet_lite0 with ReLU": {"act_layer": "relu"},
}
for kind, arguments in kinds.items():
    model = trained_like(kind.split()[0], **arguments)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    attributed = DeepLift(model).attribute(x, torch.zeros_like(x), target=3).sum().item()
    with torch.no_grad():
        change = (model(x) - model(torch.zeros_like(x)))[0, 3].item()
    found[kind] = abs(attributed - change) / abs(change)
    print(f"{kind}: change {change:.2g}, attributed {attributed:.2g}, off by {found[kind]:.1g} of it")
assert min(found["efficientnet_b0"], found["efficientnet_lite0"]) > 1, found
assert found["efficientnet_lite0 with ReLU"] < 1e-9, found
PYTHON
