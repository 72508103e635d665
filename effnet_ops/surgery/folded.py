"""What `optimize_for_inference` puts in the place of layers: the same computation with the normalisations folded in.

Weights of products are packed (see `effnet_ops.packing`) for the dtype of the activations: bf16 in pairs, fp16 in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from effnet_ops import backends, functional, packing, reference
from effnet_ops.checks import check_input, padding_sides, resolve_padding
from effnet_ops.ops import packed
from effnet_ops.ops._library import Prepared, PreparedCalls
from effnet_ops.params import ConvNormParams, SqueezeExciteParams
from effnet_ops.reference import activate, compute_dtype
from effnet_ops.surgery.fused import HOOKS, Unfit, check_untouched, parameter
from effnet_ops.surgery.snapshot import Snapshot


def fold(conv: ConvNormParams, dtype: torch.dtype | None = None) -> ConvNormParams:
    """``conv`` without its normalisation, which is applied to weight and bias: norm(conv(x)) in evaluation.

    Computed in fp64 and rounded once, to ``dtype`` or else the weight's: running variances span ten orders.
    """
    weight, bias, norm = conv.weight.detach().double(), conv.bias, conv.norm
    shift = weight.new_zeros(weight.shape[0]) if bias is None else bias.detach().double()
    if norm is not None:
        scale = torch.rsqrt(norm.running_var.double() + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight.detach().double()
        weight, shift = weight * scale[:, None, None, None], (shift - norm.running_mean.double()) * scale
        if norm.bias is not None:
            shift = shift + norm.bias.detach().double()
    dtype = dtype or conv.weight.dtype
    return ConvNormParams(frozen(weight.to(dtype)), frozen(shift.to(dtype)))


def frozen(value: Tensor) -> nn.Parameter:
    """A parameter with memory of its own that needs no gradient."""
    return nn.Parameter(value.detach().clone(memory_format=torch.contiguous_format), requires_grad=False)


_PREPARED = "_effnet_ops_prepared"


class Folded(nn.Module):
    """Base of the modules that hold folded normalisations: they cannot train.

    ``activations`` is an empty buffer whose dtype the input is cast to, so that ``.to(dtype)`` changes that too; None
    leaves the input as it is. ``depths`` has the number of terms of each product whose weight is packed.
    """

    activations: Tensor | None
    depths: dict[str, int]

    def cast(self, x: Tensor) -> Tensor:
        like = self._buffers.get("activations")
        if like is None and isinstance(x, Tensor):
            return x
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a tensor of floating-point numbers, got {kind}")
        return x.to(like.dtype)

    def set_activations(self, dtype: torch.dtype) -> None:
        """Cast every input to ``dtype`` from now on."""
        device = next(self.parameters()).device
        self.register_buffer("activations", torch.empty(0, dtype=dtype, device=device), persistent=False)
        self._repack()

    def runs_packed(self, x: Tensor, channels: int) -> bool:
        """Whether the packed operator takes x, which must have ``channels``."""
        if x.dim() != 4 or x.shape[1] != channels:
            check_input(x)
            raise ValueError(f"x must have {channels} channels, got shape {tuple(x.shape)}")
        return backends.select(x) == "cpu"

    def prepared(self, x: Tensor, arguments: tuple[Any, ...]) -> Prepared | None:
        """What runs an operator that has run on such an x with these very arguments before."""
        if torch.compiler.is_compiling():
            return None
        calls = self.__dict__.get(_PREPARED)
        return None if calls is None else calls.get((x.shape, x.stride(), x.dtype, arguments), x)

    def run_and_prepare(
        self, x: Tensor, operator: Callable[..., Tensor], prepare: Callable[..., Any], arguments: tuple[Any, ...]
    ) -> Tensor:
        y = operator(x, *arguments)
        if not torch.compiler.is_compiling() and (kernel := prepare(x, *arguments)) is not None:
            calls = self.__dict__.setdefault(_PREPARED, PreparedCalls())
            calls.keep((x.shape, x.stride(), x.dtype, arguments), kernel)
        return y

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != _PREPARED}

    def plain(self, name: str) -> Tensor | None:
        """The weight of a product as (columns, depth), whether it is packed or not."""
        weight = parameter(self, name)
        if weight is None or not packing.is_packed(weight):
            return weight
        bias = parameter(self, name.replace("weight", "bias"))
        return packing.unpack(weight, bias.shape[0], self.depths[name])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        if self.__dict__.get("depths"):
            self._repack()
        return self

    def _repack(self) -> None:
        """Pack the products for the dtype that the activations have now; away from the CPU they stay plain."""
        self.__dict__.pop(_PREPARED, None)
        like = self._buffers.get("activations")
        for name in self.depths:
            weight = self._parameters[name]
            wanted = self._product_dtype(name, weight.dtype if like is None else like.dtype)
            on_cpu, pairs = _on_cpu(weight), wanted is torch.bfloat16
            fits = packing.is_packed(weight) is on_cpu and (not on_cpu or (weight.dim() == 4) is pairs)
            if weight.dtype is not wanted or not fits:
                rows = self.plain(name).detach().to(wanted)
                self._parameters[name] = frozen(packing.pack(rows) if on_cpu else rows)
            elif not weight.is_contiguous():
                # model.to(memory_format=...) takes what has four axes for images.
                self._parameters[name] = frozen(weight)

    def _product_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        return dtype if dtype is torch.bfloat16 else compute_dtype(dtype)

    def train(self, mode: bool = True) -> nn.Module:
        if mode:
            _refuse_to_train()
        return super().train(mode)

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}: script the model that was optimized instead"
        )


def _on_cpu(weight: Tensor) -> bool:
    """Whether it is in the order of the CPU's kernels; elsewhere it is as the functions take it."""
    return weight.device.type == "cpu"


def _refuse_to_train() -> NoReturn:
    raise RuntimeError(
        "this model cannot train: optimize_for_inference folded its batch normalisations into the convolutions. "
        "Train the model that it was made from, and give that one, too, to functions that call train() themselves; "
        "call eval() on this one to use it on"
    )


class FoldedNorm(Folded, nn.Sequential):
    """What is left where a normalisation was: the activations behind it, often none."""


class FoldedPointwise(Folded, nn.Conv2d):
    """A 1x1 convolution with bias and activation; made of an ``nn.Conv2d``, with its weight packed."""

    activation: str

    @classmethod
    def convert(cls, conv: nn.Conv2d, activation: str) -> None:
        """Make ``conv`` one, in place."""
        conv.__class__ = cls
        conv.activation, conv.depths = activation, {"weight": conv.in_channels}
        conv.weight = frozen(packing.pack(conv.weight.detach().flatten(1)))
        if conv.bias is None:
            conv.bias = frozen(conv.weight.new_zeros(conv.out_channels))
        conv._repack()

    def forward(self, x: Tensor) -> Tensor:
        x, bias = self.cast(x), parameter(self, "bias")
        arguments = (parameter(self, "weight"), bias, self.activation)
        if (known := self.prepared(x, arguments)) is not None:
            return known.run(x)
        if self.runs_packed(x, self.in_channels):
            return self.run_and_prepare(x, packed.pointwise, packed.prepare_pointwise, arguments)
        weight = self.plain("weight")[:, :, None, None]
        return functional.pointwise_conv2d(x, weight, bias, activation=self.activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


class FoldedConvolution(Folded, nn.Conv2d):
    """A dense convolution of few channels with bias and activation, in channels_last; made of an ``nn.Conv2d``.

    Its weight is in fp32 (fp64 for fp64 activations), packed on the CPU: of three channels, pairs of bf16 have no use.
    """

    activation: str

    @classmethod
    def convert(cls, conv: nn.Conv2d, padding: functional.Padding, activation: str) -> None:
        """Make ``conv`` one, in place; ``padding`` as `effnet_ops.depthwise_conv2d` takes it."""
        conv.__class__ = cls
        conv.activation, conv.sides = activation, padding_sides(padding)
        conv.depths = {"weight": conv.weight[0].numel()}
        conv.weight = frozen(packing.pack_convolution(conv.weight.detach()))
        conv._repack()

    def dense(self) -> Tensor:
        """The weight (out, in, kh, kw), whether it is packed or not."""
        weight = parameter(self, "weight")
        if weight.dim() == 4:
            return weight
        return packing.unpack_convolution(weight, self.out_channels, self.in_channels, self.kernel_size)

    def _repack(self) -> None:
        self.__dict__.pop(_PREPARED, None)
        weight, like = self._parameters["weight"], self._buffers.get("activations")
        dtype, on_cpu = compute_dtype(weight.dtype if like is None else like.dtype), _on_cpu(weight)
        if weight.dtype is not dtype or (weight.dim() == 3) is not on_cpu:
            dense = self.dense().detach().to(dtype)
            self._parameters["weight"] = frozen(packing.pack_convolution(dense) if on_cpu else dense)

    def forward(self, x: Tensor) -> Tensor:
        x, bias = self.cast(x), parameter(self, "bias")
        arguments = (parameter(self, "weight"), bias, self.kernel_size, self.stride, self.sides, self.activation)
        if (known := self.prepared(x, arguments)) is not None:
            return known.run(x)
        if self.runs_packed(x, self.in_channels):
            return self.run_and_prepare(x, packed.convolution, packed.prepare_convolution, arguments)
        sides = resolve_padding(self.sides, x.shape[2:], self.kernel_size, self.stride, (1, 1))
        convolution = reference.convolution if x.device.type == "cpu" else _library_convolution
        return convolution(x, self.dense(), bias, self.stride, sides, self.activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


def _library_convolution(
    x: Tensor, weight: Tensor, bias: Tensor, stride: Sequence[int], padding: Sequence[int], activation: str
) -> Tensor:
    """`reference.convolution` by PyTorch's kernel for x's dtype, in channels_last: fp32 would move twice as much."""
    top, bottom, left, right = padding
    if (top, left) != (bottom, right):
        x, top, left = nn.functional.pad(x, (left, right, top, bottom)), 0, 0
    weight = weight.to(x.dtype, memory_format=torch.channels_last)
    return activate(nn.functional.conv2d(x, weight, bias.to(x.dtype), stride, (top, left)), activation)


class FoldedLinear(Folded, nn.Linear):
    """A linear layer with its weight packed; made of an ``nn.Linear`` behind folded blocks."""

    @classmethod
    def convert(cls, linear: nn.Linear) -> None:
        """Make ``linear`` one, in place."""
        linear.__class__ = cls
        linear.depths = {"weight": linear.in_features}
        linear.weight = frozen(packing.pack(linear.weight.detach()))
        if linear.bias is None:
            linear.bias = frozen(linear.weight.new_zeros(linear.out_features))
        linear._repack()

    def forward(self, x: Tensor) -> Tensor:
        x = self.cast(x)
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x must have {self.in_features} features, got shape {tuple(x.shape)}")
        rows, bias = x.reshape(-1, self.in_features, 1, 1), parameter(self, "bias")
        arguments = (parameter(self, "weight"), bias, "none")
        if (known := self.prepared(rows, arguments)) is not None:
            y = known.run(rows)
        elif self.runs_packed(rows, self.in_features):
            y = self.run_and_prepare(rows, packed.pointwise, packed.prepare_pointwise, arguments)
        else:
            return nn.functional.linear(x, self.plain("weight").to(x.dtype), bias.to(x.dtype))
        return y.view(*x.shape[:-1], self.out_features)


class FoldedPool(Folded):
    """Base of the classes for the average over an image, behind folded blocks.

    Each derives from the class that it takes the place of, too, whose ``forward`` runs on other devices.
    """

    keepdim: bool

    @staticmethod
    def averages(pool: nn.Module) -> bool:
        """Whether a module of the replaced class averages over the image, and gives that the shape of ``keepdim``."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        arguments = (self.keepdim,)
        if not self.averages(self):
            return super().forward(x)
        if (known := self.prepared(x, arguments)) is not None:
            return known.run(x)
        if x.dim() == 4 and 0 not in x.shape and backends.select(x) == "cpu":
            return self.run_and_prepare(x, packed.average_pool, packed.prepare_average_pool, arguments)
        return super().forward(x)


class FoldedAdaptivePool(FoldedPool, nn.AdaptiveAvgPool2d):
    """Made of an ``nn.AdaptiveAvgPool2d`` with one output pixel."""

    keepdim = True

    @staticmethod
    def averages(pool: nn.AdaptiveAvgPool2d) -> bool:
        return pool.output_size in (1, (1, 1))


POOLS: dict[type[nn.Module], type[FoldedPool]] = {nn.AdaptiveAvgPool2d: FoldedAdaptivePool}
"""What takes the place of a pool that is the average over the image, by its class."""


_TENSORS = tuple(
    f"{part}_{kind}" for part in ("expand", "depthwise", "reduce", "excite", "project") for kind in ("weight", "bias")
)


class FoldedMBConv(Folded):
    """An MBConv block as one operator, without normalisations and without drop path.

    Input (N, Cin, H, W), output (N, Cout, Ho, Wo). Parameters ``expand_weight``, ``expand_bias`` and so on for
    ``depthwise``, ``project``, ``reduce`` and ``excite``; those that the block lacks are None. On the CPU weights are
    packed, that of the depthwise convolution as (kh, kw, C).

    Args:
        expand, depthwise, project: folded convolutions; ``expand`` can be None.
        squeeze_excite: its two products, or None.
        stride, padding, activation, gate, residual: as `effnet_ops.mbconv` takes them.
        after: an activation behind the projection; only for blocks without a residual.
    """

    def __init__(
        self,
        expand: ConvNormParams | None,
        depthwise: ConvNormParams,
        squeeze_excite: SqueezeExciteParams | None,
        project: ConvNormParams,
        *,
        stride: tuple[int, int],
        padding: functional.Padding,
        activation: str,
        gate: str,
        residual: bool,
        after: str = "none",
    ) -> None:
        super().__init__()
        dtype, self.depths = depthwise.weight.dtype, {}
        self._add_product("expand", expand)
        self.depthwise_weight = frozen(packing.pack_depthwise(depthwise.weight.detach()))
        self.depthwise_bias = depthwise.bias
        for name, at in (("reduce", 0), ("excite", 2)):
            weight, bias = squeeze_excite[at : at + 2] if squeeze_excite else (None, None)
            if weight is not None:
                bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
                weight, bias = weight.detach().to(dtype), frozen(bias.to(dtype))
            self._add_product(name, None if weight is None else ConvNormParams(weight, bias))
        self._add_product("project", project)
        self.in_channels = (depthwise if expand is None else expand).weight.shape[0 if expand is None else 1]
        self.stride, self.padding, self.residual = tuple(stride), padding_sides(padding), residual
        self.activation, self.gate, self.after = activation, gate, after
        self.squeeze_activation = (squeeze_excite.activation if squeeze_excite else None) or activation
        self._repack()

    def _add_product(self, name: str, conv: ConvNormParams | None) -> None:
        packed_weight = None if conv is None else frozen(packing.pack(conv.weight.detach().flatten(1)))
        self.register_parameter(f"{name}_weight", packed_weight)
        self.register_parameter(f"{name}_bias", None if conv is None else conv.bias)
        if conv is not None:
            self.depths[f"{name}_weight"] = conv.weight.shape[1]

    def _repack(self) -> None:
        super()._repack()
        filters = self._parameters["depthwise_weight"]
        if _on_cpu(filters) and filters.dim() == 4:
            self._parameters["depthwise_weight"] = frozen(packing.pack_depthwise(filters))
        elif not _on_cpu(filters) and filters.dim() == 3:
            self._parameters["depthwise_weight"] = frozen(packing.unpack_depthwise(filters))

    def _product_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """The gate is computed in fp32 (fp64 for fp64), as the pool is that it comes from."""
        return (
            compute_dtype(dtype) if name in ("reduce_weight", "excite_weight") else super()._product_dtype(name, dtype)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.cast(x)
        y = self._run_packed(x) if self.runs_packed(x, self.in_channels) else self._run_plain(x)
        return y if self.after == "none" else activate(y, self.after)

    def _run_packed(self, x: Tensor) -> Tensor:
        tensors = list(self._parameters.values())
        if len(tensors) != len(_TENSORS):
            # A replica of nn.DataParallel has plain attributes instead.
            tensors = [getattr(self, name) for name in _TENSORS]
        config = (self.residual, self.activation, self.squeeze_activation, self.gate)
        return packed.mbconv(x, *tensors, self.stride, self.padding, *config)

    def _run_plain(self, x: Tensor) -> Tensor:
        """The block by `effnet_ops.mbconv`, on whatever backend that chooses."""

        def conv(name: str) -> ConvNormParams | None:
            weight = self.plain(f"{name}_weight")
            return None if weight is None else ConvNormParams(weight[:, :, None, None], parameter(self, f"{name}_bias"))

        reduce, excite, squeeze_excite = conv("reduce"), conv("excite"), None
        if reduce is not None:
            squeeze_excite = SqueezeExciteParams(*reduce[:2], *excite[:2], self.squeeze_activation)
        filters = parameter(self, "depthwise_weight")
        filters = packing.unpack_depthwise(filters) if filters.dim() == 3 else filters
        return functional.mbconv(
            x,
            conv("expand"),
            ConvNormParams(filters, parameter(self, "depthwise_bias")),
            squeeze_excite,
            conv("project"),
            stride=self.stride,
            padding=self.padding or "same",
            activation=self.activation,
            gate=self.gate,
            residual=self.residual,
            training=False,
        )

    def extra_repr(self) -> str:
        return f"stride={self.stride}, padding={self.padding}, activation={self.activation}, residual={self.residual}"


_SEQUENCE = "_effnet_ops_sequence"
_settings = attrgetter("stride", "padding", "residual", "activation", "squeeze_activation", "gate")


class FoldedSequence(nn.Sequential):
    """Folded blocks, or such sequences, one after the other: on the CPU one call; made of an ``nn.Sequential``.

    That saves the Python around each block.
    """

    @classmethod
    def convert(cls, sequence: nn.Module) -> None:
        """Make ``sequence`` one, in place, if it is a plain ``nn.Sequential`` with two folded blocks or more inside."""
        if type(sequence) is nn.Sequential and len(_blocks_of(sequence) or ()) > 1:
            sequence.__class__ = cls

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or not isinstance(input, Tensor):
            return super().forward(input)
        known = self.__dict__.get(_SEQUENCE)
        if known is None or not known.holds(self):
            known = self.__dict__[_SEQUENCE] = _Sequence(self)
        y = known.run(input)
        return super().forward(input) if y is None else y

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != _SEQUENCE}


def _blocks_of(sequence: nn.Sequential) -> list[FoldedMBConv] | None:
    """All blocks in the order of their calls, or None where there is anything else, or a hook."""
    blocks: list[FoldedMBConv] = []
    for child in sequence.children():
        try:
            check_untouched("", child)
        except Unfit:
            return None
        if type(child) in (nn.Sequential, FoldedSequence):
            inner = _blocks_of(child)
            if inner is None:
                return None
            blocks += inner
        elif type(child) is FoldedMBConv and child.after == "none":
            blocks.append(child)
        else:
            return None
    return blocks


class _Sequence:
    """What a `FoldedSequence` was when it was looked at, and whether it still is that."""

    def __init__(self, sequence: FoldedSequence) -> None:
        inner = [module for module in sequence.modules() if module is not sequence]
        # A new instance attribute can be a forward of its own.
        states = [module.__dict__ for module in inner]
        names = ("_modules", "_parameters", "_buffers", *HOOKS)
        watched = [sequence._modules, *states, *(state[name] for state in states for name in names)]
        self._links, self._snapshot = sequence._modules, Snapshot(watched)
        self._modules, self._types = inner, list(map(type, inner))
        self._blocks = _blocks_of(sequence) or []
        numbers = [
            packed.SequenceBlock.of(block.expand_weight is not None, block.reduce_weight is not None, *_settings(block))
            for block in self._blocks
        ]
        self._numbers = [number for block in numbers for number in block]
        tensors = (p for block in self._blocks for p in block._parameters.values())
        self._tensors = [p for p in tensors if p is not None]
        self._prepared = PreparedCalls()

    def holds(self, sequence: FoldedSequence) -> bool:
        """Whether nothing has changed since. A replica has children of its own."""
        same = self._links is sequence._modules and self._snapshot.holds()
        return same and list(map(type, self._modules)) == self._types

    def run(self, x: Tensor) -> Tensor | None:
        """The blocks in one call, or None where one of them would not run packed on what it is given."""
        if len(self._blocks) < 2 or _has_any_global_hook():
            return None
        x = self._blocks[0].cast(x)
        key = (x.shape, x.stride(), x.dtype)
        if (known := self._prepared.get(key, x)) is not None:
            return known.run(x)
        if not self._runs_packed(x):
            return None
        y = packed.mbconv_sequence(x, self._tensors, self._numbers)
        self._prepared.keep(key, packed.prepare_sequence(x, self._tensors, self._numbers))
        return y

    def _runs_packed(self, x: Tensor) -> bool:
        for block in self._blocks:
            project, like = block._parameters.get("project_weight"), block._buffers.get("activations")
            if project is None or not packed.fits(x, project) or (like is not None and like.dtype is not x.dtype):
                return False
        return self._blocks[0].runs_packed(x, self._blocks[0].in_channels)
