"""The activations that each layer moves and keeps: operation by operation, and fused as docs/mbconv.md derives it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from effnet_ops.scaling.network import Layer

RECOMPUTED_UP_TO = 64
"""Input channels up to which training forms the expanded tensor again (`effnet_ops.set_recompute`, "auto")."""


class Traffic(NamedTuple):
    """Elements of one image. ``stock`` and ``fused`` are read and written by a forward pass in evaluation.

    ``stock_saved`` and ``fused_saved`` are kept for the backward pass by a forward pass in training.
    """

    stock: int
    fused: int
    stock_saved: int
    fused_saved: int


def traffic(layers: Iterable[Layer]) -> Iterator[Traffic]:
    """One entry a layer; normalisation, activation, gate, pool and residual belong to the layer in front of them.

    Stock: a convolution reads its input and writes its output, a normalisation, an activation or a gate reads and
    writes a tensor, a pool reads one, a residual reads two and writes one. Fused: a product or convolution writes its
    activated output once; the expanded tensor is never in memory; the pool and the projection read the depthwise
    convolution's output. Of a Fused-MBConv block, training keeps the expansion, whose multiply-adds nobody repeats.
    """
    rows = list(layers)
    following = [*rows[1:], None]
    wide, expanded_input, projected = 0, 0, False
    for layer, after in zip(rows, following, strict=True):
        x, y = layer.in_channels * math.prod(layer.in_size), layer.activations
        if layer.kind == "conv" and layer.stage != "stem":
            expands = layer.path.endswith("conv_exp")
            in_tile = expands and after.kind == "pointwise"
            wide, projected = y, in_tile
            added = 0 if expands or not layer.residual else y
            yield Traffic(x + 5 * y + 3 * added, x + (0 if in_tile else y) + added, x + 2 * y, x + y)
        elif layer.kind == "pointwise" and after is not None and after.kind == "depthwise":
            kept = y if layer.in_channels > RECOMPUTED_UP_TO else 0
            expanded_input = x
            yield Traffic(x + 5 * y, x, x + 2 * y, x + kept)
        elif layer.kind == "depthwise":
            read = 0 if expanded_input else x
            wide, expanded_input = y, 0
            yield Traffic(x + 5 * y, read + y, x + 2 * y, read + y)
        elif layer.kind == "squeeze_excite":
            reduces = layer.in_channels > layer.out_channels
            yield Traffic(wide, wide, 0, 0) if reduces else Traffic(2 * wide, 0, wide, 0)
        elif layer.kind == "pointwise" and layer.stage != "head":
            added = y if layer.residual else 0
            read = 0 if projected else x
            projected = False
            yield Traffic(x + 3 * y + 3 * added, read + y + added, x + y, y)
        elif layer.kind == "linear":
            yield Traffic(x + y, x + y, x, x)
        else:
            pooled = y if layer.stage == "head" else 0
            yield Traffic(x + 5 * y + pooled, x + y + pooled, x + 2 * y, x + 2 * y)
