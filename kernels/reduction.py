"""The second stage of sums over pixels: partial sums are added in a fixed order, so every run has the same result."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from effnet_ops.kernels.activation import INTERPRETED, narrow, widen
from effnet_ops.kernels.launching import launch
from effnet_ops.kernels.layout import cdiv


@triton.jit
def sum_partials_kernel(p_partials, p_out, parts, size, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr):
    """out = sum over the parts of partials (parts, size)."""
    ACC: tl.constexpr = tl.float64 if p_partials.dtype.element_ty == tl.float64 else tl.float32
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < size
    b_sum = tl.zeros([BLOCK_S, BLOCK], ACC)
    for i in range(0, parts, BLOCK_S):
        o_s = i + tl.arange(0, BLOCK_S)
        o_p = o_s.to(tl.int64)[:, None] * size + o[None, :]
        b_sum += widen(tl.load(p_partials + o_p, mask=(o_s < parts)[:, None] & m[None, :], other=0.0))
    tl.store(p_out + o, narrow(tl.sum(b_sum, 0), p_out.dtype.element_ty), mask=m)


# The interpreter takes as long for a program of any size.
_BLOCK_S, _BLOCK = 16, 4096 if INTERPRETED else 64


def sum_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over the first axis of ``partials`` (parts, ...), contiguous, in ``dtype``."""
    out = torch.empty(partials.shape[1:], dtype=dtype, device=partials.device)
    size = out.numel()
    grid = (cdiv(size, _BLOCK),)
    launch(sum_partials_kernel, grid, partials, out, partials.shape[0], size, _BLOCK_S, _BLOCK, num_warps=4)
    return out
