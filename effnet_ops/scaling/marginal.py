"""What the next step along each axis brings for what it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from effnet_ops.models import ScaledSpec
from effnet_ops.scaling.laws import Axes, base_spec, scaled

STEP = 1.02


@dataclass(frozen=True)
class MarginalGain:
    """The step along one axis that ``spec`` takes: what it gains, what it costs, in the units of score and cost."""

    axis: str
    spec: ScaledSpec
    gain: float
    cost: float

    @property
    def rate(self) -> float:
        """Gain for one unit of cost; infinite where the step is free."""
        return self.gain / self.cost if self.cost > 0 else float("inf")


def marginal_gains(
    spec: str | ScaledSpec, score: Callable[[ScaledSpec], float], cost: Callable[[ScaledSpec], float], step: float = 1.1
) -> list[MarginalGain]:
    """Score and cost of growing a network along each axis alone, the best rate first.

    An axis grows by at least ``step``, and on until rounding lets the network change.

    Args:
        spec: the point to start from.
        score: larger is better, such as `published_accuracy`.
        cost: such as ``LatencyTable.predict`` (gains are then by the second) or ``lambda spec: count(spec).macs``.
        step: the smallest factor of an axis, above 1.

    Raises ValueError for a step that is not above 1.
    """
    if not step > 1.0:
        raise ValueError(f"step must be larger than 1, got {step!r}")
    spec = base_spec(spec)
    before, paid = score(spec), cost(spec)
    gains = []
    for axis in Axes._fields:
        larger = _grown(spec, axis, step)
        gains.append(MarginalGain(axis, larger, score(larger) - before, cost(larger) - paid))
    return sorted(gains, key=lambda gain: -gain.rate)


def _grown(spec: ScaledSpec, axis: str, factor: float) -> ScaledSpec:
    while True:
        grown = scaled(spec, Axes(1.0, 1.0, 1.0)._replace(**{axis: factor}))
        if (grown.stages(), grown.resolution) != (spec.stages(), spec.resolution):
            return replace(grown, name=f"{spec.name}, {axis} x{factor:.2f}")
        factor *= STEP
