"""`squeeze_excite` and its gradient on Triton kernels."""

from __future__ import annotations

from torch import Tensor

from effnet_ops.kernels import squeeze_excite as kernels
from effnet_ops.kernels.layout import nhwc
from effnet_ops.ops import _library
from effnet_ops.ops.calls import SqueezeExcite
from effnet_ops.ops.squeeze_excite import SqueezeExciteCall, SqueezeExciteGradientCall
from effnet_ops.ops.triton.layout import result_like


def parameters(layer: SqueezeExcite) -> kernels.Parameters:
    """The four parameters, activation and gate as the kernels take them."""
    *tensors, activation, gate = layer
    return kernels.Parameters(*(None if p is None else p.contiguous() for p in tensors), activation, gate)


def squeeze_excite(call: SqueezeExciteCall) -> tuple[Tensor, Tensor]:
    x = call.x
    if x.numel() == 0:
        return call.output()
    rows = nhwc(x).flatten(1, 2)
    layer = parameters(SqueezeExcite(*call[1:]))
    pooled, gate = kernels.gate_forward(kernels.pool(rows), rows.shape[1], layer)
    return result_like(kernels.scale(rows, gate).unflatten(1, x.shape[2:]), x), pooled


def squeeze_excite_backward(gradient: SqueezeExciteGradientCall) -> tuple[Tensor, ...]:
    grad, call, pooled, needs = gradient
    x = call.x
    if x.numel() == 0:
        return _library.no_gradients(x, call[:5], needs)
    rows, grad_rows = nhwc(x).flatten(1, 2), nhwc(grad).flatten(1, 2)
    sums = kernels.pool(grad_rows, other=rows).unsqueeze(2)
    layer = parameters(SqueezeExcite(*call[1:]))
    found = kernels.gate_backward(sums, rows.shape[1], pooled.contiguous(), layer)
    dx = None
    if needs[0]:
        dx = result_like(kernels.scale(grad_rows, found.gate, found.pooled).unflatten(1, x.shape[2:]), x)
    return tuple(
        x.new_empty(0) if value is None or not need else value
        for value, need in zip((dx, *found[:4]), needs, strict=True)
    )
