"""What all operators share: definition, output layout, autocast, gradients of a reference, and FLOP counts.

A kernel registered for a device (for CPU by the compiled library) takes precedence over the fallback of `define`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad

from effnet_ops import _native, backends, context
from effnet_ops.checks import output_size, resolve_padding

NAMESPACE = "effnet_ops"
library = torch.library.Library(NAMESPACE, "DEF")

# The layout of an output follows the strides of x, so Inductor must not hand over other strides than it traced.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

_AUTOCAST_KEYS = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}
_AUTOCAST = torch._C.DispatchKeySet(_AUTOCAST_KEYS["cpu"]) | torch._C.DispatchKeySet(_AUTOCAST_KEYS["cuda"])
_AUTOGRAD = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)

# In the order of the enumerations in csrc/cpu/kernels.h.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ACTIVATIONS = ("none", "relu", "relu6", "silu", "hardswish")
GATES = ("sigmoid", "hard_sigmoid")

fallbacks: dict[str, Callable[..., Any]] = {}
"""The kernel in plain PyTorch of every operator, by its name."""


def define(schema: str, fallback: Callable[..., Any], fake: Callable[..., Any]) -> OpOverload:
    """Define an operator, with a fallback in plain PyTorch for any device and a fake kernel for tracing."""
    name = schema.partition("(")[0]
    library.define(schema, tags=_TAGS)

    def kernel(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return fallback(*args)

    fallbacks[name] = kernel
    library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def define_inference(schema: str, fallback: Callable[..., Any], fake: Callable[..., Any]) -> OpOverload:
    """An operator whose gradient is the fallback's, by PyTorch's autograd: these are rare, and have no kernel."""
    operator = define(schema, fallback, fake)
    differentiable = fallbacks[operator._schema.name.partition("::")[2]]

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if forward_ad._current_level >= 0 or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return differentiable(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    library.impl(operator._schema.name, kernel, "Autograd", with_keyset=True)
    return operator


def call(operator: OpOverload, *args: Any) -> Any:
    """Call the operator, past its autograd kernel where gradients are off: that is Python, and half of the overhead."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return operator(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def unobserved(x: Tensor) -> bool:
    """Whether no mode, transform, profiler or gradient would see an operator on x, but its kernel alone."""
    return (
        type(x) is Tensor
        and not torch.is_grad_enabled()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._is_torch_function_mode_enabled()
        and not torch._C._autograd._profiler_enabled()
        and not torch._C._is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and not context.in_transform()
        and not x.is_neg()
    )


def is_nhwc(x: Tensor) -> bool:
    """Whether memory has the channels innermost and the result's would have: a contiguous x has a contiguous one."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


class Prepared:
    """A CPU kernel for one shape, layout and dtype of x and the tensors that its operator has accepted with it.

    ``kernel.run(x, y)`` has the addresses of the tensors, which are contiguous, so that a call does not unpack them;
    ``holds`` must be asked before each ``run``. ``shape`` and ``layout`` are the output's.
    """

    __slots__ = ("_addresses", "_kernel", "_layout", "_shape", "_sizes", "tensors")

    def __init__(
        self,
        kernel: Any,
        shape: Sequence[int],
        tensors: Sequence[Tensor],
        layout: torch.memory_format = torch.channels_last,
    ) -> None:
        self._kernel, self._shape, self._layout, self.tensors = kernel, tuple(shape), layout, list(tensors)
        self._addresses, self._sizes = list(map(Tensor.data_ptr, tensors)), list(map(Tensor.numel, tensors))

    @staticmethod
    def fits(x: Tensor) -> bool:
        """Whether a kernel can run on x, and nobody else has to see the call."""
        runs_here = _native.module is not None and x.is_cpu and backends.requested() in (None, "cpu")
        return runs_here and 0 < x.numel() <= PreparedCalls.largest and unobserved(x)

    @property
    def elements(self) -> int:
        return prod(self._shape)

    def holds(self, x: Tensor) -> bool:
        """Whether x fits, and the tensors' memory is as it was: it moves when it is sent to another process."""
        return (
            Prepared.fits(x)
            and list(map(Tensor.data_ptr, self.tensors)) == self._addresses
            and list(map(Tensor.numel, self.tensors)) == self._sizes
            and all(map(Tensor.is_contiguous, self.tensors))
        )

    def run(self, x: Tensor) -> Tensor:
        y = torch.empty(self._shape, dtype=x.dtype, memory_format=self._layout)
        self._kernel.run(x.data_ptr(), y.data_ptr())
        return y


class PreparedCalls:
    """What is prepared for the inputs that one layer has seen lately.

    Not for large tensors: their time is in the kernels, and the operators have an eye on how their memory is mapped.
    """

    __slots__ = ("_calls",)
    most, largest = 8, 1 << 22

    def __init__(self) -> None:
        self._calls: dict[Any, Prepared] = {}

    def get(self, key: Any, x: Tensor) -> Prepared | None:
        prepared = self._calls.get(key)
        return prepared if prepared is not None and prepared.holds(x) else None

    def keep(self, key: Any, prepared: Prepared | None) -> None:
        if prepared is not None and prepared.elements <= self.largest:
            if len(self._calls) >= self.most:
                self._calls.clear()
            self._calls[key] = prepared


def register_autocast(operator: OpOverload, activations: Sequence[int]) -> None:
    """Under autocast, cast the fp32 arguments at the positions ``activations``; parameters keep their precision."""

    def register(device: str, key: str) -> None:
        def kernel(*args: Any) -> Any:
            dtype = torch.get_autocast_dtype(device)
            cast = list(args)
            for i in activations:
                if cast[i] is not None and cast[i].dtype == torch.float32:
                    cast[i] = cast[i].to(dtype)
            with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
                return operator(*cast)

        library.impl(operator._schema.name, kernel, key)

    register("cpu", "AutocastCPU")
    register("cuda", "AutocastCUDA")


class Backward(NamedTuple):
    """The gradient of an operator, as an operator ``name(Tensor grad, ..., bool[] needs)``; made by `define_backward`.

    ``forward(args, *inputs)`` is the reference of what it differentiates, from its arguments behind ``grad`` and the
    tensors at ``positions`` of them, the first of which is x.
    """

    operator: OpOverload
    forward: Callable[..., Tensor]
    positions: Sequence[int]


def define_backward(
    schema: str, forward: Callable[..., Tensor], positions: Sequence[int], fake: Callable[..., Any]
) -> Backward:
    """Define the operator of a gradient, whose fallback differentiates ``forward`` by PyTorch's autograd."""

    def fallback(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
        inputs = [args[i] for i in positions]
        return gradients(partial(forward, args), inputs[0], inputs, args[-1], grad)

    return Backward(define(schema, fallback, fake), forward, positions)


def register_autograd(
    operator: OpOverload, setup_context: Callable[..., None], backward: Callable[..., Any], gradient: Backward
) -> None:
    """Give the operator its gradient, and the gradient its own, by the reference.

    ``setup_context(ctx, inputs, output)`` and ``backward(ctx, *grads)`` are those of `torch.library.register_autograd`,
    which takes 0.1 ms for the 29 arguments of a block to look for default values among them.
    """
    name = operator._schema.name.partition("::")[2]

    def setup_again(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in inputs))
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]

    def differentiate_again(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        args = [other if saved is None else saved for saved, other in zip(ctx.saved_tensors, ctx.others, strict=True)]
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return _second_gradients(gradient, args, ctx.needs_input_grad, grads)

    def refuse_forward_mode(*args: Any) -> Any:
        raise RuntimeError(
            f"effnet_ops: forward-mode differentiation of the gradient of {name} is not supported; use the reference "
            "backend"
        )

    kernel = _autograd_kernel(operator, setup_context, backward, fallbacks[name])
    library.impl(name, kernel, "Autograd", with_keyset=True)
    kernel = _autograd_kernel(gradient.operator, setup_again, differentiate_again, refuse_forward_mode)
    library.impl(gradient.operator._schema.name, kernel, "Autograd", with_keyset=True)


def _second_gradients(
    gradient: Backward, args: Sequence[Any], wanted: Sequence[bool], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Gradients of the arguments of a gradient's operator for ``grads`` of its results; these can be differentiated."""
    again, results = torch.is_grad_enabled(), [None] * len(args)
    with torch.enable_grad():
        # Views: differentiation stops at each of them, and a third one goes on from there.
        args = [value.view_as(value) if isinstance(value, Tensor) else value for value in args]
        grad, *rest, needs = args
        inputs = [rest[i] for i in gradient.positions]
        used = [i for i, need in enumerate(needs) if need and inputs[i] is not None and grads[i] is not None]
        if not used or inputs[0].shape[0] == 0:
            return tuple(results)
        leaves = [inputs[i].requires_grad_() for i in used]
        first = torch.autograd.grad(gradient.forward(rest, *inputs), leaves, grad, create_graph=True)
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
    operator: OpOverload, setup_context: Callable[..., None], backward: Callable[..., Any], other: Callable[..., Any]
) -> Callable[..., Any]:
    """``other`` runs in forward-mode differentiation and function transforms, into which PyTorch has to see."""

    def run(keyset: torch._C.DispatchKeySet, args: Sequence[Any]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)

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
    function = type(operator._schema.name.replace("::", "_"), (torch.autograd.Function,), methods)

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if context.in_transform():
            return other(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(*args, keyset)
        return run(keyset, args)

    return kernel


def window_numbers(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[int, ...]:
    """Those of a DepthwiseShape (csrc/cpu/kernels.h) from the height on."""
    sides = resolve_padding(padding, size, kernel, stride, (1, 1))
    return (*size, *output_size(size, kernel, stride, sides, (1, 1)), *kernel, *stride, 1, 1, sides[0], sides[2])


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


def empty_gradients(x: Tensor, inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Uninitialised gradients of ``inputs``, the first of which is x; (0,) where one is not needed."""
    gradients = []
    for p, need in zip(inputs, needs, strict=True):
        if not need or p is None:
            gradients.append(x.new_empty(0))
        else:
            gradients.append(
                empty_result(x, x.shape) if p is x else torch.empty(p.shape, dtype=p.dtype, device=p.device)
            )
    return tuple(gradients)


def gradients(
    function: Callable[..., Tensor], x: Tensor, inputs: Sequence[Tensor | None], needs: Sequence[bool], grad: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of ``function(*inputs)``, taken by PyTorch's autograd, from inside a kernel that runs below it."""
    results = empty_gradients(x, inputs, needs)
    wanted = [i for i, (p, need) in enumerate(zip(inputs, needs, strict=True)) if need and p is not None]
    if x.shape[0] == 0 or not wanted:
        return tuple(result.zero_() for result in results)
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(include, exclude - _AUTOGRAD), torch.enable_grad():
        leaves = [None if p is None else p.detach() for p in inputs]
        for i in wanted:
            leaves[i].requires_grad_()
        found = torch.autograd.grad(function(*leaves), [leaves[i] for i in wanted], grad.detach())
    for i, value in zip(wanted, found, strict=True):
        results[i].copy_(value)
    return results


def only_needed(values: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Autograd's form of gradients: None where one is not needed."""
    return tuple(value if need else None for value, need in zip(values, needs, strict=True))


def convolution_flops(out_shape: Sequence[int], weight_shape: Sequence[int]) -> int:
    """Two floating-point operations for each multiply-add of a convolution, and so for each of its gradients."""
    batch, _, *size = out_shape
    return 2 * batch * prod(size) * prod(weight_shape)
