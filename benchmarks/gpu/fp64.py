"""What the kernels' launches compute, in plain PyTorch and fp64, for the rows' checks.

Activations are (images, .., channels); a norm is (3, C), rows mean, scale and shift; the activation is SiLU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rows import relative_error
from torch import Tensor


def error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative error of several results."""
    return max(relative_error(*pair) for pair in zip(found, expected, strict=True))


def of_image(vectors: Tensor, like: Tensor) -> Tensor:
    """(images, C) as it goes with the pixels of ``like``."""
    return vectors.double().view(len(vectors), *[1] * (like.dim() - 2), -1)


def norm(x: Tensor, vectors: Tensor) -> Tensor:
    mean, scale, shift = vectors.double()
    return (x.double() - mean) * scale + shift


def convolved(u: Tensor, weight: Tensor, window: dict[str, Any]) -> Tensor:
    """The depthwise convolution of u (N, H, W, C); ``window`` is that of `effnet_ops.kernels.depthwise.forward`."""
    top, bottom, left, right = window["padding"]
    padded = F.pad(u.permute(0, 3, 1, 2), (left, right, top, bottom))
    return F.conv2d(padded, weight.double(), stride=window["stride"], groups=u.shape[3]).permute(0, 2, 3, 1)


def slope(a: Tensor, vectors: Tensor, grad: Tensor | float = 1.0) -> Tensor:
    """grad * silu'(norm(a))."""
    n = norm(a, vectors).requires_grad_()
    return torch.autograd.grad(F.silu(n).sum(), n)[0] * grad


def norm_gradient(grad: Tensor, a: Tensor, coefficients: Tensor) -> Tensor:
    """A grad + B (a - mean) + D, with rows mean, A, B and D."""
    mean, of_grad, of_a, constant = coefficients.double()
    return of_grad * grad.double() + of_a * (a.double() - mean) + constant


def convolution_gradients(
    g: Tensor, x: Tensor, vectors: Tensor, weight: Tensor, window: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """From the gradient g of the convolution of silu(norm(x)): those of norm(x) and weight, and `norm_sums`."""
    leaves = [norm(x, vectors).requires_grad_(), weight.double().requires_grad_()]
    dn, dw = torch.autograd.grad(convolved(F.silu(leaves[0]), leaves[1], window), leaves, g)
    return dn, dw, norm_sums(dn, x, vectors).sum(0)


def norm_sums(dn: Tensor, x: Tensor, vectors: Tensor) -> Tensor:
    """(images, 2, C): the sums over pixels of dn and of dn (x - mean)."""
    values = torch.stack([dn, dn * (x.double() - vectors[0].double())], 1)
    return values.flatten(2, -2).sum(2)


def gate_sums(dx: Tensor, x: Tensor, vectors: Tensor) -> Tensor:
    """(images, 5, C): those of dx silu(norm(x)), dx s, s, dx s c and s c, where s is the slope and c = x - mean."""
    s, through = slope(x, vectors), slope(x, vectors, dx)
    grad, of_slope = norm_sums(through, x, vectors), norm_sums(s, x, vectors)
    gate = (dx * F.silu(norm(x, vectors))).flatten(1, -2).sum(1)
    return torch.stack([gate, grad[:, 0], of_slope[:, 0], grad[:, 1], of_slope[:, 1]], 1)


def moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance a channel."""
    rows = y.flatten(0, -2)
    return rows.mean(0), rows.var(0, correction=0)


def merged(partials: Tensor) -> tuple[Tensor, Tensor]:
    """The same from (parts, 3, C): count, mean, and sum of squares around it."""
    count, mean, squares = partials.double().unbind(1)
    total = count.sum(0)
    middle = (count * mean).sum(0) / total
    return middle, (squares + count * (mean - middle) ** 2).sum(0) / total
