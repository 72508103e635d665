"""The public functions. Each checks its arguments, asks `backends` who runs the call, and hands it over.

Layout: x may be contiguous, channels_last or any strided view; the output is channels_last where the channels of x are
innermost (and x is not contiguous at the same time), contiguous otherwise. Precision: fp16 and bf16 inputs take
parameters of their own dtype or fp32 and are accumulated in fp32; fp64 in fp64. Second derivatives, torch.func and
forward-mode differentiation go through the reference; symbolic tracing (torch.fx) records one node for a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import is_
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn import Parameter
from torch.overrides import handle_torch_function

from effnet_ops import backends, checks, context, ops, reference
from effnet_ops.ops._library import memory_format
from effnet_ops.params import BatchNormParams, ConvNormParams, SqueezeExciteParams

Padding = int | str | Sequence[int]
_TALLEST = 64


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    activation: str = "none",
) -> Tensor:
    """Depthwise convolution: ``activation(conv2d(x, weight, groups=C) + bias)``.

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16.
        weight: (C, 1, kh, kw), or (C*m, 1, kh, kw) for a channel multiplier m (which runs the reference).
        bias: (C,) or None.
        stride, dilation: an int or (vertical, horizontal), at least 1.
        padding: pixels of zeros as an int, (vertical, horizontal) or (top, bottom, left, right), or "same" in
            TensorFlow's meaning: output ceil(H / stride), the odd pixel at the bottom and right.
        activation: one of `effnet_ops.reference.ACTIVATIONS`, such as "silu".

    Returns:
        (N, C, Ho, Wo) in the dtype of x.

    Raises:
        ValueError, TypeError: a shape, dtype, device, size or name that does not fit, named in the message.
    """
    if isinstance(x, Proxy):
        settings = dict(stride=stride, padding=padding, dilation=dilation, activation=activation)
        return handle_torch_function(depthwise_conv2d, (x,), x, weight, bias, **settings)
    checks.check_input(x)
    channels = x.shape[1]
    checks.check_parameter("weight", weight, (None, 1, None, None), x)
    if weight.shape[0] == 0 or weight.shape[0] % max(channels, 1):
        raise ValueError(
            f"weight {tuple(weight.shape)} must have a multiple of {channels} filters for x {tuple(x.shape)}"
        )
    checks.check_parameter("bias", bias, (weight.shape[0],), x)
    stride, dilation = checks.pair("stride", stride, 1), checks.pair("dilation", dilation, 1)
    sides = checks.padding_sides(padding)
    checks.check_activation(activation)
    checks.check_window(x, weight.shape[2:], stride, sides, dilation)
    window = backends.Window(weight.shape[2:], stride, dilation)
    if _runs_reference(x, "depthwise_conv2d", _uncovered_filter(weight, channels), window):
        resolved = checks.resolve_padding(sides, x.shape[2:], weight.shape[2:], stride, dilation)
        return _run_reference(reference.depthwise_conv2d, x, weight, bias, stride, resolved, dilation, activation)
    return ops.depthwise_conv2d(ops.DepthwiseCall(x, weight, bias, stride, sides, dilation, activation))


def pointwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """1x1 convolution: ``activation(conv2d(x, weight) + bias) + residual``.

    Args:
        x: (N, Cin, H, W), float32, float64, bfloat16 or float16.
        weight: (Cout, Cin, 1, 1).
        bias: (Cout,) or None.
        residual: (N, Cout, H, W) in the dtype of x, or None.
        activation: one of `effnet_ops.reference.ACTIVATIONS`, such as "silu".

    Returns:
        (N, Cout, H, W) in the dtype of x.

    Raises:
        ValueError, TypeError: a shape, dtype, device or name that does not fit, named in the message.
    """
    if isinstance(x, Proxy):
        settings = dict(residual=residual, activation=activation)
        return handle_torch_function(pointwise_conv2d, (x,), x, weight, bias, **settings)
    checks.check_input(x)
    batch, channels, height, width = x.shape
    checks.check_parameter("weight", weight, (None, channels, 1, 1), x)
    checks.check_parameter("bias", bias, (weight.shape[0],), x)
    if residual is not None:
        checks.check_parameter("residual", residual, (batch, weight.shape[0], height, width), x)
        if residual.dtype != x.dtype:
            raise TypeError(f"residual must be {x.dtype} like x, got {residual.dtype}")
    checks.check_activation(activation)
    if 0 in (channels, weight.shape[0], height, width):
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} must have no empty axis but the batch")
    if _runs_reference(x, "pointwise_conv2d"):
        return _run_reference(reference.pointwise_conv2d, x, weight, bias, residual, activation)
    return ops.pointwise_conv2d(ops.PointwiseCall(x, weight, bias, residual, activation))


def squeeze_excite(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    *,
    activation: str = "silu",
    gate: str = "sigmoid",
) -> Tensor:
    """Squeeze-and-excitation (arXiv 1709.01507): ``x * gate(expand(activation(reduce(mean(x)))))``.

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16.
        reduce_weight, reduce_bias: (R, C, 1, 1) and (R,) or None.
        expand_weight, expand_bias: (C, R, 1, 1) and (C,) or None.
        activation: between the two products: one of `effnet_ops.reference.ACTIVATIONS`, such as "silu".
        gate: one of `effnet_ops.reference.GATES`, such as "sigmoid".

    Returns:
        (N, C, H, W) in the dtype of x.

    Raises:
        ValueError, TypeError: a shape, dtype, device or name that does not fit, named in the message.
    """
    params = (reduce_weight, reduce_bias, expand_weight, expand_bias)
    if isinstance(x, Proxy):
        return handle_torch_function(squeeze_excite, (x,), x, *params, activation=activation, gate=gate)
    checks.check_input(x)
    if 0 in x.shape[1:]:
        raise ValueError(f"x {tuple(x.shape)} must have no empty axis but the batch")
    _check_squeeze_excite(*params, x, x.shape[1])
    checks.check_activation(activation)
    checks.check_gate(gate)
    if _runs_reference(x, "squeeze_excite"):
        return _run_reference(reference.squeeze_excite, x, *params, activation, gate)
    return ops.squeeze_excite(ops.SqueezeExciteCall(x, *params, activation, gate))[0]


def mbconv(
    x: Tensor,
    expand: ConvNormParams | None,
    depthwise: ConvNormParams,
    squeeze_excite: SqueezeExciteParams | None,
    project: ConvNormParams,
    *,
    stride: int | Sequence[int],
    padding: Padding,
    activation: str = "silu",
    gate: str = "sigmoid",
    residual: bool,
    drop_path: float | Tensor | None = None,
    training: bool,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """One MBConv block (arXiv 1905.11946): expand, depthwise, squeeze-and-excitation, project, drop path, residual.

    In training the three normalisations use batch statistics and update their running buffers once, also when
    activation checkpointing runs the block a second time. In evaluation the running statistics are constants, and
    gradients flow to everything else. `set_recompute` decides what training keeps for the backward pass.

    Args:
        x: (N, Cin, H, W), float32, float64, bfloat16 or float16.
        expand: 1x1 to C channels with its normalisation, or None where C = Cin.
        depthwise: k x k on C channels with its normalisation.
        squeeze_excite: the two small products on C channels, or None.
        project: 1x1 to Cout channels with its normalisation, no activation.
        stride, padding, dilation: of the depthwise convolution, as in `depthwise_conv2d`.
        activation: after the first two normalisations. gate: of the squeeze-and-excitation.
        residual: add x; needs Cin = Cout and an output of x's size.
        drop_path: a rate in [0, 1), drawn here where ``training``, or a scale (N,) per image that is applied always.
        training: use batch statistics.

    Returns:
        (N, Cout, Ho, Wo) in the dtype of x.

    Raises:
        ValueError, TypeError: a shape, dtype, device, size or name that does not fit, named in the message.
    """
    groups = (expand, depthwise, squeeze_excite, project)
    if isinstance(x, Proxy):
        settings = dict(stride=stride, padding=padding, activation=activation, gate=gate, residual=residual)
        settings |= dict(drop_path=drop_path, training=training, dilation=dilation)
        return handle_torch_function(mbconv, (x,), x, *groups, **settings)
    stride, dilation = checks.pair("stride", stride, 1), checks.pair("dilation", dilation, 1)
    sides = checks.padding_sides(padding)
    size = _check_mbconv(x, *groups, stride, sides, dilation, activation, gate, residual)
    drop_path = _drop_path_scale(drop_path, x, training)
    convs = [conv for conv in (expand, depthwise, project) if conv is not None]
    group = _shared_group(convs) if training else None
    if training and group is None:
        _check_batch_size(convs, x, size)
    keywords = dict(stride=stride, dilation=dilation, activation=activation, gate=gate, residual=residual)
    keywords["drop_path"] = drop_path
    # Only the CPU's kernels share statistics, and a process without images runs none.
    alone = group is not None and (x.device.type != "cpu" or x.shape[0] == 0)
    window = backends.Window(depthwise.weight.shape[2:], stride, dilation)
    if _block_runs_reference(x, depthwise, window, _block_operation(x, groups, training)) or alone:
        padding = checks.resolve_padding(sides, x.shape[2:], *window)
        y, statistics, *_ = _run_reference(reference.mbconv, x, *groups, padding=padding, training=training, **keywords)
    else:
        call = ops.MBConvCall.of(x, *_into_norms(groups, training), padding=sides, training=training, **keywords)
        y, statistics = ops.mbconv(call) if group is None else ops.mbconv_sync(call, group.group_name)
        statistics = _with_biases(statistics, (expand, depthwise, project))
    if training:
        inner, outer = x.shape[0] * x.shape[2] * x.shape[3], x.shape[0] * size[0] * size[1]
        _update_running_statistics((expand, depthwise, project), statistics, (inner, outer, outer))
    return y


def fused_mbconv(
    x: Tensor,
    expand: ConvNormParams,
    squeeze_excite: SqueezeExciteParams | None,
    project: ConvNormParams | None,
    *,
    stride: int | Sequence[int],
    padding: Padding,
    activation: str = "silu",
    gate: str = "sigmoid",
    residual: bool,
    drop_path: float | Tensor | None = None,
    training: bool,
) -> Tensor:
    """One Fused-MBConv block (arXiv 2104.00298): expand, squeeze-and-excitation, project, drop path, residual.

    The expansion is a dense k x k convolution. Statistics, gradients and `set_recompute` are as in `mbconv`.

    Args:
        x: (N, Cin, H, W), float32, float64, bfloat16 or float16.
        expand: k x k to C channels with its normalisation.
        squeeze_excite: the two small products on C channels, or None.
        project: 1x1 to Cout channels with its normalisation, no activation; None leaves the one convolution, with its
            normalisation and activation, and Cout = C.
        stride, padding: of the dense convolution, as in `depthwise_conv2d`.
        activation: after the first normalisation. gate: of the squeeze-and-excitation.
        residual: add x; needs Cin = Cout and an output of x's size.
        drop_path: a rate in [0, 1), drawn here where ``training``, or a scale (N,) per image that is applied always.
        training: use batch statistics.

    Returns:
        (N, Cout, Ho, Wo) in the dtype of x.

    Raises:
        ValueError, TypeError: a shape, dtype, device, size or name that does not fit, named in the message.
    """
    groups = (expand, squeeze_excite, project)
    if isinstance(x, Proxy):
        settings = dict(stride=stride, padding=padding, activation=activation, gate=gate, residual=residual)
        settings |= dict(drop_path=drop_path, training=training)
        return handle_torch_function(fused_mbconv, (x,), x, *groups, **settings)
    stride, sides = checks.pair("stride", stride, 1), checks.padding_sides(padding)
    size = _check_fused_mbconv(x, *groups, stride, sides, activation, gate, residual)
    drop_path = _drop_path_scale(drop_path, x, training)
    convs = [conv for conv in (expand, project) if conv is not None]
    group = _shared_group(convs) if training else None
    if training and group is None:
        _check_batch_size(convs, x, size)
    keywords = dict(stride=stride, activation=activation, gate=gate, residual=residual, drop_path=drop_path)
    # Only the CPU's kernels share statistics, and a process without images runs none.
    alone = group is not None and (x.device.type != "cpu" or x.shape[0] == 0)
    if _fused_runs_reference(x, groups, stride) or alone:
        padding = checks.resolve_padding(sides, x.shape[2:], expand.weight.shape[2:], stride, (1, 1))
        made = _run_reference(reference.fused_mbconv, x, *groups, padding=padding, training=training, **keywords)
        y, statistics = made[:2]
    else:
        call = ops.FusedMBConvCall.of(x, *_into_norms(groups, training), padding=sides, training=training, **keywords)
        y, statistics = ops.fused_mbconv(call) if group is None else ops.fused_mbconv_sync(call, group.group_name)
        statistics = _with_biases(statistics, (expand, project))
    if training:
        _update_running_statistics((expand, project), statistics, [x.shape[0] * size[0] * size[1]] * 2)
    return y


def batch_norm(x: Tensor, norm: BatchNormParams, *, activation: str = "none", training: bool) -> Tensor:
    """Batch normalisation (arXiv 1502.03167) and the activation behind it: ``activation(batch_norm(x))``.

    Training keeps x alone for the backward pass; eager PyTorch keeps what is between the two, too.

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16.
        norm: its vectors (C,). Running statistics are updated where ``training``, as torch.nn.BatchNorm2d does.
        activation: one of `effnet_ops.reference.ACTIVATIONS`.
        training: use batch statistics.

    Returns:
        (N, C, H, W) in the dtype of x.

    Raises:
        ValueError, TypeError: a shape, dtype, device or name that does not fit, named in the message.
    """
    if isinstance(x, Proxy):
        return handle_torch_function(batch_norm, (x,), x, norm, activation=activation, training=training)
    checks.check_input(x)
    _check_norm("norm", norm, x.shape[1], x)
    checks.check_activation(activation)
    if training and norm.process_group is not None:
        return reference.activate(sync_batch_norm(x, norm, norm.process_group), activation)
    values = x.shape[0] * x.shape[2] * x.shape[3]
    if training and values == 1:
        raise ValueError(f"training needs more than 1 value per channel, but x is {tuple(x.shape)}")
    y, *used = _batch_norm(x, norm, activation, training)
    if training and not context.recomputing():
        _update_norm(norm, *used, values)
    return y


def trains_norm(x: Tensor) -> bool:
    """Whether a kernel computes `batch_norm` of x without a copy of it."""
    last = x.shape[2:].numel() == 1 or memory_format(x) is torch.channels_last
    return last and backends.select(x) == "cpu"


def _batch_norm(x: Tensor, norm: BatchNormParams, activation: str, training: bool) -> tuple[Tensor, ...]:
    gamma = x.new_ones(x.shape[1]) if norm.weight is None else norm.weight
    statistics = (None, None) if training else (norm.running_mean, norm.running_var)
    call = ops.NormTrainingCall(x, gamma, norm.bias, *statistics, norm.eps, activation)
    covered = "" if x.device.type == "cpu" else "only CPUs have a kernel for batch_norm"
    return call.reference() if _runs_reference(x, "batch_norm", covered) else ops.batch_norm_training(call)


def sync_batch_norm(x: Tensor, norm: BatchNormParams, group: Any) -> Tensor:
    """Batch normalisation in training with the statistics of all processes of ``group``, as torch.nn.SyncBatchNorm."""
    y, mean, variance, count = reference.sync_batch_norm(x, norm.weight, norm.bias, norm.eps, group)
    if not context.recomputing():
        _update_norm(norm, mean, variance, count)
    return y


def _shared_group(convs: Sequence[ConvNormParams]) -> Any:
    """The process group that shares the statistics of a block, None for none."""
    groups = [conv.norm.process_group for conv in convs if conv.norm is not None]
    if any(group is not groups[0] for group in groups):
        raise ValueError("the normalisations of a block must have one process_group, or none of them any")
    return groups[0] if groups else None


def _runs_reference(x: Tensor, operation: str, uncovered: str = "", window: backends.Window | None = None) -> bool:
    """Whether the reference runs a call on x: also where a transform has to see plain PyTorch."""
    return context.transforming() or backends.select(x, uncovered, window, operation) == "reference"


def _block_operation(x: Tensor, groups: Sequence[Any], training: bool) -> str:
    """What a backend needs kernels for: "mbconv_inference" where statistics are constants and no gradient can come.

    Only a request for `cuda` can fail by it, and nobody else pays for the answer.
    """
    if training or backends.requested() != "cuda":
        return "mbconv"
    norms = [group.norm for group in groups if isinstance(group, ConvNormParams) and group.norm is not None]
    batch = any(norm.running_mean is None for norm in norms)
    differentiates = torch.is_grad_enabled() and any(t.requires_grad for t in _tensors_in((x, *groups)))
    return "mbconv" if batch or differentiates else "mbconv_inference"


def _tensors_in(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors_in(value)


def _block_runs_reference(x: Tensor, depthwise: ConvNormParams, window: backends.Window, operation: str) -> bool:
    uncovered = _uncovered_filter(depthwise.weight, depthwise.weight.shape[0])
    return _runs_reference(x, operation, uncovered, window)


def _fused_runs_reference(x: Tensor, groups: Sequence[Any], stride: tuple[int, int], **settings: Any) -> bool:
    expand, squeeze_excite, project = groups
    kernel, otherwise = expand.weight.shape[2:], ""
    if kernel[0] > _TALLEST:
        otherwise = f"expand.weight {tuple(expand.weight.shape)} is taller than {_TALLEST}"
    elif squeeze_excite is not None and project is None:
        otherwise = "squeeze-and-excitation has no projection behind it"
    return _runs_reference(x, "fused_mbconv", otherwise, backends.Window(kernel, stride, (1, 1)))


def _has_both(conv: Any) -> bool:
    """Whether a convolution has a bias and a normalisation."""
    return isinstance(conv, ConvNormParams) and conv.bias is not None and conv.norm is not None


def _into_norms(groups: Sequence[Any], training: bool) -> list[Any]:
    """The groups of a block's parameters where no convolution in front of a normalisation has a bias, and which give
    the same: the operators know one or the other."""
    return [_into_norm(conv, training) if _has_both(conv) else conv for conv in groups]


def _into_norm(conv: ConvNormParams, training: bool) -> ConvNormParams:
    """The bias b goes into the mean: norm(h + b) with the mean m is norm(h) with m - b, without a sum that cancels.

    The mean of a batch holds b already. Where b has a gradient, it comes by way of the shift, to which 0 is added.
    """
    weight, bias, norm = conv
    uses_batch, shift = training or norm.running_mean is None, norm.bias
    if not uses_batch:
        mean = norm.running_mean
        norm = norm._replace(running_mean=mean - bias.detach().to(mean.dtype))
    if bias.requires_grad and torch.is_grad_enabled():
        slope = 0.0
        if not uses_batch:
            slope = torch.rsqrt(norm.running_var + norm.eps)
            slope = slope if norm.weight is None else slope * norm.weight
        nothing = (bias - bias.detach()) * slope
        norm = norm._replace(bias=nothing if shift is None else shift + nothing.to(shift.dtype))
    return ConvNormParams(weight, None, norm)


def _with_biases(
    statistics: Sequence[reference.Statistics | None], convs: Sequence[ConvNormParams | None]
) -> list[reference.Statistics | None]:
    """The statistics of batches behind the biases that `_into_norms` left out."""
    return [
        (used[0] + conv.bias.detach().to(used[0].dtype), *used[1:]) if used and _has_both(conv) else used
        for used, conv in zip(statistics, convs, strict=True)
    ]


def may_keep(state: Sequence[Any], weight: Tensor | None) -> bool:
    """Whether a cache may keep these tensors of a layer until its next call.

    Not those that torch.func.functional_call put in the places of its parameters, and never a graph.
    """
    if weight is not None and not isinstance(weight, Parameter):
        return False
    return all(p.grad_fn is None for p in state if isinstance(p, Tensor))


class BlockInference:
    """A block in evaluation without gradients: what was checked at one call is not checked at the next.

    A block has some twenty parameters to check.
    """

    __slots__ = ("_checked",)
    _function: ClassVar[Callable[..., Tensor]]
    _call: ClassVar[type]
    _operator: ClassVar[Any]

    @staticmethod
    def _runs_reference(x: Tensor, groups: Sequence[Any], stride: tuple[int, int], **settings: Any) -> bool:
        raise NotImplementedError

    def __init__(self) -> None:
        # One tuple, which threads that run the same block exchange as a whole: key, state, what the operator takes
        # behind x, what is prepared.
        self._checked: tuple[Any, Sequence[Any], Sequence[Any], ops.PreparedCalls] | None = None

    def __call__(
        self,
        x: Tensor,
        state: Sequence[Any],
        block: Callable[[], Sequence[Any]],
        padding: Padding,
        settings: dict[str, Any],
    ) -> Tensor:
        """The block's output for x; padding and settings are those of the block's function.

        ``block()`` gives the groups of its parameters; ``state`` is all that these are made of, the weight of the k x k
        convolution first: while it holds the same objects as before, they are not asked for.
        """
        weight = state[0]
        key = (x.shape[1:], x.dtype, x.device, weight.dtype, weight.device, backends.requested())
        checked = self._checked
        if checked is not None and key == checked[0] and all(map(is_, state, checked[1])):
            _, _, arguments, prepared = checked
            return prepared.run(x, lambda x: self._operator.run(x, *arguments))
        groups = block()
        y = self._function(x, *groups, padding=padding, training=False, **settings)
        self._checked = None
        kept = may_keep(state, weight) and not any(map(_has_both, groups))
        if kept and not self._runs_reference(x, groups, **settings):
            call = self._call.of(x, *groups, padding=checks.padding_sides(padding), **settings)
            if not call.uses_batch():
                arguments = self._operator.signature.flatten(call)[1:]
                tensors = [p for p in arguments if isinstance(p, Tensor)]
                self._checked = key, state, arguments, ops.PreparedCalls(tensors)
        return y


class MBConvInference(BlockInference):
    """`mbconv` for one block."""

    __slots__ = ()
    _function, _call, _operator = staticmethod(mbconv), ops.MBConvCall, ops.mbconv_inference

    @staticmethod
    def _runs_reference(
        x: Tensor, groups: Sequence[Any], stride: tuple[int, int], dilation: tuple[int, int] = (1, 1), **settings: Any
    ) -> bool:
        depthwise = groups[1]
        window = backends.Window(depthwise.weight.shape[2:], stride, dilation)
        return _block_runs_reference(x, depthwise, window, _block_operation(x, groups, False))


class FusedMBConvInference(BlockInference):
    """`fused_mbconv` for one block."""

    __slots__ = ()
    _function, _call, _operator = staticmethod(fused_mbconv), ops.FusedMBConvCall, ops.fused_mbconv_inference
    _runs_reference = staticmethod(_fused_runs_reference)


# Asked once: torch.compile does not trace the question, and torch.compiler's decorators import it, which takes seconds.
_AUTOCAST_DEVICES = [kind for kind in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(kind)]


def _run_reference(function: Callable[..., Any], x: Tensor, *args: Any, **keywords: Any) -> Any:
    """The reference on x, cast as autocast would cast it for a convolution; parameters keep their precision."""
    kind = x.device.type
    if kind not in _AUTOCAST_DEVICES or not torch.is_autocast_enabled(kind):
        return function(x, *args, **keywords)
    if x.dtype == torch.float32:
        x = x.to(torch.get_autocast_dtype(kind))
    with torch.autocast(kind, enabled=False):
        return function(x, *args, **keywords)


def _uncovered_filter(weight: Tensor, channels: int) -> str:
    """Why the fused operators do not take this depthwise filter, or ""."""
    if weight.shape[0] != channels:
        return f"weight {tuple(weight.shape)} has a channel multiplier"
    return "" if weight.shape[2] <= _TALLEST else f"weight {tuple(weight.shape)} is taller than {_TALLEST}"


def _check_squeeze_excite(
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    x: Tensor,
    channels: int,
) -> None:
    checks.check_parameter("reduce_weight", reduce_weight, (None, channels, 1, 1), x)
    reduced = reduce_weight.shape[0]
    if reduced == 0:
        raise ValueError(f"reduce_weight {tuple(reduce_weight.shape)} must have at least one filter")
    for name, p, shape in (
        ("reduce_bias", reduce_bias, (reduced,)),
        ("expand_weight", expand_weight, (channels, reduced, 1, 1)),
        ("expand_bias", expand_bias, (channels,)),
    ):
        if not checks.fits(p, shape, x):
            checks.check_parameter(name, p, shape, x)


_VECTORS = ("weight", "bias", "running_mean", "running_var")


def _check_conv_norm(name: str, conv: ConvNormParams, shape: tuple[int | None, ...], x: Tensor) -> None:
    if not isinstance(conv, ConvNormParams):
        raise TypeError(f"{name} must be ConvNormParams, got {type(conv).__name__}")
    weight, bias, norm = conv
    checks.check_parameter(f"{name}.weight", weight, shape, x)
    channels = weight.shape[0]
    if min(weight.shape) == 0:
        raise ValueError(f"{name}.weight {tuple(weight.shape)} must have no empty axis")
    if bias is not None:
        checks.check_parameter(f"{name}.bias", bias, (channels,), x)
    if norm is not None:
        _check_norm(f"{name}.norm", norm, channels, x)


def _check_norm(name: str, norm: BatchNormParams, channels: int, x: Tensor) -> None:
    size = (channels,)
    for field, p in zip(_VECTORS, norm, strict=False):
        if not checks.fits(p, size, x):
            checks.check_parameter(f"{name}.{field}", p, size, x)
    if (norm.running_mean is None) != (norm.running_var is None):
        raise ValueError(f"{name} must have both running_mean and running_var, or neither")
    if norm.momentum is None and norm.running_mean is not None and norm.num_batches_tracked is None:
        raise ValueError(f"{name} with momentum=None needs num_batches_tracked")


def _check_mbconv(
    x: Tensor,
    expand: ConvNormParams | None,
    depthwise: ConvNormParams,
    squeeze_excite: SqueezeExciteParams | None,
    project: ConvNormParams,
    stride: tuple[int, int],
    sides: tuple[int, ...],
    dilation: tuple[int, int],
    activation: str,
    gate: str,
    residual: bool,
) -> tuple[int, int]:
    """Check every shape, dtype, device and name of a block; return its output size."""
    checks.check_input(x)
    checks.check_activation(activation)
    checks.check_gate(gate)
    channels = x.shape[1]
    if expand is not None:
        _check_conv_norm("expand", expand, (None, channels, 1, 1), x)
        channels = expand.weight.shape[0]
    _check_conv_norm("depthwise", depthwise, (channels, 1, None, None), x)
    size = checks.check_window(x, depthwise.weight.shape[2:], stride, sides, dilation)
    if squeeze_excite is not None:
        _check_gate_params(squeeze_excite, x, channels)
    _check_conv_norm("project", project, (None, channels, 1, 1), x)
    _check_residual(residual, project.weight.shape[0], size, x)
    return size


def _check_fused_mbconv(
    x: Tensor,
    expand: ConvNormParams,
    squeeze_excite: SqueezeExciteParams | None,
    project: ConvNormParams | None,
    stride: tuple[int, int],
    sides: tuple[int, ...],
    activation: str,
    gate: str,
    residual: bool,
) -> tuple[int, int]:
    """Check every shape, dtype, device and name of a block; return its output size."""
    checks.check_input(x)
    checks.check_activation(activation)
    checks.check_gate(gate)
    _check_conv_norm("expand", expand, (None, x.shape[1], None, None), x)
    channels = out_channels = expand.weight.shape[0]
    size = checks.check_window(x, expand.weight.shape[2:], stride, sides, (1, 1))
    if squeeze_excite is not None:
        _check_gate_params(squeeze_excite, x, channels)
    if project is not None:
        _check_conv_norm("project", project, (None, channels, 1, 1), x)
        out_channels = project.weight.shape[0]
    _check_residual(residual, out_channels, size, x)
    return size


def _check_gate_params(layer: SqueezeExciteParams, x: Tensor, channels: int) -> None:
    if not isinstance(layer, SqueezeExciteParams):
        raise TypeError(f"squeeze_excite must be SqueezeExciteParams or None, got {type(layer).__name__}")
    _check_squeeze_excite(*layer[:4], x, channels)
    if layer.activation is not None:
        checks.check_activation(layer.activation)


def _check_residual(residual: bool, channels: int, size: tuple[int, int], x: Tensor) -> None:
    if residual and (channels, *size) != tuple(x.shape[1:]):
        out = (x.shape[0], channels, *size)
        raise ValueError(f"residual=True needs an output of x's shape {tuple(x.shape)}, but it is {out}")


def _check_batch_size(convs: list[ConvNormParams], x: Tensor, size: tuple[int, int]) -> None:
    if x.shape[0] * size[0] * size[1] == 1 and any(conv.norm is not None for conv in convs):
        raise ValueError(
            f"training needs more than 1 value per channel, but x {tuple(x.shape)} gives an output of one pixel"
        )


def _drop_path_scale(drop_path: float | Tensor | None, x: Tensor, training: bool) -> Tensor | None:
    """The per-image scale of stochastic depth (arXiv 1603.09382) from a rate or a given scale."""
    if drop_path is None:
        return None
    if isinstance(drop_path, Tensor):
        if drop_path.shape != (x.shape[0],):
            raise ValueError(f"drop_path must have shape ({x.shape[0]},), got {tuple(drop_path.shape)}")
        if drop_path.device != x.device:
            raise ValueError(f"drop_path is on {drop_path.device}, but x is on {x.device}")
        return drop_path
    if not 0.0 <= drop_path < 1.0:
        raise ValueError(f"drop_path must be a rate in [0, 1) or a scale per image, got {drop_path!r}")
    if drop_path == 0.0 or not training:
        return None
    return reference.drop_path_scale(x, drop_path)


def _update_running_statistics(
    convs: tuple[ConvNormParams | None, ...],
    statistics: Sequence[reference.Statistics | None],
    counts: Sequence[int],
) -> None:
    """Update the running buffers, but not when a checkpoint runs the block again for the backward pass.

    ``counts`` are how many values a channel has before each normalisation.
    """
    if context.recomputing():
        return
    for conv, used, count in zip(convs, statistics, counts, strict=True):
        if conv is not None and conv.norm is not None and used is not None:
            mean, variance, *shared = used
            _update_norm(conv.norm, mean, variance, shared[0] if shared else count)


@torch.no_grad()
def _update_norm(norm: BatchNormParams, mean: Tensor, variance: Tensor, count: int | Tensor) -> None:
    """running = (1 - momentum) * running + momentum * batch, with the unbiased variance, as torch.nn.BatchNorm2d."""
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    shared = isinstance(count, Tensor)
    if norm.running_mean is None or (not shared and count == 0):
        return
    momentum = 1.0 / norm.num_batches_tracked.item() if norm.momentum is None else norm.momentum
    others = (count - 1).clamp(min=1) if shared else max(count - 1, 1)
    mean = mean.to(norm.running_mean.dtype)
    unbiased = (variance * (count / others)).to(norm.running_var.dtype)
    if shared:
        # All processes may be without images. To ask would split a compiled graph.
        mean = torch.where(count > 0, mean, norm.running_mean)
        unbiased = torch.where(count > 0, unbiased, norm.running_var)
    norm.running_mean.lerp_(mean, momentum)
    norm.running_var.lerp_(unbiased, momentum)
