"""Fused EfficientNet operators: depthwise convolution, squeeze-and-excitation and whole MBConv blocks."""

from effnet_ops import deployment, layers, scaling
from effnet_ops.backends import available_backends, use_backend
from effnet_ops.cuda_graphs import CUDAGraphs
from effnet_ops.functional import depthwise_conv2d, fused_mbconv, mbconv, pointwise_conv2d, squeeze_excite
from effnet_ops.models import convert_state_dict, create_model, list_models
from effnet_ops.ops import set_recompute
from effnet_ops.params import BatchNormParams, ConvNormParams, SqueezeExciteParams
from effnet_ops.surgery import (
    OptimizationReport,
    ReplacementReport,
    optimize_for_inference,
    register_block,
    replace_layers,
    restore_layers,
)

__version__ = "0.1.0"

__all__ = [
    "BatchNormParams",
    "CUDAGraphs",
    "ConvNormParams",
    "OptimizationReport",
    "ReplacementReport",
    "SqueezeExciteParams",
    "available_backends",
    "convert_state_dict",
    "create_model",
    "deployment",
    "depthwise_conv2d",
    "fused_mbconv",
    "layers",
    "list_models",
    "mbconv",
    "optimize_for_inference",
    "pointwise_conv2d",
    "register_block",
    "replace_layers",
    "restore_layers",
    "scaling",
    "set_recompute",
    "squeeze_excite",
    "use_backend",
]
