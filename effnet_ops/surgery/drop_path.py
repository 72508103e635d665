"""Stochastic depth as the libraries draw it: with the same seed, the same images are dropped."""

from __future__ import annotations

import torch
from torch import Tensor

from effnet_ops.reference import compute_dtype


def bernoulli_scale(x: Tensor, keep: float, *, scale_by_keep: bool = True, per_image: bool = True) -> Tensor:
    """Scale (N,) per image of x (N, C, H, W), drawn as timm and torchvision do; or one draw for all images."""
    shape = (x.shape[0] if per_image else 1, 1, 1, 1)
    drawn = torch.empty(shape, dtype=_branch_dtype(x), device=x.device).bernoulli_(keep)
    scale = drawn.to(compute_dtype(x.dtype)).view(-1)
    if keep > 0.0 and scale_by_keep:
        scale = scale / keep
    return scale if per_image else scale.expand(x.shape[0])


def uniform_scale(x: Tensor, rate: float) -> Tensor:
    """Scale (N,) per image of x (N, C, H, W), drawn as efficientnet_pytorch and geffnet do."""
    drawn = torch.rand((x.shape[0], 1, 1, 1), dtype=_branch_dtype(x), device=x.device)
    return torch.floor(drawn + (1 - rate)).to(compute_dtype(x.dtype)).view(-1) / (1 - rate)


def _branch_dtype(x: Tensor) -> torch.dtype:
    """The dtype that the stock block's branch has, in which the stock draws."""
    kind = x.device.type
    # A compiled graph has random numbers of its own, so there is nothing to match; nor can Dynamo trace the question.
    if x.dtype != torch.float32 or torch.compiler.is_compiling() or not torch.amp.is_autocast_available(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
