#!/usr/bin/env bash
# timm 1.0.31's efficientnet_b1 to b5 are configured for other image sizes than the paper's B1 to B5.
#
# Guess: 240, 260, 300, 380, 456, as in the paper and in tf_efficientnet_b1 to b5.
# Seen: "b1 240, test 288; b2 256, test 288; b3 288, test 320; b4 320, test 384; b5 448". A benchmark of "B4 of timm at its
# own size" does 0.71 times the paper's multiply-adds, or 1.02 times with the size for tests.
. "$(dirname "$0")/install" torch==2.14.1 torchvision==0.29.1 timm==1.0.31
"$python" -W ignore - <<'PYTHON'
import timm

paper = {"b0": 224, "b1": 240, "b2": 260, "b3": 300, "b4": 380, "b5": 456}
found = {}
for size, resolution in paper.items():
    native, tensorflow = (timm.get_pretrained_cfg(f"{prefix}efficientnet_{size}") for prefix in ("", "tf_"))
    found[size] = native.input_size[-1], (native.test_input_size or native.input_size)[-1]
    print(size, "paper", resolution, "; timm", found[size][0], ", test", found[size][1])
    assert tensorflow.input_size[-1] == resolution and tensorflow.test_input_size is None
expected = {"b0": (224, 224), "b1": (240, 288), "b2": (256, 288), "b3": (288, 320), "b4": (320, 384), "b5": (448, 448)}
assert found == expected, found
PYTHON
