"""The operator `squeeze_excite` and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effnet_ops import reference
from effnet_ops.ops import _library

_PARAMETERS = "Tensor reduce_weight, Tensor? reduce_bias, Tensor expand_weight, Tensor? expand_bias"


def _forward(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    y = _library.as_result(x, reference.squeeze_excite(x, *args))
    return y, x.to(reference.compute_dtype(x.dtype)).mean((2, 3))


def _forward_fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _library.empty_result(x, x.shape), x.new_empty(x.shape[:2], dtype=reference.compute_dtype(x.dtype))


def _backward_fake(grad: Tensor, x: Tensor, pooled: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *parameters, _activation, _gate, needs = args
    return _library.empty_gradients(x, (x, *parameters), needs)


_operator = _library.define(
    f"squeeze_excite(Tensor x, {_PARAMETERS}, str activation, str gate) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_gradient = _library.define_backward(
    f"squeeze_excite_backward(Tensor grad, Tensor x, Tensor pooled, {_PARAMETERS}, str activation, str gate, "
    "bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda args, *inputs: reference.squeeze_excite(*inputs, *args[6:8]),
    (0, 2, 3, 4, 5),
    _backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *parameters, ctx.activation, ctx.gate = inputs
    pooled = output[1]
    ctx.mark_non_differentiable(pooled)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, pooled, *parameters)


def _differentiate(ctx: Any, grad: Tensor | None, _pooled_grad: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    needs = list(ctx.needs_input_grad[:5])
    values = _gradient.operator(grad, *ctx.saved_tensors, ctx.activation, ctx.gate, needs)
    return (*_library.only_needed(values, needs), None, None)


_library.register_autograd(_operator, _setup_context, _differentiate, _gradient)
_library.register_autocast(_operator, (0,))


@register_flop_formula(torch.ops.effnet_ops.squeeze_excite)
def _flops(
    x: Sequence[int],
    reduce_weight: Sequence[int],
    reduce_bias: Any,
    expand_weight: Sequence[int],
    *args: Any,
    **kwargs: Any,
) -> int:
    vector = (x[0], x[1])
    return _library.convolution_flops(vector, reduce_weight) + _library.convolution_flops(vector, expand_weight)


def gradient_flops(batch: int, reduce: Sequence[int], expand: Sequence[int], needs: Sequence[bool]) -> int:
    """FLOPs of the two products' gradients; ``needs`` in the order input, reduce w and b, expand w and b."""
    products = needs[0] + needs[1]
    flops = products * _library.convolution_flops((batch, 0), reduce)
    products = any(needs[:3]) + needs[3]
    return flops + products * _library.convolution_flops((batch, 0), expand)


@register_flop_formula(torch.ops.effnet_ops.squeeze_excite_backward)
def _backward_flops(
    grad: Sequence[int],
    x: Sequence[int],
    pooled: Any,
    reduce_weight: Any,
    reduce_bias: Any,
    expand_weight: Any,
    *args: Any,
    **kwargs: Any,
) -> int:
    return gradient_flops(x[0], reduce_weight, expand_weight, args[-1])


def squeeze_excite(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    activation: str,
    gate: str,
) -> Tensor:
    """`effnet_ops.squeeze_excite` without checks."""
    return _library.call(_operator, x, reduce_weight, reduce_bias, expand_weight, expand_bias, activation, gate)[0]
