"""The words as exporters want them: in as few of PyTorch's own operators as there can be, each with its name.

The reference computes the same and is the specification, so it writes a normalisation and a gate as arithmetic. An
exporter knows ``batch_norm`` and folds it into the convolution in front of it, and knows ``hardsigmoid`` and the pool.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_ops.ops.calls import ConvNorm, SqueezeExcite
from effnet_ops.reference import ACTIVATIONS, compute_dtype, pad_unevenly

_GATES: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "hard_sigmoid": F.hardsigmoid}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **ACTIVATIONS,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}


def activate(x: Tensor, name: str) -> Tensor:
    return _ACTIVATIONS[name](x)


def average(x: Tensor) -> Tensor:
    """The mean over each image, (N, C, 1, 1)."""
    return F.adaptive_avg_pool2d(x, 1)


def excite(x: Tensor, pooled: Tensor, layer: Sequence[Any]) -> Tensor:
    """x times its gate, from its mean (N, C, 1, 1); ``layer`` has the fields of `SqueezeExcite`."""
    *params, activation, gate = layer
    reduce_weight, reduce_bias, expand_weight, expand_bias = (None if p is None else p.to(x.dtype) for p in params)
    hidden = activate(F.conv2d(pooled, reduce_weight, reduce_bias), activation)
    return x * _GATES[gate](F.conv2d(hidden, expand_weight, expand_bias))


def normalise(x: Tensor, norm: Sequence[Any], activation: str) -> Tensor:
    """activation(norm(x)) with constant statistics; ``norm`` is gamma, beta, mean, var and eps."""
    *tensors, eps = norm
    gamma, beta, mean, var = (None if p is None else p.to(x.dtype) for p in tensors)
    return activate(F.batch_norm(x, mean, var, gamma, beta, False, 0.0, eps), activation)


def conv_norm(
    x: Tensor,
    conv: ConvNorm,
    stride: Sequence[int],
    padding: Sequence[int],
    activation: str,
    groups: int = 1,
    dilation: Sequence[int] = (1, 1),
) -> Tensor:
    """activation(norm(conv(x))) with constant statistics, padding (top, bottom, left, right)."""
    x, sides = pad_unevenly(x, padding)
    window = (tuple(stride), sides, tuple(dilation), groups)
    weight = conv.weight.to(x.dtype)
    if conv.gamma is not None:
        return normalise(F.conv2d(x, weight, None, *window), conv[1:], activation)
    bias = None if conv.beta is None else conv.beta.to(x.dtype)
    return activate(F.conv2d(x, weight, bias, *window), activation)


def mbconv(
    x: Tensor,
    expand: ConvNorm | None,
    depthwise: ConvNorm,
    squeeze_excite: SqueezeExcite | None,
    project: ConvNorm,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    residual: bool,
    drop_path: Tensor | None = None,
) -> Tensor:
    """A block whose statistics are constants."""
    h = x.to(compute_dtype(x.dtype))
    if expand is not None:
        h = conv_norm(h, expand, (1, 1), (0, 0, 0, 0), activation)
    h = conv_norm(h, depthwise, stride, padding, activation, depthwise.weight.shape[0], dilation)
    return _finish(x, h, squeeze_excite, project, residual, drop_path)


def fused_mbconv(
    x: Tensor,
    expand: ConvNorm,
    squeeze_excite: SqueezeExcite | None,
    project: ConvNorm | None,
    stride: Sequence[int],
    padding: Sequence[int],
    activation: str,
    residual: bool,
    drop_path: Tensor | None = None,
) -> Tensor:
    """A block whose statistics are constants."""
    h = conv_norm(x.to(compute_dtype(x.dtype)), expand, stride, padding, activation)
    return _finish(x, h, squeeze_excite, project, residual, drop_path)


def _finish(
    x: Tensor,
    h: Tensor,
    squeeze_excite: SqueezeExcite | None,
    project: ConvNorm | None,
    residual: bool,
    drop_path: Tensor | None,
) -> Tensor:
    """What a block does with its wide h."""
    if squeeze_excite is not None:
        h = excite(h, average(h), squeeze_excite)
    if project is not None:
        h = conv_norm(h, project, (1, 1), (0, 0, 0, 0), "none")
    if drop_path is not None:
        h = h * drop_path.to(h.dtype)[:, None, None, None]
    return (h + x.to(h.dtype) if residual else h).to(x.dtype)
