"""What host code computes sizes and views with.

Kernels work on activations as contiguous (N, H, W, C) tensors, which channels_last tensors are without a copy.
"""

from __future__ import annotations

from torch import Tensor


# Triton's functions of these names take microseconds outside kernels.
def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def nhwc(x: Tensor) -> Tensor:
    """x (N, C, H, W) as a contiguous (N, H, W, C) tensor: a view where the memory is laid out so, or else a copy."""
    return x.permute(0, 2, 3, 1).contiguous()


def nchw(x: Tensor) -> Tensor:
    """The (N, C, H, W) view of x (N, H, W, C)."""
    return x.permute(0, 3, 1, 2)


def flat(x: Tensor) -> Tensor:
    """x (N, H, W, C) as a product takes it, (N, H * W, C): a view."""
    return x.flatten(1, 2)
