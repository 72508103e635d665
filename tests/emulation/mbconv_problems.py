"""Both halves of a block in inference with random operands on the emulated GPU, and what they should be, in fp64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from cases import MBConvCase
from cuda_kernels import Kernels
from depthwise_problems import Geometry
from helpers import normal
from torch import Tensor

from effnet_ops.checks import output_size, padding_sides, resolve_padding
from effnet_ops.reference import activate

_EPS = 1e-3


def norm_of(channels: int, kind: str) -> dict[str, Tensor]:
    """By the names of `ConstantNorm`: of a "batch" normalisation, of a "bias", or nothing."""
    if kind == "none":
        return {}
    found = {"beta": normal(channels) * 0.3}
    if kind == "batch":
        found["gamma"] = torch.rand(channels, dtype=torch.float64) + 0.5
        found["mean"], found["var"] = normal(channels), torch.rand(channels, dtype=torch.float64) + 0.3
    return {name: value.float() for name, value in found.items()}


def normalise(x: Tensor, norm: dict[str, Tensor]) -> Tensor:
    """The last axis of x (..., C)."""
    given = {name: value.double() for name, value in norm.items()}
    if "gamma" in given:
        x = (x - given["mean"]) / (given["var"] + _EPS).sqrt() * given["gamma"]
    return x + given.get("beta", 0.0)


@dataclass(frozen=True)
class Expand:
    """The first half: expansion to the geometry's channels, and its convolution."""

    geometry: Geometry
    in_channels: int
    activation: str = "silu"
    norm: str = "batch"
    wide: bool = False
    pool: bool = True

    @classmethod
    def of(cls, case: MBConvCase, wide: bool = False) -> Expand:
        batch, channels, *size = case.shape
        stride = (case.stride,) * 2
        sides = resolve_padding(padding_sides(case.padding), size, case.kernel, stride, (1, 1))
        out_size = output_size(size, case.kernel, stride, sides, (1, 1))
        geometry = Geometry(batch, case.expanded, tuple(size), tuple(out_size), case.kernel[0], stride[0], tuple(sides))
        norm = "bias" if case.norm == "folded" else "batch"
        return cls(geometry, channels, case.activation, norm, wide, case.reduced is not None)

    def operands(self, dtype: torch.dtype) -> dict[str, Any]:
        """By the names of kernels.h, in memory that no kernel knows yet."""
        channels, size = self.geometry.channels, self.geometry.size
        return {
            "x": normal(self.geometry.batch, *size, self.in_channels).to(dtype),
            "expand_weight": (normal(channels, self.in_channels) / self.in_channels**0.5).to(dtype),
            "expand_norm": norm_of(channels, self.norm),
            "depthwise_weight": (normal(channels, self.geometry.kernel**2) / self.geometry.kernel).float(),
            "depthwise_norm": norm_of(channels, self.norm),
        }

    def exact(self, given: dict[str, Any]) -> Tensor:
        """(N, H, W, C)"""
        wide = given["x"].double() @ given["expand_weight"].double().T
        inner = activate(normalise(wide, given["expand_norm"]), self.activation).permute(0, 3, 1, 2)
        convolved = self.geometry.convolve(inner, given["depthwise_weight"]).permute(0, 2, 3, 1)
        return activate(normalise(convolved, given["depthwise_norm"]), self.activation)

    def values(self, kernels: Kernels, given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """The problem without results, in the emulated GPU's memory."""
        return {
            "shape": self.geometry.struct, "in_channels": self.in_channels, "dtype": dtype,
            "activation": self.activation, **uploaded(kernels, given, self.wide),
        }  # fmt: skip

    def run(self, kernels: Kernels, given: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
        """y (N, H, W, C), and the pool (N, parts, C)."""
        geometry, values = self.geometry, self.values(kernels, given, dtype)
        wanted = {"pool": 1} if self.pool else {}
        plan = kernels.plan("ExpandDepthwise", **values, **wanted)
        assert plan.why_not is None, plan.why_not
        made = {"y": kernels.empty("y", geometry.y_shape, dtype)}
        if self.pool:
            made["pool"] = kernels.empty("pool", (geometry.batch, plan.parts, geometry.channels), torch.float32)
        kernels.run("ExpandDepthwise", **values, **made)
        return made


@dataclass(frozen=True)
class Project:
    """The second half."""

    images: int
    pixels: int
    channels: int
    out: int
    norm: str = "batch"
    wide: bool = False
    gates: bool = True
    residual: bool = True
    drop_path: bool = True

    def operands(self, dtype: torch.dtype) -> dict[str, Any]:
        given = {
            "x": normal(self.images, self.pixels, self.channels).to(dtype),
            "weight": (normal(self.out, self.channels) / self.channels**0.5).to(dtype),
            "norm": norm_of(self.out, self.norm),
        }
        if self.gates:
            given["gates"] = torch.rand(self.images, self.channels)
        if self.residual:
            given["residual"] = normal(self.images, self.pixels, self.out).to(dtype)
        if self.drop_path:
            given["image_scale"] = torch.rand(self.images)
        return given

    def exact(self, given: dict[str, Any]) -> Tensor:
        x = given["x"].double()
        if self.gates:
            x = x * given["gates"].double()[:, None]
        y = normalise(F.linear(x, given["weight"].double()), given["norm"])
        if self.drop_path:
            y = y * given["image_scale"].double()[:, None, None]
        return y + given["residual"].double() if self.residual else y

    def values(self, kernels: Kernels, given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        sizes = {"images": self.images, "pixels": self.pixels, "channels": self.channels, "out_channels": self.out}
        return {**sizes, "dtype": dtype, **uploaded(kernels, given, self.wide)}

    def run(self, kernels: Kernels, given: dict[str, Any], dtype: torch.dtype) -> Tensor:
        """(N, pixels, out)"""
        values = self.values(kernels, given, dtype)
        assert kernels.why_not("GatedProject", **values) is None
        y = kernels.empty("y", (self.images, self.pixels, self.out), dtype)
        kernels.run("GatedProject", **values, y=y)
        return y


def uploaded(kernels: Kernels, given: dict[str, Any], wide: bool) -> dict[str, Any]:
    """Operands as kernels.h has them: norms and weights of products are structures."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, dict):
            found[name] = {key: kernels.upload(f"{name}.{key}", part) for key, part in value.items()} | {"eps": _EPS}
        elif name in ("expand_weight", "weight"):
            data = kernels.upload(name, value.float() if wide else value)
            found[name] = {"data": data, "wide": data.dtype == torch.float32}
        else:
            found[name] = kernels.upload(name, value)
    return found
