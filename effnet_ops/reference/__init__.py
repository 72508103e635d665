"""Every word in plain PyTorch: the specification that all backends are tested against.

Gradients are PyTorch's own. Half-precision inputs are computed in fp32 and rounded once at the end, fp64 stays
fp64; a backend may keep more precision between the steps of a fused operation, never less.
"""

from effnet_ops.reference.activation import ACTIVATIONS, GATES, activate, compute_dtype
from effnet_ops.reference.batch_norm import Statistics, batch_norm, batch_statistics, sync_batch_norm
from effnet_ops.reference.convolution import convolution, pad_unevenly
from effnet_ops.reference.depthwise import depthwise_conv2d
from effnet_ops.reference.fused_mbconv import FusedStages, fused_mbconv
from effnet_ops.reference.mbconv import Stages, drop_path_scale, mbconv
from effnet_ops.reference.pointwise import pointwise_conv2d
from effnet_ops.reference.squeeze_excite import squeeze_excite

__all__ = [
    "ACTIVATIONS",
    "GATES",
    "FusedStages",
    "Stages",
    "Statistics",
    "activate",
    "batch_norm",
    "batch_statistics",
    "compute_dtype",
    "convolution",
    "depthwise_conv2d",
    "drop_path_scale",
    "fused_mbconv",
    "mbconv",
    "pad_unevenly",
    "pointwise_conv2d",
    "squeeze_excite",
    "sync_batch_norm",
]
