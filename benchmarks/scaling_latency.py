"""How well the latency table predicts whole networks: layers measured first, networks afterwards.

python benchmarks/scaling_latency.py              # writes benchmarks/results/scaling_latency.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from effnet_ops.benchmark.rows import environment
from effnet_ops.models import ScaledSpec, model_spec
from effnet_ops.scaling import CompoundScaling, LatencyTable, Prediction, median_error
from effnet_ops.scaling.latency import VARIANTS

RESULTS = Path(__file__).resolve().parent / "results"


def networks(resolution: int) -> list[ScaledSpec]:
    """B0 to B3 at one resolution, and a designed network between them."""
    family = [model_spec(f"efficientnet_b{i}") for i in range(4)]
    specs = [*family, CompoundScaling(1.3, 1.05, 1.2).spec(0.5)]
    return [ScaledSpec(s.architecture, s.width, s.depth, resolution, name=s.name) for s in specs]


def main(
    resolution: int = 160,
    rounds: int = 11,
    variants: Annotated[list[str] | None, typer.Option(help="optimized, fused, stock; all by default.")] = None,
    output: Path = RESULTS / "scaling_latency.json",
) -> None:
    """Predict B0 to B3 and a designed network from their layers, and measure them."""
    rows, found = [], []
    table = Table(title=f"predicted and measured at {resolution}x{resolution}, batch 1")
    for heading in ("", "", "predicted (ms)", "measured (ms)", "error", "undisturbed calls"):
        table.add_column(heading)
    for variant in variants or VARIANTS:
        specs = networks(resolution)
        latency = LatencyTable(variant, rounds=rounds)
        latency.measure(specs)
        for p in latency.validate(specs):
            found.append(p)
            rows.append({"variant": variant, **_row(p, resolution)})
            measured = f"{p.measured.p50 * 1e3:.2f} ({p.measured.p20 * 1e3:.2f} to {p.measured.p80 * 1e3:.2f})"
            quiet = f"{p.measured.quiet} of {p.measured.calls}"
            table.add_row(variant, p.name, f"{p.predicted * 1e3:.2f}", measured, f"{p.error:+.1%}", quiet)
    Console(width=110).print(table)
    print(f"median error {median_error(found):.1%}")
    origin = {**environment(), "threads": torch.get_num_threads()}
    output.write_text(json.dumps({"environment": origin, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def _row(p: Prediction, resolution: int) -> dict[str, object]:
    times = {name: round(getattr(p.measured, name) * 1e3, 4) for name in ("p20", "p50", "p80")}
    counts = {"calls": p.measured.calls, "quiet": p.measured.quiet}
    return {
        "network": p.name,
        "resolution": resolution,
        "predicted": round(p.predicted * 1e3, 4),
        **times,
        **counts,
        "error": round(p.error, 5),
    }


if __name__ == "__main__":
    typer.run(main)
