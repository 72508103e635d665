"""The operators of optimized models, most on packed weights (see `effnet_ops.packing`), without gradient kernels.

Autocast does not change their precision, which was chosen when the weights were packed. An input that it made bf16 in
another layer, or left fp32, is converted to what the weights are packed for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effnet_ops import _native, packing, reference
from effnet_ops.checks import output_size, resolve_padding
from effnet_ops.ops import _library
from effnet_ops.ops._library import ACTIVATIONS, GATES
from effnet_ops.params import ConvNormParams, SqueezeExciteParams


def _pointwise_weight(packed: Tensor, out: int, channels: int, like: Tensor) -> Tensor:
    weight = packing.unpack(packed, out, channels).view(out, channels, 1, 1)
    return weight.to(reference.compute_dtype(like.dtype))


def reference_mbconv(
    x: Tensor,
    expand_weight: Tensor | None,
    expand_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor,
    reduce_weight: Tensor | None,
    reduce_bias: Tensor | None,
    excite_weight: Tensor | None,
    excite_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    residual: bool,
    activation: str,
    squeeze_activation: str,
    gate: str,
) -> Tensor:
    channels, expand, squeeze_excite = depthwise_weight.shape[2], None, None
    if expand_weight is not None:
        expand = ConvNormParams(_pointwise_weight(expand_weight, channels, x.shape[1], x), expand_bias)
    if reduce_weight is not None:
        reduced = reduce_bias.shape[0]
        squeeze_excite = SqueezeExciteParams(
            _pointwise_weight(reduce_weight, reduced, channels, x),
            reduce_bias,
            _pointwise_weight(excite_weight, channels, reduced, x),
            excite_bias,
            squeeze_activation,
        )
    sides = resolve_padding(padding, x.shape[2:], depthwise_weight.shape[:2], stride, (1, 1))
    project = ConvNormParams(_pointwise_weight(project_weight, project_bias.shape[0], channels, x), project_bias)
    depthwise = ConvNormParams(packing.unpack_depthwise(depthwise_weight), depthwise_bias)
    y, _ = reference.mbconv(
        x,
        expand,
        depthwise,
        squeeze_excite,
        project,
        stride=stride,
        padding=sides,
        activation=activation,
        gate=gate,
        residual=residual,
        drop_path=None,
        training=False,
    )
    return _library.as_result(x, y)


def _mbconv_fake(x: Tensor, *args: Any) -> Tensor:
    depthwise_weight, project_bias, stride, padding = args[2], args[9], args[10], args[11]
    return _library.empty_result(
        x, (x.shape[0], project_bias.shape[0], *_size(x, depthwise_weight.shape[:2], stride, padding))
    )


class SequenceBlock(NamedTuple):
    """The settings of one block of `mbconv_sequence`, as the operator takes them; names as places in their lists."""

    expands: int
    gated: int
    stride_h: int
    stride_w: int
    padded: int
    top: int
    bottom: int
    left: int
    right: int
    residual: int
    activation: int
    squeeze_activation: int
    gate: int

    @classmethod
    def of(
        cls,
        expands: bool,
        gated: bool,
        stride: Sequence[int],
        padding: Sequence[int],
        residual: bool,
        activation: str,
        squeeze_activation: str,
        gate: str,
    ) -> SequenceBlock:
        sides = tuple(padding) or (0, 0, 0, 0)
        places = (ACTIVATIONS.index(activation), ACTIVATIONS.index(squeeze_activation), GATES.index(gate))
        return cls(expands, gated, *stride, bool(padding), *sides, residual, *places)

    def arguments(self, tensors: Iterator[Tensor]) -> tuple[Any, ...]:
        """The arguments of `mbconv_packed` behind x, with the block's tensors taken from ``tensors``."""

        def take(count: int, there: int = 1) -> list[Tensor | None]:
            return [next(tensors) if there else None for _ in range(count)]

        parameters = (*take(2, self.expands), *take(2), *take(4, self.gated), *take(2))
        padding = self[5:9] if self.padded else ()
        names = (ACTIVATIONS[self.activation], ACTIVATIONS[self.squeeze_activation], GATES[self.gate])
        return *parameters, (self.stride_h, self.stride_w), padding, bool(self.residual), *names


def _run_sequence(x: Tensor, tensors: Sequence[Tensor], blocks: Sequence[int], run: Callable[..., Tensor]) -> Tensor:
    width, remaining = len(SequenceBlock._fields), iter(tensors)
    for at in range(0, len(blocks), width):
        x = run(x, *SequenceBlock(*blocks[at : at + width]).arguments(remaining))
    return x


def reference_mbconv_sequence(x: Tensor, tensors: Sequence[Tensor], blocks: Sequence[int]) -> Tensor:
    return _run_sequence(x, tensors, blocks, reference_mbconv)


def _mbconv_sequence_fake(x: Tensor, tensors: Sequence[Tensor], blocks: Sequence[int]) -> Tensor:
    return _run_sequence(x, tensors, blocks, _mbconv_fake)


def _size(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> tuple[int, int]:
    sides = resolve_padding(padding, x.shape[2:], kernel, stride, (1, 1))
    return output_size(x.shape[2:], kernel, stride, sides, (1, 1))


def reference_pointwise(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    weight = _pointwise_weight(weight, bias.shape[0], x.shape[1], x)
    y = reference.pointwise_conv2d(x, weight, bias, None, activation)
    return _library.as_result(x, y)


def _pointwise_fake(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    return _library.empty_result(x, (x.shape[0], bias.shape[0], *x.shape[2:]))


def reference_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    activation: str,
) -> Tensor:
    weight = packing.unpack_convolution(weight, bias.shape[0], x.shape[1], tuple(kernel))
    sides = resolve_padding(padding, x.shape[2:], kernel, stride, (1, 1))
    y = reference.convolution(x, weight, bias, stride, sides, activation)
    return y.contiguous(memory_format=torch.channels_last)


def _convolution_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    *_: Any,
) -> Tensor:
    size = (x.shape[0], bias.shape[0], *_size(x, kernel, stride, padding))
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def reference_average_pool(x: Tensor, keepdim: bool) -> Tensor:
    return x.to(reference.compute_dtype(x.dtype)).mean((2, 3), keepdim=keepdim).to(x.dtype).contiguous()


def _average_pool_fake(x: Tensor, keepdim: bool) -> Tensor:
    return x.new_empty(*x.shape[:2], 1, 1) if keepdim else x.new_empty(x.shape[:2])


_mbconv_operator = _library.define_inference(
    "mbconv_packed(Tensor x, Tensor? expand_weight, Tensor? expand_bias, Tensor depthwise_weight, "
    "Tensor depthwise_bias, Tensor? reduce_weight, Tensor? reduce_bias, Tensor? excite_weight, Tensor? excite_bias, "
    "Tensor project_weight, Tensor project_bias, int[] stride, int[] padding, bool residual, str activation, "
    "str squeeze_activation, str gate) -> Tensor",
    reference_mbconv,
    _mbconv_fake,
)
_sequence_operator = _library.define_inference(
    "mbconv_sequence_packed(Tensor x, Tensor[] tensors, int[] blocks) -> Tensor",
    reference_mbconv_sequence,
    _mbconv_sequence_fake,
)
_pointwise_operator = _library.define_inference(
    "pointwise_packed(Tensor x, Tensor weight, Tensor bias, str activation) -> Tensor",
    reference_pointwise,
    _pointwise_fake,
)
_convolution_operator = _library.define_inference(
    "convolution_packed(Tensor x, Tensor weight, Tensor bias, int[] kernel, int[] stride, int[] padding, "
    "str activation) -> Tensor",
    reference_convolution,
    _convolution_fake,
)

_average_pool_operator = _library.define_inference(
    "average_pool(Tensor x, bool keepdim) -> Tensor", reference_average_pool, _average_pool_fake
)


def _mbconv_flops(x: Sequence[int], *args: Any, out_shape: Sequence[int], **kwargs: Any) -> int:
    kernel_h, kernel_w, channels = args[2]
    pixels_in, pixels_out = x[0] * x[2] * x[3], x[0] * out_shape[2] * out_shape[3]
    flops = 2 * pixels_out * channels * (kernel_h * kernel_w + args[9][0])
    if args[0] is not None:
        flops += 2 * pixels_in * x[1] * channels
    return flops if args[4] is None else flops + 4 * x[0] * channels * args[5][0]


register_flop_formula(torch.ops.effnet_ops.mbconv_packed)(_mbconv_flops)


@register_flop_formula(torch.ops.effnet_ops.mbconv_sequence_packed)
def _sequence_flops(
    x: Sequence[int], tensors: Sequence[Sequence[int]], blocks: Sequence[int], *_: Any, **kwargs: Any
) -> int:
    flops = 0

    def run(x: Sequence[int], *args: Any) -> tuple[int, ...]:
        nonlocal flops
        sides = resolve_padding(args[11], x[2:], args[2][:2], args[10], (1, 1))
        out_shape = (x[0], args[9][0], *output_size(x[2:], args[2][:2], args[10], sides, (1, 1)))
        flops += _mbconv_flops(x, *args, out_shape=out_shape)
        return out_shape

    _run_sequence(x, tensors, blocks, run)
    return flops


@register_flop_formula(torch.ops.effnet_ops.pointwise_packed)
def _pointwise_flops(x: Sequence[int], *args: Any, out_shape: Sequence[int], **kwargs: Any) -> int:
    return _library.convolution_flops(out_shape, (out_shape[1], x[1]))


@register_flop_formula(torch.ops.effnet_ops.convolution_packed)
def _convolution_flops(
    x: Sequence[int], weight: Any, bias: Any, kernel: Sequence[int], *_: Any, out_shape: Sequence[int], **kwargs: Any
) -> int:
    return _library.convolution_flops(out_shape, (out_shape[1], x[1], *kernel))


def fits(x: Tensor, product: Tensor) -> bool:
    """Whether the kernels take x with a product's weight as it is packed."""
    wanted = x.dtype if x.dtype is torch.bfloat16 else reference.compute_dtype(x.dtype)
    return product.dtype is wanted and (product.dim() == 4) is (wanted is torch.bfloat16)


def _before_autocast(x: Tensor, product: Tensor) -> Tensor:
    """x in the dtype that a product is packed for, where it can be autocast that made it one that does not fit."""
    cast = x.is_cpu and x.dtype is not torch.float64 and torch.is_autocast_enabled("cpu")
    return x.to(product.dtype) if cast else x


def mbconv(x: Tensor, *args: Any) -> Tensor:
    """An MBConv block with folded normalisations; the arguments are those of the operator's schema."""
    if fits(x, args[8]) or fits(x := _before_autocast(x, args[8]), args[8]):
        return _library.call(_mbconv_operator, x, *args)
    return reference_mbconv(x, *args)


def mbconv_sequence(x: Tensor, tensors: Sequence[Tensor], blocks: Sequence[int]) -> Tensor:
    """Blocks one after the other in one call, which fit x (`fits`); ``blocks`` are the numbers of `SequenceBlock`s.

    ``tensors``: those of all blocks in the order of `mbconv`, without the ones that a block lacks.
    """
    return _library.call(_sequence_operator, x, tensors, blocks)


def prepare_sequence(x: Tensor, tensors: Sequence[Tensor], blocks: Sequence[int]) -> _library.Prepared | None:
    """`mbconv_sequence` for inputs like x, which has run with these arguments; None where it can only run so."""
    wide = reference.compute_dtype(x.dtype)
    fits = _library.Prepared.fits(x) and _library.is_nhwc(x)
    if not fits or not all(
        p.is_contiguous() and p.dtype is (torch.bfloat16 if p.dim() == 4 else wide) for p in tensors
    ):
        return None
    width, remaining, numbers, shape = len(SequenceBlock._fields), iter(tensors), [], x.shape
    for at in range(0, len(blocks), width):
        block = SequenceBlock(*blocks[at : at + width])
        *parameters, stride, padding, residual, _, _, _ = block.arguments(remaining)
        *kernel, channels = parameters[2].shape
        window = _library.window_numbers(shape[2:], kernel, stride, padding)
        out, reduced = parameters[9].shape[0], 0 if parameters[5] is None else parameters[5].shape[0]
        settings = (residual, block.activation, block.squeeze_activation, block.gate)
        addresses = [0 if p is None else p.data_ptr() for p in parameters]
        numbers.append([shape[0], channels, *window, shape[1], out, reduced, *settings, *addresses])
        shape = (shape[0], out, *window[2:4])
    kernel = _native.module.prepare_sequence(_library.DTYPES.index(x.dtype), numbers)
    return _library.Prepared(kernel, shape, tensors)


def pointwise(x: Tensor, *args: Any) -> Tensor:
    """activation(W x + b) for x (N, Cin, H, W); ``args`` are weight, bias and activation."""
    if fits(x, args[0]) or fits(x := _before_autocast(x, args[0]), args[0]):
        return _library.call(_pointwise_operator, x, *args)
    return reference_pointwise(x, *args)


def convolution(x: Tensor, weight: Tensor, bias: Tensor, *args: Any) -> Tensor:
    """activation(conv(x) + b), channels_last; ``args`` are kernel, stride, padding and activation."""
    fit = weight.dtype is reference.compute_dtype(x.dtype)
    return (
        _library.call(_convolution_operator, x, weight, bias, *args)
        if fit
        else reference_convolution(x, weight, bias, *args)
    )


def prepare_pointwise(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> _library.Prepared | None:
    """The same for `pointwise`."""
    one_pixel = x.shape[2] * x.shape[3] == 1 and x.is_contiguous()
    if not fits(x, weight) or not _reads(x, weight, bias) or not (one_pixel or _library.is_nhwc(x)):
        return None
    out = bias.shape[0]
    numbers = (x.shape[0], x.shape[2] * x.shape[3], x.shape[1], out, ACTIVATIONS.index(activation))
    kernel = _native.module.prepare_pointwise(
        _library.DTYPES.index(x.dtype), (*numbers, weight.data_ptr(), bias.data_ptr())
    )
    layout = torch.contiguous_format if one_pixel else torch.channels_last
    return _library.Prepared(kernel, (x.shape[0], out, *x.shape[2:]), (weight, bias), layout)


def prepare_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    activation: str,
) -> _library.Prepared | None:
    """The same for `convolution`."""
    fit = weight.dtype is bias.dtype and _reads(x, weight, bias)
    if not fit or not (x.is_contiguous() or _library.is_nhwc(x)):
        return None
    height, width, *size, kernel_h, kernel_w, stride_h, stride_w, _, _, top, left = _library.window_numbers(
        x.shape[2:], kernel, stride, padding
    )
    window = (height, width, *size, kernel_h, kernel_w, stride_h, stride_w, top, left, not x.is_contiguous())
    addresses = (ACTIVATIONS.index(activation), weight.data_ptr(), bias.data_ptr())
    numbers = (x.shape[0], x.shape[1], bias.shape[0], *window, *addresses)
    prepared = _native.module.prepare_convolution(_library.DTYPES.index(x.dtype), numbers)
    return _library.Prepared(prepared, (x.shape[0], bias.shape[0], *size), (weight, bias))


def prepare_average_pool(x: Tensor, keepdim: bool) -> _library.Prepared | None:
    """The same for `average_pool`."""
    if not _library.Prepared.fits(x) or not _library.is_nhwc(x):
        return None
    kernel = _native.module.prepare_average_pool(
        _library.DTYPES.index(x.dtype), (x.shape[0], x.shape[2] * x.shape[3], x.shape[1])
    )
    shape = (*x.shape[:2], 1, 1) if keepdim else x.shape[:2]
    return _library.Prepared(kernel, shape, (), torch.contiguous_format)


def _reads(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    dense = weight.is_contiguous() and bias.is_contiguous()
    return _library.Prepared.fits(x) and dense and bias.dtype is reference.compute_dtype(x.dtype)


def average_pool(x: Tensor, keepdim: bool) -> Tensor:
    """The mean over the pixels of x (N, C, H, W), as (N, C, 1, 1) or, without ``keepdim``, (N, C)."""
    return _library.call(_average_pool_operator, x, keepdim)
