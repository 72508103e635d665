"""The operator `pointwise_conv2d` and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effnet_ops import reference
from effnet_ops.ops import _library


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> Tensor:
    y = reference.pointwise_conv2d(x, weight, bias, residual, activation)
    return _library.as_result(x, y)


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> Tensor:
    return _library.empty_result(x, (x.shape[0], weight.shape[0], *x.shape[2:]))


def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    return _library.empty_gradients(x, (x, weight, bias), needs)


_operator = _library.define(
    "pointwise_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation) -> Tensor",
    _forward,
    _forward_fake,
)
_gradient = _library.define_backward(
    "pointwise_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, str activation, bool[] needs) "
    "-> (Tensor, Tensor, Tensor)",
    lambda args, *inputs: reference.pointwise_conv2d(*inputs, None, args[3]),
    (0, 1, 2),
    _backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _, ctx.activation = inputs
    needs_x = ctx.needs_input_grad[1] or ctx.activation != "none"
    ctx.size, ctx.strides = x.shape, x.stride()
    ctx.save_for_backward(x if needs_x else None, weight, bias)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    if x is None:
        x = grad.new_empty_strided(ctx.size, ctx.strides)
    needs, needs_residual = list(ctx.needs_input_grad[:3]), ctx.needs_input_grad[3]
    values: tuple[Tensor | None, ...] = (None, None, None)
    if any(needs):
        values = _library.only_needed(_gradient.operator(grad, x, weight, bias, ctx.activation, needs), needs)
    return (*values, grad if needs_residual else None, None)


_library.register_autograd(_operator, _setup_context, _differentiate, _gradient)
_library.register_autocast(_operator, (0, 3))


@register_flop_formula(torch.ops.effnet_ops.pointwise_conv2d)
def _flops(x: Sequence[int], weight: Sequence[int], *args: Any, out_shape: Sequence[int], **kwargs: Any) -> int:
    return _library.convolution_flops(out_shape, weight)


@register_flop_formula(torch.ops.effnet_ops.pointwise_conv2d_backward)
def _backward_flops(
    grad: Sequence[int], x: Sequence[int], weight: Sequence[int], *args: Any, out_shape: Any, **kwargs: Any
) -> int:
    return sum(args[-1][:2]) * _library.convolution_flops(grad, weight)


def pointwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    """`effnet_ops.pointwise_conv2d` without checks."""
    return _library.call(_operator, x, weight, bias, residual, activation)
