"""The operator `depthwise_conv2d` and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from effnet_ops import backends, reference
from effnet_ops.checks import output_size, resolve_padding
from effnet_ops.ops import _library
from effnet_ops.ops.calls import Activation, Flags, Pair, Sides, Weight


class DepthwiseCall(NamedTuple):
    """A depthwise convolution with a bias and an activation."""

    x: Activation
    weight: Weight
    bias: Weight | None
    stride: Pair
    padding: Sides
    dilation: Pair
    activation: str

    def window(self) -> backends.Window:
        return backends.Window(self.weight.shape[2:], self.stride, self.dilation)

    def sides(self) -> tuple[int, int, int, int]:
        return resolve_padding(self.padding, self.x.shape[2:], self.weight.shape[2:], self.stride, self.dilation)

    def reference(self) -> Tensor:
        return _library.as_result(self.x, self.standard())

    def standard(self) -> Tensor:
        config = (self.stride, self.sides(), self.dilation, self.activation)
        return reference.depthwise_conv2d(self.x, self.weight, self.bias, *config)

    def output(self) -> Tensor:
        size = output_size(self.x.shape[2:], self.weight.shape[2:], self.stride, self.sides(), self.dilation)
        return _library.empty_result(self.x, (*self.x.shape[:2], *size))

    def flops(self, out: Sequence[int]) -> int:
        return _library.convolution_flops(out, self.weight)


class DepthwiseGradientCall(NamedTuple):
    """The gradients of x, weight and bias, as far as ``needs`` asks for them."""

    grad: Activation
    call: DepthwiseCall
    needs: Flags

    of = _library.Gradient.of(DepthwiseCall)
    reference, output = _library.reference_of_gradient, _library.output_of_gradient

    def flops(self, out: Any) -> int:
        return sum(self.needs[:2]) * _library.convolution_flops(self.grad, self.call.weight)


depthwise_conv2d = _library.Operator("depthwise_conv2d", DepthwiseCall, autocast=True)
_gradient = _library.Operator("depthwise_conv2d_backward", DepthwiseGradientCall, results=3)


def _setup_context(ctx: Any, call: DepthwiseCall, output: Tensor) -> None:
    needs_x = ctx.needs[1] or call.activation != "none"
    ctx.size, ctx.strides, ctx.config = call.x.shape, call.x.stride(), call[3:]
    ctx.save_for_backward(call.x if needs_x else None, call.weight, call.bias)


def _differentiate(ctx: Any, grad: Tensor) -> Sequence[Tensor | None]:
    x, weight, bias = ctx.saved_tensors
    if x is None:
        # Only its size counts.
        x = grad.new_empty_strided(ctx.size, ctx.strides)
    return _gradient(DepthwiseGradientCall(grad, DepthwiseCall(x, weight, bias, *ctx.config), ctx.needs))


_library.register_autograd(depthwise_conv2d, _setup_context, _differentiate, _gradient)
