"""Activations and gates by name, and the precision that a reference computes in."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    # Gaussian error linear units (arXiv 1606.08415): x times the normal distribution function, and its approximation by
    # tanh. Not F.gelu, whose sums 1 + erf and 1 + tanh lose all digits of the result for x far below 0.
    "gelu": lambda x: 0.5 * x * torch.erfc(x * -(0.5**0.5)),
    "gelu_tanh": lambda x: x * torch.sigmoid((8 / math.pi) ** 0.5 * (x + 0.044715 * x * x * x)),
}
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    # Not F.hardsigmoid: its derivative is 1/6 rounded to fp32 in fp64 too, up to torch 2.14.1.
    "hard_sigmoid": lambda x: F.relu6(x + 3) / 6,
}


def activate(x: Tensor, name: str) -> Tensor:
    """Apply the activation called ``name`` elementwise."""
    return ACTIVATIONS[name](x)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32
