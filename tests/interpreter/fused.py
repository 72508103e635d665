"""Operands of a product with everything that MBConv fuses into it, and what the result should be, in fp64."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from helpers import HALF, normal
from torch import Tensor


class Fused(NamedTuple):
    """(images, pixels, channels) in the dtype under test, weight (Cout, Cin), vectors in the compute dtype."""

    x: Tensor
    weight: Tensor
    norm: Tensor
    gate: Tensor
    out_norm: Tensor
    image_scale: Tensor
    residual: Tensor
    grad: Tensor
    a: Tensor
    coefficients: Tensor

    @staticmethod
    def exact_norm(value: Tensor, norm: Tensor) -> Tensor:
        mean, scale, shift = norm.double()
        return (value - mean) * scale + shift

    def scale_of_rows(self) -> Tensor:
        return self.image_scale.double()[:, None, None]

    def exact_input(self, activation: str) -> Tensor:
        activate = {"none": lambda x: x, "silu": F.silu}[activation]
        return activate(self.exact_norm(self.x.double(), self.norm)) * self.gate.double()[:, None]

    def exact_gradient(self) -> Tensor:
        mean, of_grad, of_a, constant = self.coefficients.double()
        return of_grad * (self.grad.double() * self.scale_of_rows()) + of_a * (self.a.double() - mean) + constant


def norm_of(channels: int) -> Tensor:
    """Means several deviations away from zero, scales of both signs."""
    return torch.stack(
        [normal(channels) * 3, (torch.rand(channels).double() + 0.5) * normal(channels).sign(), normal(channels)]
    )


def fused(images: int, pixels: int, c_in: int, c_out: int, dtype: torch.dtype) -> Fused:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    norm = norm_of(c_in)
    x = normal(images, pixels, c_in) + norm[0]
    weight = normal(c_out, c_in) / c_in**0.5
    scale = torch.tensor([0.0, 1.25, 1.25, 0.0, 1.25], dtype=wide)[:images]
    activations = [normal(images, pixels, c_out).to(dtype) for _ in range(3)]
    coefficients = torch.stack([normal(c_out), *(normal(c_out) for _ in range(3))])
    return Fused(
        x.to(dtype),
        weight.to(torch.float32 if dtype in HALF else dtype),
        norm.to(wide),
        torch.rand(images, c_in).to(wide),
        norm_of(c_out).to(wide),
        scale,
        *activations,
        coefficients.to(wide),
    )
