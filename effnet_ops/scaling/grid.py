"""The search for coefficients: a grid over (alpha, beta, gamma) under a constraint, scored, and never scored twice."""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from effnet_ops.models import ScaledSpec
from effnet_ops.scaling.budget import Budget, spec_cost
from effnet_ops.scaling.counters import count
from effnet_ops.scaling.laws import CompoundScaling
from effnet_ops.scaling.objective import Objective
from effnet_ops.scaling.proxy import published_accuracy
from effnet_ops.scaling.runs import Job, evaluate

ALPHAS = tuple(1.0 + 0.1 * i for i in range(11))
BETAS = GAMMAS = tuple(1.0 + 0.05 * i for i in range(9))


@dataclass(frozen=True)
class GridPoint:
    """A point of the grid that meets the constraint. ``cost`` is in the constraint's unit (nominal: a factor)."""

    law: CompoundScaling
    spec: ScaledSpec
    cost: float
    macs: int
    parameters: int


@dataclass(frozen=True)
class ScoredPoint:
    """A point with its scores, one a seed. ``deviation`` is the sample standard deviation, 0 for a single seed."""

    point: GridPoint
    scores: tuple[float, ...]

    @property
    def score(self) -> float:
        """The mean over the seeds."""
        return statistics.fmean(self.scores)

    @property
    def deviation(self) -> float:
        """The standard deviation over the seeds, 0 of a single one."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else 0.0

    @property
    def macs(self) -> int:
        """Multiply-adds of one image."""
        return self.point.macs

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return self.point.parameters

    @property
    def cost(self) -> float:
        """What the constraint limits, in its unit."""
        return self.point.cost


@dataclass(frozen=True)
class SearchResult:
    """Every scored point, the best first. ``new`` of the runs were made now, the others were in the results file."""

    points: tuple[ScoredPoint, ...]
    new: int

    @property
    def best(self) -> ScoredPoint:
        """The point with the best score."""
        return self.points[0]


def grid(
    base: str | ScaledSpec = "efficientnet_b0",
    *,
    alphas: Iterable[float] = ALPHAS,
    betas: Iterable[float] = BETAS,
    gammas: Iterable[float] = GAMMAS,
    phi: float = 1.0,
    target: float = 2.0,
    budget: Budget | str | None = None,
    tolerance: float = 0.1,
    cost: Callable[[ScaledSpec], float] | None = None,
) -> list[GridPoint]:
    """The points of a grid that meet a constraint, without those that round to the same network as an earlier one.

    Arguments as `search`. Raises ValueError where no point does, with the range that the grid covers.
    """
    if not 0.0 <= tolerance < 1.0:
        raise ValueError(f"tolerance must lie in [0, 1), got {tolerance!r}")
    budget = None if budget is None else Budget.parse(budget)
    if budget is None:
        if not target > 1.0:
            raise ValueError(f"target must be larger than 1, got {target!r}")
        low, high = target * (1 - tolerance), target * (1 + tolerance)
    else:
        low, high = budget.amount * (1 - tolerance), budget.amount
        cost = cost or spec_cost(budget)
    points: dict[object, GridPoint] = {}
    costs = []
    for coefficients in itertools.product(alphas, betas, gammas):
        law = CompoundScaling(*(round(c, 6) for c in coefficients), base=base)
        spec = replace(law.spec(phi), name=f"alpha {law.alpha:g} beta {law.beta:g} gamma {law.gamma:g} phi {phi:g}")
        value = law.growth if budget is None else cost(spec)
        costs.append(value)
        if low <= value <= high:
            counted = count(spec)
            identity = (spec.stages(), spec.stem_channels, spec.head_channels, spec.resolution)
            points.setdefault(identity, GridPoint(law, spec, value, counted.macs, counted.parameters))
    if not points:
        raise ValueError(_nothing_fits(budget, low, high, costs))
    return list(points.values())


def _nothing_fits(budget: Budget | None, low: float, high: float, costs: list[float]) -> str:
    if not costs:
        return "the grid is empty: alphas, betas and gammas need a value each"
    if budget is None:
        wanted, seen = f"{low:g} to {high:g}", f"{min(costs):g} to {max(costs):g}"
        return f"no point of the grid has alpha beta^2 gamma^2 of {wanted}; its points have {seen}"
    shown = [str(Budget(budget.kind, amount)) for amount in (low, high, min(costs), max(costs))]
    return f"no point of the grid takes {shown[0]} to {shown[1]}; its points take {shown[2]} to {shown[3]}"


def search(
    base: str | ScaledSpec = "efficientnet_b0",
    *,
    alphas: Iterable[float] = ALPHAS,
    betas: Iterable[float] = BETAS,
    gammas: Iterable[float] = GAMMAS,
    phi: float = 1.0,
    target: float = 2.0,
    budget: Budget | str | None = None,
    tolerance: float = 0.1,
    cost: Callable[[ScaledSpec], float] | None = None,
    objective: Objective = published_accuracy,
    seeds: Sequence[int] = (0,),
    results: str | os.PathLike[str] | None = None,
    workers: int = 1,
    progress: bool = False,
) -> SearchResult:
    """Grid search over the coefficients of compound scaling.

    Args:
        base: the network that is scaled.
        alphas, betas, gammas: the values of the grid, each at least 1.
        phi: where the networks are compared.
        target, tolerance: the paper's constraint: alpha beta^2 gamma^2 within ``tolerance`` (relative) of ``target``.
        budget: instead of it, what the real network at ``phi`` may take: at most that, and at least (1 -
            ``tolerance``) of it. Text such as "1.2GMACs", "20Mparams", "60MB", "15ms", or a `Budget`.
        cost: measures a specification in the budget's unit; a budget of time needs one (`LatencyTable.predict`).
        objective: a function of (specification, seed), such as `DigitsTraining`; larger is better. The default,
            `published_accuracy`, trains nothing and says what it is worth.
        seeds: the objective is called once with each, and a point's score is the mean.
        results: a file to which each run is appended when it ends. What is in it already is not run again, so a
            search that was killed goes on where it stopped. Without it nothing is kept.
        workers: processes; the objective must be picklable for more than one. They do not change the results.
        progress: show a bar with the time left on stderr.

    Raises:
        ValueError: a coefficient below 1, no point that meets the constraint, a results file that is damaged or
            belongs to another objective.
    """
    points = grid(
        base,
        alphas=alphas,
        betas=betas,
        gammas=gammas,
        phi=phi,
        target=target,
        budget=budget,
        tolerance=tolerance,
        cost=cost,
    )
    jobs = [Job(point.spec, seed, _tags(point)) for point in points for seed in _checked_seeds(seeds)]
    done = evaluate(jobs, objective, results=results, workers=workers, progress=progress)
    scores = iter(row["score"] for row in done.rows)
    scored = [ScoredPoint(point, tuple(next(scores) for _ in seeds)) for point in points]
    return SearchResult(tuple(sorted(scored, key=lambda p: -p.score)), done.new)


def _checked_seeds(seeds: Sequence[int]) -> Sequence[int]:
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must be different whole numbers, at least one, got {seeds!r}")
    return seeds


def _tags(point: GridPoint) -> dict[str, Any]:
    law = point.law
    return {"alpha": law.alpha, "beta": law.beta, "gamma": law.gamma}
