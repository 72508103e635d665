"""What a search maximises: a function of a network and a seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from effnet_ops.models import ScaledSpec


class Score(NamedTuple):
    """How good a network is (larger is better), with what a results file shall keep beside it, as JSON takes it."""

    value: float
    details: Mapping[str, Any] = MappingProxyType({})


Objective = Callable[[ScaledSpec, int], float | Score]
"""A function, or an object with ``__call__``, of a specification and a seed; picklable for more than one process."""


def describe(objective: Objective) -> dict[str, Any]:
    """What tells one objective's results from another's: its name and, of a dataclass, its fields."""
    kind = objective if hasattr(objective, "__qualname__") else type(objective)
    description: dict[str, Any] = {"name": f"{kind.__module__}.{kind.__qualname__}"}
    if dataclasses.is_dataclass(objective) and not isinstance(objective, type):
        description["settings"] = dataclasses.asdict(objective)
    return description


def scored(objective: Objective, spec: ScaledSpec, seed: int) -> Score:
    """``objective`` at one point, as a `Score`. Raises TypeError for a result that is no number."""
    result = objective(spec, seed)
    value = result.value if isinstance(result, Score) else result
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise TypeError(f"the objective must return a number or a Score, got {result!r} for {spec.name}, seed {seed}")
    return result if isinstance(result, Score) else Score(float(value))
