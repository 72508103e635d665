"""The operator `depthwise_conv2d` and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effnet_ops import reference
from effnet_ops.checks import output_size, resolve_padding
from effnet_ops.ops import _library


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> Tensor:
    sides = resolve_padding(padding, x.shape[2:], weight.shape[2:], stride, dilation)
    return reference.depthwise_conv2d(x, weight, bias, stride, sides, dilation, activation)


def _forward(x: Tensor, *args: Any) -> Tensor:
    y = _run(x, *args)
    return _library.as_result(x, y)


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> Tensor:
    sides = resolve_padding(padding, x.shape[2:], weight.shape[2:], stride, dilation)
    size = output_size(x.shape[2:], weight.shape[2:], stride, sides, dilation)
    return _library.empty_result(x, (*x.shape[:2], *size))


def _backward_fake(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    return _library.empty_gradients(x, (x, weight, bias), args[-1])


_operator = _library.define(
    "depthwise_conv2d(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, "
    "str activation) -> Tensor",
    _forward,
    _forward_fake,
)
_gradient = _library.define_backward(
    "depthwise_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, "
    "int[] dilation, str activation, bool[] needs) -> (Tensor, Tensor, Tensor)",
    lambda args, *inputs: _run(*inputs, *args[3:7]),
    (0, 1, 2),
    _backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *ctx.config = inputs
    needs_x = ctx.needs_input_grad[1] or ctx.config[-1] != "none"
    ctx.size, ctx.strides = x.shape, x.stride()
    ctx.save_for_backward(x if needs_x else None, weight, bias)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    if x is None:
        x = grad.new_empty_strided(ctx.size, ctx.strides)
    needs = list(ctx.needs_input_grad[:3])
    values = _gradient.operator(grad, x, weight, bias, *ctx.config, needs)
    return (*_library.only_needed(values, needs), None, None, None, None)


_library.register_autograd(_operator, _setup_context, _differentiate, _gradient)
_library.register_autocast(_operator, (0,))


@register_flop_formula(torch.ops.effnet_ops.depthwise_conv2d)
def _flops(x: Sequence[int], weight: Sequence[int], *args: Any, out_shape: Sequence[int], **kwargs: Any) -> int:
    return _library.convolution_flops(out_shape, weight)


@register_flop_formula(torch.ops.effnet_ops.depthwise_conv2d_backward)
def _backward_flops(
    grad: Sequence[int], x: Sequence[int], weight: Sequence[int], *args: Any, out_shape: Any, **kwargs: Any
) -> int:
    return sum(args[-1][:2]) * _library.convolution_flops(grad, weight)


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> Tensor:
    """`effnet_ops.depthwise_conv2d` without checks; ``padding`` is (top, bottom, left, right), or () for SAME."""
    return _library.call(_operator, x, weight, bias, stride, padding, dilation, activation)
