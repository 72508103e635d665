"""`squeeze_excite` and its gradient on Triton kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from effnet_ops import reference
from effnet_ops.kernels import squeeze_excite as kernels
from effnet_ops.kernels.layout import nhwc
from effnet_ops.ops import _library
from effnet_ops.ops.triton.layout import result_like


def parameters(*args: Any) -> kernels.Parameters:
    """The operators' four parameters, activation and gate as the kernels take them."""
    *tensors, activation, gate = args
    return kernels.Parameters(*(None if p is None else p.contiguous() for p in tensors), activation, gate)


def squeeze_excite(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        pooled = x.new_empty(x.shape[:2], dtype=reference.compute_dtype(x.dtype))
        return _library.empty_result(x, x.shape), pooled
    rows = nhwc(x).flatten(1, 2)
    pooled, gate = kernels.gate_forward(kernels.pool(rows), rows.shape[1], parameters(*args))
    return result_like(kernels.scale(rows, gate).unflatten(1, x.shape[2:]), x), pooled


def squeeze_excite_backward(grad: Tensor, x: Tensor, pooled: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *tensors, activation, gate, needs = args
    if x.numel() == 0:
        return tuple(value.zero_() for value in _library.empty_gradients(x, (x, *tensors), needs))
    rows, grad_rows = nhwc(x).flatten(1, 2), nhwc(grad).flatten(1, 2)
    sums = kernels.pool(grad_rows, other=rows).unsqueeze(2)
    found = kernels.gate_backward(sums, rows.shape[1], pooled.contiguous(), parameters(*tensors, activation, gate))
    dx = None
    if needs[0]:
        dx = result_like(kernels.scale(grad_rows, found.gate, found.pooled).unflatten(1, x.shape[2:]), x)
    values = (dx, *found[:4])
    return tuple(
        x.new_empty(0) if value is None or not need else value for value, need in zip(values, needs, strict=True)
    )
