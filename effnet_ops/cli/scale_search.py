"""`effnet-ops scale search` and `compare`: objectives over many networks."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from rich.table import Table

from effnet_ops import scaling
from effnet_ops.checks import unknown_name
from effnet_ops.cli.console import console, need
from effnet_ops.cli.scale_laws import Measuring, bad_input, measured
from effnet_ops.models import ScaledSpec, model_spec
from effnet_ops.scaling import Budget, CompoundScaling, DigitsTraining, Objective, published_accuracy
from effnet_ops.scaling.digits import TINY

BUILT_IN: dict[str, Callable[[], Objective]] = {"published": lambda: published_accuracy, "digits": DigitsTraining}


def search(
    base: str,
    constraint: dict[str, Any],
    objective: str,
    seeds: int,
    run: dict[str, Any],
    top: int,
    measuring: Measuring,
) -> None:
    with bad_input(), measured(constraint["budget"], measuring) as cost:
        chosen = _objective(objective)
        result = scaling.search(
            _base(base), **constraint, cost=cost, objective=chosen, seeds=range(seeds), **run, progress=True
        )
    table = Table(title=f"the best of {len(result.points)} networks, {result.new} runs made now", title_justify="left")
    for heading in ("alpha", "beta", "gamma", "score", "deviation", "params (M)", "MACs (G)"):
        table.add_column(heading, justify="right")
    if cost is not None:
        table.add_column("time (ms)", justify="right")
    for row in result.points[:top]:
        law = row.point.law
        cells = [f"{law.alpha:g}", f"{law.beta:g}", f"{law.gamma:g}", f"{row.score:.4g}", f"{row.deviation:.2g}"]
        cells += [f"{row.parameters / 1e6:.3f}", f"{row.macs / 1e9:.4f}"]
        table.add_row(*cells, *([f"{row.cost * 1e3:.2f}"] if cost is not None else []))
    console.print(table)
    if objective == "published":
        console.print(f"score: fitted top-1 (%), good to {scaling.accuracy_fit().residual:.2f}; nothing was trained")


def compare(
    base: str,
    budgets: list[str] | None,
    coefficients: tuple[float, float, float],
    objective: str,
    seeds: int,
    run: dict[str, Any],
) -> None:
    with bad_input():
        spec = _base(base)
        wanted = budgets or [Budget("macs", 3 * scaling.count(spec).macs)]
        laws, chosen = {"compound": CompoundScaling(*coefficients)}, _objective(objective)
        result = scaling.compare(spec, wanted, laws=laws, objective=chosen, seeds=range(seeds), **run, progress=True)
    table = Table(title=f"{spec.name} scaled, {result.new} runs made now", title_justify="left")
    for heading in ("", "MACs", "params (M)", "score", "deviation", "gain over unscaled"):
        table.add_column(heading, justify="left" if heading == "" else "right")
    for row in result.outcomes:
        gain, error = row.gain(result.base)
        shown = "" if row is result.base else f"{gain:+.4g}" + (f" ± {error:.2g}" if error == error else "")
        costs = f"{row.contender.factor:.2f}x", f"{row.contender.parameters / 1e6:.3f}"
        table.add_row(row.contender.way, *costs, f"{row.score:.4g}", f"{row.deviation:.2g}", shown)
    console.print(table)
    console.print("gain: mean over the seeds and its standard error, each seed against itself")


def _base(name: str) -> ScaledSpec:
    return TINY if name == TINY.name else model_spec(name)


def _objective(name: str) -> Objective:
    """A built-in objective, or ``module:function`` with the current folder importable."""
    module, colon, attribute = name.partition(":")
    if not colon:
        if name not in BUILT_IN:
            raise unknown_name("objective", name, BUILT_IN)
        if name == "digits":
            need("sklearn")
        return BUILT_IN[name]()
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"objective {name!r} cannot be loaded: {error}") from None
    if not callable(found):
        raise TypeError(f"objective {name!r} is not a function but {type(found).__name__}")
    return found
