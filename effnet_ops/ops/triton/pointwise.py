"""`pointwise_conv2d` and its gradient on Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from effnet_ops.kernels import pointwise
from effnet_ops.kernels.layout import nhwc
from effnet_ops.ops import _library
from effnet_ops.ops.pointwise import PointwiseCall, PointwiseGradientCall
from effnet_ops.ops.triton.layout import result_like


def _pixels(x: Tensor) -> Tensor:
    """x (N, C, H, W) as the kernels take it, (N, H * W, C) and contiguous."""
    return nhwc(x).flatten(1, 2)


def pointwise_conv2d(call: PointwiseCall) -> Tensor:
    x, weight, bias, residual, activation = call
    if x.numel() == 0:
        return call.output()
    y, _ = pointwise.forward(
        _pixels(x),
        weight.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        out_activation=activation,
        residual=None if residual is None else _pixels(residual),
    )
    return result_like(y.unflatten(1, x.shape[2:]), x)


def pointwise_conv2d_backward(gradient: PointwiseGradientCall) -> tuple[Tensor, ...]:
    grad, (x, weight, bias, _, activation), needs = gradient
    if x.numel() == 0:
        return _library.no_gradients(x, (x, weight, bias), needs)
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    wide_grad = _pixels(grad)
    # Without an activation autograd did not save x if the weight needs no gradient: it may be uninitialised.
    wide_x = _pixels(x) if activation != "none" or needs[1] else None
    if activation != "none":
        wide_grad, _ = pointwise.forward(wide_x, weight, bias=bias, out_activation=activation, grad=wide_grad)
    results = [x.new_empty(0) for _ in range(3)]
    if needs[0]:
        dx, _ = pointwise.input_gradient(wide_grad, weight)
        results[0] = result_like(dx.unflatten(1, x.shape[2:]), x)
    needs_bias = needs[2] and bias is not None
    if needs[1]:
        results[1], bias_gradient = pointwise.weight_gradient(
            wide_grad, wide_x, weight, bias=bias if needs_bias else None
        )
        results[2] = bias_gradient if needs_bias else results[2]
    elif needs_bias:
        results[2] = wide_grad.sum((0, 1), dtype=torch.promote_types(wide_grad.dtype, bias.dtype)).to(bias.dtype)
    return tuple(results)
