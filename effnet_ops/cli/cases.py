"""The calls that `effnet-ops check` compares, in the shapes where kernels go wrong.

Odd sizes, stride 2 on odd input, channels that are no multiple of 16, asymmetric padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import effnet_ops
from effnet_ops import BatchNormParams, ConvNormParams, SqueezeExciteParams

Inputs = dict[str, Tensor]
CONVOLUTIONS = ("expand", "depthwise", "project")


class Case(NamedTuple):
    """One call of a public function; ``inputs`` (fp64) names what is differentiated, x first."""

    word: str
    inputs: Inputs
    function: Callable[[Inputs], Tensor]


def all_cases(seed: int) -> list[Case]:
    draw = _Draw(seed)
    windows = (
        (3, 1, 1, "silu"),
        (3, 2, "same", "relu6"),
        (5, 2, 2, "hardswish"),
        (5, 1, "same", "none"),
        (7, 1, 3, "relu"),
    )
    return [
        *(_depthwise(draw, *window) for window in windows),
        *(_pointwise(draw, activation) for activation in ("silu", "none")),
        *(_squeeze_excite(draw, gate) for gate in ("sigmoid", "hard_sigmoid")),
        *(_mbconv(draw, False, kernel, stride) for kernel, stride in ((3, 1), (5, 2))),
        *(_mbconv(draw, True, kernel, stride, kept) for kernel, stride, kept in ((3, 1, "always"), (5, 2, "never"))),
        *(_fused_mbconv(draw, training, stride) for training in (False, True) for stride in (1, 2)),
    ]


class _Draw:
    """Random tensors from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, generator=self.generator, dtype=torch.float64) * scale

    def positive(self, *size: int) -> Tensor:
        return torch.rand(size, generator=self.generator, dtype=torch.float64) + 0.5

    def conv(self, name: str, *shape: int) -> Inputs:
        fan_in = shape[1] * shape[2] * shape[3]
        return {
            f"{name}.weight": self.normal(*shape, scale=fan_in**-0.5),
            f"{name}.gamma": self.positive(shape[0]),
            f"{name}.beta": self.normal(shape[0], scale=0.2),
        }

    def squeeze_excite(self, channels: int, reduced: int) -> Inputs:
        return {
            "se.reduce_weight": self.normal(reduced, channels, 1, 1, scale=0.3),
            "se.reduce_bias": self.normal(reduced),
            "se.expand_weight": self.normal(channels, reduced, 1, 1, scale=0.3),
            "se.expand_bias": self.normal(channels),
        }


def _depthwise(draw: _Draw, kernel: int, stride: int, padding: int | str, activation: str) -> Case:
    weight = draw.normal(40, 1, kernel, kernel, scale=1 / kernel)
    inputs = {"x": draw.normal(2, 40, 15, 13), "weight": weight, "bias": draw.normal(40)}

    def function(v: Inputs) -> Tensor:
        return effnet_ops.depthwise_conv2d(*v.values(), stride=stride, padding=padding, activation=activation)

    return Case("depthwise_conv2d", inputs, function)


def _pointwise(draw: _Draw, activation: str) -> Case:
    inputs = {"x": draw.normal(2, 24, 9, 11), "weight": draw.normal(56, 24, 1, 1, scale=0.2), "bias": draw.normal(56)}
    return Case("pointwise_conv2d", inputs, lambda v: effnet_ops.pointwise_conv2d(*v.values(), activation=activation))


def _squeeze_excite(draw: _Draw, gate: str) -> Case:
    inputs = {"x": draw.normal(2, 72, 7, 9)} | draw.squeeze_excite(72, 6)
    return Case("squeeze_excite", inputs, lambda v: effnet_ops.squeeze_excite(*v.values(), gate=gate))


def _mbconv(draw: _Draw, training: bool, kernel: int, stride: int, recompute: str = "auto") -> Case:
    out_channels = 24 if stride == 1 else 40
    inputs = {"x": draw.normal(2, 24, 13, 15)}
    inputs |= draw.conv("expand", 144, 24, 1, 1) | draw.conv("depthwise", 144, 1, kernel, kernel)
    inputs |= draw.squeeze_excite(144, 6) | draw.conv("project", out_channels, 144, 1, 1)
    channels = {name: inputs[f"{name}.weight"].shape[0] for name in CONVOLUTIONS}
    running = {name: (draw.normal(c, scale=0.1), draw.positive(c)) for name, c in channels.items()}

    def function(v: Inputs) -> Tensor:
        expand, depthwise, project = (_conv_norm(v, name, *running[name]) for name in CONVOLUTIONS)
        se = SqueezeExciteParams(*(value for name, value in v.items() if name.startswith("se.")))
        window = {"stride": stride, "padding": "same", "residual": stride == 1}
        with effnet_ops.set_recompute(recompute):
            return effnet_ops.mbconv(v["x"], expand, depthwise, se, project, **window, training=training)

    return Case(f"mbconv, {'training' if training else 'eval'}", inputs, function)


def _fused_mbconv(draw: _Draw, training: bool, stride: int) -> Case:
    """With stride 1 a residual and a projection, with stride 2 the convolution alone."""
    inputs = {"x": draw.normal(2, 24, 13, 15)} | draw.conv("expand", 72, 24, 3, 3)
    if stride == 1:
        inputs |= draw.conv("project", 24, 72, 1, 1)
    names = [name for name in CONVOLUTIONS if f"{name}.weight" in inputs]
    channels = {name: inputs[f"{name}.weight"].shape[0] for name in names}
    running = {name: (draw.normal(c, scale=0.1), draw.positive(c)) for name, c in channels.items()}

    def function(v: Inputs) -> Tensor:
        convs = {name: _conv_norm(v, name, *running[name]) for name in names}
        window = {"stride": stride, "padding": "same", "residual": stride == 1}
        return effnet_ops.fused_mbconv(v["x"], convs["expand"], None, convs.get("project"), **window, training=training)

    return Case(f"fused_mbconv, {'training' if training else 'eval'}", inputs, function)


def _conv_norm(v: Inputs, name: str, mean: Tensor, variance: Tensor) -> ConvNormParams:
    """The convolution with a copy of its running statistics, which training overwrites."""
    weight = v[f"{name}.weight"]
    mean, variance = (value.to(weight.device, weight.dtype, copy=True) for value in (mean, variance))
    return ConvNormParams(weight, None, BatchNormParams(v[f"{name}.gamma"], v[f"{name}.beta"], mean, variance, 1e-3))
