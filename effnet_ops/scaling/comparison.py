"""One axis against all three: networks of equal cost, scored with the same seeds."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from effnet_ops.models import ScaledSpec
from effnet_ops.scaling.budget import Budget
from effnet_ops.scaling.counters import count
from effnet_ops.scaling.laws import Axes, CompoundScaling, base_spec, single_axis
from effnet_ops.scaling.objective import Objective
from effnet_ops.scaling.runs import Job, evaluate

BASE = "unscaled"


@dataclass(frozen=True)
class Contender:
    """A network that one way of scaling makes of a budget; ``factor`` is its multiply-adds relative to the base."""

    way: str
    spec: ScaledSpec
    macs: int
    parameters: int
    factor: float


@dataclass(frozen=True)
class Outcome:
    """A contender's scores, one a seed, and what the objective gave beside them (`DigitsTraining`: "curve")."""

    contender: Contender
    seeds: tuple[int, ...]
    scores: tuple[float, ...]
    details: tuple[dict[str, Any], ...]

    @property
    def score(self) -> float:
        """The mean over the seeds."""
        return statistics.fmean(self.scores)

    @property
    def deviation(self) -> float:
        """Sample standard deviation over the seeds, 0 for a single one."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else 0.0

    def gain(self, other: Outcome) -> tuple[float, float]:
        """Mean and standard error of the score over ``other``'s, seed by seed: the same seed has the same data.

        Raises ValueError where the seeds differ.
        """
        if self.seeds != other.seeds:
            raise ValueError(f"scores of seeds {self.seeds} and {other.seeds} cannot be paired")
        gains = [a - b for a, b in zip(self.scores, other.scores, strict=True)]
        error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
        return statistics.fmean(gains), error

    def curve(self) -> list[tuple[float, float]]:
        """Mean and deviation over the seeds of each entry of the objective's "curve"; empty without one."""
        curves = [row.get("curve", ()) for row in self.details]
        spread = statistics.stdev if len(curves) > 1 else lambda _: 0.0
        return [(statistics.fmean(values), spread(values)) for values in zip(*curves, strict=True)]


@dataclass(frozen=True)
class Comparison:
    """All outcomes, the unscaled network first and then by budget; ``new`` runs were made now."""

    outcomes: tuple[Outcome, ...]
    new: int

    @property
    def base(self) -> Outcome:
        """What the others are compared with."""
        return self.outcomes[0]


def contenders(
    base: str | ScaledSpec, budgets: Sequence[Budget | str], laws: Mapping[str, CompoundScaling]
) -> list[Contender]:
    """The base network and, for each budget, depth, width and resolution alone and each law as far as it allows.

    Raises ValueError for a budget below the base network's cost.
    """
    spec = base_spec(base)
    unscaled = count(spec).macs
    found = [_contender(BASE, spec, unscaled)]
    for budget in budgets:
        for axis in Axes._fields:
            found.append(_contender(f"{axis} only", single_axis(spec, axis, budget), unscaled))
        for name, law in laws.items():
            law = replace(law, base=spec)
            found.append(_contender(name, law.spec(law.phi_for(budget)), unscaled))
    return found


def _contender(way: str, spec: ScaledSpec, unscaled: int) -> Contender:
    costs = count(spec)
    spec = replace(spec, name=f"{way}, {costs.macs / unscaled:.2f}x")
    return Contender(way, spec, costs.macs, costs.parameters, costs.macs / unscaled)


def compare(
    base: str | ScaledSpec,
    budgets: Sequence[Budget | str],
    *,
    laws: Mapping[str, CompoundScaling] | None = None,
    objective: Objective,
    seeds: Sequence[int] = (0, 1, 2),
    results: str | os.PathLike[str] | None = None,
    workers: int = 1,
    progress: bool = False,
) -> Comparison:
    """Score each way to spend a budget on networks scaled from ``base``.

    Args:
        base: the network that is scaled.
        budgets: of multiply-adds, parameters or memory. Rounding keeps networks below them: see each one's ``factor``.
        laws: compound scalings by name, whose own base does not matter; the paper's by default.
        objective, seeds, results, workers, progress: as `search` takes them.

    Raises ValueError for a budget below the base network's cost, and as `search`.
    """
    laws = {"compound": CompoundScaling()} if laws is None else laws
    found = contenders(base, budgets, laws)
    jobs = [Job(c.spec, seed, {"way": c.way, "factor": round(c.factor, 4)}) for c in found for seed in seeds]
    runs = evaluate(jobs, objective, results=results, workers=workers, progress=progress)
    rows = iter(runs.rows)
    outcomes = []
    for contender in found:
        mine = [next(rows) for _ in seeds]
        scores, details = tuple(row["score"] for row in mine), tuple(row["details"] for row in mine)
        outcomes.append(Outcome(contender, tuple(seeds), scores, details))
    return Comparison(tuple(outcomes), runs.new)
