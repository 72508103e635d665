"""Squeeze-and-excitation (Hu et al., arXiv 1709.01507): a channel's gate depends on the whole image's average."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from effnet_ops.reference.activation import GATES, activate, compute_dtype


def squeeze_excite(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    activation: str,
    gate: str,
) -> Tensor:
    """x * gate(expand(activation(reduce(mean over H, W of x)))) for x (N, C, H, W)."""
    dtype = compute_dtype(x.dtype)

    def product(v: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(v, weight.to(dtype), None if bias is None else bias.to(dtype))

    x_wide = x.to(dtype)
    pooled = x_wide.mean((2, 3), keepdim=True)
    hidden = activate(product(pooled, reduce_weight, reduce_bias), activation)
    return (x_wide * GATES[gate](product(hidden, expand_weight, expand_bias))).to(x.dtype)
