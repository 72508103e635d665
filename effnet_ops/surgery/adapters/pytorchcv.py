"""pytorchcv: the variants of EfficientNet with TensorFlow's padding compute it at each call."""

from __future__ import annotations

from pytorchcv.models.efficientnet import calc_tf_padding

from effnet_ops.surgery.recognise import PADDINGS

PADDINGS.add(calc_tf_padding)
