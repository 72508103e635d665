"""The operators of optimized models, most on packed weights (see `effnet_ops.packing`), without gradient kernels.

Autocast does not change their precision, which was chosen when the weights were packed. An input that it made bf16 in
another layer, or left fp32, is converted to what the weights are packed for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effnet_ops import packing, reference
from effnet_ops.checks import output_size, resolve_padding
from effnet_ops.ops import _library, standard
from effnet_ops.ops.calls import Activation, ConvNorm, PackedConv, Pair, Sides, SqueezeExcite, Weight
from effnet_ops.params import ConvNormParams, SqueezeExciteParams


class PackedBlockCall(NamedTuple):
    """An MBConv block with folded normalisations; the depthwise weight is (kh, kw, C)."""

    x: Activation
    expand: PackedConv | None
    depthwise: PackedConv
    reduce: PackedConv | None
    excite: PackedConv | None
    project: PackedConv
    stride: Pair
    padding: Sides
    dilation: Pair
    residual: bool
    activation: str
    squeeze_activation: str
    gate: str

    def sides(self) -> tuple[int, int, int, int]:
        kernel = self.depthwise.weight.shape[:2]
        return resolve_padding(self.padding, self.x.shape[2:], kernel, self.stride, self.dilation)

    def _product(self, conv: PackedConv, channels: int) -> ConvNormParams:
        return ConvNormParams(_pointwise_weight(conv, channels, self.x), conv.bias)

    def reference(self) -> Tensor:
        x, channels, expand, squeeze_excite = self.x, self.depthwise.weight.shape[2], None, None
        if self.expand is not None:
            expand = self._product(self.expand, x.shape[1])
        if self.reduce is not None:
            reduce, excite = _squeeze_excite_products(self, channels)
            squeeze_excite = SqueezeExciteParams(*reduce[:2], *excite[:2], self.squeeze_activation)
        stages = reference.mbconv(
            x,
            expand,
            ConvNormParams(packing.unpack_depthwise(self.depthwise.weight), self.depthwise.bias),
            squeeze_excite,
            self._product(self.project, channels),
            stride=self.stride,
            padding=self.sides(),
            dilation=self.dilation,
            activation=self.activation,
            gate=self.gate,
            residual=self.residual,
            drop_path=None,
            training=False,
        )
        return _library.as_result(x, stages.y)

    def standard(self) -> Tensor:
        x, channels, expand, squeeze_excite = self.x, self.depthwise.weight.shape[2], None, None
        if self.expand is not None:
            expand = _unpacked(self.expand, x.shape[1], x)
        if self.reduce is not None:
            reduce, excite = _squeeze_excite_products(self, channels)
            squeeze_excite = SqueezeExcite(*reduce[:2], *excite[:2], self.squeeze_activation, self.gate)
        filters = packing.unpack_depthwise(self.depthwise.weight)
        depthwise = ConvNorm(filters, None, self.depthwise.bias, None, None)
        block = (expand, depthwise, squeeze_excite, _unpacked(self.project, channels, x))
        return standard.mbconv(x, *block, self.stride, self.sides(), self.dilation, self.activation, self.residual)

    def output(self) -> Tensor:
        kernel = self.depthwise.weight.shape[:2]
        size = output_size(self.x.shape[2:], kernel, self.stride, self.sides(), self.dilation)
        return _library.empty_result(self.x, (self.x.shape[0], self.project.bias.shape[0], *size))

    def flops(self, out: Sequence[int]) -> int:
        batch, inputs, height, width = self.x
        *kernel, channels = self.depthwise.weight
        flops = _library.convolution_flops(out, (channels, *kernel)) + _library.convolution_flops(
            out, (out[1], channels)
        )
        if self.expand is not None:
            flops += _library.convolution_flops((batch, channels, height, width), (channels, inputs))
        if self.reduce is not None:
            flops += 2 * _library.convolution_flops((batch, channels), (channels, self.reduce.bias[0]))
        return flops


class FusedPackedCall(NamedTuple):
    """A Fused-MBConv block with folded normalisations; ``expand`` is packed as `packing.pack_convolution` does.

    Without ``project`` it is one convolution with its activation.
    """

    x: Activation
    expand: PackedConv
    reduce: PackedConv | None
    excite: PackedConv | None
    project: PackedConv | None
    kernel: Pair
    stride: Pair
    padding: Sides
    residual: bool
    activation: str
    squeeze_activation: str
    gate: str

    def sides(self) -> tuple[int, int, int, int]:
        return resolve_padding(self.padding, self.x.shape[2:], self.kernel, self.stride, (1, 1))

    def _channels(self) -> int:
        return self.expand.bias.shape[0]

    def _expand_weight(self) -> Tensor:
        weight = packing.unpack_convolution(self.expand.weight, self._channels(), self.x.shape[1], tuple(self.kernel))
        return weight.to(reference.compute_dtype(self.x.dtype))

    def reference(self) -> Tensor:
        squeeze_excite = project = None
        if self.reduce is not None:
            reduce, excite = _squeeze_excite_products(self, self._channels())
            squeeze_excite = SqueezeExciteParams(*reduce[:2], *excite[:2], self.squeeze_activation)
        if self.project is not None:
            project = ConvNormParams(_pointwise_weight(self.project, self._channels(), self.x), self.project.bias)
        stages = reference.fused_mbconv(
            self.x,
            ConvNormParams(self._expand_weight(), self.expand.bias),
            squeeze_excite,
            project,
            stride=self.stride,
            padding=self.sides(),
            activation=self.activation,
            gate=self.gate,
            residual=self.residual,
            drop_path=None,
            training=False,
        )
        return _library.as_result(self.x, stages.y)

    def standard(self) -> Tensor:
        layer = project = None
        if self.reduce is not None:
            reduce, excite = _squeeze_excite_products(self, self._channels())
            layer = SqueezeExcite(*reduce[:2], *excite[:2], self.squeeze_activation, self.gate)
        if self.project is not None:
            project = _unpacked(self.project, self._channels(), self.x)
        expand = ConvNorm(self._expand_weight(), None, self.expand.bias, None, None)
        settings = (self.stride, self.sides(), self.activation, self.residual)
        return standard.fused_mbconv(self.x, expand, layer, project, *settings)

    def output(self) -> Tensor:
        size = output_size(self.x.shape[2:], self.kernel, self.stride, self.sides(), (1, 1))
        last = self.expand if self.project is None else self.project
        return _library.empty_result(self.x, (self.x.shape[0], last.bias.shape[0], *size))

    def flops(self, out: Sequence[int]) -> int:
        channels = self.expand.bias[0]
        flops = _library.convolution_flops(out, (channels, self.x[1], *self.kernel))
        if self.project is not None:
            flops += _library.convolution_flops(out, (out[1], channels))
        if self.reduce is not None:
            flops += 2 * _library.convolution_flops((out[0], channels), (channels, self.reduce.bias[0]))
        return flops


def _squeeze_excite_products(call: Any, channels: int) -> tuple[ConvNormParams, ConvNormParams]:
    """The two products of a block's squeeze-and-excitation, unpacked."""
    reduce = ConvNormParams(_pointwise_weight(call.reduce, channels, call.x), call.reduce.bias)
    return reduce, ConvNormParams(_pointwise_weight(call.excite, call.reduce.bias.shape[0], call.x), call.excite.bias)


def _pointwise_weight(conv: PackedConv, channels: int, like: Tensor) -> Tensor:
    weight = packing.unpack(conv.weight, conv.bias.shape[0], channels)[:, :, None, None]
    return weight.to(reference.compute_dtype(like.dtype))


def _unpacked(conv: PackedConv, channels: int, like: Tensor) -> ConvNorm:
    return ConvNorm(_pointwise_weight(conv, channels, like), None, conv.bias, None, None)


class PackedPointwiseCall(NamedTuple):
    """activation(W x + b) for x (N, Cin, H, W)."""

    x: Activation
    weight: Weight
    bias: Weight
    activation: str

    def reference(self) -> Tensor:
        return _library.as_result(self.x, self.standard())

    def standard(self) -> Tensor:
        weight = _pointwise_weight(PackedConv(self.weight, self.bias), self.x.shape[1], self.x)
        return reference.pointwise_conv2d(self.x, weight, self.bias, None, self.activation)

    def output(self) -> Tensor:
        return _library.empty_result(self.x, (self.x.shape[0], self.bias.shape[0], *self.x.shape[2:]))

    def flops(self, out: Sequence[int]) -> int:
        return _library.convolution_flops(out, (out[1], self.x[1]))


class PackedConvolutionCall(NamedTuple):
    """activation(conv(x) + b), channels_last."""

    x: Activation
    weight: Weight
    bias: Weight
    kernel: Pair
    stride: Pair
    padding: Sides
    activation: str

    def sides(self) -> tuple[int, int, int, int]:
        return resolve_padding(self.padding, self.x.shape[2:], self.kernel, self.stride, (1, 1))

    def reference(self) -> Tensor:
        return self.standard().contiguous(memory_format=torch.channels_last)

    def standard(self) -> Tensor:
        weight = packing.unpack_convolution(self.weight, self.bias.shape[0], self.x.shape[1], tuple(self.kernel))
        return reference.convolution(self.x, weight, self.bias, self.stride, self.sides(), self.activation)

    def output(self) -> Tensor:
        x, size = self.x, output_size(self.x.shape[2:], self.kernel, self.stride, self.sides(), (1, 1))
        size = (x.shape[0], self.bias.shape[0], *size)
        return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    def flops(self, out: Sequence[int]) -> int:
        return _library.convolution_flops(out, (out[1], self.x[1], *self.kernel))


class AveragePoolCall(NamedTuple):
    """The mean over the pixels of x (N, C, H, W), as (N, C, 1, 1) or, without ``keepdim``, (N, C)."""

    x: Activation
    keepdim: bool

    def reference(self) -> Tensor:
        wide = self.x.to(reference.compute_dtype(self.x.dtype))
        return wide.mean((2, 3), keepdim=self.keepdim).to(self.x.dtype).contiguous()

    def standard(self) -> Tensor:
        y = standard.average(self.x.to(reference.compute_dtype(self.x.dtype))).to(self.x.dtype)
        return y if self.keepdim else y.flatten(1)

    def output(self) -> Tensor:
        batch, channels, *_ = self.x.shape
        return self.x.new_empty(batch, channels, 1, 1) if self.keepdim else self.x.new_empty(batch, channels)

    def flops(self, out: Sequence[int]) -> int:
        return 0


_mbconv = _library.define_inference("mbconv_packed", PackedBlockCall)
_fused_mbconv = _library.define_inference("fused_mbconv_packed", FusedPackedCall)
_pointwise = _library.define_inference("pointwise_packed", PackedPointwiseCall)
_convolution = _library.define_inference("convolution_packed", PackedConvolutionCall)
average_pool = _library.define_inference("average_pool", AveragePoolCall)


def _fits(x: Tensor, product: Tensor) -> bool:
    """Whether the kernels take x with a product's weight as it is packed."""
    wanted = x.dtype if x.dtype is torch.bfloat16 else reference.compute_dtype(x.dtype)
    return product.dtype is wanted and (product.dim() == 4) is (wanted is torch.bfloat16)


def _run_product(operator: _library.Operator[Any], call: Any, product: Tensor) -> Tensor:
    """The operator, where x has the dtype that a product is packed for, or had it before autocast."""
    x = call.x
    if not _fits(x, product) and x.is_cpu and x.dtype is not torch.float64 and torch.is_autocast_enabled("cpu"):
        call = call._replace(x=x.to(product.dtype))
    return operator(call) if _fits(call.x, product) else call.reference()


def mbconv(call: PackedBlockCall) -> Tensor:
    return _run_product(_mbconv, call, call.project.weight)


def fused_mbconv(call: FusedPackedCall) -> Tensor:
    if call.expand.weight.dim() == 4 and call.x.shape[1] % 2 == 1:
        # The kernels take pairs of channels, and here some pairs are of two pixels.
        return call.reference()
    return _run_product(_fused_mbconv, call, call.expand.weight)


def pointwise(call: PackedPointwiseCall) -> Tensor:
    return _run_product(_pointwise, call, call.weight)


def convolution(call: PackedConvolutionCall) -> Tensor:
    fit = call.weight.dtype is reference.compute_dtype(call.x.dtype)
    return _convolution(call) if fit else call.reference()
