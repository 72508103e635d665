#!/usr/bin/env bash
# grad-cam 1.5.7 on torchvision's EfficientNet-B0, target layer features[8][1] (the last normalisation): the activation that
# it keeps is the one after SiLU, the gradient is the one before.
#
# Guess: a hook keeps what its layer gave, so both belong to the normalisation; or, since SiLU works in place, both to SiLU.
# Seen (torch 2.14.1, torchvision 0.29.1): "activation is the normalisation's: False, is SiLU's: True; gradient is SiLU's:
# False". On a CPU the kept tensor shares its memory with what SiLU overwrites; the gradient's hook was set before that.
. "$(dirname "$0")/install" torch==2.14.1 torchvision==0.29.1 grad-cam==1.5.7
"$python" -W ignore - <<'PYTHON'
import torch
import torchvision
from pytorch_grad_cam import GradCAM
from torch import nn

torch.manual_seed(0)
model, x = torchvision.models.efficientnet_b0().train(), torch.randn(8, 3, 64, 64)
for module in model.modules():
    if isinstance(module, nn.BatchNorm2d):
        module.momentum = None
with torch.no_grad():
    model(x)
model.eval()
norm, silu = model.features[8][1], model.features[8][2]
exact, kept = {}, {}
for layer in (norm, silu):
    layer.register_forward_hook(lambda module, _, output: exact.update({module: output.detach().clone()}))
for layer in (norm, silu):
    with GradCAM(model=model, target_layers=[layer]) as cam:
        cam(input_tensor=x[:1], targets=None)
        kept[layer] = cam.activations_and_grads.activations[0], cam.activations_and_grads.gradients[0]
activation, gradient = kept[norm]
found = torch.equal(activation, exact[norm]), torch.equal(activation, exact[silu]), torch.equal(gradient, kept[silu][1])
print("activation is the normalisation's:", found[0], ", is SiLU's:", found[1], "; gradient is SiLU's:", found[2])
assert found == (False, True, False), found
PYTHON
