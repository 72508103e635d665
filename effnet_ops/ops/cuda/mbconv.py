"""`mbconv_inference` on CUDA C++ kernels.

Launches: expansion and convolution in one, the gates, the projection; where there is no expansion, the convolution
alone is the first. Parameters in float32, and weights of products in the dtype of x, are read as they are; the others
are converted at each call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effnet_ops import backends
from effnet_ops.ops import gpu
from effnet_ops.ops.calls import ConvNorm
from effnet_ops.ops.cuda.depthwise import too_large
from effnet_ops.ops.mbconv import MBConvCall
from effnet_ops.ops.triton.layout import result_like

_fits: dict[tuple[object, ...], bool] = {}
_MOST_KEPT = 4096


def mbconv_inference(call: MBConvCall) -> Tensor:
    if call.x.numel() == 0 or not _covers(call):
        return gpu.without("cuda", "mbconv_inference", call)
    x = call.x.contiguous(memory_format=torch.channels_last)
    y, sums = _convolved(x, call)
    gates, layer = None, call.squeeze_excite
    if layer is not None:
        pixels = y.shape[2] * y.shape[3]
        _, gates = torch.ops.effnet_ops.cuda_gates_forward(sums, pixels, *layer)
    residual = x if call.residual else None
    y = torch.ops.effnet_ops.cuda_gated_project(y, gates, *call.project, call.drop_path, residual)
    return result_like(y.permute(0, 2, 3, 1), call.x)


def _covers(call: MBConvCall) -> bool:
    """Whether the kernels can run this block, found once for all blocks of its sizes."""
    x, expand, weight = call.x, call.expand, call.depthwise.weight
    size = None if expand is None else expand.weight.shape
    window = tuple(map(tuple, call.window()))
    key = (x.device, x.dtype, x.shape, size, window, weight.shape[0], call.padding, call.squeeze_excite is None)
    found = _fits.get(key)
    if found is None:
        if len(_fits) >= _MOST_KEPT:
            _fits.clear()
        found = _fits[key] = _has_kernels(call)
    return found


def _has_kernels(call: MBConvCall) -> bool:
    x, weight, sides = call.x, call.depthwise.weight, call.sides()
    backend, window = backends.BACKENDS["cuda"], call.window()
    if backend.uncovered(window) or backend.lacks("mbconv_inference", window):
        return False
    expanded = (x.shape[0], weight.shape[0], *x.shape[2:])
    if too_large(expanded, weight.shape[2], sides):
        return False
    if call.expand is None:
        return True
    pool = call.squeeze_excite is not None
    return torch.ops.effnet_ops.cuda_expand_depthwise_fits(x, call.expand.weight, weight, call.stride[0], sides, pool)


def _convolved(x: Tensor, call: MBConvCall) -> tuple[Tensor, Tensor]:
    """The result of the convolution, channels_last, and sums over its pixels where there is a gate."""
    place = call.stride[0], call.sides()
    pool = call.squeeze_excite is not None
    if call.expand is not None:
        return torch.ops.effnet_ops.cuda_expand_depthwise(
            x, *call.expand, *call.depthwise, *place, call.activation, pool
        )
    conv = call.depthwise
    norm = _norm(conv)
    bias = conv.beta if norm is None else None
    y, sums, _ = torch.ops.effnet_ops.cuda_depthwise_forward(
        x, conv.weight, bias, None, None, norm, None, *place, "none", call.activation, pool, False
    )
    return y, sums


def _norm(conv: ConvNorm) -> Tensor | None:
    """Mean, scale and shift (3, C) of a normalisation in front of which there is no kernel of the block's own."""
    if conv.gamma is None:
        return None
    gamma, beta, mean, var = (value.float() for value in conv[1:5])
    return torch.stack((mean, gamma * torch.rsqrt(var + conv.eps), beta))
