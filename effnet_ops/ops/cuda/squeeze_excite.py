"""`squeeze_excite` and its gradient on CUDA C++ kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from effnet_ops.ops import _library
from effnet_ops.ops.squeeze_excite import SqueezeExciteCall, SqueezeExciteGradientCall

_MOST_ELEMENTS, _MOST_SHARED_FLOATS = 2**31, 24 * 1024


def _too_large(x: Tensor, reduced: int) -> bool:
    """Whether 32-bit offsets in an image could overflow, or an image's vectors not fit into any GPU's shared memory."""
    elements = x.shape[1] * max(x.shape[2] * x.shape[3], reduced)
    return elements >= _MOST_ELEMENTS or 2 * x.shape[1] + 3 * reduced + 256 > _MOST_SHARED_FLOATS


def squeeze_excite(call: SqueezeExciteCall) -> tuple[Tensor, Tensor]:
    x, *layer = call
    if x.numel() == 0:
        return call.output()
    if _too_large(x, call.reduce_weight.shape[0]):
        return call.reference()
    *parameters, activation, gate = layer
    y, pooled, _ = torch.ops.effnet_ops.cuda_squeeze_excite_forward(
        x, None, *parameters, "none", activation, gate, True
    )
    return y, pooled


def squeeze_excite_backward(gradient: SqueezeExciteGradientCall) -> tuple[Tensor, ...]:
    grad, (x, *layer), pooled, needs = gradient
    if x.numel() == 0:
        return _library.no_gradients(x, gradient.call[:5], needs)
    if _too_large(x, gradient.call.reduce_weight.shape[0]):
        return gradient.reference()
    return torch.ops.effnet_ops.cuda_squeeze_excite_backward(grad, x, pooled, *layer, needs)
