#!/usr/bin/env bash
# torch.fx.experimental.optimization.fuse (torch 2.14.1) folds all 49 normalisations of torchvision's EfficientNet-B0 and
# none of timm's, without a word.
#
# Guess: both networks are the same convolutions and normalisations, so 49 are folded in both.
# Seen: "torchvision: 0 of 49 left; timm: 49 of 49 left". timm's BatchNormAct2d is no leaf for the tracer, which writes
# down F.batch_norm, and what is folded is pairs of modules. A count of BatchNorm2d modules in the graph says 0 for both.
. "$(dirname "$0")/install" torch==2.14.1 torchvision==0.29.1 timm==1.0.31
"$python" -W ignore - <<'PYTHON'
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.fx.experimental.optimization import fuse

found = {}
models = {"torchvision": torchvision.models.efficientnet_b0(), "timm": timm.create_model("efficientnet_b0")}
for name, model in models.items():
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    fused = fuse(model.eval())
    modules = [fused.get_submodule(node.target) for node in fused.graph.nodes if node.op == "call_module"]
    left = sum(isinstance(module, nn.BatchNorm2d) for module in modules)
    functions = sum(node.target is F.batch_norm for node in fused.graph.nodes)
    found[name] = norms, left, functions
    print(f"{name}: {left + functions} of {norms} left, {left} as modules, {functions} as functions")
assert found == {"torchvision": (49, 0, 0), "timm": (49, 0, 49)}, found
PYTHON
