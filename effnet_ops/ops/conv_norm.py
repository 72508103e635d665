"""The operators of the layers around blocks, in evaluation: they take the parameters that modules have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from effnet_ops import reference
from effnet_ops.checks import output_size, resolve_padding
from effnet_ops.ops import _library, standard
from effnet_ops.ops.calls import Activation, Constant, ConvNorm, Pair, Sides, Weight

FEW_CHANNELS, TALLEST = 16, 16
"""Most input channels for which a dense convolution is worth it, and most filter rows that its kernel takes."""


class NormCall(NamedTuple):
    """activation(norm(x)) with constant statistics."""

    x: Activation
    gamma: Weight
    beta: Weight | None
    mean: Constant
    var: Constant
    eps: float
    activation: str

    def reference(self) -> Tensor:
        x = self.x.to(reference.compute_dtype(self.x.dtype))
        return _library.as_result(self.x, _normalise(x, self[1:6], self.activation))

    def standard(self) -> Tensor:
        x = self.x.to(reference.compute_dtype(self.x.dtype))
        return standard.normalise(x, self[1:6], self.activation).to(self.x.dtype)

    def output(self) -> Tensor:
        return _library.empty_result(self.x, self.x.shape)

    def flops(self, out: Sequence[int]) -> int:
        return 0


class ConvNormCall(NamedTuple):
    """activation(norm(conv(x))); constant statistics, or no normalisation.

    The convolution is pointwise, or has at most `TALLEST` filter rows; it has no groups and no dilation.
    """

    x: Activation
    conv: ConvNorm
    stride: Pair
    padding: Sides
    activation: str

    def sides(self) -> tuple[int, int, int, int]:
        return resolve_padding(self.padding, self.x.shape[2:], self.conv.weight.shape[2:], self.stride, (1, 1))

    def reference(self) -> Tensor:
        x, weight = self.x.to(reference.compute_dtype(self.x.dtype)), self.conv.weight
        zeros = weight.new_zeros(weight.shape[0], dtype=x.dtype)
        y = reference.convolution(x, weight, zeros, self.stride, self.sides(), "none")
        y = _normalise(y, self.conv[1:], self.activation)
        return self._empty(y.shape[2:]).copy_(y)

    def standard(self) -> Tensor:
        x = self.x.to(reference.compute_dtype(self.x.dtype))
        return standard.conv_norm(x, self.conv, self.stride, self.sides(), self.activation).to(self.x.dtype)

    def output(self) -> Tensor:
        kernel = self.conv.weight.shape[2:]
        return self._empty(output_size(self.x.shape[2:], kernel, self.stride, self.sides(), (1, 1)))

    def _empty(self, size: Sequence[int]) -> Tensor:
        x, weight = self.x, self.conv.weight
        layout = torch.channels_last if keeps_channels_last(x, weight) else torch.contiguous_format
        size = (x.shape[0], weight.shape[0], *size)
        return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)

    def flops(self, out: Sequence[int]) -> int:
        return _library.convolution_flops(out, self.conv.weight)


def _normalise(y: Tensor, norm: Sequence[Tensor | float | None], activation: str) -> Tensor:
    *tensors, eps = norm
    gamma, beta, mean, var = (None if p is None else p.to(y.dtype) for p in tensors)
    if gamma is not None:
        y = reference.batch_norm(y, mean, var, gamma, beta, eps)
    elif beta is not None:
        y = y + beta[:, None, None]
    return reference.activate(y, activation)


def keeps_channels_last(x: Tensor, weight: Tensor) -> bool:
    """Whether a convolution's output is channels_last: where x or the weight is, as PyTorch's."""
    return torch.channels_last in (_library.memory_format(x), _library.memory_format(weight))


batch_norm = _library.define_inference("batch_norm_inference", NormCall)
conv_norm = _library.define_inference("conv_norm_inference", ConvNormCall, autocast=True)
