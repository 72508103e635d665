"""The operators ``torch.ops.effnet_ops.*``: schema, fake kernel, gradient, autocast and FLOP formula, one file a word.

The compiled library registers their CPU kernels and `gpu` those for CUDA; elsewhere they run the reference.
"""

from effnet_ops.ops import conv_norm, gpu, packed, triton
from effnet_ops.ops._library import PreparedCalls
from effnet_ops.ops.depthwise import depthwise_conv2d
from effnet_ops.ops.mbconv import (
    infer_mbconv,
    inference_arguments,
    mbconv,
    mbconv_arguments,
    prepare_inference,
    set_recompute,
)
from effnet_ops.ops.pointwise import pointwise_conv2d
from effnet_ops.ops.squeeze_excite import squeeze_excite

__all__ = [
    "PreparedCalls",
    "conv_norm",
    "depthwise_conv2d",
    "infer_mbconv",
    "inference_arguments",
    "mbconv",
    "mbconv_arguments",
    "packed",
    "pointwise_conv2d",
    "prepare_inference",
    "set_recompute",
    "squeeze_excite",
]

gpu.register()
triton.register_interpreter()
