"""What `optimize_for_inference` puts in the place of layers: the same computation with the normalisations folded in."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor, nn

from effnet_ops import functional
from effnet_ops.params import ConvNormParams, SqueezeExciteParams
from effnet_ops.reference import activate
from effnet_ops.surgery.fused import parameter


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


class Folded(nn.Module):
    """Base of the modules that hold folded normalisations: they cannot train.

    ``activations`` is an empty buffer whose dtype the input is cast to, so that ``.to(dtype)`` changes that too; None
    leaves the input as it is.
    """

    activations: Tensor | None

    def cast(self, x: Tensor) -> Tensor:
        like = self._buffers.get("activations")
        return x if like is None else x.to(like.dtype)

    def set_activations(self, dtype: torch.dtype) -> None:
        """Cast every input to ``dtype`` from now on."""
        device = next(self.parameters()).device
        self.register_buffer("activations", torch.empty(0, dtype=dtype, device=device), persistent=False)

    def train(self, mode: bool = True) -> nn.Module:
        if mode:
            _refuse_to_train()
        return super().train(mode)


def _refuse_to_train() -> NoReturn:
    raise RuntimeError(
        "this model cannot train: optimize_for_inference folded its batch normalisations into the convolutions. "
        "Train the model that it was made from; call eval() on this one to use it on"
    )


class FoldedNorm(Folded, nn.Sequential):
    """What is left where a normalisation was: the activations behind it, often none."""


class FoldedPointwise(Folded, nn.Conv2d):
    """A 1x1 convolution with bias and activation, run by `effnet_ops.pointwise_conv2d`; made of an ``nn.Conv2d``."""

    activation: str

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = parameter(self, "weight"), parameter(self, "bias")
        return functional.pointwise_conv2d(self.cast(x), weight, bias, activation=self.activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


_SQUEEZE_EXCITE = ("reduce_weight", "reduce_bias", "excite_weight", "excite_bias")


class FoldedMBConv(Folded):
    """An MBConv block as one call of `effnet_ops.mbconv`, without normalisations and without drop path.

    Input (N, Cin, H, W), output (N, Cout, Ho, Wo). Parameters ``expand_weight``, ``expand_bias`` and so on for
    ``depthwise``, ``project``, ``reduce`` and ``excite``; those that the block lacks are None.

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
        for name, conv in (("expand", expand), ("depthwise", depthwise), ("project", project)):
            self.register_parameter(f"{name}_weight", None if conv is None else conv.weight)
            self.register_parameter(f"{name}_bias", None if conv is None else conv.bias)
        for name, value in zip(_SQUEEZE_EXCITE, squeeze_excite[:4] if squeeze_excite else (None,) * 4, strict=True):
            self.register_parameter(name, None if value is None else frozen(value.to(depthwise.weight.dtype)))
        self.expands, self.squeezes = expand is not None, squeeze_excite is not None
        self.stride, self.padding, self.residual = stride, padding, residual
        self.activation, self.gate, self.after = activation, gate, after
        self.squeeze_activation = squeeze_excite.activation if squeeze_excite else None

    def forward(self, x: Tensor) -> Tensor:
        squeeze_excite = None
        if self.squeezes:
            tensors = (
                parameter(self, name) for name in ("reduce_weight", "reduce_bias", "excite_weight", "excite_bias")
            )
            squeeze_excite = SqueezeExciteParams(*tensors, self.squeeze_activation)
        y = functional.mbconv(
            self.cast(x),
            self._conv("expand") if self.expands else None,
            self._conv("depthwise"),
            squeeze_excite,
            self._conv("project"),
            stride=self.stride,
            padding=self.padding,
            activation=self.activation,
            gate=self.gate,
            residual=self.residual,
            training=False,
        )
        return y if self.after == "none" else activate(y, self.after)

    def _conv(self, name: str) -> ConvNormParams:
        return ConvNormParams(parameter(self, f"{name}_weight"), parameter(self, f"{name}_bias"))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, padding={self.padding}, activation={self.activation}, residual={self.residual}"
