"""An objective that trains nothing: a curve with saturating returns on each axis, fitted to published accuracies."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from effnet_ops.models import ScaledSpec
from effnet_ops.models.family import EFFICIENTNET
from effnet_ops.scaling.laws import Axes, realised_axes
from effnet_ops.scaling.published import RELEASED, SCALED_B0

POWERS = tuple(0.1 * i for i in range(1, 41))


class AccuracyFit(NamedTuple):
    """top-1 = ceiling - sum over the axes of weight * (size relative to B0)^-power, in percent of ImageNet.

    ``residual`` is the root mean square of what the fit misses over its points, ``offset`` what the paper's table 7
    lies above (its networks were trained otherwise than the released ones).
    """

    ceiling: float
    weights: Axes
    power: float
    offset: float
    residual: float

    def accuracy(self, axes: Axes) -> float:
        """The fitted accuracy of a network of these axes."""
        return self.ceiling - sum(w * x**-self.power for w, x in zip(self.weights, axes, strict=True))


@functools.cache
def accuracy_fit() -> AccuracyFit:
    """The fit to B0-B7 and to the paper's table 7, by least squares for each power of `POWERS`; the best one wins."""
    published = [*RELEASED, *SCALED_B0]
    axes = torch.tensor([realised_axes(p.spec) for p in published], dtype=torch.float64)
    top1 = torch.tensor([p.top1 for p in published], dtype=torch.float64)
    table7 = torch.tensor([p in SCALED_B0 for p in published], dtype=torch.float64)
    fits = []
    for power in POWERS:
        columns = [torch.ones_like(top1), table7, *(-(axes**-power)).unbind(1)]
        system = torch.stack(columns, 1)
        solution = torch.linalg.lstsq(system, top1).solution
        residual = (system @ solution - top1).square().mean().sqrt().item()
        ceiling, offset, *weights = solution.tolist()
        if min(weights) >= 0.0:
            fits.append(AccuracyFit(ceiling, Axes(*weights), power, offset, residual))
    return min(fits, key=lambda fit: fit.residual)


def published_accuracy(spec: ScaledSpec, seed: int = 0) -> float:
    """A guess at ImageNet's top-1 accuracy of a scaled B0, in percent, from `accuracy_fit`. ``seed`` does nothing.

    It knows thirteen published networks, all scaled from B0 and trained by their authors' recipe; it interpolates
    between them and says nothing about another architecture, task or recipe. Its residual is a few tenths of a percent,
    more than the differences between neighbouring points of a grid. Use it to see how the search works and where a
    budget leads; train to decide.

    Raises ValueError for an architecture other than B0's.
    """
    if spec.architecture != EFFICIENTNET:
        raise ValueError(f"published_accuracy knows networks scaled from efficientnet_b0, not {spec.name}")
    return accuracy_fit().accuracy(realised_axes(spec))
