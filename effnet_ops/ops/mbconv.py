"""The operators of a whole MBConv block: inference, training and its gradient; and what training keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effnet_ops import backends, context, reference
from effnet_ops.checks import output_size, resolve_padding, unknown_name
from effnet_ops.ops import _library, standard
from effnet_ops.ops.calls import Activation, Constant, ConvNorm, Flags, Pair, Sides, SqueezeExcite
from effnet_ops.ops.squeeze_excite import gradient_flops
from effnet_ops.params import BatchNormParams, ConvNormParams, SqueezeExciteParams


class MBConvCall(NamedTuple):
    """A block of x (N, Cin, H, W); ``drop_path`` (N,) multiplies each image's branch."""

    x: Activation
    expand: ConvNorm | None
    depthwise: ConvNorm
    squeeze_excite: SqueezeExcite | None
    project: ConvNorm
    drop_path: Constant | None
    stride: Pair
    padding: Sides
    residual: bool
    activation: str

    @classmethod
    def of(
        cls,
        x: Tensor,
        expand: ConvNormParams | None,
        depthwise: ConvNormParams,
        squeeze_excite: SqueezeExciteParams | None,
        project: ConvNormParams,
        *,
        stride: Sequence[int],
        padding: Sequence[int],
        activation: str,
        gate: str,
        residual: bool,
        drop_path: Tensor | None = None,
        training: bool = False,
    ) -> MBConvCall:
        """The call of `effnet_ops.mbconv` with these arguments."""
        if drop_path is not None:
            drop_path = drop_path.to(reference.compute_dtype(x.dtype))
        groups = [None if conv is None else _conv_norm(conv, training) for conv in (expand, depthwise, project)]
        layer = None
        if squeeze_excite is not None:
            layer = SqueezeExcite(*squeeze_excite[:4], squeeze_excite.activation or activation, gate)
        return cls(x, *groups[:2], layer, groups[2], drop_path, stride, padding, residual, activation)

    def convs(self) -> tuple[ConvNorm | None, ConvNorm, ConvNorm]:
        return self.expand, self.depthwise, self.project

    def uses_batch(self) -> bool:
        """Whether a normalisation takes the statistics of this batch."""
        return any(conv is not None and conv.uses_batch() for conv in self.convs())

    def window(self) -> backends.Window:
        return backends.Window(self.depthwise.weight.shape[2:], self.stride, (1, 1))

    def sides(self) -> tuple[int, int, int, int]:
        return resolve_padding(self.padding, self.x.shape[2:], self.depthwise.weight.shape[2:], self.stride, (1, 1))

    def output_shape(self) -> tuple[int, int, int, int]:
        kernel = self.depthwise.weight.shape[2:]
        size = output_size(self.x.shape[2:], kernel, self.stride, self.sides(), (1, 1))
        return (self.x.shape[0], self.project.weight.shape[0], *size)

    def stages(self) -> reference.Stages:
        layer = self.squeeze_excite
        return reference.mbconv(
            self.x,
            None if self.expand is None else _params(self.expand),
            _params(self.depthwise),
            None if layer is None else SqueezeExciteParams(*layer[:5]),
            _params(self.project),
            stride=self.stride,
            padding=self.sides(),
            activation=self.activation,
            gate="sigmoid" if layer is None else layer.gate,
            residual=self.residual,
            drop_path=self.drop_path,
            training=False,
        )

    def reference(self) -> Tensor:
        return _library.as_result(self.x, self.stages().y)

    def standard(self) -> Tensor:
        if self.uses_batch():
            return self.stages().y
        block = (self.expand, self.depthwise, self.squeeze_excite, self.project)
        settings = (self.stride, self.sides(), self.activation, self.residual, self.drop_path)
        return standard.mbconv(self.x, *block, *settings)

    def output(self) -> Tensor:
        return _library.empty_result(self.x, self.output_shape())

    def flops(self, out: Sequence[int]) -> int:
        batch, _, height, width = self.x
        flops = _library.convolution_flops(out, self.depthwise.weight)
        flops += _library.convolution_flops(out, self.project.weight)
        if self.expand is not None:
            flops += _library.convolution_flops((batch, 0, height, width), self.expand.weight)
        if self.squeeze_excite is not None:
            flops += _library.convolution_flops((batch, 0), self.squeeze_excite.reduce_weight)
            flops += _library.convolution_flops((batch, 0), self.squeeze_excite.expand_weight)
        return flops


def _conv_norm(conv: ConvNormParams, training: bool) -> ConvNorm:
    weight, norm = conv.weight, conv.norm
    if norm is None:
        return ConvNorm(weight, None, conv.bias, None, None)
    gamma = weight.new_ones(weight.shape[0]) if norm.weight is None else norm.weight
    beta = weight.new_zeros(weight.shape[0]) if norm.bias is None else norm.bias
    statistics = (None, None) if training else (norm.running_mean, norm.running_var)
    return ConvNorm(weight, gamma, beta, *statistics, norm.eps)


def _params(conv: ConvNorm) -> ConvNormParams:
    if conv.gamma is None:
        return ConvNormParams(conv.weight, conv.beta)
    return ConvNormParams(conv.weight, None, BatchNormParams(*conv[1:]))


class Saved(NamedTuple):
    """What training hands to its gradient: before each normalisation, the statistics of the batch, the pooled values.

    What there is none of is empty.
    """

    expanded: Constant
    convolved: Constant
    projected: Constant
    expand_mean_used: Constant
    expand_var_used: Constant
    depthwise_mean_used: Constant
    depthwise_var_used: Constant
    project_mean_used: Constant
    project_var_used: Constant
    pooled: Constant

    def statistics(self, counts: Tensor | None = None) -> list[reference.Statistics | None]:
        """(mean, biased variance) of expand, depthwise and project, where those of the batch were used.

        With ``counts`` (3,), the number of values behind them, too.
        """
        pairs = ((self[i], self[i + 1]) for i in range(self._fields.index("expand_mean_used"), len(self) - 1, 2))
        behind = [()] * 3 if counts is None else [(count,) for count in counts]
        return [(mean, var, *more) if mean.numel() else None for (mean, var), more in zip(pairs, behind, strict=True)]


class MBConvTrainingCall(NamedTuple):
    """The block where a gradient may come; the results are y and those of `Saved`."""

    call: MBConvCall
    save_expanded: bool

    def reference(self) -> tuple[Tensor, ...]:
        stages, results = self.call.stages(), self.output()
        statistics = [value for used in stages.statistics for value in (used or (None, None))]
        values = (stages.y, stages.expanded, stages.convolved, stages.projected, *statistics, stages.pooled)
        pairs = list(zip(results, values, strict=True))
        if context.in_transform():
            return tuple(value if _is_made(result, value) else result for result, value in pairs)
        for result, value in pairs:
            if _is_made(result, value):
                result.copy_(value)
        return results

    def output(self) -> tuple[Tensor, ...]:
        call = self.call
        x, dtype = call.x, reference.compute_dtype(call.x.dtype)
        batch, out_channels, height, width = call.output_shape()
        channels = call.depthwise.weight.shape[0]

        def channels_last(*size: int) -> Tensor:
            return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

        def statistics(conv: ConvNorm | None) -> list[Tensor]:
            size = conv.gamma.shape if conv is not None and conv.uses_batch() else 0
            return [x.new_empty(size, dtype=dtype) for _ in range(2)]

        saves = self.save_expanded and call.expand is not None
        return (
            _library.empty_result(x, (batch, out_channels, height, width)),
            channels_last(batch, channels, *x.shape[2:]) if saves else x.new_empty(0),
            channels_last(batch, channels, height, width),
            channels_last(batch, out_channels, height, width),
            *(value for conv in call.convs() for value in statistics(conv)),
            x.new_empty(0 if call.squeeze_excite is None else (batch, channels), dtype=dtype),
        )

    def flops(self, out: Sequence[Sequence[int]]) -> int:
        return self.call.flops(out[0])


def _is_made(result: Tensor, value: Tensor | None) -> bool:
    return value is not None and result.dim() == value.dim()


class MBConvGradientCall(NamedTuple):
    """The gradients of all that has one in the call, as far as ``needs`` asks for them."""

    grad: Activation
    call: MBConvCall
    saved: Saved
    needs: Flags

    of = _library.Gradient.of(MBConvCall)
    reference, output = _library.reference_of_gradient, _library.output_of_gradient

    def flops(self, out: Any = None) -> int:
        """The gradients of each product and convolution; what is computed a second time does not count."""
        names = (_MBCONV.arguments[i].name for i in _MBCONV.differentiable)
        needs = dict(zip(names, self.needs, strict=True))

        def before(name: str) -> bool:
            """Whether something in front of an argument needs a gradient, which then goes through its product."""
            return any(list(needs.values())[: list(needs).index(name)])

        call = self.call
        batch, _, height, width = call.x
        sizes = {"project_weight": (batch, 0, *self.grad[2:]), "depthwise_weight": (batch, 0, *self.grad[2:])}
        sizes["expand_weight"] = (batch, 0, height, width)
        flops = 0
        for (name, size), conv in zip(sizes.items(), (call.project, call.depthwise, call.expand), strict=True):
            if conv is not None:
                flops += (before(name) + needs[name]) * _library.convolution_flops(size, conv.weight)
        if call.squeeze_excite is not None:
            first = "squeeze_excite_reduce_weight"
            inner = [need for name, need in needs.items() if name.startswith("squeeze_excite")]
            weights = call.squeeze_excite.reduce_weight, call.squeeze_excite.expand_weight
            flops += gradient_flops(batch, *weights, (before(first), *inner))
        return flops


class MBConvSyncTrainingCall(NamedTuple):
    """The same where the processes of a group share the statistics; the results are those, and counts (3,).

    Counts are the numbers of values behind the statistics of expand, depthwise and project.
    """

    training: MBConvTrainingCall
    process_group: str

    def reference(self) -> tuple[Tensor, ...]:
        raise _only_cpu()

    def output(self) -> tuple[Tensor, ...]:
        return (*self.training.output(), self.training.call.x.new_empty(3, dtype=torch.float64))

    def flops(self, out: Sequence[Sequence[int]]) -> int:
        return self.training.flops(out)


class MBConvSyncGradientCall(NamedTuple):
    """The gradients of such a block."""

    grad: Activation
    call: MBConvCall
    saved: Saved
    counts: Constant
    process_group: str
    needs: Flags

    of = _library.Gradient.of(MBConvCall)
    output = _library.output_of_gradient

    def reference(self) -> tuple[Tensor, ...]:
        raise _only_cpu()

    def flops(self, out: Any) -> int:
        return MBConvGradientCall(self.grad, self.call, self.saved, self.needs).flops()


def _only_cpu() -> RuntimeError:
    return RuntimeError(
        "effnet_ops: only the CPU's kernels share statistics with other processes; use effnet_ops.mbconv, or the "
        "reference backend"
    )


mbconv_inference = _library.define_inference("mbconv_inference", MBConvCall, autocast=True)
_training = _library.Operator("mbconv_training", MBConvTrainingCall, results=1 + len(Saved._fields), autocast=True)
_MBCONV = mbconv_inference.signature
_gradient = _library.Operator("mbconv_backward", MBConvGradientCall, results=len(_MBCONV.differentiable))
_sync_training = _library.Operator(
    "mbconv_sync_training", MBConvSyncTrainingCall, results=2 + len(Saved._fields), autocast=True
)
_sync_gradient = _library.Operator("mbconv_sync_backward", MBConvSyncGradientCall, results=len(_MBCONV.differentiable))


def _setup_context(ctx: Any, training: MBConvTrainingCall, output: tuple[Tensor, ...]) -> None:
    args = _MBCONV.flatten(training.call)
    for i, (argument, value) in enumerate(zip(_MBCONV.arguments, args, strict=True)):
        constant = isinstance(value, Tensor) and i not in _MBCONV.differentiable
        if constant and ctx.needs_input_grad[i]:
            raise RuntimeError(f"effnet_ops: mbconv has no gradient for {argument.name}, which requires one; detach it")
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.others = [None if isinstance(value, Tensor) else value for value in args]
    # A training step between an evaluation and its gradient changes the running statistics in place.
    tensors = (
        value if i in _MBCONV.differentiable else value.clone() if isinstance(value, Tensor) else None
        for i, value in enumerate(args)
    )
    ctx.save_for_backward(*tensors, *output[1:])


def _differentiate(ctx: Any, grad: Tensor | None, *_: None) -> Sequence[Tensor | None]:
    if grad is None:
        return (None,) * len(ctx.needs)
    saved, count = ctx.saved_tensors, len(ctx.others)
    args = [other if tensor is None else tensor for tensor, other in zip(saved[:count], ctx.others, strict=True)]
    return _gradient.run(grad, *args, *saved[count:], ctx.needs)


def _setup_sync_context(ctx: Any, sync: MBConvSyncTrainingCall, output: tuple[Tensor, ...]) -> None:
    _setup_context(ctx, sync.training, output)
    ctx.process_group = sync.process_group


def _differentiate_sync(ctx: Any, grad: Tensor | None, *_: None) -> Sequence[Tensor | None]:
    if torch.is_grad_enabled():
        raise RuntimeError("effnet_ops: a block that shares its statistics with other processes has no second gradient")
    # The other processes wait for this one also where nobody uses its result.
    saved, count = ctx.saved_tensors, len(ctx.others)
    args = [other if tensor is None else tensor for tensor, other in zip(saved[:count], ctx.others, strict=True)]
    grad = torch.zeros_like(saved[count + 2]) if grad is None else grad
    return _sync_gradient.run(grad, *args, *saved[count:], ctx.process_group, ctx.needs)


_library.register_autograd(_training, _setup_context, _differentiate, _gradient)
_library.register_autograd(_sync_training, _setup_sync_context, _differentiate_sync, _sync_gradient)


_POLICIES = ("auto", "always", "never")
_AUTO_CHANNELS = 64
_policy = "auto"


class set_recompute:
    """Set what training keeps of MBConv's expanded activation; as a context manager, only inside the ``with`` block.

    Args:
        policy: "always" recomputes it in the backward pass and never saves it, "never" saves it, and "auto" recomputes
            it where the block has at most 64 input channels. Recomputing saves (element size / input channels) bytes
            for each multiply-add that is done again, so the early blocks, which are large and narrow, gain most.

    Raises:
        ValueError: the policy is not one of these.
    """

    def __init__(self, policy: str) -> None:
        global _policy
        if policy not in _POLICIES:
            raise unknown_name("recompute policy", policy, _POLICIES)
        self._previous = _policy
        _policy = policy

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        global _policy
        _policy = self._previous


def mbconv(call: MBConvCall) -> tuple[Tensor, list[reference.Statistics | None]]:
    """`effnet_ops.mbconv` without checks and without updating running statistics.

    Returns:
        y, and for expand, depthwise and project the mean and biased variance (C,) of the batch where they were used.
    """
    args, differentiate = _arguments(call)
    # The operator of inference has gradients, too, by the reference: torch.jit.trace records it for both uses.
    if not call.uses_batch() and (not differentiate or torch.jit.is_tracing()):
        return mbconv_inference.run(*args), [None, None, None]
    y, *saved = _training.run(*args, differentiate and _saves_expanded(call))
    return y, Saved(*saved).statistics()


def mbconv_sync(call: MBConvCall, process_group: str) -> tuple[Tensor, list[reference.Statistics | None]]:
    """`mbconv` in training, where the processes of a group, given by its name, share the statistics.

    Returns:
        y, and where statistics of the batch were used their mean and biased variance (C,) and the number of values.
    """
    args, differentiate = _arguments(call)
    y, *saved, counts = _sync_training.run(*args, differentiate and _saves_expanded(call), process_group)
    return y, Saved(*saved).statistics(counts)


def _arguments(call: MBConvCall) -> tuple[Sequence[Any], bool]:
    """The operator's arguments, and whether a gradient may come."""
    args = _MBCONV.flatten(call)
    return args, torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args)


def _saves_expanded(call: MBConvCall) -> bool:
    return _policy == "never" or (_policy == "auto" and call.x.shape[1] > _AUTO_CHANNELS)
