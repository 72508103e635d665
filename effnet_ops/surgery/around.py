"""The layers around the blocks of a known network: its first and last convolutions, their normalisations, its pool.

They are fused in evaluation without gradients. Where a gradient may come, a normalisation and its activation are, in
channels_last. Everywhere else, and where PyTorch's compiler sees them together, the stock forward runs. As in all
replaced layers, parameters are read at each call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import is_
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from effnet_ops import backends, distributed, functional
from effnet_ops.checks import output_size, padding_sides, resolve_padding
from effnet_ops.functional import may_keep
from effnet_ops.ops import PreparedCalls, packed
from effnet_ops.ops._library import Operator
from effnet_ops.ops.conv_norm import FEW_CHANNELS, TALLEST, batch_norm, conv_norm, keeps_channels_last
from effnet_ops.surgery.fused import (
    NORMS,
    FusedLayer,
    NotFusable,
    Part,
    check_norm,
    convolution_padding,
    convolution_pair,
    fused_class,
    norm_params,
    parameter,
    same_convolution,
    trains,
)
from effnet_ops.surgery.structure import stock_class

_FEWEST_PIXELS = 16
"""Packing the weights of a 1x1 convolution costs as much as multiplying them with some ten pixels."""

NETWORKS: set[type[nn.Module]] = set()
"""Networks whose layers around the blocks are fused."""

AROUND: dict[type[nn.Module], type[FusedLayer]] = {}
"""The replacement of each stock class."""

SYNC_NORMS: dict[type[nn.Module], type[FusedLayer]] = {}
"""The same for normalisations that share their statistics with other processes, wherever they are."""

NETWORK_POOLS: dict[type[nn.Module], type[FusedLayer]] = {}
"""The same for pools, which are replaced only as a network's own children."""


class AroundLayer(FusedLayer):
    """Base of the layers around the blocks; what `describe` gives is called with the layer and x."""

    may_train: ClassVar[bool] = False
    """Whether its plan has a method `train`, for calls of which a gradient may come."""

    def run(self, x: Tensor) -> Tensor | None:
        """The layer's output for x, or None where the stock forward shall run."""
        differentiates = self.training or torch.is_grad_enabled()
        if (differentiates and not self.may_train) or torch.compiler.is_compiling():
            return None
        plan = self.plan(x)
        if plan is None:
            return None
        return plan.train(self, x) if differentiates else plan(self, x)


class _Checked:
    """An operator with what it takes behind x, made of a layer's parameters: again when one is another object."""

    __slots__ = ("_known", "_operator")

    def __init__(self, operator: Operator[Any]) -> None:
        self._operator = operator
        # One tuple, which threads that run the same layer exchange as a whole.
        self._known: tuple[Any, Sequence[Any], Callable[[Tensor], Tensor] | None] | None = None

    def __call__(
        self, x: Tensor, state: Sequence[Any], arguments: Callable[..., tuple[Any, ...] | None]
    ) -> Tensor | None:
        """The operator on x and ``arguments(x, *state)``, None where that is None, and the stock forward shall run.

        The last of ``state`` is a weight, or None. ``.to()`` changes a parameter without making another object of it.
        """
        weight = state[-1]
        held = None if weight is None else (weight.shape, weight.dtype, weight.device)
        key = (x.shape[1:], x.dtype, x.device, held, backends.requested())
        known = self._known
        if known is None or key != known[0] or not all(map(is_, state, known[1])):
            fit = 0 not in x.shape[1:] and backends.select(x) == "cpu"
            found = arguments(x, *state) if fit else None
            known = (key, state, None if found is None else _Bound(self._operator, found))
            self._known = known if may_keep(state, weight) else None
        return None if known[2] is None else known[2](x)


class _Bound:
    """An operator with all its arguments but x."""

    __slots__ = ("_arguments", "_operator", "_prepared")

    def __init__(self, operator: Operator[Any], arguments: Sequence[Any]) -> None:
        self._operator, self._arguments = operator, arguments
        self._prepared = PreparedCalls([p for p in arguments if isinstance(p, Tensor)])

    def __call__(self, x: Tensor) -> Tensor:
        return self._prepared.run(x, self._run)

    def _run(self, x: Tensor) -> Tensor:
        return self._operator.run(x, *self._arguments)


def _goes_with(p: Tensor | None, x: Tensor, *shape: int) -> bool:
    """Whether the kernels take a parameter of this shape with x: of its dtype, or float32 where that is half."""
    if p is None:
        return True
    half = x.dtype in (torch.bfloat16, torch.float16)
    return p.shape == shape and p.device == x.device and (p.dtype is x.dtype or (half and p.dtype is torch.float32))


def _norm_state(norm: nn.BatchNorm2d) -> list[Any]:
    buffers = norm._buffers
    return [
        *(norm.eps, parameter(norm, "bias"), buffers["running_mean"], buffers["running_var"]),
        parameter(norm, "weight"),
    ]


def _norm_arguments(
    x: Tensor, channels: int, eps: float, beta: Tensor | None, mean: Tensor | None, var: Tensor | None, gamma: Any
) -> tuple[Any, ...] | None:
    """gamma, beta, mean, var and eps, or None where there are no constant statistics or one does not fit."""
    if mean is None or var is None or not all(_goes_with(p, x, channels) for p in (gamma, beta, mean, var)):
        return None
    return (torch.ones_like(mean) if gamma is None else gamma, beta, mean, var, eps)


class _Convolution:
    """The settings of a convolution that `effnet_ops::conv_norm_inference` computes; raises `NotFusable` for others."""

    __slots__ = ("pointwise", "sides", "stride")

    def __init__(self, part: Part) -> None:
        conv = part.module
        self.sides, self.stride = padding_sides(convolution_padding(part)), convolution_pair(part, "stride")
        kernel = convolution_pair(part, "kernel_size")
        # At kernel 1 and stride 1, TensorFlow's SAME pads nothing.
        self.pointwise = kernel == (1, 1) == self.stride and not any(self.sides)
        if conv.groups != 1 or convolution_pair(part, "dilation") != (1, 1):
            raise NotFusable(f"{part.name} has groups or a dilation")
        if not self.pointwise and (conv.in_channels > FEW_CHANNELS or kernel[0] > TALLEST):
            raise NotFusable(f"{part.name} has {conv.in_channels} channels, and a {kernel} kernel")

    def takes(self, x: Tensor, weight: Tensor) -> bool:
        """Whether the kernels take this weight with x."""
        if not _goes_with(weight, x, weight.shape[0], x.shape[1], *weight.shape[2:]) or 0 in weight.shape:
            return False
        sides = resolve_padding(self.sides, x.shape[2:], weight.shape[2:], self.stride, (1, 1))
        return min(output_size(x.shape[2:], weight.shape[2:], self.stride, sides, (1, 1))) > 0

    def pays(self, x: Tensor, weight: Tensor) -> bool:
        """Whether the kernels are the faster ones: they pack the weights, and write the channels innermost."""
        if self.pointwise:
            return x.shape[0] * x.shape[2] * x.shape[3] >= _FEWEST_PIXELS
        return keeps_channels_last(x, weight)


class _ConvolutionPlan(_Convolution):
    """A convolution alone."""

    __slots__ = ("_checked",)

    def __init__(self, part: Part) -> None:
        super().__init__(part)
        self._checked = _Checked(conv_norm)

    def __call__(self, conv: nn.Conv2d, x: Tensor) -> Tensor | None:
        weight = parameter(conv, "weight")
        if not self.pays(x, weight):
            return None
        return self._checked(x, (parameter(conv, "bias"), weight), self._arguments)

    def _arguments(self, x: Tensor, bias: Tensor | None, weight: Tensor) -> tuple[Any, ...] | None:
        if not self.takes(x, weight) or not _goes_with(bias, x, weight.shape[0]):
            return None
        return (weight, None, bias, None, None, 0.0, self.stride, self.sides, "none")


class _NormPlan:
    """A normalisation and the activation behind it."""

    __slots__ = ("_activation", "_checked")

    def __init__(self, activation: str) -> None:
        self._activation, self._checked = activation, _Checked(batch_norm)

    def __call__(self, norm: nn.BatchNorm2d, x: Tensor) -> Tensor | None:
        if norm.training:
            return None
        return self._checked(x, _norm_state(norm), self._arguments)

    def train(self, norm: nn.BatchNorm2d, x: Tensor) -> Tensor | None:
        params, training = norm_params(norm), trains(norm)
        batch = training or params.running_mean is None
        # PyTorch refuses a single value by an error of its own.
        fits = x.numel() > (x.shape[1] if batch else 0) and functional.trains_norm(x)
        if not fits or not all(_goes_with(p, x, x.shape[1]) for p in params[:4]):
            return None
        return functional.batch_norm(x, params, activation=self._activation, training=training)

    def _arguments(self, x: Tensor, *state: Any) -> tuple[Any, ...] | None:
        norm = _norm_arguments(x, x.shape[1], *state)
        return None if norm is None else (*norm, self._activation)


class _ConvNormPlan(_Convolution):
    """A convolution, its normalisation and the activation behind it, which one module calls."""

    __slots__ = ("_activation", "_after", "_checked", "_conv", "_norm", "_stock")

    def __init__(self, conv: Part, norm: nn.BatchNorm2d, activation: str, stock: Sequence[nn.Module]) -> None:
        super().__init__(conv)
        self._conv, self._norm, self._activation, self._stock = conv.module, norm, activation, stock
        self._after, self._checked = _NormPlan(activation), _Checked(conv_norm)

    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        norm, weight = self._norm, parameter(self._conv, "weight")
        if norm.training or parameter(self._conv, "bias") is not None:
            return None
        if not self.pays(x, weight):
            return self._after(norm, self._conv(x))
        return self._checked(x, (*_norm_state(norm), weight), self._arguments)

    def train(self, layer: nn.Module, x: Tensor) -> Tensor:
        x = self._conv(x)
        y = self._after.train(self._norm, x)
        if y is not None:
            return y
        for module in self._stock:
            x = module(x)
        return x

    def _arguments(self, x: Tensor, *state: Any) -> tuple[Any, ...] | None:
        *norm_state, weight = state
        norm = _norm_arguments(x, weight.shape[0], *norm_state) if self.takes(x, weight) else None
        return None if norm is None else (weight, *norm, self.stride, self.sides, self._activation)


class AroundConvolution(AroundLayer):
    """Base of the convolutions: pointwise ones, and dense ones of few channels, in channels_last."""

    kind = "convolution"
    attributes = ("stride", "padding", "dilation", "groups", "padding_mode")

    def run(self, x: Tensor) -> Tensor | None:
        return same_convolution(self, x) if torch.compiler.is_compiling() else super().run(x)

    @classmethod
    def describe(cls, module: nn.Module) -> _ConvolutionPlan:
        return _ConvolutionPlan(Part("it", module))


class AroundNorm(AroundLayer):
    """Base of the normalisations, with the activation that a library's class runs behind its own."""

    kind = "norm"
    may_train = True

    @classmethod
    def describe(cls, module: nn.Module) -> _NormPlan:
        return _NormPlan(check_norm(Part("it", module)))


class AroundSyncNorm(AroundNorm):
    """Base of the normalisations that share their statistics: in training on a CPU, where the stock ones refuse."""

    def run(self, x: Tensor) -> Tensor | None:
        if not (self.training and isinstance(x, Tensor) and x.device.type == "cpu"):
            return super().run(x)
        group = distributed.group_of(self)
        if group is None:
            y = super().run(x)
            if y is not None:
                return y
            y = distributed.batch_norm_alone(self, x)
        else:
            y = functional.sync_batch_norm(x, norm_params(self), group)
        for part in NORMS[stock_class(self)](self):
            y = part.module(y)
        return y


class AroundConvNorm(AroundLayer):
    """Base of the sequences of a convolution, its normalisation and, in most of them, an activation."""

    kind = "conv_norm"
    may_train = True

    @classmethod
    def describe(cls, module: nn.Module) -> _ConvNormPlan:
        conv, norm, *rest = (*(Part(name, child) for name, child in module._modules.items()), None, None)[:4]
        activation = rest[0]
        if conv is None or norm is None or rest[1:] != [None]:
            raise NotFusable("it is not a convolution, its normalisation and an activation")
        plan = _ConvNormPlan(conv, norm.module, check_norm(norm, activation), list(module)[1:])
        if conv.module.bias is not None:
            raise NotFusable(f"{conv.name} has a bias before its normalisation")
        return plan


class AroundPool(AroundLayer):
    """Base of the average over an image."""

    kind = "pool"

    @classmethod
    def describe(cls, module: nn.Module) -> Callable[[nn.Module, Tensor], Tensor | None]:
        keepdim = cls.keeps_size(module)
        if keepdim is None:
            raise NotFusable("it is not the average over the image")
        return partial(_average, keepdim)

    @classmethod
    def keeps_size(cls, module: nn.Module) -> bool | None:
        """Whether the average over the image is (N, C, 1, 1), or (N, C); None where the module is none."""
        raise NotImplementedError


def _average(keepdim: bool, layer: nn.Module, x: Tensor) -> Tensor | None:
    fits = 0 not in x.shape and backends.select(x) == "cpu"
    return packed.average_pool(packed.AveragePoolCall(x, keepdim)) if fits else None


SYNC_NORMS[nn.SyncBatchNorm] = fused_class(AroundSyncNorm, nn.SyncBatchNorm)
