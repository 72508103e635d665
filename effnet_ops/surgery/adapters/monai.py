"""MONAI: EfficientNetBN in two dimensions."""

from __future__ import annotations

from monai.networks.blocks.activation import MemoryEfficientSwish
from monai.networks.nets.efficientnet import drop_connect

from effnet_ops.surgery.fused import ACTIVATIONS
from effnet_ops.surgery.recognise import DROP_PATHS

ACTIVATIONS[MemoryEfficientSwish] = "silu"
DROP_PATHS.add(drop_connect)
