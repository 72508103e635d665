#!/usr/bin/env bash
# torchao 0.18.0's quantisation by export, for x86 (X86InductorQuantizer), quantises 81 convolutions of timm's
# efficientnet_b0 and 76 of tf_efficientnet_b0.
#
# Guess: all 81 of both; or, since it knows ReLU and not SiLU, only what no SiLU follows.
# Seen (torch 2.14.1, timm 1.0.31): "efficientnet_b0 81 of 81, tf_efficientnet_b0 76 of 81". The five with stride 2, which
# are TensorFlow's SAME with a padding of its own in front, stay in float32, and nothing says so.
. "$(dirname "$0")/install" torch==2.14.1 torchvision==0.29.1 timm==1.0.31 torchao==0.18.0
"$python" -W ignore - 2>/dev/null <<'PYTHON'
import timm
import torch
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

found = {}
for name in ("efficientnet_b0", "tf_efficientnet_b0"):
    torch.manual_seed(0)
    model, x = timm.create_model(name).eval(), torch.randn(1, 3, 64, 64)
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(model, (x,)).module(), quantizer)
    prepared(x)
    nodes = [node for node in convert_pt2e(prepared).graph.nodes if "conv2d" in str(node.target)]
    quantised = [node for node in nodes if all("dequantize" in str(source.target) for source in node.args[:2])]
    strides = {tuple(node.args[3]) for node in nodes if node not in quantised}
    found[name] = len(quantised), len(nodes), strides
    print(name, len(quantised), "of", len(nodes), "; strides of the others:", strides)
assert found == {"efficientnet_b0": (81, 81, set()), "tf_efficientnet_b0": (76, 81, {(2, 2)})}, found
PYTHON
