"""`depthwise_conv2d` and its gradient on Triton kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from effnet_ops import backends
from effnet_ops.kernels import depthwise
from effnet_ops.kernels.layout import nhwc
from effnet_ops.ops import _library
from effnet_ops.ops.depthwise import DepthwiseCall, DepthwiseGradientCall
from effnet_ops.ops.triton.layout import result_like


def _uncovered(call: DepthwiseCall) -> bool:
    return bool(backends.BACKENDS["triton"].uncovered(call.window()))


def _window(call: DepthwiseCall) -> dict[str, Any]:
    return {"stride": call.stride, "padding": call.sides(), "dilation": call.dilation}


def depthwise_conv2d(call: DepthwiseCall) -> Tensor:
    if _uncovered(call):
        return call.reference()
    y, _, _ = depthwise.forward(
        nhwc(call.x),
        call.weight.contiguous(),
        **_window(call),
        bias=None if call.bias is None else call.bias.contiguous(),
        out_activation=call.activation,
    )
    return result_like(y, call.x)


def depthwise_conv2d_backward(gradient: DepthwiseGradientCall) -> tuple[Tensor, ...]:
    grad, call, needs = gradient
    if _uncovered(call):
        return gradient.reference()
    x, weight, bias = call[:3]
    wanted = (needs[0], needs[1], needs[2] and bias is not None)
    if x.shape[0] == 0 or not any(wanted):
        return _library.no_gradients(x, (x, weight, bias), needs)
    window, grad, filters = _window(call), nhwc(grad), weight.contiguous()
    pixels = nhwc(x) if wanted[1] or call.activation != "none" else None
    if call.activation != "none":
        vector = None if bias is None else bias.contiguous()
        grad, _, _ = depthwise.forward(
            pixels, filters, **window, bias=vector, out_activation=call.activation, grad=grad
        )
    dx, dw, db, _ = depthwise.backward(grad, pixels, filters, size=x.shape[2:], **window, bias=bias, needs=wanted)
    return tuple(
        x.new_empty(0) if value is None else value for value in (None if dx is None else result_like(dx, x), dw, db)
    )
