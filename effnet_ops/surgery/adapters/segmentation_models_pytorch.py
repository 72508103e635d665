"""segmentation_models_pytorch: its own EfficientNet encoders, a copy of efficientnet_pytorch's."""

from __future__ import annotations

from segmentation_models_pytorch.encoders._efficientnet import (
    Conv2dDynamicSamePadding,
    Conv2dStaticSamePadding,
    drop_connect,
)

from effnet_ops.surgery.generic import dynamic_padding, register_convolution, static_padding
from effnet_ops.surgery.recognise import DROP_PATHS

DROP_PATHS.add(drop_connect)
register_convolution(Conv2dStaticSamePadding, static_padding)
register_convolution(Conv2dDynamicSamePadding, dynamic_padding)
