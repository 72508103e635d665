#!/usr/bin/env bash
# efficientnet_pytorch 0.7.1: from_name("efficientnet-b0") pads any image as if it had 224 pixels.
#
# Guess: "Conv2dStaticSamePadding" is TensorFlow's SAME, so an image of 240 pixels ends in 8x8 features.
# Seen (torch 2.14.1): "224: 7x7 and 7x7, equal; 225: 7x7, 8x8 with SAME; 240: 7x7, 8x8; 300: 9x9, 10x10" against the same
# weights with image_size=None, which pads by the image.
. "$(dirname "$0")/install" torch==2.14.1 efficientnet_pytorch==0.7.1
"$python" -W ignore - <<'PYTHON'
import torch
from efficientnet_pytorch import EfficientNet

torch.manual_seed(0)
fixed = EfficientNet.from_name("efficientnet-b0").eval()
dynamic = EfficientNet.from_name("efficientnet-b0", image_size=None).eval()
dynamic.load_state_dict(fixed.state_dict())
found = {}
for size in (224, 225, 240, 300):
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        a, b = fixed.extract_features(x), dynamic.extract_features(x)
    found[size] = a.shape[-1], b.shape[-1]
    print(f"{size}: {found[size][0]}x{found[size][0]} fixed, {found[size][1]}x{found[size][1]} by the image")
    assert a.shape != b.shape or torch.equal(a, b)
assert found == {224: (7, 7), 225: (7, 8), 240: (7, 8), 300: (9, 10)}, found
PYTHON
