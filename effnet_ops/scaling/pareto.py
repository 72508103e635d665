"""Pareto fronts: the candidates that no other beats in every respect at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

Candidate = TypeVar("Candidate")
Measure = str | Callable[[Any], float]


def pareto_front(
    candidates: Iterable[Candidate], costs: Sequence[Measure] = ("macs",), score: Measure = "score"
) -> list[Candidate]:
    """The candidates to which no other is preferable: as cheap in each of ``costs``, as good, and better in one.

    Args:
        candidates: anything: mappings, objects, rows of a search. Equal ones are all kept.
        costs: what to keep small: names of keys or attributes, or functions of a candidate; commonly one or two.
        score: what to make large.

    Returns:
        The front in the order of the first cost.

    Raises:
        ValueError: no costs, a value that is NaN or missing, named with its candidate.
    """
    if not costs or isinstance(costs, str):
        raise ValueError(f"costs must be a sequence of at least one name or function, got {costs!r}")
    points = [(tuple(_value(c, m) for m in costs), _value(c, score), c) for c in candidates]

    def beaten(cost: tuple[float, ...], value: float) -> bool:
        return any(
            other_value >= value
            and all(a <= b for a, b in zip(other, cost, strict=True))
            and (other, other_value) != (cost, value)
            for other, other_value, _ in points
        )

    front = [(cost, value, c) for cost, value, c in points if not beaten(cost, value)]
    return [c for _, _, c in sorted(front, key=lambda point: (point[0], point[1]))]


def _value(candidate: object, measure: Measure) -> float:
    if callable(measure):
        value = measure(candidate)
    elif isinstance(candidate, Mapping):
        value = candidate.get(measure)
    else:
        value = getattr(candidate, measure, None)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise ValueError(f"{measure!r} of {candidate!r} is {value!r}, not a number")
    return float(value)
