"""The law of compound scaling (Tan and Le, arXiv 1905.11946, equation 3) and what rounding makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from effnet_ops.checks import unknown_name
from effnet_ops.models import ScaledSpec, model_spec
from effnet_ops.scaling.budget import Budget, spec_cost
from effnet_ops.scaling.counters import Count, count

PHI_RANGE = (-8.0, 24.0)
"""Where an inverse is searched: from a hundredth of the base network's multiply-adds to several million times them."""


class Axes(NamedTuple):
    """One number for each of the three axes."""

    depth: float
    width: float
    resolution: float


@dataclass(frozen=True)
class ScaledNetwork:
    """A point of a law as a network: what the formula promises (``nominal_factor``) and what rounding leaves of it.

    ``factor`` and ``nominal_factor`` are multiply-adds relative to the unscaled network.
    """

    phi: float
    coefficients: Axes
    spec: ScaledSpec
    count: Count
    nominal_factor: float
    factor: float


@dataclass(frozen=True)
class CompoundScaling:
    """depth = alpha^phi, width = beta^phi, resolution = gamma^phi, relative to ``base``.

    The cost of a convolution grows with depth, with the square of width and with the square of resolution, so the law
    promises (alpha beta^2 gamma^2)^phi times the multiply-adds. The defaults are the paper's, found by a grid search
    under alpha beta^2 gamma^2 = 2 to within its grid (their product is 1.92).

    Raises ValueError for a coefficient below 1.
    """

    alpha: float = 1.2
    beta: float = 1.1
    gamma: float = 1.15
    base: str | ScaledSpec = field(default="efficientnet_b0", kw_only=True)

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "gamma"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 1.0 <= value < math.inf:
                raise ValueError(f"{name} must be a number of at least 1, got {value!r}")
        base_spec(self.base)

    @property
    def growth(self) -> float:
        """alpha beta^2 gamma^2: the nominal factor of the multiply-adds at phi = 1."""
        return self.alpha * self.beta**2 * self.gamma**2

    def coefficients(self, phi: float) -> Axes:
        """The three multipliers at ``phi``, before any rounding."""
        phi = _checked_phi(phi)
        return Axes(self.alpha**phi, self.beta**phi, self.gamma**phi)

    def nominal_factor(self, phi: float) -> float:
        """How often the base network's multiply-adds the formula promises: (alpha beta^2 gamma^2)^phi."""
        return self.growth ** _checked_phi(phi)

    def spec(self, phi: float) -> ScaledSpec:
        """The network at ``phi``: resolution to the nearest pixel, channels and repeats as `ScaledSpec` rounds them."""
        name = f"{base_spec(self.base).name} at phi {phi:g}"
        return scaled(self.base, self.coefficients(phi), name)

    def network(self, phi: float) -> ScaledNetwork:
        """The network at ``phi`` with its nominal and its real cost."""
        spec = self.spec(phi)
        costs = count(spec)
        factor = costs.macs / count(base_spec(self.base)).macs
        return ScaledNetwork(phi, self.coefficients(phi), spec, costs, self.nominal_factor(phi), factor)

    def nominal_phi(self, factor: float) -> float:
        """The phi at which the formula promises ``factor`` times the multiply-adds."""
        if not 0.0 < factor < math.inf:
            raise ValueError(f"factor must be a positive number, got {factor!r}")
        self._check_growth()
        return math.log(factor) / math.log(self.growth)

    def phi_for(self, budget: Budget | str, cost: Callable[[ScaledSpec], float] | None = None) -> float:
        """The largest phi whose real network stays within ``budget``, to 1e-4.

        ``cost`` replaces the budget's own measure of a specification; a budget of time needs one, such as
        ``LatencyTable.predict``. Negative phi are networks smaller than the base.

        Raises ValueError for a budget that no phi in `PHI_RANGE` meets, or that all of them do.
        """
        self._check_growth()
        budget = Budget.parse(budget)
        measure = cost or spec_cost(budget)
        low, high = PHI_RANGE
        smallest = measure(self.spec(low))
        if smallest > budget.amount:
            least = Budget(budget.kind, smallest)
            raise ValueError(f"budget {budget} is infeasible: even phi = {low:g} takes {least}")
        low, high = self._bracket(lambda phi: measure(self.spec(phi)) <= budget.amount, budget)
        while high - low > 1e-4:
            middle = (low + high) / 2
            low, high = (middle, high) if measure(self.spec(middle)) <= budget.amount else (low, middle)
        return low

    def _bracket(self, fits: Callable[[float], bool], budget: Budget) -> tuple[float, float]:
        """A phi that fits and a larger one that does not, found in growing steps from 0: large networks are dear."""
        step = 1.0
        if fits(0.0):
            low, high = 0.0, step
            while fits(high):
                if high >= PHI_RANGE[1]:
                    raise ValueError(f"budget {budget} is beyond phi = {PHI_RANGE[1]:g}")
                step *= 2
                low, high = high, min(high + step, PHI_RANGE[1])
            return low, high
        low, high = -step, 0.0
        while low > PHI_RANGE[0] and not fits(low):
            step *= 2
            low, high = max(low - step, PHI_RANGE[0]), low
        return low, high

    def _check_growth(self) -> None:
        if self.growth == 1.0:
            raise ValueError("alpha = beta = gamma = 1 scales nothing, so no phi can be found")


def base_spec(base: str | ScaledSpec) -> ScaledSpec:
    """The network that is scaled, from its name or specification."""
    if isinstance(base, ScaledSpec):
        return base
    if not isinstance(base, str):
        raise TypeError(f"base must be a model's name or a ScaledSpec, got {type(base).__name__}")
    return model_spec(base)


def scaled(base: str | ScaledSpec, factors: Axes, name: str | None = None) -> ScaledSpec:
    """``base`` with its depth, width and resolution multiplied; resolution to the nearest pixel, at least 1."""
    spec = base_spec(base)
    return replace(
        spec,
        depth=spec.depth * factors.depth,
        width=spec.width * factors.width,
        resolution=max(1, round(spec.resolution * factors.resolution)),
        train_resolution=None,
        name=spec.name if name is None else name,
    )


def implied_phi(spec: str | ScaledSpec, law: CompoundScaling | None = None) -> Axes:
    """The phi of each axis at which ``law`` has a network's depth, width and resolution: log(depth) / log(alpha) ...

    A network of the law has three equal ones. Raises ValueError where a coefficient of the law is 1.
    """
    law, spec = law or CompoundScaling(), base_spec(spec)
    base = base_spec(law.base)
    ratios = Axes(spec.depth / base.depth, spec.width / base.width, spec.resolution / base.resolution)
    for name in ("alpha", "beta", "gamma"):
        if getattr(law, name) == 1.0:
            raise ValueError(f"{name} = 1 leaves its axis as it is, so that axis implies no phi")
    return Axes(*(math.log(r) / math.log(c) for r, c in zip(ratios, (law.alpha, law.beta, law.gamma), strict=True)))


def realised_axes(spec: str | ScaledSpec, base: str | ScaledSpec = "efficientnet_b0") -> Axes:
    """Depth, width and resolution of a network over those of ``base``, after rounding.

    Depth is the ratio of the numbers of blocks, width the geometric mean over the stages of the ratio of channels.
    """
    spec, base = base_spec(spec), base_spec(base)
    stages, base_stages = spec.stages(), base_spec(base).stages()
    if len(stages) != len(base_stages):
        raise ValueError(
            f"{spec.name} has {len(stages)} stages and {base.name} {len(base_stages)}: no axes relate them"
        )
    depth = sum(map(len, stages)) / sum(map(len, base_stages))
    ratios = [a[-1].out_channels / b[-1].out_channels for a, b in zip(stages, base_stages, strict=True)]
    return Axes(depth, math.prod(ratios) ** (1 / len(ratios)), spec.resolution / base.resolution)


def single_axis(base: str | ScaledSpec, axis: str, budget: Budget | str) -> ScaledSpec:
    """``base`` scaled along one axis only, as far as a budget of multiply-adds, parameters or memory allows.

    ``axis`` is "depth", "width" or "resolution". Raises ValueError for another one, for a budget below the base
    network's cost, and where the axis does not change that cost (resolution and parameters).
    """
    if axis not in Axes._fields:
        raise unknown_name("axis", axis, Axes._fields)
    budget = Budget.parse(budget)
    law = CompoundScaling(*(2.0 if name == axis else 1.0 for name in Axes._fields), base=base)
    return replace(law.spec(law.phi_for(budget)), name=f"{base_spec(base).name}, {axis} only")


def _checked_phi(phi: float) -> float:
    if isinstance(phi, bool) or not isinstance(phi, int | float) or not math.isfinite(phi):
        raise ValueError(f"phi must be a finite number, got {phi!r}")
    return float(phi)
