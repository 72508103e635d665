"""The operator of a normalisation and the activation behind it where a gradient may come, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from effnet_ops import context, reference
from effnet_ops.ops import _library
from effnet_ops.ops.calls import Activation, Constant, Flags, Weight


class NormTrainingCall(NamedTuple):
    """activation(norm(x)) with the statistics of the batch, or with constant ones where mean and var are given.

    The results are y, and the mean and biased variance of the batch; empty where they were given.
    """

    x: Activation
    gamma: Weight
    beta: Weight | None
    mean: Constant | None
    var: Constant | None
    eps: float
    activation: str

    def uses_batch(self) -> bool:
        return self.mean is None

    def reference(self) -> tuple[Tensor, ...]:
        x = self.x.to(reference.compute_dtype(self.x.dtype))
        results = self._empty_statistics()
        if self.uses_batch():
            mean, var = reference.batch_statistics(x)
            values = (mean.detach(), var.detach())
            results = values if context.in_transform() else [r.copy_(v) for r, v in zip(results, values, strict=True)]
        else:
            mean, var = self.mean.to(x.dtype), self.var.to(x.dtype)
        gamma, beta = (None if p is None else p.to(x.dtype) for p in (self.gamma, self.beta))
        y = reference.activate(reference.batch_norm(x, mean, var, gamma, beta, self.eps), self.activation)
        return _library.as_result(self.x, y), *results

    def output(self) -> tuple[Tensor, ...]:
        return _library.empty_result(self.x, self.x.shape), *self._empty_statistics()

    def _empty_statistics(self) -> list[Tensor]:
        size = self.x.shape[1] if self.uses_batch() else 0
        return [self.x.new_empty(size, dtype=reference.compute_dtype(self.x.dtype)) for _ in range(2)]

    def flops(self, out: Any) -> int:
        return 0


class NormGradientCall(NamedTuple):
    """The gradients of all that has one in the call, as far as ``needs`` asks for them."""

    grad: Activation
    call: NormTrainingCall
    mean_used: Constant
    var_used: Constant
    needs: Flags

    of = _library.Gradient.of(NormTrainingCall)
    reference, output = _library.reference_of_gradient, _library.output_of_gradient

    def flops(self, out: Any) -> int:
        return 0


batch_norm_training = _library.Operator("batch_norm_training", NormTrainingCall, results=3)
_gradient = _library.Operator("batch_norm_backward", NormGradientCall, results=3)


def _setup_context(ctx: Any, call: NormTrainingCall, output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.eps, ctx.activation = call.eps, call.activation
    # A training step between an evaluation and its gradient changes the running statistics in place.
    constants = (p if p is None else p.clone() for p in (call.mean, call.var))
    ctx.save_for_backward(call.x, call.gamma, call.beta, *constants, *output[1:])


def _differentiate(ctx: Any, grad: Tensor | None, *_: None) -> Sequence[Tensor | None]:
    if grad is None:
        return (None,) * len(ctx.needs)
    *args, mean_used, var_used = ctx.saved_tensors
    return _gradient.run(grad, *args, ctx.eps, ctx.activation, mean_used, var_used, ctx.needs)


_library.register_autograd(batch_norm_training, _setup_context, _differentiate, _gradient)
