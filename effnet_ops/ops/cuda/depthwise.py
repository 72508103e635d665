"""`depthwise_conv2d` and its gradient on CUDA C++ kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effnet_ops.ops import _library
from effnet_ops.ops.depthwise import DepthwiseCall, DepthwiseGradientCall

_MOST_ELEMENTS = 2**31


def too_large(size: Sequence[int], kernel: int, sides: Sequence[int]) -> bool:
    """Whether 32-bit offsets in an image, with all that a tile may overhang, or a count of pixels could overflow.

    ``size`` is that of x, (N, C, H, W).
    """
    batch, channels, height, width = size
    height += sides[0] + sides[1] + 2 * kernel + 2
    width += sides[2] + sides[3] + 64 * kernel + 2
    return height * width * max(channels, 8, batch) >= _MOST_ELEMENTS


def _too_large(call: DepthwiseCall) -> bool:
    return too_large(call.x.shape, call.weight.shape[2], call.sides())


def depthwise_conv2d(call: DepthwiseCall) -> Tensor:
    if _too_large(call):
        return call.reference()
    return _forward(call, None)


def _forward(call: DepthwiseCall, grad: Tensor | None) -> Tensor:
    """The convolution, or ``grad`` in front of its activation, from the convolution formed again."""
    y, _, _ = torch.ops.effnet_ops.cuda_depthwise_forward(
        call.x, call.weight, call.bias, None, None, None, grad, call.stride[0], call.sides(), "none", call.activation,
        False, False,
    )  # fmt: skip
    return y


def depthwise_conv2d_backward(gradient: DepthwiseGradientCall) -> tuple[Tensor, ...]:
    grad, call, needs = gradient
    x, weight, bias = call[:3]
    wanted = [needs[0], needs[1], needs[2] and bias is not None]
    if x.shape[0] == 0 or not any(wanted):
        return _library.no_gradients(x, (x, weight, bias), needs)
    if _too_large(call):
        return gradient.reference()
    if call.activation != "none":
        grad = _forward(call, grad)
    # Without an activation and a gradient of the weight autograd did not save x: it may be uninitialised.
    pixels = x if wanted[1] else None
    fused, place = (None,) * 7, (call.stride[0], call.sides())
    return torch.ops.effnet_ops.cuda_depthwise_backward(
        grad, pixels, weight, bias, *fused, x, *place, "none", "none", wanted
    )[:3]
