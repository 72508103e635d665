"""Stochastic depth as the libraries draw it: with the same seed, the same images are dropped."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from effnet_ops.reference import compute_dtype


def drop_path_scale(drop: nn.Module | Callable[..., Tensor], x: Tensor, rate: float | None) -> Tensor | None:
    """The scale (N,) per image that a library's own drop path draws for a branch of x (N, C, H, W).

    Drop path multiplies the images by numbers: those that it makes of ones. None where it does nothing. ``drop`` is a
    module, or a function that takes the drop rate of the call, too.
    """
    if isinstance(drop, nn.Module) and not drop.training:
        return None
    ones = torch.ones((x.shape[0], 1, 1, 1), dtype=_branch_dtype(x), device=x.device)
    scale = drop(ones) if isinstance(drop, nn.Module) else drop(ones, rate)
    return None if scale is ones else scale.to(compute_dtype(x.dtype)).view(-1)


def _branch_dtype(x: Tensor) -> torch.dtype:
    """The dtype that the stock block's branch has, in which the stock draws."""
    kind = x.device.type
    # A compiled graph has random numbers of its own, so there is nothing to match; nor can Dynamo trace the question.
    if x.dtype != torch.float32 or torch.compiler.is_compiling() or not torch.amp.is_autocast_available(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
