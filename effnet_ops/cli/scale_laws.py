"""`effnet-ops scale family` and `plan`: networks and what they cost."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from effnet_ops.checks import FLOAT_DTYPES, unknown_name
from effnet_ops.cli.console import bad_input, complain, console, show
from effnet_ops.models import ScaledSpec, spec_to_dict
from effnet_ops.scaling import (
    Axes,
    Budget,
    CompoundScaling,
    LatencyTable,
    count,
    implied_phi,
    realised_axes,
    single_axis,
)
from effnet_ops.scaling.budget import spec_cost
from effnet_ops.scaling.latency import default_path, units
from effnet_ops.scaling.laws import base_spec
from effnet_ops.scaling.published import LITE, RELEASED, V2_SCALED, V2_SEARCHED


class Measuring(NamedTuple):
    """How times are measured, from the command line."""

    variant: str
    batch: int
    dtype: str
    device: str
    cache: Path | None

    def empty(self, path: Path | None = None) -> LatencyTable:
        """A table of this setting that reads no cache. Raises ValueError for an option or device that does not fit."""
        dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}
        if self.dtype not in dtypes:
            raise unknown_name("dtype", self.dtype, dtypes)
        return LatencyTable(self.variant, dtype=dtypes[self.dtype], batch=self.batch, device=self.device, path=path)

    def table(self) -> LatencyTable:
        """The cached table of this machine. Raises ValueError and OSError as `empty` and for a file."""
        return self.empty(self.cache or default_path(self.empty()))


@contextlib.contextmanager
def measured(budget: str | Budget | None, measuring: Measuring) -> Iterator[Callable[[ScaledSpec], float] | None]:
    """What measures a specification where the budget is one of time; None where counting does.

    Raises ValueError for a setting that does not fit, also where nothing is measured.
    """
    measuring.empty()
    if budget is None or Budget.parse(budget).kind != "latency":
        yield None
        return
    with measuring.table() as table:
        told = False

        def predict(spec: ScaledSpec) -> float:
            nonlocal told
            if not told and any(unit.key not in table.entries for unit in units(spec)):
                told = True
                complain("measuring layers; the times are kept for the next call")
            return table.predict(spec)

        yield predict


def family() -> None:
    table = Table(title="EfficientNets as released", title_justify="left", box=None, padding=(0, 1, 0, 0))
    for heading in ("", "width", "depth", "pixels", "params (M)", "MACs (G)", "top-1", "phi d", "phi w", "phi r"):
        table.add_column(heading, justify="left" if heading == "" else "right", no_wrap=True)
    for row in (*RELEASED, *LITE, *V2_SCALED, *V2_SEARCHED):
        spec, costs = row.spec, count(row.spec)
        name = spec.name.removeprefix("tf_").removeprefix("efficientnet").removeprefix("_")
        scaled, phis = (f"{spec.width:g}", f"{spec.depth:g}"), implied_phi(spec)
        if row in V2_SEARCHED:
            scaled, phis = ("", ""), ()
        figures = f"{costs.parameters / 1e6:.2f}", f"{costs.macs / 1e9:.3f}", f"{row.top1:.1f}"
        table.add_row(name, *scaled, str(spec.resolution), *figures, *(f"{phi:.2f}" for phi in phis))
    show(table)
    console.print("top-1: % of ImageNet, published (arXiv 1905.11946; Lite: tensorflow/tpu; V2: google/automl)")
    console.print("phi d, w, r: where 1.2^phi, 1.1^phi, 1.15^phi are the depth, width, resolution")
    console.print("V2-S to XL have stages of their own: they are scaled from nothing. XL saw ImageNet-21k first.")


def plan(
    budget: str, coefficients: tuple[float, float, float], base: str, measuring: Measuring, output: Path | None
) -> None:
    with bad_input():
        law, wanted = CompoundScaling(*coefficients, base=base), Budget.parse(budget)
        with measured(wanted, measuring) as cost:
            cost = cost or spec_cost(wanted)
            phi = law.phi_for(wanted, cost)
            networks = {"compound": law.spec(phi), **(_alone(base, wanted) if wanted.kind != "latency" else {})}
            _show_plan(networks, base, wanted, cost)
        network = law.network(phi)
        console.print(
            f"phi = {phi:.4f}; the formula promises {network.nominal_factor:.2f}x the multiply-adds of {base}"
        )
        if output is not None:
            output.write_text(json.dumps(spec_to_dict(network.spec), indent=1) + "\n", encoding="utf-8")
            console.print(f"specification written to {output}", soft_wrap=True)


def _alone(base: str, budget: Budget) -> dict[str, ScaledSpec]:
    """The base network along one axis, where that axis can use the budget."""
    found = {}
    for axis in Axes._fields:
        with contextlib.suppress(ValueError):
            found[f"{axis} only"] = single_axis(base, axis, budget)
    return found


def _show_plan(networks: dict[str, ScaledSpec], base: str, budget: Budget, cost: Callable[[ScaledSpec], float]) -> None:
    table = Table(title=f"within {budget}", title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold")
    for heading in ("takes", "pixels", "blocks", "params (M)", "MACs (G)", "depth", "width", "resolution"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, spec in {base: base_spec(base), **networks}.items():
        costs, axes = count(spec), realised_axes(spec, base)
        blocks = sum(stage.blocks for stage in costs.stages)
        figures = f"{costs.parameters / 1e6:.2f}", f"{costs.macs / 1e9:.3f}", *(f"{axis:.2f}x" for axis in axes)
        table.add_row(name, str(Budget(budget.kind, cost(spec))), str(spec.resolution), str(blocks), *figures)
    show(table)
    console.print(f"depth, width, resolution: after rounding, relative to {base}")
