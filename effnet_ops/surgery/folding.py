"""What an optimized copy runs: convolutions with their normalisations folded in, and weights packed for the kernels.

These are values, made from modules and beside them; `surgery.folded` has the modules that keep and call them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effnet_ops import backends, functional, packing, reference
from effnet_ops.checks import check_input, padding_sides, resolve_padding
from effnet_ops.ops import PreparedCalls, packed
from effnet_ops.ops.calls import PackedConv
from effnet_ops.params import ConvNormParams, SqueezeExciteParams
from effnet_ops.reference import activate, compute_dtype
from effnet_ops.surgery.fused import (
    HOOKS,
    LAYERS,
    NotFusable,
    Part,
    Steps,
    check_pointwise,
    convolution_padding,
    convolution_pair,
    stock_class,
)


class Calls(threading.local):
    """What the calls of a thread know of each other."""

    depth = 0
    """How many containers of optimized copies are being called, one in the other."""
    armed: dict[nn.Module, Any] = {}  # noqa: RUF012  (replaced, never changed)
    """The parts that the innermost container calls itself, with what runs in their place; the called ones are gone."""
    moved = False
    """Whether a contiguous image became channels_last, which it would not in the model."""


calls = Calls()

_FEW_CHANNELS, _TALLEST = 16, 16
"""Dense convolutions up to this many channels and filter rows, such as a network's first, have a packed form."""


def fold(conv: ConvNormParams, dtype: torch.dtype | None = None) -> ConvNormParams:
    """``conv`` without its normalisation, which is applied to weight and bias: norm(conv(x)) in evaluation.

    Computed in fp64 and rounded once, to ``dtype`` or else the weight's: running variances span ten orders.
    """
    # `Tensor.detach`, since a watched parameter notes that its own is called (`surgery.guard`).
    weight, bias, norm = Tensor.detach(conv.weight).double(), conv.bias, conv.norm
    shift = weight.new_zeros(weight.shape[0]) if bias is None else Tensor.detach(bias).double()
    if norm is not None:
        scale = torch.rsqrt(norm.running_var.double() + norm.eps)
        if norm.weight is not None:
            scale = scale * Tensor.detach(norm.weight).double()
        weight, shift = weight * scale[:, None, None, None], (shift - norm.running_mean.double()) * scale
        if norm.bias is not None:
            shift = shift + Tensor.detach(norm.bias).double()
    dtype = dtype or conv.weight.dtype
    return ConvNormParams(_own(weight.to(dtype)), _own(shift.to(dtype)))


def _own(value: Tensor) -> Tensor:
    """The values in memory of their own."""
    return value.detach().clone(memory_format=torch.contiguous_format)


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a product's weight for activations of ``dtype``: bf16 in pairs, fp16 in fp32."""
    return dtype if dtype is torch.bfloat16 else compute_dtype(dtype)


def _on_cpu(tensor: Tensor) -> bool:
    """Whether weights are packed, in the order of the CPU's kernels; elsewhere they are as the functions take them."""
    return tensor.device.type == "cpu"


class _Packed:
    """Base of what runs packed weights."""

    channels: int

    def __init__(self) -> None:
        self._prepared = PreparedCalls()

    def runs_packed(self, x: Tensor, weight: Tensor) -> bool:
        """Whether the packed operator takes x, which must have the right number of channels."""
        if x.dim() != 4 or x.shape[1] != self.channels:
            check_input(x)
            raise ValueError(f"x must have {self.channels} channels, got shape {tuple(x.shape)}")
        return _on_cpu(weight) and backends.select(x) == "cpu"


class Product(_Packed):
    """activation(W x + b): a 1x1 convolution, from its folded parameters, or a linear layer."""

    def __init__(self, conv: ConvNormParams, dtype: torch.dtype, activation: str = "none") -> None:
        super().__init__()
        rows = conv.weight.flatten(1)
        self.columns, self.channels = rows.shape
        self.weight, self.bias, self.activation = _packed_product(rows, dtype), conv.bias, activation

    def __call__(self, x: Tensor) -> Tensor:
        return self._prepared.run(x, self._run)

    def _run(self, x: Tensor) -> Tensor:
        if self.runs_packed(x, self.weight):
            return packed.pointwise(packed.PackedPointwiseCall(x, self.weight, self.bias, self.activation))
        weight = _plain_product(self.weight, self.columns, self.channels)
        return functional.pointwise_conv2d(x, weight, self.bias, activation=self.activation)


def _packed_product(rows: Tensor, dtype: torch.dtype) -> Tensor:
    rows = rows.to(product_dtype(dtype))
    return packing.pack(rows) if _on_cpu(rows) else rows


def _plain_product(weight: Tensor, columns: int, depth: int) -> Tensor:
    rows = packing.unpack(weight, columns, depth) if packing.is_packed(weight) else weight
    return rows[:, :, None, None]


class DenseConvolution(_Packed):
    """A dense convolution of few channels with bias and activation, in channels_last.

    Its weight is in fp32 (fp64 for fp64 activations): of three channels, pairs of bf16 have no use.
    """

    def __init__(
        self, conv: ConvNormParams, stride: Sequence[int], padding: functional.Padding, activation: str, to_nhwc: bool
    ) -> None:
        super().__init__()
        self.columns, self.channels, *kernel = conv.weight.shape
        self.weight = packing.pack_convolution(conv.weight) if _on_cpu(conv.weight) else conv.weight
        self.bias, self.activation = conv.bias, activation
        self.kernel, self.stride, self.sides = tuple(kernel), tuple(stride), padding_sides(padding)
        self._to_nhwc = to_nhwc

    def __call__(self, x: Tensor) -> Tensor:
        if not self._to_nhwc and x.is_contiguous():
            calls.moved = True
        return self._prepared.run(x, self._run)

    def _run(self, x: Tensor) -> Tensor:
        if self.runs_packed(x, self.weight):
            settings = (self.kernel, self.stride, self.sides, self.activation)
            return packed.convolution(packed.PackedConvolutionCall(x, self.weight, self.bias, *settings))
        weight = self.weight
        if _on_cpu(weight):
            weight = packing.unpack_convolution(weight, self.columns, self.channels, self.kernel)
        sides = resolve_padding(self.sides, x.shape[2:], self.kernel, self.stride, (1, 1))
        convolution = reference.convolution if x.device.type == "cpu" else _library_convolution
        return convolution(x, weight, self.bias, self.stride, sides, self.activation)


def _library_convolution(
    x: Tensor, weight: Tensor, bias: Tensor, stride: Sequence[int], padding: Sequence[int], activation: str
) -> Tensor:
    """`reference.convolution` by PyTorch's kernel for x's dtype, in channels_last: fp32 would move twice as much."""
    top, bottom, left, right = padding
    if (top, left) != (bottom, right):
        x, top, left = nn.functional.pad(x, (left, right, top, bottom)), 0, 0
    weight = weight.to(x.dtype, memory_format=torch.channels_last)
    return activate(nn.functional.conv2d(x, weight, bias.to(x.dtype), stride, (top, left)), activation)


class OtherConvolution:
    """Any other convolution: its module's own forward, or that of a fused depthwise one, with folded parameters."""

    def __init__(self, conv: nn.Conv2d, folded: ConvNormParams, activation: str) -> None:
        stock = stock_class(conv)
        depthwise = LAYERS.get(stock)
        cls = depthwise if depthwise is not None and depthwise.concerns(conv) else stock
        module = cls.__new__(cls)
        module.__dict__.update(conv.__dict__, **{name: {} for name in (*HOOKS, "_buffers")})
        module._parameters = {"weight": folded.weight, "bias": folded.bias}
        module.__dict__.pop("forward", None)
        self._conv, self._activation = module, activation

    def __call__(self, x: Tensor) -> Tensor:
        return activate(self._conv.forward(x), self._activation)


def convolution(
    conv: nn.Conv2d, params: ConvNormParams, dtype: torch.dtype, activation: str
) -> Callable[[Tensor], Any]:
    """What runs ``conv`` with ``params`` and the activation on inputs of ``dtype``."""
    part = Part("it", conv)
    weight = params.weight
    try:
        padding, stride = convolution_padding(part), convolution_pair(part, "stride")
        close = convolution_pair(part, "dilation") == (1, 1)
    except NotFusable:
        return OtherConvolution(conv, fold(params, dtype), activation)
    if _is_pointwise(part):
        return Product(fold(params, compute_dtype(dtype)), dtype, activation)
    if close and conv.groups == 1 and weight.shape[1] <= _FEW_CHANNELS and weight.shape[2] <= _TALLEST:
        nhwc = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
        return DenseConvolution(fold(params, compute_dtype(dtype)), stride, padding, activation, nhwc)
    return OtherConvolution(conv, fold(params, dtype), activation)


def _is_pointwise(part: Part) -> bool:
    try:
        return stock_class(part.module) is nn.Conv2d and check_pointwise(part) is part.module
    except NotFusable:
        return False


class _Block(_Packed):
    """Base of the blocks: ``_call`` is that of the packed operator, without x."""

    _call: Any
    after: str
    depths: dict[str, int]
    """Of the products by name: how many terms each has."""

    def _products(
        self,
        squeeze_excite: SqueezeExciteParams | None,
        project: ConvNormParams | None,
        wide: torch.dtype,
        dtype: torch.dtype,
    ) -> tuple[PackedConv | None, PackedConv | None, PackedConv | None]:
        """reduce, excite and project, packed; ``wide`` is the dtype of sums for activations of ``dtype``."""
        reduce = excite = None
        if squeeze_excite is not None:
            # The gate is computed in fp32 (fp64 for fp64), as the pool is that it comes from.
            reduce, excite = (fold(ConvNormParams(*squeeze_excite[at : at + 2]), wide) for at in (0, 2))
        packed_ = (self._product("reduce", reduce, wide), self._product("excite", excite, wide))
        return *packed_, self._product("project", project, dtype)

    def _product(self, name: str, conv: ConvNormParams | None, dtype: torch.dtype) -> PackedConv | None:
        if conv is None:
            return None
        rows = conv.weight.flatten(1)
        self.depths[name] = rows.shape[1]
        return PackedConv(_packed_product(rows, dtype), conv.bias)

    def __call__(self, x: Tensor) -> Tensor:
        y = self._run_packed(x) if self.runs_packed(x, self._weight()) else self._run_plain(x)
        return y if self.after == "none" else activate(y, self.after)

    def _weight(self) -> Tensor:
        """That of the k x k convolution."""
        raise NotImplementedError

    def _run_packed(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _run_plain(self, x: Tensor) -> Tensor:
        """The block by its public function, on whatever backend that chooses."""
        raise NotImplementedError

    def _conv(self, name: str) -> ConvNormParams | None:
        conv = getattr(self._call, name)
        if conv is None:
            return None
        return ConvNormParams(_plain_product(conv.weight, len(conv.bias), self.depths[name]), conv.bias)

    def _squeeze_excite(self) -> SqueezeExciteParams | None:
        reduce, excite = self._conv("reduce"), self._conv("excite")
        return None if reduce is None else SqueezeExciteParams(*reduce[:2], *excite[:2], self._call.squeeze_activation)

    def _settings(self) -> dict[str, Any]:
        """Those of the public function."""
        call = self._call
        settings = {"activation": call.activation, "gate": call.gate, "residual": call.residual, "training": False}
        return {"stride": call.stride, "padding": call.padding or "same", **settings}


class Block(_Block):
    """An MBConv block without normalisations and without drop path, from folded convolutions.

    On the CPU weights are packed, that of the depthwise convolution as (kh, kw, C). ``after`` is an activation behind
    the projection; the other settings are as `effnet_ops.mbconv` takes them.
    """

    def __init__(
        self,
        expand: ConvNormParams | None,
        depthwise: ConvNormParams,
        squeeze_excite: SqueezeExciteParams | None,
        project: ConvNormParams,
        dtype: torch.dtype,
        *,
        stride: Sequence[int],
        padding: functional.Padding | Callable[[Tensor], functional.Padding],
        activation: str,
        gate: str,
        residual: bool,
        after: str = "none",
        dilation: Sequence[int] = (1, 1),
    ) -> None:
        super().__init__()
        wide, cpu = depthwise.weight.dtype, _on_cpu(depthwise.weight)
        self.after, self.depths = after, {}
        self._padding = padding if callable(padding) else None
        self.channels = (depthwise if expand is None else expand).weight.shape[0 if expand is None else 1]
        filters = packing.pack_depthwise(depthwise.weight) if cpu else depthwise.weight
        self._call = packed.PackedBlockCall(
            None,
            self._product("expand", expand, dtype),
            PackedConv(filters, depthwise.bias),
            *self._products(squeeze_excite, project, wide, dtype),
            tuple(stride),
            () if callable(padding) else padding_sides(padding),
            tuple(dilation),
            residual,
            activation,
            (squeeze_excite.activation if squeeze_excite else None) or activation,
            gate,
        )

    def _weight(self) -> Tensor:
        return self._call.depthwise.weight

    def _run_packed(self, x: Tensor) -> Tensor:
        call = self._call._replace(x=x)
        if self._padding is not None:
            call = call._replace(padding=padding_sides(self._padding(x)))
        return packed.mbconv(call)

    def _run_plain(self, x: Tensor) -> Tensor:
        filters, bias = self._call.depthwise
        filters = packing.unpack_depthwise(filters) if _on_cpu(filters) else filters
        convs = self._conv("expand"), ConvNormParams(filters, bias)
        settings = {**self._settings(), "dilation": self._call.dilation}
        if self._padding is not None:
            settings["padding"] = self._padding(x)
        return functional.mbconv(x, *convs, self._squeeze_excite(), self._conv("project"), **settings)


class FusedBlock(_Block):
    """A Fused-MBConv block without normalisations and without drop path, from folded convolutions, as `Block`.

    On the CPU the dense convolution is packed, too. The settings are as `effnet_ops.fused_mbconv` takes them.
    """

    def __init__(
        self,
        expand: ConvNormParams,
        squeeze_excite: SqueezeExciteParams | None,
        project: ConvNormParams | None,
        dtype: torch.dtype,
        *,
        stride: Sequence[int],
        padding: functional.Padding,
        activation: str,
        gate: str,
        residual: bool,
        after: str = "none",
    ) -> None:
        super().__init__()
        self.after, self.depths, weight = after, {}, expand.weight
        _, self.channels, *kernel = weight.shape
        # channels_last is what the kernels of a GPU read, which else lay the weight out at each call.
        filters = weight.to(product_dtype(dtype)).contiguous(memory_format=torch.channels_last)
        self._call = packed.FusedPackedCall(
            None,
            PackedConv(packing.pack_convolution(filters) if _on_cpu(filters) else filters, expand.bias),
            *self._products(squeeze_excite, project, weight.dtype, dtype),
            tuple(kernel),
            tuple(stride),
            padding_sides(padding),
            residual,
            activation,
            (squeeze_excite.activation if squeeze_excite else None) or activation,
            gate,
        )

    def _weight(self) -> Tensor:
        return self._call.expand.weight

    def _run_packed(self, x: Tensor) -> Tensor:
        return packed.fused_mbconv(self._call._replace(x=x))

    def _run_plain(self, x: Tensor) -> Tensor:
        filters, bias = self._call.expand
        if _on_cpu(filters):
            filters = packing.unpack_convolution(filters, len(bias), self.channels, self._call.kernel)
        expand = ConvNormParams(filters, bias)
        return functional.fused_mbconv(x, expand, self._squeeze_excite(), self._conv("project"), **self._settings())


class SteppedBlock:
    """A folded block with what its module calls around it, as that module calls it, in the precision ``wide``."""

    def __init__(self, block: _Block, steps: Steps, wide: torch.dtype) -> None:
        self._block, self._steps, self._wide = block, steps, wide

    def __call__(self, x: Tensor) -> Tensor:
        y = self._steps.run(lambda h: self._block(h.to(x.dtype)).to(self._wide), x.to(self._wide), None)
        return y.to(x.dtype)


class BlockSequence:
    """Blocks one after the other: one call, which saves the Python around each of them.

    Raises `NotFusable` where something runs between their kernels.
    """

    def __init__(self, blocks: Sequence[_Block | SteppedBlock]) -> None:
        if not all(isinstance(block, _Block) and block.after == "none" for block in blocks):
            raise NotFusable("something runs between the blocks")
        self._blocks = list(blocks)
        self._prepared = PreparedCalls()

    def __call__(self, x: Tensor) -> Tensor:
        return self._prepared.run(x, self._run)

    def _run(self, x: Tensor) -> Tensor:
        for block in self._blocks:
            x = block(x)
        return x
