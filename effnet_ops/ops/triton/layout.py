"""From the kernels' (N, H, W, C) back to the layout that an operator promises."""

from __future__ import annotations

import torch
from torch import Tensor

from effnet_ops.ops import _library


def result_like(value: Tensor, x: Tensor) -> Tensor:
    """``value`` (N, H, W, C), contiguous, as a result (N, C, H, W) that belongs to x; a copy where x is contiguous."""
    value = value.permute(0, 3, 1, 2)
    if _library.memory_format(x) == torch.channels_last:
        return value
    _, channels, height, width = value.shape
    # Where H = W = 1 or C = 1 nothing is copied, but the strides are those of the other layout.
    return value.contiguous().as_strided(value.shape, (channels * height * width, height * width, width, 1))
