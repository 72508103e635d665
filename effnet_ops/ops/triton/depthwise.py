"""`depthwise_conv2d` and its gradient on Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence

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
