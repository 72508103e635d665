"""The operators of the layers around blocks, in evaluation: they take the parameters that modules have.

A normalisation has gamma, beta, mean and var with constant statistics; a convolution without one has its bias as beta.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effnet_ops import reference
from effnet_ops.checks import output_size, resolve_padding
from effnet_ops.ops import _library

FEW_CHANNELS, TALLEST = 16, 16
"""Most input channels for which a dense convolution is worth it, and most filter rows that its kernel takes."""


def _normalise(
    y: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    activation: str,
) -> Tensor:
    gamma, beta, mean, var = (None if p is None else p.to(y.dtype) for p in (gamma, beta, mean, var))
    if gamma is not None:
        y = reference.batch_norm(y, mean, var, gamma, beta, eps)
    elif beta is not None:
        y = y + beta[:, None, None]
    return reference.activate(y, activation)


def reference_batch_norm(x: Tensor, *args: Any) -> Tensor:
    y = _normalise(x.to(reference.compute_dtype(x.dtype)), *args)
    return _library.as_result(x, y)


def _batch_norm_fake(x: Tensor, *args: Any) -> Tensor:
    return _library.empty_result(x, x.shape)


def reference_conv_norm(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    stride: Sequence[int],
    padding: Sequence[int],
    activation: str,
) -> Tensor:
    dtype, kernel = reference.compute_dtype(x.dtype), weight.shape[2:]
    sides = resolve_padding(padding, x.shape[2:], kernel, stride, (1, 1))
    zeros = weight.new_zeros(weight.shape[0], dtype=dtype)
    y = reference.convolution(x.to(dtype), weight, zeros, stride, sides, "none")
    y = _normalise(y, gamma, beta, mean, var, eps, activation)
    return _empty_convolved(x, weight, y.shape[2:]).copy_(y)


def keeps_channels_last(x: Tensor, weight: Tensor) -> bool:
    """Whether a convolution's output is channels_last: where x or the weight is, as PyTorch's."""
    return torch.channels_last in (_library.memory_format(x), _library.memory_format(weight))


def _empty_convolved(x: Tensor, weight: Tensor, size: Sequence[int]) -> Tensor:
    layout = torch.channels_last if keeps_channels_last(x, weight) else torch.contiguous_format
    return torch.empty((x.shape[0], weight.shape[0], *size), dtype=x.dtype, device=x.device, memory_format=layout)


def _conv_norm_fake(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    stride, padding, kernel = args[5], args[6], weight.shape[2:]
    sides = resolve_padding(padding, x.shape[2:], kernel, stride, (1, 1))
    return _empty_convolved(x, weight, output_size(x.shape[2:], kernel, stride, sides, (1, 1)))


_batch_norm_operator = _library.define_inference(
    "batch_norm_inference(Tensor x, Tensor gamma, Tensor? beta, Tensor mean, Tensor var, float eps, str activation) "
    "-> Tensor",
    reference_batch_norm,
    _batch_norm_fake,
)
_conv_norm_operator = _library.define_inference(
    "conv_norm_inference(Tensor x, Tensor weight, Tensor? gamma, Tensor? beta, Tensor? mean, Tensor? var, float eps, "
    "int[] stride, int[] padding, str activation) -> Tensor",
    reference_conv_norm,
    _conv_norm_fake,
)
_library.register_autocast(_conv_norm_operator, (0,))


@register_flop_formula(torch.ops.effnet_ops.conv_norm_inference)
def _flops(x: Sequence[int], weight: Sequence[int], *args: Any, out_shape: Sequence[int], **kwargs: Any) -> int:
    return _library.convolution_flops(out_shape, weight)


def batch_norm(x: Tensor, arguments: Sequence[Any]) -> Tensor:
    """activation(norm(x)); ``arguments`` are what the operator takes behind x."""
    return _library.call(_batch_norm_operator, x, *arguments)


def conv_norm(x: Tensor, arguments: Sequence[Any]) -> Tensor:
    """activation(norm(conv(x))); ``arguments`` are what the operator takes behind x.

    The convolution is pointwise, or has at most `TALLEST` filter rows; it has no groups and no dilation.
    """
    return _library.call(_conv_norm_operator, x, *arguments)
