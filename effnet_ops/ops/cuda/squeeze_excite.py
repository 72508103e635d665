"""`squeeze_excite` and its gradient on CUDA C++ kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effnet_ops import reference
from effnet_ops.ops import _library

_MOST_ELEMENTS, _MOST_SHARED_FLOATS = 2**31, 24 * 1024


def _too_large(x: Tensor, reduced: int) -> bool:
    """Whether 32-bit offsets in an image could overflow, or an image's vectors not fit into any GPU's shared memory."""
    elements = x.shape[1] * max(x.shape[2] * x.shape[3], reduced)
    return elements >= _MOST_ELEMENTS or 2 * x.shape[1] + 3 * reduced + 256 > _MOST_SHARED_FLOATS


def squeeze_excite(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        pooled = x.new_empty(x.shape[:2], dtype=reference.compute_dtype(x.dtype))
        return _library.empty_result(x, x.shape), pooled
    *parameters, activation, gate = args
    if _too_large(x, parameters[0].shape[0]):
        return _library.fallbacks["squeeze_excite"](x, *args)
    y, pooled, _ = torch.ops.effnet_ops.cuda_squeeze_excite_forward(
        x, None, *parameters, "none", activation, gate, True
    )
    return y, pooled


def squeeze_excite_backward(grad: Tensor, x: Tensor, pooled: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *tensors, _activation, _gate, needs = args
    if x.numel() == 0:
        return tuple(value.zero_() for value in _library.empty_gradients(x, (x, *tensors), needs))
    if _too_large(x, tensors[0].shape[0]):
        return _library.fallbacks["squeeze_excite_backward"](grad, x, pooled, *args)
    return torch.ops.effnet_ops.cuda_squeeze_excite_backward(grad, x, pooled, *args)
