"""Kernels work on activations as contiguous (N, H, W, C) tensors, which channels_last tensors are without a copy."""

from __future__ import annotations

from torch import Tensor


def nhwc(x: Tensor) -> Tensor:
    """x (N, C, H, W) as a contiguous (N, H, W, C) tensor: a view where the memory is laid out so, or else a copy."""
    return x.permute(0, 2, 3, 1).contiguous()


def nchw(x: Tensor) -> Tensor:
    """The (N, C, H, W) view of x (N, H, W, C)."""
    return x.permute(0, 3, 1, 2)
