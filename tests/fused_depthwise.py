"""The internal CUDA operators with every prologue and epilogue, against the formulas of docs/mbconv.md in fp64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from helpers import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, expected_strides, normal, relative_error
from torch import Tensor

from effnet_ops import reference
from effnet_ops.checks import resolve_padding


class Fused(NamedTuple):
    """A depthwise convolution inside a block; ``shape`` is x's (N, C, H, W)."""

    shape: tuple[int, int, int, int]
    kernel: int
    stride: int
    activation: str = "silu"

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))}_k{self.kernel}_s{self.stride}_{self.activation}"

    @property
    def padding(self) -> Sequence[int]:
        return resolve_padding((), self.shape[2:], (self.kernel,) * 2, (self.stride,) * 2, (1, 1))


CASES = (
    Fused((2, 16, 9, 11), 3, 1),
    Fused((2, 24, 15, 13), 3, 2, "relu6"),
    Fused((3, 13, 9, 8), 5, 1, "hardswish"),
    Fused((2, 40, 14, 17), 5, 2),
    Fused((1, 8, 10, 12), 7, 1, "relu"),
    Fused((2, 8, 13, 9), 7, 2),
    Fused((4, 32, 1, 1), 3, 1),
)


def vectors(rows: int, channels: int) -> Tensor:
    """mean, positive scale, shift, and further rows."""
    return torch.stack([normal(channels) * 0.3, torch.rand(channels).double() + 0.5, *normal(rows - 2, channels) * 0.3])


def normalised(x: Tensor, norm: Tensor) -> Tensor:
    mean, scale, shift = (row[:, None, None] for row in norm)
    return (x - mean) * scale + shift


def convolved(case: Fused, u: Tensor, weight: Tensor) -> Tensor:
    top, bottom, left, right = case.padding
    return F.conv2d(F.pad(u, (left, right, top, bottom)), weight, None, case.stride, 0, 1, u.shape[1])


def derivative(x: Tensor, name: str) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(reference.activate(x, name).sum(), x)[0]


def given(value: Tensor, dtype: torch.dtype, device: str, layout: torch.memory_format) -> tuple[Tensor, Tensor]:
    """An activation as the kernel gets it, and the same in fp64."""
    cast = value.to(dtype)
    return cast.to(device).contiguous(memory_format=layout), cast.double()


def check_forward(case: Fused, dtype: torch.dtype, device: str, layout: torch.memory_format) -> None:
    """Normalise, activate and gate in front; bias, normalise and activate behind; pool and statistics."""
    batch, channels = case.shape[:2]
    x, exact_x = given(normal(*case.shape), dtype, device, layout)
    weight, bias, gate = normal(channels, 1, case.kernel, case.kernel), normal(channels), torch.rand(batch, channels)
    norm, out_norm = vectors(3, channels), vectors(3, channels)
    small = [t.float() for t in (weight, bias, norm, gate, out_norm)]
    weight, bias, norm, gate, out_norm = (t.double() for t in small)

    u = reference.activate(normalised(exact_x, norm), case.activation) * gate[:, :, None, None]
    before = normalised(convolved(case, u, weight) + bias[:, None, None], out_norm)
    expected = reference.activate(before, case.activation)
    w, b, n, g, o = (t.to(device) for t in small)
    place = (case.stride, case.padding, case.activation, case.activation)
    y, pool, partials = torch.ops.effnet_ops.cuda_depthwise_forward(x, w, b, n, g, o, None, *place, True, True)
    bound = FORWARD_TOLERANCE[dtype]
    assert relative_error(y.cpu(), expected) <= bound
    assert relative_error(pool.sum(1).cpu(), expected.sum((2, 3))) <= bound
    check_statistics(partials.double().cpu(), y.double().cpu(), bound)

    grad, exact_grad = given(normal(*y.shape), dtype, device, layout)
    through, _, _ = torch.ops.effnet_ops.cuda_depthwise_forward(x, w, b, n, g, o, grad, *place, False, False)
    assert relative_error(through.cpu(), exact_grad * derivative(before, case.activation)) <= 10 * bound
    assert through.stride() == y.stride()


def check_statistics(partials: Tensor, y: Tensor, bound: float) -> None:
    """Counts, means and squares of the parts are those of the stored result; fp32 sums, so fp32's bound at best."""
    count, mean, squares = partials.unbind(1)
    total = count.sum(0)
    assert torch.equal(total, torch.full_like(total, y.numel() / y.shape[1]))
    common = (count * mean).sum(0) / total
    variance = (squares + count * (mean - common) ** 2).sum(0) / total
    exact_variance, exact_mean = torch.var_mean(y, (0, 2, 3), correction=0)
    assert relative_error(common, exact_mean) <= max(bound, 2e-6) and relative_error(variance, exact_variance) <= 2e-5


def check_backward(case: Fused, dtype: torch.dtype, device: str, layout: torch.memory_format) -> None:
    """The backward of gate, activation and normalisation in front; activation, residual and sums behind."""
    batch, channels = case.shape[:2]
    x, exact_x = given(normal(*case.shape), dtype, device, layout)
    weight = normal(channels, 1, case.kernel, case.kernel)
    size = convolved(case, exact_x, weight).shape
    grad, exact_grad = given(normal(*size), dtype, device, layout)
    a, exact_a = given(normal(*size), dtype, device, layout)
    residual, exact_residual = given(normal(*case.shape), dtype, device, layout)
    a_norm, norm, coefficients = vectors(3, channels), vectors(3, channels), vectors(4, channels)
    coefficients[0] = a_norm[0]
    small = [
        t.float() for t in (weight, a_norm, coefficients, torch.rand(batch, channels), normal(batch, channels), norm)
    ]
    weight, a_norm, coefficients, gate, pooled, norm = (t.double() for t in small)

    mean, of_grad, of_a, constant = (row[:, None, None] for row in coefficients)
    n = exact_grad * gate[:, :, None, None] + pooled[:, :, None, None]
    n = n * derivative(normalised(exact_a, a_norm), case.activation)
    g = of_grad * n + of_a * (exact_a - mean) + constant
    before, leaf = normalised(exact_x, norm).requires_grad_(), weight.clone().requires_grad_()
    y = convolved(case, reference.activate(before, case.activation), leaf)
    exact_dx, exact_dw = torch.autograd.grad(y, [before, leaf], g)
    exact_dx = exact_dx + exact_residual
    centred = exact_x - norm[0][:, None, None]
    exact_sums = torch.stack([exact_dx.sum((0, 2, 3)), (exact_dx * centred).sum((0, 2, 3))])

    w, an, co, ga, po, no = (t.to(device) for t in small)
    arguments: list[Any] = [grad, x, w, None, a, an, co, ga, po, no, residual, x, case.stride, case.padding]
    dx, dw, db, sums = torch.ops.effnet_ops.cuda_depthwise_backward(
        *arguments, case.activation, case.activation, [True, True, False]
    )
    # Sums of many terms of both signs: against what they would be without cancelling.
    bound, size_of_sums = GRADIENT_TOLERANCE[dtype], torch.stack([exact_dx.abs().sum((0, 2, 3))] * 2).norm().item()
    assert relative_error(dx.cpu(), exact_dx) <= bound and dx.stride() == expected_strides(x, x.shape)
    assert relative_error(dw.cpu(), exact_dw) <= bound and db.numel() == 0
    assert relative_error(sums.sum(0).cpu(), exact_sums, size_of_sums) <= bound
