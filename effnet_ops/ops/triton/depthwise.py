"""`depthwise_conv2d` and its gradient on Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from effnet_ops import backends
from effnet_ops.checks import resolve_padding
from effnet_ops.kernels import depthwise
from effnet_ops.kernels.layout import nhwc
from effnet_ops.ops import _library
from effnet_ops.ops.triton.layout import result_like


def _uncovered(weight: Tensor, stride: Sequence[int], dilation: Sequence[int]) -> bool:
    window = backends.Window(weight.shape[2:], stride, dilation)
    return bool(backends.BACKENDS["triton"].uncovered(window))


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> Tensor:
    if _uncovered(weight, stride, dilation):
        return _library.fallbacks["depthwise_conv2d"](x, weight, bias, stride, padding, dilation, activation)
    y, _, _ = depthwise.forward(
        nhwc(x),
        weight.contiguous(),
        stride=stride,
        padding=resolve_padding(padding, x.shape[2:], weight.shape[2:], stride, dilation),
        dilation=dilation,
        bias=None if bias is None else bias.contiguous(),
        out_activation=activation,
    )
    return result_like(y, x)


def depthwise_conv2d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    if _uncovered(weight, stride, dilation):
        config = (stride, padding, dilation, activation, needs)
        return _library.fallbacks["depthwise_conv2d_backward"](grad, x, weight, bias, *config)
    wanted = (needs[0], needs[1], needs[2] and bias is not None)
    if x.shape[0] == 0 or not any(wanted):
        return tuple(result.zero_() for result in _library.empty_gradients(x, (x, weight, bias), needs))
    window: dict[str, Any] = {
        "stride": stride,
        "padding": resolve_padding(padding, x.shape[2:], weight.shape[2:], stride, dilation),
        "dilation": dilation,
    }
    grad, filters = nhwc(grad), weight.contiguous()
    pixels = nhwc(x) if wanted[1] or activation != "none" else None
    if activation != "none":
        bias_vector = None if bias is None else bias.contiguous()
        grad, _, _ = depthwise.forward(
            pixels, filters, **window, bias=bias_vector, out_activation=activation, grad=grad
        )
    dx, dw, db, _ = depthwise.backward(grad, pixels, filters, size=x.shape[2:], **window, bias=bias, needs=wanted)
    empty = x.new_empty(0)
    return (
        empty if dx is None else result_like(dx, x),
        empty if dw is None else dw,
        x.new_empty(0) if db is None else db,
    )
