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
from effnet_ops.cli.console import bad_input, console, counted, need, show
from effnet_ops.cli.scale_laws import Measuring, measured
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
    with bad_input():
        spec, chosen = _base(base), _objective(objective)
        with measured(constraint["budget"], measuring) as cost:
            result = scaling.search(
                spec, **constraint, cost=cost, objective=chosen, seeds=range(seeds), **run, progress=True
            )
    title = f"the best of {counted(len(result.points), 'network')}, {counted(result.new, 'run')} made now"
    table = Table(title=title, title_justify="left")
    for heading in ("alpha", "beta", "gamma", "score", "deviation", "params (M)", "MACs (G)"):
        table.add_column(heading, justify="right", no_wrap=True)
    if cost is not None:
        table.add_column("time (ms)", justify="right", no_wrap=True)
    for row in result.points[:top]:
        law = row.point.law
        cells = [f"{law.alpha:g}", f"{law.beta:g}", f"{law.gamma:g}", f"{row.score:.4g}", f"{row.deviation:.2g}"]
        cells += [f"{row.parameters / 1e6:.3f}", f"{row.macs / 1e9:.4f}"]
        table.add_row(*cells, *([f"{row.cost * 1e3:.2f}"] if cost is not None else []))
    show(table)
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
        wanted = [Budget.parse(budget) for budget in budgets or ()] or [Budget("macs", 3 * scaling.count(spec).macs)]
        if any(budget.kind == "latency" for budget in wanted):
            raise ValueError("compare measures no times: give --budget in MACs, FLOPs, params or B, such as 2GMACs")
        laws, chosen = {"compound": CompoundScaling(*coefficients)}, _objective(objective)
        result = scaling.compare(spec, wanted, laws=laws, objective=chosen, seeds=range(seeds), **run, progress=True)
    table = Table(title=f"{spec.name} scaled, {counted(result.new, 'run')} made now", title_justify="left")
    table.add_column("", overflow="fold")
    for heading in ("MACs", "params (M)", "score", "deviation", "gain over unscaled"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in result.outcomes:
        gain, error = row.gain(result.base)
        shown = "" if row is result.base else f"{gain:+.4g}" + (f" ± {error:.2g}" if error == error else "")
        costs = f"{row.contender.factor:.2f}x", f"{row.contender.parameters / 1e6:.3f}"
        table.add_row(row.contender.way, *costs, f"{row.score:.4g}", f"{row.deviation:.2g}", shown)
    show(table)
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
