#!/usr/bin/env bash
# pnnx 20261020 writes the weights for ncnn in half precision unless it is told fp16=False.
#
# Guess: a converter keeps the weights, and precision is a choice at run time: with ncnn's options for half precision
# off, logits agree to 1e-6.
# Seen (torch 2.14.1, timm 1.0.31, ncnn 1.0.20261020): "10.6 MB, off by 3e-04; fp16=False: 21.1 MB, off by 6e-07", both with
# all of ncnn's options for 16 bits off.
. "$(dirname "$0")/install" torch==2.14.1 torchvision==0.29.1 timm==1.0.31 pnnx==20261020 ncnn==1.0.20261020 numpy==2.4.6
"$python" -W ignore - <<'PYTHON'
import os
import tempfile

import ncnn
import numpy
import pnnx
import timm
import torch

folder = tempfile.TemporaryDirectory()
os.chdir(folder.name)
torch.manual_seed(0)
model, x = timm.create_model("efficientnet_b0").train(), torch.randn(1, 3, 64, 64)
with torch.no_grad():
    for _ in range(3):
        model(torch.randn(8, 3, 64, 64))
    model.eval()
    exact = model.double()(x.double())[0]
    model.float()


def error(files: str) -> float:
    net = ncnn.Net()
    for option in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
        setattr(net.opt, option, False)
    net.load_param(f"{files}.ncnn.param")
    net.load_model(f"{files}.ncnn.bin")
    extractor = net.create_extractor()
    extractor.input("in0", ncnn.Mat(x[0].numpy()).clone())
    logits = torch.from_numpy(numpy.array(extractor.extract("out0")[1])).double()
    return ((logits - exact).norm() / exact.norm()).item()


found = {}
for name, arguments in (("default", {}), ("whole", {"fp16": False})):
    torch.jit.trace(model, x).save(f"{name}.pt")
    pnnx.convert(f"{name}.pt", x, **arguments)
    found[name] = os.path.getsize(f"{name}.ncnn.bin") / 1e6, error(name)
for name, (size, off) in found.items():
    print(f"{name}: {size:.1f} MB, off by {off:.0e}")
assert found["default"][0] < 11 < 20 < found["whole"][0], found
assert found["default"][1] > 1e-4 and found["whole"][1] < 2e-6, found
PYTHON
