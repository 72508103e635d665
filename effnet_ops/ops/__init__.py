"""The operators ``torch.ops.effnet_ops.*``, one file a word: the class of its calls, from which all else is derived.

The compiled library registers their CPU kernels and `gpu` those for CUDA; elsewhere they run the reference.
"""

from effnet_ops.ops import conv_norm, gpu, packed, triton
from effnet_ops.ops.batch_norm import NormTrainingCall, batch_norm_training
from effnet_ops.ops.depthwise import DepthwiseCall, depthwise_conv2d
from effnet_ops.ops.fused_mbconv import FusedMBConvCall, fused_mbconv, fused_mbconv_inference, fused_mbconv_sync
from effnet_ops.ops.mbconv import MBConvCall, mbconv, mbconv_inference, mbconv_sync, set_recompute
from effnet_ops.ops.pointwise import PointwiseCall, pointwise_conv2d
from effnet_ops.ops.prepared import PreparedCalls
from effnet_ops.ops.squeeze_excite import SqueezeExciteCall, squeeze_excite

__all__ = [
    "DepthwiseCall",
    "FusedMBConvCall",
    "MBConvCall",
    "NormTrainingCall",
    "PointwiseCall",
    "PreparedCalls",
    "SqueezeExciteCall",
    "batch_norm_training",
    "conv_norm",
    "depthwise_conv2d",
    "fused_mbconv",
    "fused_mbconv_inference",
    "fused_mbconv_sync",
    "mbconv",
    "mbconv_inference",
    "mbconv_sync",
    "packed",
    "pointwise_conv2d",
    "set_recompute",
    "squeeze_excite",
]

gpu.register()
triton.register_interpreter()
