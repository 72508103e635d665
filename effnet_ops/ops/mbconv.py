"""The operators of a whole MBConv block: inference, training and its gradient; and what training keeps.

Each convolution has a weight and a norm (gamma, beta, mean, var). Without gamma there is no norm, and beta is the
convolution's bias; with gamma but without mean and var, batch statistics are used; with all, they are constants.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effnet_ops import _native, context, reference
from effnet_ops.checks import output_size, resolve_padding, unknown_name
from effnet_ops.ops import _library
from effnet_ops.ops.squeeze_excite import gradient_flops
from effnet_ops.params import ConvNormParams, SqueezeExciteParams

_BLOCK = (
    "Tensor x, "
    "Tensor? expand_weight, Tensor? expand_gamma, Tensor? expand_beta, Tensor? expand_mean, Tensor? expand_var, "
    "Tensor depthwise_weight, Tensor? depthwise_gamma, Tensor? depthwise_beta, Tensor? depthwise_mean, "
    "Tensor? depthwise_var, "
    "Tensor? se_reduce_weight, Tensor? se_reduce_bias, Tensor? se_expand_weight, Tensor? se_expand_bias, "
    "Tensor project_weight, Tensor? project_gamma, Tensor? project_beta, Tensor? project_mean, Tensor? project_var, "
    "Tensor? drop_path"
)
_CONFIG = "float[] eps, int[] stride, int[] padding, bool residual, str activation, str se_activation, str gate"
_STAGES = (
    "Tensor expanded, Tensor convolved, Tensor projected, Tensor expand_mean, Tensor expand_var, "
    "Tensor depthwise_mean, Tensor depthwise_var, Tensor project_mean, Tensor project_var, Tensor pooled"
)


def _names(arguments: str) -> list[str]:
    return [argument.split()[1] for argument in arguments.split(", ")]


Block = namedtuple("Block", _names(_BLOCK))
Config = namedtuple("Config", _names(_CONFIG))
_DIFFERENTIABLE = [name for name in Block._fields if not name.endswith(("_mean", "_var", "drop_path"))]
_POSITIONS = [Block._fields.index(name) for name in _DIFFERENTIABLE]
_CONSTANTS = [name for name in Block._fields if name not in _DIFFERENTIABLE]
_N_BLOCK = len(Block._fields)
N_INPUTS = _N_BLOCK + len(Config._fields)


class _Stages(NamedTuple):
    """What one pass through the block makes, in the compute dtype; None for a stage that the block lacks."""

    y: Tensor
    expanded: Tensor | None
    convolved: Tensor
    projected: Tensor
    statistics: list[tuple[Tensor, Tensor] | None]
    pooled: Tensor | None


def _norm(
    h: Tensor, gamma: Tensor | None, beta: Tensor | None, mean: Tensor | None, var: Tensor | None, eps: float
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    gamma, beta = (None if p is None else p.to(h.dtype) for p in (gamma, beta))
    if gamma is None:
        return (h if beta is None else h + beta[:, None, None]), None
    if mean is not None:
        return reference.batch_norm(h, mean.to(h.dtype), var.to(h.dtype), gamma, beta, eps), None
    used = reference.batch_statistics(h)
    return reference.batch_norm(h, *used, gamma, beta, eps), used


def _run(block: Block, config: Config) -> _Stages:
    x = block.x.to(reference.compute_dtype(block.x.dtype))
    expanded, expand_used, pooled, h = None, None, None, x
    if block.expand_weight is not None:
        expanded = reference.pointwise_conv2d(x, block.expand_weight, None, None, "none")
        h, expand_used = _norm(expanded, *block[2:6], config.eps[0])
        h = reference.activate(h, config.activation)
    sides = resolve_padding(config.padding, x.shape[2:], block.depthwise_weight.shape[2:], config.stride, (1, 1))
    convolved = reference.depthwise_conv2d(h, block.depthwise_weight, None, config.stride, sides, (1, 1), "none")
    h, depthwise_used = _norm(convolved, *block[7:11], config.eps[1])
    h = reference.activate(h, config.activation)
    if block.se_reduce_weight is not None:
        pooled = h.mean((2, 3))
        h = reference.squeeze_excite(h, *block[11:15], config.se_activation, config.gate)
    projected = reference.pointwise_conv2d(h, block.project_weight, None, None, "none")
    y, project_used = _norm(projected, *block[16:20], config.eps[2])
    if block.drop_path is not None:
        y = y * block.drop_path.to(y.dtype)[:, None, None, None]
    if config.residual:
        y = y + x
    used = [expand_used, depthwise_used, project_used]
    return _Stages(y.to(block.x.dtype), expanded, convolved, projected, used, pooled)


def _output_size(block: Block, config: Config) -> tuple[int, int, int, int]:
    size, kernel = block.x.shape[2:], block.depthwise_weight.shape[2:]
    sides = resolve_padding(config.padding, size, kernel, config.stride, (1, 1))
    size = output_size(size, kernel, config.stride, sides, (1, 1))
    return (block.x.shape[0], block.project_weight.shape[0], *size)


def split(args: Sequence[Any]) -> tuple[Block, Config]:
    """What all operators here begin with, by name; those of the backward behind ``grad``."""
    return Block(*args[:_N_BLOCK]), Config(*args[_N_BLOCK:N_INPUTS])


def _inference(*args: Any) -> Tensor:
    block, config = split(args)
    y = _run(block, config).y
    return _library.as_result(block.x, y)


def _inference_fake(*args: Any) -> Tensor:
    block, config = split(args)
    return _library.empty_result(block.x, _output_size(block, config))


def _training(*args: Any) -> tuple[Tensor, ...]:
    results = _training_fake(*args)
    block, config = split(args)
    stages = _run(block, config)
    statistics = [value for used in stages.statistics for value in (used or (None, None))]
    values = (stages.y, stages.expanded, stages.convolved, stages.projected, *statistics, stages.pooled)
    made = [value is not None and result.dim() == value.dim() for result, value in zip(results, values, strict=True)]
    if context.in_transform():
        return tuple(value if there else result for result, value, there in zip(results, values, made, strict=True))
    for result, value, there in zip(results, values, made, strict=True):
        if there:
            result.copy_(value)
    return results


def _training_fake(*args: Any) -> tuple[Tensor, ...]:
    block, config = split(args)
    x, save_expanded = block.x, args[N_INPUTS]
    dtype = reference.compute_dtype(x.dtype)
    batch, out_channels, height, width = _output_size(block, config)
    channels = block.depthwise_weight.shape[0]

    def channels_last(*size: int) -> Tensor:
        return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    def statistics(gamma: Tensor | None, mean: Tensor | None) -> list[Tensor]:
        used = gamma is not None and mean is None
        return [x.new_empty(gamma.shape if used else 0, dtype=dtype) for _ in range(2)]

    save_expanded = save_expanded and block.expand_weight is not None
    return (
        _library.empty_result(x, (batch, out_channels, height, width)),
        channels_last(batch, channels, *x.shape[2:]) if save_expanded else x.new_empty(0),
        channels_last(batch, channels, height, width),
        channels_last(batch, out_channels, height, width),
        *statistics(block.expand_gamma, block.expand_mean),
        *statistics(block.depthwise_gamma, block.depthwise_mean),
        *statistics(block.project_gamma, block.project_mean),
        x.new_empty(0 if block.se_reduce_weight is None else (batch, channels), dtype=dtype),
    )


def _differentiated(args: Sequence[Any], *inputs: Tensor | None) -> Tensor:
    block, config = split(args)
    return _run(block._replace(**dict(zip(_DIFFERENTIABLE, inputs, strict=True))), config).y


def _backward_fake(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    block, _ = split(args)
    return _library.empty_gradients(block.x, [block[i] for i in _POSITIONS], args[-1])


_inference_operator = _library.define_inference(
    f"mbconv_inference({_BLOCK}, {_CONFIG}) -> Tensor", _inference, _inference_fake
)
_training_operator = _library.define(
    f"mbconv_training({_BLOCK}, {_CONFIG}, bool save_expanded) -> (Tensor, {', '.join(['Tensor'] * 10)})",
    _training,
    _training_fake,
)
_gradient = _library.define_backward(
    f"mbconv_backward(Tensor grad, {_BLOCK}, {_CONFIG}, "
    + _STAGES.replace("_mean", "_mean_used").replace("_var", "_var_used")
    + f", bool[] needs) -> ({', '.join(['Tensor'] * len(_DIFFERENTIABLE))})",
    _differentiated,
    _POSITIONS,
    _backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    for name in _CONSTANTS:
        if ctx.needs_input_grad[Block._fields.index(name)]:
            raise RuntimeError(f"effnet_ops: mbconv has no gradient for {name}, which requires one; detach it")
    ctx.config = inputs[_N_BLOCK:N_INPUTS]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    # A training step between an evaluation and its gradient changes the running statistics in place.
    block = (inputs[i] if i in _POSITIONS or inputs[i] is None else inputs[i].clone() for i in range(_N_BLOCK))
    ctx.save_for_backward(*block, *output[1:])


def _differentiate(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    results: list[Tensor | None] = [None] * (N_INPUTS + 1)
    if grad is None:
        return tuple(results)
    saved = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in _POSITIONS]
    values = _gradient.operator(grad, *saved[:_N_BLOCK], *ctx.config, *saved[_N_BLOCK:], needs)
    for position, value in zip(_POSITIONS, _library.only_needed(values, needs), strict=True):
        results[position] = value
    return tuple(results)


_library.register_autograd(_training_operator, _setup_context, _differentiate, _gradient)
_library.register_autocast(_inference_operator, (0,))
_library.register_autocast(_training_operator, (0,))


def _forward_flops(block: Block, size: Sequence[int]) -> int:
    batch, _, height, width = block.x
    flops = _library.convolution_flops((batch, 0, *size), block.depthwise_weight)
    flops += _library.convolution_flops((batch, 0, *size), block.project_weight)
    if block.expand_weight is not None:
        flops += _library.convolution_flops((batch, 0, height, width), block.expand_weight)
    if block.se_reduce_weight is not None:
        flops += _library.convolution_flops((batch, 0), block.se_reduce_weight)
        flops += _library.convolution_flops((batch, 0), block.se_expand_weight)
    return flops


@register_flop_formula(torch.ops.effnet_ops.mbconv_inference)
def _inference_flops(*args: Any, out_shape: Sequence[int], **kwargs: Any) -> int:
    return _forward_flops(Block(*args[:_N_BLOCK]), out_shape[2:])


@register_flop_formula(torch.ops.effnet_ops.mbconv_training)
def _training_flops(*args: Any, out_shape: Sequence[Sequence[int]], **kwargs: Any) -> int:
    return _forward_flops(Block(*args[:_N_BLOCK]), out_shape[0][2:])


@register_flop_formula(torch.ops.effnet_ops.mbconv_backward)
def _backward_flops(grad: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """The gradients of each product and convolution; what is computed a second time does not count."""
    block, needs = Block(*args[:_N_BLOCK]), args[-1]
    batch, _, height, width = block.x
    out = (batch, 0, *grad[2:])
    flops = (any(needs[:11]) + needs[11]) * _library.convolution_flops(out, block.project_weight)
    flops += (any(needs[:4]) + needs[4]) * _library.convolution_flops(out, block.depthwise_weight)
    if block.expand_weight is not None:
        flops += (needs[0] + needs[1]) * _library.convolution_flops((batch, 0, height, width), block.expand_weight)
    if block.se_reduce_weight is not None:
        inner = (any(needs[:7]), *needs[7:11])
        flops += gradient_flops(batch, block.se_reduce_weight, block.se_expand_weight, inner)
    return flops


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


def _norm_arguments(conv: ConvNormParams, training: bool) -> tuple[Tensor | None, ...]:
    """(weight, gamma, beta, mean, var) as the operators take them."""
    weight, norm = conv.weight, conv.norm
    if norm is None:
        return weight, None, conv.bias, None, None
    gamma = weight.new_ones(weight.shape[0]) if norm.weight is None else norm.weight
    beta = weight.new_zeros(weight.shape[0]) if norm.bias is None else norm.bias
    if training:
        return weight, gamma, beta, None, None
    return weight, gamma, beta, norm.running_mean, norm.running_var


def _eps(conv: ConvNormParams | None) -> float:
    return 0.0 if conv is None or conv.norm is None else conv.norm.eps


def mbconv_arguments(
    x: Tensor,
    expand: ConvNormParams | None,
    depthwise: ConvNormParams,
    squeeze_excite: SqueezeExciteParams | None,
    project: ConvNormParams,
    stride: Sequence[int],
    padding: Sequence[int],
    activation: str,
    gate: str,
    residual: bool,
    drop_path: Tensor | None,
    training: bool,
) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
    """The tensors and the settings of a block in the order of the operators' schemas, from `effnet_ops.mbconv`'s."""
    se = (None, None, None, None) if squeeze_excite is None else squeeze_excite[:4]
    se_activation = activation if squeeze_excite is None else squeeze_excite.activation or activation
    if drop_path is not None:
        drop_path = drop_path.to(reference.compute_dtype(x.dtype))
    block = (
        x,
        *((None,) * 5 if expand is None else _norm_arguments(expand, training)),
        *_norm_arguments(depthwise, training),
        *se,
        *_norm_arguments(project, training),
        drop_path,
    )
    eps = (_eps(expand), _eps(depthwise), _eps(project))
    return block, (eps, stride, padding, residual, activation, se_activation, gate)


def inference_arguments(x: Tensor, *args: Any) -> tuple[Any, ...] | None:
    """What `infer_mbconv` takes behind x, or None where the block needs batch statistics.

    ``args`` are those of `mbconv_arguments` from ``expand`` to ``residual``.
    """
    block, config = mbconv_arguments(x, *args, None, False)
    return None if _needs_batch_statistics(block) else (*block[1:], *config)


def infer_mbconv(x: Tensor, arguments: Sequence[Any]) -> Tensor:
    """The block in evaluation and without drop path, where gradients are off."""
    return _library.call(_inference_operator, x, *arguments)


def prepare_inference(x: Tensor, arguments: Sequence[Any]) -> _library.Prepared | None:
    """`infer_mbconv` for inputs like x, which has run with these arguments; None where it can only run so."""
    if not _library.Prepared.fits(x) or not _library.is_nhwc(x):
        return None
    block, config = Block(x, *arguments[: _N_BLOCK - 1]), Config(*arguments[_N_BLOCK - 1 :])
    parameters = block[1:-1]
    tensors, dtype = [p for p in parameters if p is not None], reference.compute_dtype(x.dtype)
    if not all(p.is_contiguous() and p.dtype is dtype for p in tensors):
        return None
    channels, _, *size = block.depthwise_weight.shape
    window = _library.window_numbers(x.shape[2:], size, config.stride, config.padding)
    out, reduced = block.project_weight.shape[0], 0 if block.se_reduce_weight is None else len(block.se_reduce_weight)
    activations = map(_library.ACTIVATIONS.index, (config.activation, config.se_activation))
    settings = (config.residual, *activations, _library.GATES.index(config.gate))
    addresses = (0 if p is None else p.data_ptr() for p in parameters)
    numbers = (x.shape[0], channels, *window, x.shape[1], out, reduced, *settings, *addresses)
    kernel = _native.module.prepare_inference(_library.DTYPES.index(x.dtype), numbers, config.eps)
    return _library.Prepared(kernel, (x.shape[0], out, *window[2:4]), tensors)


def _needs_batch_statistics(block: Sequence[Tensor | None]) -> bool:
    return any(block[i] is not None and block[i + 2] is None for i in (2, 7, 16))


def mbconv(block: Sequence[Tensor | None], config: Sequence[Any]) -> tuple[Tensor, list[tuple[Tensor, Tensor] | None]]:
    """`effnet_ops.mbconv` without checks and without updating running statistics; what `mbconv_arguments` gives.

    Returns:
        y, and for expand, depthwise and project the mean and biased variance (C,) of the batch where they were used.
    """
    differentiate = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in block)
    # The operator of inference has gradients, too, by the reference: torch.jit.trace records it for both uses.
    if not _needs_batch_statistics(block) and (not differentiate or torch.jit.is_tracing()):
        return _inference_operator(*block, *config), [None, None, None]
    save_expanded = differentiate and (_policy == "never" or (_policy == "auto" and block[0].shape[1] > _AUTO_CHANNELS))
    y, *stages = _training_operator(*block, *config, save_expanded)
    statistics = [
        (stages[j], stages[j + 1]) if block[i] is not None and block[i + 2] is None else None
        for i, j in ((2, 3), (7, 5), (16, 7))
    ]
    return y, statistics
