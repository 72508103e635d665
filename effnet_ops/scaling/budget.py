"""Budgets such as "2GMACs", "15ms", "20Mparams" or "300MB", and what a network takes of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from effnet_ops.checks import unknown_name
from effnet_ops.models import ScaledSpec
from effnet_ops.scaling.counters import count

_PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_BASE_UNITS = {"MACs": ("macs", 1.0), "FLOPs": ("macs", 0.5), "params": ("parameters", 1.0), "B": ("memory", 1.0)}
UNITS: dict[str, tuple[str, float]] = {
    **{f"{prefix}{unit}": (kind, p * f) for unit, (kind, f) in _BASE_UNITS.items() for prefix, p in _PREFIXES.items()},
    **{"KiB": ("memory", 2.0**10), "MiB": ("memory", 2.0**20), "GiB": ("memory", 2.0**30)},
    **{"s": ("latency", 1.0), "ms": ("latency", 1e-3), "us": ("latency", 1e-6)},
}
"""Each unit with what it measures and its size in multiply-adds, parameters, bytes or seconds."""

_AMOUNT = re.compile(r"\s*([0-9.]+(?:[eE][-+]?[0-9]+)?)\s*([A-Za-z]+)\s*")
_SHOWN = {"macs": "MACs", "parameters": "params", "memory": "B"}
KINDS = ("macs", "parameters", "memory", "latency")


@dataclass(frozen=True)
class Budget:
    """An amount of one cost: multiply-adds, parameters, bytes of memory or seconds.

    ``kind`` is "macs", "parameters", "memory" (activations that training keeps for the backward pass, one image in
    float32, with the fused blocks) or "latency" (seconds of a forward pass).
    """

    kind: str
    amount: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown_name("kind of budget", self.kind, KINDS)
        if not 0.0 < self.amount < math.inf:
            raise ValueError(f"a budget must be positive, got {self.amount!r}")

    @classmethod
    def parse(cls, text: str | Budget) -> Budget:
        """A budget from a number and a unit: MACs, FLOPs, params or B with k, M, G, T; MiB, GiB; s, ms, us.

        Case does not matter where it cannot be mistaken. Raises ValueError for anything else, with the closest unit.
        """
        if isinstance(text, Budget):
            return text
        found = _AMOUNT.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise ValueError(f"a budget is a number and a unit, such as 2GMACs, 15ms or 20Mparams; got {text!r}")
        unit = found[2].replace("parameters", "params")
        if unit not in UNITS:
            alike = [known for known in UNITS if known.lower() == unit.lower()]
            if len(alike) != 1:
                raise unknown_name("unit of a budget", found[2], UNITS)
            unit = alike[0]
        kind, size = UNITS[unit]
        try:
            return cls(kind, float(found[1]) * size)
        except ValueError:
            raise ValueError(f"a budget must be a positive number and a unit, got {text!r}") from None

    def __str__(self) -> str:
        if self.kind == "latency":
            return f"{self.amount * 1e3:.4g} ms"
        power = max((p for p in _PREFIXES if _PREFIXES[p] <= self.amount), key=_PREFIXES.get, default="")
        return f"{self.amount / _PREFIXES[power]:.4g} {power}{_SHOWN[self.kind]}"


def spec_cost(budget: Budget | str) -> Callable[[ScaledSpec], float]:
    """What measures a specification in the unit of ``budget``, or is named so.

    Raises ValueError for latency: only a measurement knows it (`LatencyTable.predict`).
    """
    kind = budget.kind if isinstance(budget, Budget) else budget
    if kind == "latency":
        raise ValueError("a budget of time needs a measured cost: pass cost=LatencyTable(...).predict")
    attribute = {"macs": "macs", "parameters": "parameters", "memory": "fused_saved_bytes"}.get(kind)
    if attribute is None:
        raise unknown_name("kind of budget", kind, KINDS)
    return lambda spec: float(getattr(count(spec), attribute))
