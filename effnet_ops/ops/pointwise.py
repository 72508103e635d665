"""The operator `pointwise_conv2d` and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from effnet_ops import reference
from effnet_ops.ops import _library
from effnet_ops.ops.calls import Activation, Added, Flags, Weight


class PointwiseCall(NamedTuple):
    """A 1x1 convolution with a bias and an activation, to which a residual may be added."""

    x: Activation
    weight: Weight
    bias: Weight | None
    residual: Added | None
    activation: str

    def reference(self) -> Tensor:
        return _library.as_result(self.x, self.standard())

    def standard(self) -> Tensor:
        return reference.pointwise_conv2d(*self)

    def output(self) -> Tensor:
        return _library.empty_result(self.x, (self.x.shape[0], self.weight.shape[0], *self.x.shape[2:]))

    def flops(self, out: Sequence[int]) -> int:
        return _library.convolution_flops(out, self.weight)


class PointwiseGradientCall(NamedTuple):
    """The gradient of a call without a residual, whose own gradient is ``grad``."""

    grad: Activation
    call: PointwiseCall
    needs: Flags

    of = _library.Gradient.of(PointwiseCall)
    reference, output = _library.reference_of_gradient, _library.output_of_gradient

    def flops(self, out: Any) -> int:
        return sum(self.needs[:2]) * _library.convolution_flops(self.grad, self.call.weight)


pointwise_conv2d = _library.Operator("pointwise_conv2d", PointwiseCall, autocast=True)
_gradient = _library.Operator("pointwise_conv2d_backward", PointwiseGradientCall, results=3)


def _setup_context(ctx: Any, call: PointwiseCall, output: Tensor) -> None:
    needs_x = ctx.needs[1] or call.activation != "none"
    ctx.size, ctx.strides, ctx.activation = call.x.shape, call.x.stride(), call.activation
    ctx.save_for_backward(call.x if needs_x else None, call.weight, call.bias)


def _differentiate(ctx: Any, grad: Tensor) -> Sequence[Tensor | None]:
    x, weight, bias = ctx.saved_tensors
    if not any(ctx.needs[:3]):
        return None, None, None, grad
    if x is None:
        # Only its size counts.
        x = grad.new_empty_strided(ctx.size, ctx.strides)
    call = PointwiseCall(x, weight, bias, None, ctx.activation)
    return *_gradient(PointwiseGradientCall(grad, call, ctx.needs[:3])), grad


_library.register_autograd(pointwise_conv2d, _setup_context, _differentiate, _gradient)
