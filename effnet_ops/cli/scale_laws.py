"""`effnet-ops scale family` and `plan`: networks and what they cost."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Table

from effnet_ops.checks import FLOAT_DTYPES, unknown_name
from effnet_ops.cli.console import complain, console, fail
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
from effnet_ops.scaling.latency import default_path
from effnet_ops.scaling.laws import base_spec
from effnet_ops.scaling.published import LITE, RELEASED


class Measuring(NamedTuple):
    """How times are measured, from the command line."""

    variant: str
    batch: int
    dtype: str
    device: str
    cache: Path | None

    @contextlib.contextmanager
    def table(self) -> Iterator[LatencyTable]:
        """The cached table of this machine. Raises ValueError for a bad option, device or file."""
        dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}
        if self.dtype not in dtypes:
            raise unknown_name("dtype", self.dtype, dtypes)
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {self.device!r} cannot be used: {str(error).splitlines()[0]}") from None
        keywords = dict(dtype=dtypes[self.dtype], batch=self.batch, device=self.device)
        path = self.cache or default_path(LatencyTable(self.variant, **keywords))
        with LatencyTable(self.variant, **keywords, path=path) as table:
            yield table


@contextlib.contextmanager
def bad_input() -> Iterator[None]:
    """Errors of arguments and files as one line with exit code 2."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        fail(error)


@contextlib.contextmanager
def measured(budget: str | Budget | None, measuring: Measuring) -> Iterator[Callable[[ScaledSpec], float] | None]:
    """What measures a specification where the budget is one of time; None where counting does."""
    if budget is None or Budget.parse(budget).kind != "latency":
        yield None
        return
    complain("measuring layers; the times are kept for the next call")
    with measuring.table() as table:
        yield table.predict


def family() -> None:
    table = Table(title="EfficientNets as released", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("", "width", "depth", "pixels", "params (M)", "MACs (G)", "top-1", "phi d", "phi w", "phi r"):
        table.add_column(heading, justify="left" if heading == "" else "right", no_wrap=True)
    for row in (*RELEASED, *LITE):
        spec, costs = row.spec, count(row.spec)
        name = spec.name.removeprefix("efficientnet_")
        scaled = f"{spec.width:g}", f"{spec.depth:g}", str(spec.resolution)
        figures = f"{costs.parameters / 1e6:.2f}", f"{costs.macs / 1e9:.3f}", f"{row.top1:.1f}"
        table.add_row(name, *scaled, *figures, *(f"{phi:.2f}" for phi in implied_phi(spec)))
    console.print(table)
    console.print("top-1: % of ImageNet, published (arXiv 1905.11946; Lite: tensorflow/tpu)")
    console.print("phi d, w, r: where 1.2^phi, 1.1^phi, 1.15^phi are the depth, width, resolution")


def plan(
    budget: str, coefficients: tuple[float, float, float], base: str, measuring: Measuring, output: Path | None
) -> None:
    with bad_input():
        law, wanted = CompoundScaling(*coefficients, base=base), Budget.parse(budget)
        with measured(wanted, measuring) as cost:
            cost = cost or spec_cost(wanted)
            phi = law.phi_for(wanted, cost)
            networks = {"compound": law.spec(phi), **(_alone(base, wanted) if wanted.kind != "latency" else {})}
            _show(networks, base, wanted, cost)
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


def _show(networks: dict[str, ScaledSpec], base: str, budget: Budget, cost: Callable[[ScaledSpec], float]) -> None:
    table = Table(title=f"within {budget}", title_justify="left")
    for heading in ("", "takes", "pixels", "blocks", "params (M)", "MACs (G)", "depth", "width", "resolution"):
        table.add_column(heading, justify="left" if heading == "" else "right")
    for name, spec in {base: base_spec(base), **networks}.items():
        costs, axes = count(spec), realised_axes(spec, base)
        blocks = sum(stage.blocks for stage in costs.stages)
        figures = f"{costs.parameters / 1e6:.2f}", f"{costs.macs / 1e9:.3f}", *(f"{axis:.2f}x" for axis in axes)
        table.add_row(name, str(Budget(budget.kind, cost(spec))), str(spec.resolution), str(blocks), *figures)
    console.print(table)
    console.print(f"depth, width, resolution: after rounding, relative to {base}")
