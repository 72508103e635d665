"""segmentation_models_pytorch: its own EfficientNet encoders, a copy of efficientnet_pytorch's."""

from __future__ import annotations

from segmentation_models_pytorch.encoders._efficientnet import drop_connect

from effnet_ops.surgery.recognise import DROP_PATHS

DROP_PATHS.add(drop_connect)
