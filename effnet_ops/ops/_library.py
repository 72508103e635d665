"""What PyTorch is told of an operator, derived from its call: schema, fake kernel, autocast, gradients, FLOPs.

A kernel registered for a device (for CPU by the compiled library) takes precedence over the reference of the call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils.flop_counter import register_flop_formula

from effnet_ops import backends, context, distributed, internals
from effnet_ops.ops.calls import Flags, Signature

NAMESPACE = "effnet_ops"
library = torch.library.Library(NAMESPACE, "DEF")

# The layout of an output follows the strides of x, so Inductor must not hand over other strides than it traced.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

Results = Tensor | tuple[Tensor, ...]


class Call(Protocol):
    """What a call's class has beside its fields (see `effnet_ops.ops.calls`)."""

    def reference(self) -> Results:
        """The operator in plain PyTorch, on any device."""

    def output(self) -> Results:
        """Uninitialised results: the fake kernel."""

    def flops(self, out: Any) -> int:
        """Floating-point operations, where tensors are shapes; ``out`` is the shape of the result, or all of them."""

    # Some have `standard`, too: the operator in as few of PyTorch's own operators as there can be (`ops.standard`).


C = TypeVar("C", bound=Call)


class Operator(Generic[C]):
    """``torch.ops.effnet_ops.NAME``, defined by the class of its calls."""

    def __init__(self, name: str, call: type[C], results: int = 1, autocast: bool = False) -> None:
        self.name, self.signature = name, Signature(call)
        returned = "Tensor" if results == 1 else f"({', '.join(['Tensor'] * results)})"
        library.define(f"{name}({self.signature.schema}) -> {returned}", tags=_TAGS)
        library.impl(name, self.fallback, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", self._fake, lib=library)
        packet = getattr(getattr(torch.ops, NAMESPACE), name)
        self.overload: OpOverload = packet.default
        register_flop_formula(packet)(self._flops)
        if autocast:
            for device, key in internals.AUTOCAST_KEYS.items():
                library.impl(name, _autocast_kernel(self, device), key.name)
        OPERATORS[name] = self

    def fallback(self, *args: Any) -> Results:
        """The reference on the operator's arguments."""
        with internals.without(internals.AUTOCAST):
            return self.signature.parse(args).reference()

    def decompose(self, *args: Any) -> Results:
        """The operator as exporters want it, on its arguments, where its call has that."""
        return self.signature.parse(args).standard()

    def _fake(self, *args: Any) -> Results:
        return self.signature.parse(args).output()

    def _flops(self, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return self.signature.parse(args).flops(out_shape)

    def unpacking(self, function: Callable[[C], Results]) -> Callable[..., Results]:
        """A function of calls as one of the operator's arguments."""
        return lambda *args: function(self.signature.parse(args))

    def __call__(self, call: C) -> Any:
        return self.run(*self.signature.flatten(call))

    def run(self, *args: Any) -> Any:
        """The operator, past its autograd kernel where gradients are off: that is Python, and half of the overhead."""
        try:
            if torch.is_grad_enabled() or torch.compiler.is_compiling() or internals.forward_level() >= 0:
                return self.overload(*args)
            with internals.below_autograd():
                return self.overload(*args)
        except NotImplementedError:
            # Rules for sharding are keyed by shapes, without an operator's settings: DTensors are gathered here.
            gathered = distributed.gather(args)
            if gathered is None:
                raise
        whole, distribute = gathered
        results = self.run(*whole)
        return distribute(results) if isinstance(results, Tensor) else tuple(map(distribute, results))


OPERATORS: dict[str, Operator[Any]] = {}
"""All operators by name."""


def _autocast_kernel(operator: Operator[Any], device: str) -> Callable[..., Any]:
    """Cast activations in fp32; parameters keep their precision."""

    def kernel(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        cast = list(args)
        for i in operator.signature.cast:
            if cast[i] is not None and cast[i].dtype == torch.float32:
                cast[i] = cast[i].to(dtype)
        with internals.without(internals.AUTOCAST):
            return operator.overload(*cast)

    return kernel


def define_inference(name: str, call: type[C], autocast: bool = False) -> Operator[C]:
    """An operator whose gradient is the reference's, by PyTorch's autograd: these are rare, and have no kernel."""
    operator = Operator(name, call, autocast=autocast)

    def kernel(keyset: internals.Keys, *args: Any) -> Any:
        if internals.forward_level() >= 0 or (torch.is_grad_enabled() and internals.any_requires_grad(*args)):
            return operator.fallback(*args)
        with internals.below_autograd():
            return operator.overload.redispatch(keyset & internals.AFTER_AUTOGRAD, *args)

    library.impl(name, kernel, "Autograd", with_keyset=True)
    return operator


class Gradient(NamedTuple):
    """What the reference of a gradient's call needs to know of the call that it is the gradient of."""

    signature: Signature

    @classmethod
    def of(cls, call: type) -> Gradient:
        return cls(Signature(call))

    def inputs(self, call: Any) -> list[Any]:
        """What has a gradient, x first."""
        flat = self.signature.flatten(call)
        return [flat[i] for i in self.signature.differentiable]

    def forward(self, call: Any, *inputs: Tensor | None) -> Tensor:
        """The result of the call with other inputs, by its reference."""
        result = self.signature.replace(call, self.signature.differentiable, inputs).reference()
        return result if isinstance(result, Tensor) else result[0]

    def output(self, call: Any, needs: Flags) -> tuple[Tensor, ...]:
        """Uninitialised gradients; (0,) where one is not needed."""
        return empty_gradients(call.x, self.inputs(call), needs)

    def reference(self, grad: Tensor, call: Any, needs: Flags) -> tuple[Tensor, ...]:
        """The gradients, taken by PyTorch's autograd, from inside a kernel that runs below it."""
        inputs, results = self.inputs(call), self.output(call, needs)
        wanted = [i for i, (p, need) in enumerate(zip(inputs, needs, strict=True)) if need and p is not None]
        if call.x.shape[0] == 0 or not wanted:
            return tuple(result.zero_() for result in results)
        with internals.above_autograd(), torch.enable_grad():
            leaves = [None if p is None else p.detach() for p in inputs]
            for i in wanted:
                leaves[i].requires_grad_()
            found = torch.autograd.grad(self.forward(call, *leaves), [leaves[i] for i in wanted], grad.detach())
        for i, value in zip(wanted, found, strict=True):
            results[i].copy_(value)
        return results


def reference_of_gradient(gradient: Any) -> tuple[Tensor, ...]:
    """The `Call.reference` of every gradient's call."""
    return gradient.of.reference(gradient.grad, gradient.call, gradient.needs)


def output_of_gradient(gradient: Any) -> tuple[Tensor, ...]:
    """The `Call.output` of every gradient's call."""
    return gradient.of.output(gradient.call, gradient.needs)


def empty_gradients(x: Tensor, inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Uninitialised gradients of ``inputs``, the first of which is x; (0,) where one is not needed."""
    return tuple(
        x.new_empty(0)
        if not need or p is None
        else empty_result(x, x.shape)
        if p is x
        else torch.empty(p.shape, dtype=p.dtype, device=p.device)
        for p, need in zip(inputs, needs, strict=True)
    )


def no_gradients(x: Tensor, inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Gradients where there are no images, or nothing is needed."""
    return tuple(result.zero_() for result in empty_gradients(x, inputs, needs))


def register_autograd(
    operator: Operator[Any],
    setup_context: Callable[[Any, Any, Any], None],
    backward: Callable[..., Sequence[Tensor | None]],
    gradient: Operator[Any],
) -> None:
    """Give the operator its gradient, and the gradient its own, by the reference.

    ``setup_context(ctx, call, output)`` saves for ``backward(ctx, *grads)``, which gives the gradients of what has one.
    This is `torch.library.register_autograd` without its search for default values, which takes 0.1 ms for a block.
    """
    positions, size = operator.signature.tracked, len(operator.signature.arguments)

    def setup(ctx: Any, args: Sequence[Any], output: Any) -> None:
        ctx.needs = tuple(ctx.needs_input_grad[i] for i in positions)
        setup_context(ctx, operator.signature.parse(args), output)

    def differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        results: list[Tensor | None] = [None] * size
        for i, need, value in zip(positions, ctx.needs, backward(ctx, *grads), strict=True):
            results[i] = value if need else None
        return tuple(results)

    def setup_again(ctx: Any, args: Sequence[Any], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in args))
        ctx.others = [None if isinstance(value, Tensor) else value for value in args]

    def differentiate_again(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        args = [other if saved is None else saved for saved, other in zip(ctx.saved_tensors, ctx.others, strict=True)]
        with internals.without(internals.AUTOCAST):
            return _second_gradients(gradient.signature, args, ctx.needs_input_grad, grads)

    def refuse_forward_mode(*args: Any) -> Any:
        raise RuntimeError(
            f"effnet_ops: forward-mode differentiation of the gradient of {operator.name} is not supported; use the "
            "reference backend"
        )

    kernel = _autograd_kernel(operator, setup, differentiate, operator.fallback)
    library.impl(operator.name, kernel, "Autograd", with_keyset=True)
    kernel = _autograd_kernel(gradient, setup_again, differentiate_again, refuse_forward_mode)
    library.impl(gradient.name, kernel, "Autograd", with_keyset=True)


def _second_gradients(
    signature: Signature, args: Sequence[Any], wanted: Sequence[bool], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Gradients of the arguments of a gradient's operator for ``grads`` of its results; these can be differentiated."""
    again, results = torch.is_grad_enabled(), [None] * len(args)
    with torch.enable_grad():
        # Views: differentiation stops at each of them, and a third one goes on from there.
        args = [value.view_as(value) if isinstance(value, Tensor) else value for value in args]
        gradient = signature.parse(args)
        inputs = gradient.of.inputs(gradient.call)
        used = [i for i, need in enumerate(gradient.needs) if need and inputs[i] is not None and grads[i] is not None]
        if not used or inputs[0].shape[0] == 0:
            return tuple(results)
        leaves = [inputs[i].requires_grad_() for i in used]
        y = gradient.of.forward(gradient.call, *inputs)
        first = torch.autograd.grad(y, leaves, gradient.grad, create_graph=True)
        pairs = [(value, grads[i]) for value, i in zip(first, used, strict=True) if value.requires_grad]
        positions = [i for i, want in enumerate(wanted[: len(args)]) if want]
        if pairs and positions:
            values, given = zip(*pairs, strict=True)
            sources = [args[i] for i in positions]
            found = torch.autograd.grad(values, sources, given, create_graph=again, allow_unused=True)
            for i, value in zip(positions, found, strict=True):
                results[i] = value
    return tuple(results)


def _autograd_kernel(
    operator: Operator[Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    other: Callable[..., Any],
) -> Callable[..., Any]:
    """``other`` runs in forward-mode differentiation and function transforms, into which PyTorch has to see."""

    def run(keyset: internals.Keys, args: Sequence[Any]) -> Any:
        with internals.below_autograd():
            return operator.overload.redispatch(keyset & internals.AFTER_AUTOGRAD, *args)

    def forward(ctx: Any, *args: Any) -> Any:
        *inputs, keyset = args
        ctx.backend = backends.requested()
        output = run(keyset, inputs)
        setup_context(ctx, inputs, output)
        return output

    def differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # Gradients on a GPU are computed in a thread of their own, which asks for no backend.
        with backends.resume(ctx.backend):
            return (*backward(ctx, *grads), None)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
    function = type(f"{NAMESPACE}_{operator.name}", (torch.autograd.Function,), methods)

    def kernel(keyset: internals.Keys, *args: Any) -> Any:
        if context.in_transform():
            return other(*args)
        if torch.is_grad_enabled() and internals.any_requires_grad(*args):
            return function.apply(*args, keyset)
        return run(keyset, args)

    return kernel


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout of a result that belongs to x: channels_last where only the channels of x are innermost."""
    channels_last = x.stride(1) == 1 and x.shape[1] > 1 and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def empty_result(x: Tensor, size: Sequence[int]) -> Tensor:
    """An uninitialised activation in the dtype and layout of x."""
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def as_result(x: Tensor, y: Tensor) -> Tensor:
    """y, the result of plain PyTorch, in the layout and dtype of x; a transform sees y itself, whatever its layout."""
    return y.to(x.dtype) if context.in_transform() else empty_result(x, y.shape).copy_(y)


def convolution_flops(out_shape: Sequence[int], weight_shape: Sequence[int]) -> int:
    """Two floating-point operations for each multiply-add of a convolution, and so for each of its gradients."""
    batch, _, *size = out_shape
    return 2 * batch * prod(size) * prod(weight_shape)
