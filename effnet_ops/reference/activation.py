"""Activations and gates by name, and the precision that a reference computes in."""

from __future__ import annotations

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
