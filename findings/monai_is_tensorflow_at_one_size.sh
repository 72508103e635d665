#!/usr/bin/env bash
# MONAI 1.6.1's EfficientNetBN("efficientnet-b0") is TensorFlow's network for images of 224 pixels, and another for others.
#
# Guess: a class that takes any image computes the same function as timm's tf_efficientnet_b0 with its weights, at any size.
# Seen (torch 2.14.1, timm 1.0.31), fresh weights copied by position: logits differ by "224: 0%, 225: 114%, 240: 144%".
# The pads are fixed for 224 when the network is built.
. "$(dirname "$0")/install" torch==2.14.1 torchvision==0.29.1 timm==1.0.31 monai==1.6.1
"$python" -W ignore - <<'PYTHON'
import timm
import torch
from monai.networks.nets import EfficientNetBN

torch.manual_seed(0)
monai = EfficientNetBN("efficientnet-b0", pretrained=False).eval()
tensorflow = timm.create_model("tf_efficientnet_b0").eval()
tensorflow.load_state_dict(dict(zip(tensorflow.state_dict(), monai.state_dict().values(), strict=True)))
found = {}
for size in (224, 225, 240):
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        a, b = monai(x), tensorflow(x)
    found[size] = ((a - b).norm() / b.norm()).item()
    print(f"{size}: logits differ by {found[size]:.0%}")
assert found[224] < 1e-4 and found[225] > 0.5 and found[240] > 0.5, found
PYTHON
