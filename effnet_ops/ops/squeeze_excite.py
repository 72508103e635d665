"""The operator `squeeze_excite` and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from effnet_ops import reference
from effnet_ops.ops import _library, standard
from effnet_ops.ops.calls import Activation, Constant, Flags, Weight


class SqueezeExciteCall(NamedTuple):
    """Squeeze-and-excitation; the second result is the mean (N, C) over each image."""

    x: Activation
    reduce_weight: Weight
    reduce_bias: Weight | None
    expand_weight: Weight
    expand_bias: Weight | None
    activation: str
    gate: str

    def reference(self) -> tuple[Tensor, Tensor]:
        y = _library.as_result(self.x, reference.squeeze_excite(*self))
        return y, self.x.to(reference.compute_dtype(self.x.dtype)).mean((2, 3))

    def standard(self) -> tuple[Tensor, Tensor]:
        wide = self.x.to(reference.compute_dtype(self.x.dtype))
        pooled = standard.average(wide)
        return standard.excite(wide, pooled, self[1:]).to(self.x.dtype), pooled.flatten(1)

    def output(self) -> tuple[Tensor, Tensor]:
        x = self.x
        return _library.empty_result(x, x.shape), x.new_empty(x.shape[:2], dtype=reference.compute_dtype(x.dtype))

    def flops(self, out: Any) -> int:
        return sum(
            _library.convolution_flops(self.x[:2], weight) for weight in (self.reduce_weight, self.expand_weight)
        )


class SqueezeExciteGradientCall(NamedTuple):
    """The gradients of x and the four parameters; ``pooled`` is what the forward call returned."""

    grad: Activation
    call: SqueezeExciteCall
    pooled: Constant
    needs: Flags

    of = _library.Gradient.of(SqueezeExciteCall)
    reference, output = _library.reference_of_gradient, _library.output_of_gradient

    def flops(self, out: Any) -> int:
        call = self.call
        return gradient_flops(call.x[0], call.reduce_weight, call.expand_weight, self.needs)


def gradient_flops(batch: int, reduce: Sequence[int], expand: Sequence[int], needs: Sequence[bool]) -> int:
    """FLOPs of the two products' gradients; ``needs`` in the order input, reduce w and b, expand w and b."""
    x, reduce_weight, reduce_bias, expand_weight, _ = needs
    flops = (x + reduce_weight) * _library.convolution_flops((batch, 0), reduce)
    inner = any((x, reduce_weight, reduce_bias))
    return flops + (inner + expand_weight) * _library.convolution_flops((batch, 0), expand)


squeeze_excite = _library.Operator("squeeze_excite", SqueezeExciteCall, results=2, autocast=True)
_gradient = _library.Operator("squeeze_excite_backward", SqueezeExciteGradientCall, results=5)


def _setup_context(ctx: Any, call: SqueezeExciteCall, output: tuple[Tensor, Tensor]) -> None:
    pooled = output[1]
    ctx.mark_non_differentiable(pooled)
    ctx.set_materialize_grads(False)
    ctx.names = call.activation, call.gate
    ctx.save_for_backward(pooled, *(value for value in call if not isinstance(value, str)))


def _differentiate(ctx: Any, grad: Tensor | None, _pooled_grad: None) -> Sequence[Tensor | None]:
    if grad is None:
        return (None,) * len(ctx.needs)
    pooled, *tensors = ctx.saved_tensors
    return _gradient(SqueezeExciteGradientCall(grad, SqueezeExciteCall(*tensors, *ctx.names), pooled, ctx.needs))


_library.register_autograd(squeeze_excite, _setup_context, _differentiate, _gradient)
