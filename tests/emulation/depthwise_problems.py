"""Depthwise problems with random operands, on the emulated GPU, and what their results should be, in fp64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from cases import DepthwiseCase
from cuda_kernels import Kernels
from helpers import normal
from torch import Tensor

from effnet_ops.checks import output_size, padding_sides, resolve_padding
from effnet_ops.reference import activate


@dataclass(frozen=True)
class Fusion:
    """What stands in front of a convolution and behind it.

    forward: activation(norm(x)) * gate in front; bias, out_norm and out_activation behind, or with ``grad`` the
    derivative of out_activation times it; sums. backward: ``a`` with its norm, activation, gate and coefficients
    before the gradient, ``norm`` and ``activation`` behind it.
    """

    norm: bool = False
    activation: str = "none"
    gate: bool = False
    bias: bool = False
    out_norm: bool = False
    out_activation: str = "none"
    grad: bool = False
    pool: bool = False
    statistics: bool = False


def vectors(channels: int) -> Tensor:
    """A normalisation (3, C) with means several deviations away from zero, and scales of both signs."""
    sign = normal(channels).sign()
    rows = [normal(channels) * 3, (torch.rand(channels, dtype=torch.float64) + 0.5) * sign, normal(channels)]
    return torch.stack(rows).float()


def normalise(x: Tensor, norm: Tensor | None) -> Tensor:
    if norm is None:
        return x
    mean, scale, shift = norm.double()[:, :, None, None]
    return (x - mean) * scale + shift


def per_image(v: Tensor | None, otherwise: float) -> Tensor | float:
    return otherwise if v is None else v.double()[:, :, None, None]


def covered(case: DepthwiseCase) -> bool:
    """Whether csrc/cuda has a kernel for this case: square windows of 3, 5 and 7, strides of 1 and 2, no dilation."""
    stride = case.stride if isinstance(case.stride, tuple) else (case.stride,) * 2
    return case.kernel in ((3, 3), (5, 5), (7, 7)) and stride in ((1, 1), (2, 2)) and case.dilation in (1, (1, 1))


@dataclass(frozen=True)
class Geometry:
    """Sizes of a convolution of (N, H, W, C) tensors, or if not ``channels_last`` of (N, C, H, W) ones."""

    batch: int
    channels: int
    size: tuple[int, int]
    out_size: tuple[int, int]
    kernel: int
    stride: int
    padding: tuple[int, ...]  # top, bottom, left, right
    channels_last: bool = True

    @classmethod
    def of(cls, case: DepthwiseCase, channels_last: bool = True) -> Geometry:
        batch, channels, *size = case.shape
        stride = (case.stride,) * 2 if isinstance(case.stride, int) else case.stride
        sides = resolve_padding(padding_sides(case.padding), size, case.kernel, stride, (1, 1))
        out_size = output_size(size, case.kernel, stride, sides, (1, 1))
        return cls(
            batch, channels, tuple(size), tuple(out_size), case.kernel[0], stride[0], tuple(sides), channels_last
        )

    def _shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        return (self.batch, *size, self.channels) if self.channels_last else (self.batch, self.channels, *size)

    def images(self, x: Tensor) -> Tensor:
        """A tensor in this layout as (N, C, H, W) in fp64."""
        return x.double().permute(0, 3, 1, 2) if self.channels_last else x.double()

    def per_channel(self, v: Tensor) -> Tensor:
        """A vector (C) that broadcasts over a tensor in this layout."""
        return v if self.channels_last else v[:, None, None]

    @property
    def x_shape(self) -> tuple[int, ...]:
        return self._shape(self.size)

    @property
    def y_shape(self) -> tuple[int, ...]:
        return self._shape(self.out_size)

    @property
    def struct(self) -> dict[str, Any]:
        return {
            "batch": self.batch, "channels": self.channels, "height": self.size[0], "width": self.size[1],
            "out_height": self.out_size[0], "out_width": self.out_size[1], "kernel": self.kernel, "stride": self.stride,
            "pad_top": self.padding[0], "pad_left": self.padding[2], "channels_last": self.channels_last,
        }  # fmt: skip

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (N, C, H, W) and weight (C, k * k), in fp64."""
        top, bottom, left, right = self.padding
        filters = weight.double().view(self.channels, 1, self.kernel, self.kernel)
        bias = None if bias is None else bias.double()
        return F.conv2d(F.pad(x, (left, right, top, bottom)), filters, bias, self.stride, groups=self.channels)


def run_forward(
    kernels: Kernels, geometry: Geometry, fusion: Fusion, dtype: torch.dtype, *, bias: float = 0.0
) -> dict[str, Tensor]:
    """Operands and results of a forward by the names of kernels.h. ``bias`` is what biases vary around."""
    batch, channels = geometry.batch, geometry.channels
    norm = vectors(channels) if fusion.norm else None
    x = normal(*geometry.x_shape) + (geometry.per_channel(norm[0].double()) if fusion.norm else 0.0)
    given = {
        "x": x.to(dtype),
        "weight": normal(channels, geometry.kernel**2).float(),
        "bias": (normal(channels) + bias).float() if fusion.bias else None,
        "norm": norm,
        "gate": torch.rand(batch, channels) if fusion.gate else None,
        "out_norm": vectors(channels) if fusion.out_norm else None,
        "grad": normal(*geometry.y_shape).to(dtype) if fusion.grad else None,
    }
    given = {name: kernels.upload(name, value) for name, value in given.items() if value is not None}
    settings = {
        "shape": geometry.struct, "dtype": dtype, "activation": fusion.activation,
        "out_activation": fusion.out_activation,
    }  # fmt: skip
    wanted = {name: 1 for name in ("pool", "statistics") if getattr(fusion, name)}
    assert kernels.why_not("DepthwiseForward", **given, **settings, **wanted) is None
    plan = kernels.plan("DepthwiseForward", **given, **settings, **wanted)
    made = {"y": kernels.empty("y", geometry.y_shape, dtype)}
    if fusion.pool:
        made["pool"] = kernels.empty("pool", (batch, plan.parts, channels), torch.float32)
    if fusion.statistics:
        made["statistics"] = kernels.empty("statistics", (batch * plan.parts, 3, channels), torch.float32)
    kernels.run("DepthwiseForward", **given, **settings, **made)
    return {**given, **made}


def exact_forward(geometry: Geometry, fusion: Fusion, given: dict[str, Tensor]) -> Tensor:
    """(N, C, H, W) in fp64."""
    seen = activate(normalise(geometry.images(given["x"]), given.get("norm")), fusion.activation)
    seen = seen * per_image(given.get("gate"), 1.0)
    y = normalise(geometry.convolve(seen, given["weight"], given.get("bias")), given.get("out_norm"))
    if not fusion.grad:
        return activate(y, fusion.out_activation)
    y.requires_grad_()
    (slope,) = torch.autograd.grad(activate(y, fusion.out_activation).sum(), y)
    return geometry.images(given["grad"]) * slope


@dataclass(frozen=True)
class BackwardFusion:
    """What is differentiated beside the convolution, and which results are wanted.

    ``after``: the gradient comes through normalisation and ``a_activation`` behind the convolution, with ``gate`` also
    through gate and pool, and with ``statistics`` through batch statistics. ``norm``, ``activation``: in front of it.
    """

    after: bool = False
    a_activation: str = "none"
    statistics: bool = False
    gate: bool = False
    norm: bool = False
    activation: str = "none"
    residual: bool = False
    wanted: tuple[str, ...] = ("dx", "dw", "db")

    @property
    def needs_x(self) -> bool:
        return "dw" in self.wanted or self.norm or self.activation != "none"


def backward_operands(geometry: Geometry, fusion: BackwardFusion, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """By the names of kernels.h; None for what there is not."""
    batch, channels = geometry.batch, geometry.channels
    norm = vectors(channels) if fusion.norm else None
    a_norm = vectors(channels) if fusion.after else None
    x = normal(*geometry.x_shape) + (geometry.per_channel(norm[0].double()) if fusion.norm else 0.0)
    a = normal(*geometry.y_shape) + (geometry.per_channel(a_norm[0].double()) if fusion.after else 0.0)
    coefficients = None
    if fusion.statistics:
        coefficients = torch.stack([a_norm[0], *(normal(channels).float() for _ in range(3))])
    return {
        "grad": normal(*geometry.y_shape).to(dtype),
        "a": a.to(dtype) if fusion.after else None,
        "x": x.to(dtype) if fusion.needs_x else None,
        "weight": normal(channels, geometry.kernel**2).float(),
        "a_norm": a_norm,
        "coefficients": coefficients,
        "gate": torch.rand(batch, channels) if fusion.gate else None,
        "pooled": normal(batch, channels).float() if fusion.gate else None,
        "norm": norm,
        "residual": normal(*geometry.x_shape).to(dtype) if fusion.residual else None,
    }


def run_backward(
    kernels: Kernels, geometry: Geometry, fusion: BackwardFusion, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Operands and results of a backward by the names of kernels.h."""
    operands = backward_operands(geometry, fusion, dtype)
    given = {name: kernels.upload(name, value) for name, value in operands.items() if value is not None}
    settings = {
        "shape": geometry.struct, "dtype": dtype, "a_activation": fusion.a_activation, "activation": fusion.activation,
    }  # fmt: skip
    wanted = dict.fromkeys(fusion.wanted, 1)
    assert kernels.why_not("DepthwiseBackward", **given, **settings, **wanted) is None
    plan = kernels.plan("DepthwiseBackward", **given, **settings, **wanted)
    channels, f32 = geometry.channels, torch.float32
    shapes = {
        "dx": (geometry.x_shape, dtype), "dw": ((channels, geometry.kernel**2), f32), "db": ((channels,), f32),
        "sums": ((plan.parts, 2, channels), f32),
    }  # fmt: skip
    made = {name: kernels.empty(name, *shapes[name]) for name in fusion.wanted}
    workspace = kernels.empty("workspace", (plan.workspace_bytes // 4,), f32) if plan.workspace_bytes else None
    kernels.run("DepthwiseBackward", **given, **settings, **made, workspace=workspace)
    return given, made


def exact_backward(geometry: Geometry, fusion: BackwardFusion, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """dx (N, C, H, W), dw, db, and the sums over the batch (2, C), in fp64."""
    y_grad = geometry.images(given["grad"])
    if fusion.after:
        a, a_norm = geometry.images(given["a"]), given["a_norm"]
        normalised = normalise(a, a_norm).requires_grad_()
        (slope,) = torch.autograd.grad(activate(normalised, fusion.a_activation).sum(), normalised)
        y_grad = (y_grad * per_image(given.get("gate"), 1.0) + per_image(given.get("pooled"), 0.0)) * slope
        if fusion.statistics:
            _, of_grad, of_a, constant = given["coefficients"].double()[:, :, None, None]
            y_grad = of_grad * y_grad + of_a * (a - a_norm[0].double()[:, None, None]) + constant
    x = (
        geometry.images(given["x"])
        if "x" in given
        else y_grad.new_zeros(geometry.batch, geometry.channels, *geometry.size)
    )
    inner = normalise(x, given.get("norm")).requires_grad_()
    weight = given["weight"].double().requires_grad_()
    y = geometry.convolve(activate(inner, fusion.activation), weight)
    dx, dw = torch.autograd.grad(y, (inner, weight), y_grad)
    if fusion.residual:
        dx = dx + geometry.images(given["residual"])
    exact = {"dx": dx, "dw": dw, "db": y_grad.sum((0, 2, 3))}
    if fusion.norm:
        centred = x - given["norm"][0].double()[:, None, None]
        exact["sums"] = torch.stack([dx.sum((0, 2, 3)), (dx * centred).sum((0, 2, 3))])
    return exact
