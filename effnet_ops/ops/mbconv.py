"""The operators of a whole MBConv block: inference, training and its gradient; and what training keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effnet_ops import backends, context, reference
from effnet_ops.checks import output_size, resolve_padding, unknown_name
from effnet_ops.ops import _library, standard
from effnet_ops.ops.calls import Activation, Constant, ConvNorm, Flags, Pair, Sides, Signature, SqueezeExcite
from effnet_ops.ops.squeeze_excite import gradient_flops
from effnet_ops.params import BatchNormParams, ConvNormParams, SqueezeExciteParams
from effnet_ops.reference.batch_norm import Statistics


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
    dilation: Pair
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
        dilation: Sequence[int] = (1, 1),
        drop_path: Tensor | None = None,
        training: bool = False,
    ) -> MBConvCall:
        """The call of `effnet_ops.mbconv` with these arguments."""
        if drop_path is not None:
            drop_path = drop_path.to(reference.compute_dtype(x.dtype))
        groups = [None if conv is None else conv_norm(conv, training) for conv in (expand, depthwise, project)]
        layer = squeeze_excite_layer(squeeze_excite, activation, gate)
        return cls(x, *groups[:2], layer, groups[2], drop_path, stride, padding, dilation, residual, activation)

    def convs(self) -> tuple[ConvNorm | None, ConvNorm, ConvNorm]:
        return self.expand, self.depthwise, self.project

    def uses_batch(self) -> bool:
        """Whether a normalisation takes the statistics of this batch."""
        return any(conv is not None and conv.uses_batch() for conv in self.convs())

    def saves_expanded(self) -> bool:
        """Whether training keeps the result of the expansion, where nobody says so (`set_recompute`)."""
        return self.x.shape[1] > RECOMPUTED_CHANNELS

    def window(self) -> backends.Window:
        return backends.Window(self.depthwise.weight.shape[2:], self.stride, self.dilation)

    def sides(self) -> tuple[int, int, int, int]:
        return resolve_padding(self.padding, self.x.shape[2:], *self.window())

    def output_shape(self) -> tuple[int, int, int, int]:
        kernel = self.depthwise.weight.shape[2:]
        size = output_size(self.x.shape[2:], kernel, self.stride, self.sides(), self.dilation)
        return (self.x.shape[0], self.project.weight.shape[0], *size)

    def stages(self) -> reference.Stages:
        layer = self.squeeze_excite
        return reference.mbconv(
            self.x,
            conv_norm_params(self.expand),
            conv_norm_params(self.depthwise),
            None if layer is None else SqueezeExciteParams(*layer[:5]),
            conv_norm_params(self.project),
            stride=self.stride,
            padding=self.sides(),
            dilation=self.dilation,
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
        settings = (self.stride, self.sides(), self.dilation, self.activation, self.residual, self.drop_path)
        return standard.mbconv(self.x, *block, *settings)

    def output(self) -> Tensor:
        return _library.empty_result(self.x, self.output_shape())

    def flops(self, out: Sequence[int]) -> int:
        batch, _, height, width = self.x
        flops = _library.convolution_flops(out, self.depthwise.weight)
        flops += _library.convolution_flops(out, self.project.weight)
        if self.expand is not None:
            flops += _library.convolution_flops((batch, 0, height, width), self.expand.weight)
        return flops + squeeze_excite_flops(batch, self.squeeze_excite)


def squeeze_excite_flops(batch: int, layer: SqueezeExcite | None) -> int:
    if layer is None:
        return 0
    return sum(_library.convolution_flops((batch, 0), weight) for weight in (layer.reduce_weight, layer.expand_weight))


def squeeze_excite_layer(params: SqueezeExciteParams | None, activation: str, gate: str) -> SqueezeExcite | None:
    """The layer of a block with this activation."""
    return None if params is None else SqueezeExcite(*params[:4], params.activation or activation, gate)


def conv_norm(conv: ConvNormParams, training: bool) -> ConvNorm:
    """As an operator takes it: without gamma and beta they are ones and zeros, in training there are no statistics."""
    weight, norm = conv.weight, conv.norm
    if norm is None:
        return ConvNorm(weight, None, conv.bias, None, None)
    gamma = weight.new_ones(weight.shape[0]) if norm.weight is None else norm.weight
    beta = weight.new_zeros(weight.shape[0]) if norm.bias is None else norm.bias
    statistics = (None, None) if training else (norm.running_mean, norm.running_var)
    return ConvNorm(weight, gamma, beta, *statistics, norm.eps)


def conv_norm_params(conv: ConvNorm | None) -> ConvNormParams | None:
    """As the reference takes it."""
    if conv is None:
        return None
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

    def statistics(self) -> list[Statistics | None]:
        """Of expand, depthwise and project."""
        return used_statistics(self)


def used_statistics(saved: Any, counts: Tensor | None = None) -> list[Statistics | None]:
    """(mean, biased variance) of each normalisation, where those of the batch were used.

    With ``counts``, one for each normalisation, the number of values behind them, too.
    """
    first = saved._fields.index("expand_mean_used")
    pairs = list(zip(saved[first:-1:2], saved[first + 1 :: 2], strict=True))
    behind = [()] * len(pairs) if counts is None else [(count,) for count in counts]
    return [(mean, var, *more) if mean.numel() else None for (mean, var), more in zip(pairs, behind, strict=True)]


class MBConvTrainingCall(NamedTuple):
    """The block where a gradient may come; the results are y and those of `Saved`."""

    call: MBConvCall
    save_expanded: bool

    def reference(self) -> tuple[Tensor, ...]:
        stages = self.call.stages()
        return training_results(self.output(), (stages.expanded, stages.convolved, stages.projected), stages)

    def output(self) -> tuple[Tensor, ...]:
        call = self.call
        x, size, channels = call.x, call.output_shape(), call.depthwise.weight.shape[0]
        saves = self.save_expanded and call.expand is not None
        return (
            _library.empty_result(x, size),
            empty_stage(x, (x.shape[0], channels, *x.shape[2:]) if saves else None),
            empty_stage(x, (size[0], channels, *size[2:])),
            empty_stage(x, size),
            *empty_statistics(x, call.convs()),
            empty_pooled(x, channels, call.squeeze_excite),
        )

    def flops(self, out: Sequence[Sequence[int]]) -> int:
        return self.call.flops(out[0])


def empty_stage(x: Tensor, size: Sequence[int] | None) -> Tensor:
    """What training keeps of a convolution's result."""
    if size is None:
        return x.new_empty(0)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def empty_statistics(x: Tensor, convs: Sequence[ConvNorm | None]) -> list[Tensor]:
    sizes = (conv.gamma.shape if conv is not None and conv.uses_batch() else 0 for conv in convs)
    dtype = reference.compute_dtype(x.dtype)
    return [x.new_empty(size, dtype=dtype) for size in sizes for _ in range(2)]


def empty_pooled(x: Tensor, channels: int, layer: SqueezeExcite | None) -> Tensor:
    size = 0 if layer is None else (x.shape[0], channels)
    return x.new_empty(size, dtype=reference.compute_dtype(x.dtype))


def training_results(
    results: tuple[Tensor, ...], convolved: Sequence[Tensor | None], stages: Any
) -> tuple[Tensor, ...]:
    """``results``, those of a training operator, with the values of the reference's stages; what is empty stays so."""
    statistics = [value for used in stages.statistics for value in (used or (None, None))]
    pairs = list(zip(results, (stages.y, *convolved, *statistics, stages.pooled), strict=True))
    if context.in_transform():
        return tuple(value if _is_made(result, value) else result for result, value in pairs)
    for result, value in pairs:
        if _is_made(result, value):
            result.copy_(value)
    return results


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
        call, output = self.call, (self.grad[0], 0, *self.grad[2:])
        convs = {"project": (call.project, output), "depthwise": (call.depthwise, output)}
        return block_gradient_flops(mbconv.signature, self, {**convs, "expand": (call.expand, call.x)})


def block_gradient_flops(signature: Signature, gradient: Any, convs: dict[str, tuple[ConvNorm | None, Any]]) -> int:
    """Of a block's gradient, in which tensors are shapes; ``convs`` are its convolutions and their output's size."""
    names = (signature.arguments[i].name for i in signature.differentiable)
    needs = dict(zip(names, gradient.needs, strict=True))

    def before(name: str) -> bool:
        """Whether something in front of an argument needs a gradient, which then goes through its product."""
        return any(list(needs.values())[: list(needs).index(name)])

    flops = 0
    for name, (conv, size) in convs.items():
        if conv is not None:
            products = before(f"{name}_weight") + needs[f"{name}_weight"]
            flops += products * _library.convolution_flops(size, conv.weight)
    layer = gradient.call.squeeze_excite
    if layer is not None:
        inner = [need for name, need in needs.items() if name.startswith("squeeze_excite")]
        wanted = (before("squeeze_excite_reduce_weight"), *inner)
        flops += gradient_flops(gradient.call.x[0], layer.reduce_weight, layer.expand_weight, wanted)
    return flops


def sync_reference(call: Any) -> tuple[Tensor, ...]:
    """The `Call.reference` of what shares statistics with other processes."""
    raise RuntimeError(
        "effnet_ops: only the CPU's kernels share statistics with other processes; use effnet_ops.mbconv or "
        "effnet_ops.fused_mbconv, or the reference backend"
    )


def sync_output(sync: Any) -> tuple[Tensor, ...]:
    """The results of training, and how many values are behind the statistics of each convolution."""
    call = sync.training.call
    return (*sync.training.output(), call.x.new_empty(len(call.convs()), dtype=torch.float64))


def sync_flops(sync: Any, out: Sequence[Sequence[int]]) -> int:
    return sync.training.flops(out)


class MBConvSyncTrainingCall(NamedTuple):
    """Training where the processes of a group share the statistics; the results are the same, and counts (3,)."""

    training: MBConvTrainingCall
    process_group: str

    reference, output, flops = sync_reference, sync_output, sync_flops


class MBConvSyncGradientCall(NamedTuple):
    """The gradients of such a block."""

    grad: Activation
    call: MBConvCall
    saved: Saved
    counts: Constant
    process_group: str
    needs: Flags

    of = _library.Gradient.of(MBConvCall)
    reference, output = sync_reference, _library.output_of_gradient

    def flops(self, out: Any) -> int:
        return MBConvGradientCall(self.grad, self.call, self.saved, self.needs).flops()


class Block:
    """A block's operators, for inference, training and its gradient, from the classes of their calls and results.

    ``saved`` is what training hands to its gradient, whose `used_statistics` are those of the normalisations.
    """

    def __init__(self, name: str, call: type, training: type, gradient: type, saved: Any) -> None:
        self.name, self.saved, self._convs = name, saved, sum(field.endswith("_mean_used") for field in saved._fields)
        self.inference = _library.define_inference(f"{name}_inference", call, autocast=True)
        self.signature = signature = self.inference.signature
        self._training = _library.Operator(f"{name}_training", training, 1 + len(saved._fields), autocast=True)
        self._gradient = _library.Operator(f"{name}_backward", gradient, len(signature.differentiable))
        _library.register_autograd(self._training, self.setup_context, self._differentiate, self._gradient)

    def setup_context(self, ctx: Any, training: Any, output: tuple[Tensor, ...]) -> None:
        signature = self.signature
        args = signature.flatten(training.call)
        for i, (argument, value) in enumerate(zip(signature.arguments, args, strict=True)):
            constant = isinstance(value, Tensor) and i not in signature.differentiable
            if constant and ctx.needs_input_grad[i]:
                raise RuntimeError(
                    f"effnet_ops: {self.name} has no gradient for {argument.name}, which requires one; detach it"
                )
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.others = [None if isinstance(value, Tensor) else value for value in args]
        # A training step between an evaluation and its gradient changes the running statistics in place.
        tensors = (
            value if i in signature.differentiable else value.clone() if isinstance(value, Tensor) else None
            for i, value in enumerate(args)
        )
        ctx.save_for_backward(*tensors, *output[1:])

    def _differentiate(self, ctx: Any, grad: Tensor | None, *_: None) -> Sequence[Tensor | None]:
        if grad is None:
            return (None,) * len(ctx.needs)
        args, saved = saved_arguments(ctx)
        return self._gradient.run(grad, *args, *saved, ctx.needs)

    def arguments(self, call: Any) -> tuple[Sequence[Any], bool]:
        """The operator's arguments, and whether a gradient may come."""
        args = self.signature.flatten(call)
        return args, torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args)

    def __call__(self, call: Any) -> tuple[Tensor, list[Statistics | None]]:
        """The public function of the block without checks and without updating running statistics.

        Returns:
            y, and for each convolution the mean and biased variance (C,) of the batch where they were used.
        """
        args, differentiate = self.arguments(call)
        # The operator of inference has gradients, too, by the reference: torch.jit.trace records it for both uses.
        if not call.uses_batch() and (not differentiate or torch.jit.is_tracing()):
            return self.inference.run(*args), [None] * self._convs
        y, *saved = self._training.run(*args, differentiate and saves_expanded(call))
        return y, used_statistics(self.saved(*saved))


class SyncBlock:
    """A block in training where the processes of a group share the statistics of its normalisations."""

    def __init__(self, block: Block, training: type, gradient: type) -> None:
        self._block, name, signature = block, block.name, block.signature
        results = 2 + len(block.saved._fields)
        self._training = _library.Operator(f"{name}_sync_training", training, results, autocast=True)
        self._gradient = _library.Operator(f"{name}_sync_backward", gradient, len(signature.differentiable))
        _library.register_autograd(self._training, self._setup_context, self._differentiate, self._gradient)

    def _setup_context(self, ctx: Any, sync: Any, output: tuple[Tensor, ...]) -> None:
        self._block.setup_context(ctx, sync.training, output)
        ctx.process_group = sync.process_group

    def _differentiate(self, ctx: Any, grad: Tensor | None, *_: None) -> Sequence[Tensor | None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "effnet_ops: a block that shares its statistics with other processes has no second gradient"
            )
        args, saved = saved_arguments(ctx)
        if grad is None:
            # The other processes wait for this one also where nobody uses its result.
            grad = self._block.signature.parse(args).output().zero_()
        return self._gradient.run(grad, *args, *saved, ctx.process_group, ctx.needs)

    def __call__(self, call: Any, process_group: str) -> tuple[Tensor, list[Statistics | None]]:
        """The block in training; ``process_group`` is the name of the group.

        Returns:
            y, and where statistics of the batch were used their mean and biased variance (C,) and the number of values.
        """
        args, differentiate = self._block.arguments(call)
        y, *saved, counts = self._training.run(*args, differentiate and saves_expanded(call), process_group)
        return y, used_statistics(self._block.saved(*saved), counts)


def saved_arguments(ctx: Any) -> tuple[list[Any], Sequence[Tensor]]:
    """The arguments of the training operator, and what it kept behind them."""
    saved, count = ctx.saved_tensors, len(ctx.others)
    args = [other if tensor is None else tensor for tensor, other in zip(saved[:count], ctx.others, strict=True)]
    return args, saved[count:]


_POLICIES = ("auto", "always", "never")
RECOMPUTED_CHANNELS = 64
_policy = "auto"


def saves_expanded(call: Any) -> bool:
    """Whether the policy is that training keeps a block's expanded activation."""
    return _policy != "always" and (_policy == "never" or call.saves_expanded())


class set_recompute:
    """Set what training keeps of a block's expanded activation; as a context manager, only inside the ``with`` block.

    Args:
        policy: "always" recomputes it in the backward pass and never saves it, "never" saves it, and "auto" recomputes
            it where an MBConv block has at most 64 input channels. Recomputing saves (element size / input channels)
            bytes for each multiply-add that is done again, so the early blocks, which are large and narrow, gain most.
            A Fused-MBConv block, whose expansion is a 3x3 convolution, has nine times the multiply-adds: "auto" saves.

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


mbconv = Block("mbconv", MBConvCall, MBConvTrainingCall, MBConvGradientCall, Saved)
mbconv_inference = mbconv.inference
mbconv_sync = SyncBlock(mbconv, MBConvSyncTrainingCall, MBConvSyncGradientCall)
