"""`depthwise_conv2d` and its gradient on CUDA C++ kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effnet_ops.checks import resolve_padding
from effnet_ops.ops import _library

_MOST_ELEMENTS = 2**31


def too_large(size: Sequence[int], kernel: int, sides: Sequence[int]) -> bool:
    """Whether 32-bit offsets in an image, with all that a tile may overhang, or a count of pixels could overflow.

    ``size`` is that of x, (N, C, H, W).
    """
    batch, channels, height, width = size
    height += sides[0] + sides[1] + 2 * kernel + 2
    width += sides[2] + sides[3] + 64 * kernel + 2
    return height * width * max(channels, 8, batch) >= _MOST_ELEMENTS


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> Tensor:
    sides = resolve_padding(padding, x.shape[2:], weight.shape[2:], stride, dilation)
    if too_large(x.shape, weight.shape[2], sides):
        return _library.fallbacks["depthwise_conv2d"](x, weight, bias, stride, padding, dilation, activation)
    y, _, _ = torch.ops.effnet_ops.cuda_depthwise_forward(
        x, weight, bias, None, None, None, None, stride[0], sides, "none", activation, False, False
    )
    return y


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
    wanted = [needs[0], needs[1], needs[2] and bias is not None]
    if x.shape[0] == 0 or not any(wanted):
        return tuple(result.zero_() for result in _library.empty_gradients(x, (x, weight, bias), needs))
    sides = resolve_padding(padding, x.shape[2:], weight.shape[2:], stride, dilation)
    if too_large(x.shape, weight.shape[2], sides):
        config = (stride, padding, dilation, activation, needs)
        return _library.fallbacks["depthwise_conv2d_backward"](grad, x, weight, bias, *config)
    if activation != "none":
        # The gradient in front of the activation, from the convolution formed again: y was not saved.
        grad, _, _ = torch.ops.effnet_ops.cuda_depthwise_forward(
            x, weight, bias, None, None, None, grad, stride[0], sides, "none", activation, False, False
        )
    # Without an activation and a gradient of the weight autograd did not save x: it may be uninitialised.
    pixels = x if wanted[1] else None
    fused = (None,) * 7
    place = (stride[0], sides)
    return torch.ops.effnet_ops.cuda_depthwise_backward(
        grad, pixels, weight, bias, *fused, x, *place, "none", "none", wanted
    )[:3]
