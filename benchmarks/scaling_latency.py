"""How well the latency table predicts whole networks: layers measured first, networks afterwards, several times over.

A machine's speed changes in the seconds between the two, and on a shared one by a third: each network's row has the
medians of its predictions and of its measurements over the repetitions, which alternate between all variants.

python benchmarks/scaling_latency.py              # writes benchmarks/results/scaling_latency.json
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import median
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
    rounds: int = 7,
    repetitions: int = 5,
    variants: Annotated[list[str] | None, typer.Option(help="optimized, fused, stock; all by default.")] = None,
    output: Path = RESULTS / "scaling_latency.json",
) -> None:
    """Predict B0 to B3 and a designed network from their layers, and measure them."""
    specs, runs = networks(resolution), defaultdict(list)
    for _ in range(repetitions):
        for variant in variants or VARIANTS:
            latency = LatencyTable(variant, rounds=rounds)
            latency.measure(specs)
            for p in latency.validate(specs):
                runs[variant, p.name].append(p)
    found = {key: _median(predictions) for key, predictions in runs.items()}
    table = Table(title=f"predicted and measured at {resolution}x{resolution}, batch 1")
    for heading in ("", "", "predicted (ms)", "measured (ms)", "error", "undisturbed calls"):
        table.add_column(heading)
    for (variant, name), p in found.items():
        measured = f"{p.measured.p50 * 1e3:.2f} ({p.measured.p20 * 1e3:.2f} to {p.measured.p80 * 1e3:.2f})"
        quiet = f"{p.measured.quiet} of {p.measured.calls}"
        table.add_row(variant, name, f"{p.predicted * 1e3:.2f}", measured, f"{p.error:+.1%}", quiet)
    Console(width=110).print(table)
    single = [median_error(run) for run in zip(*runs.values(), strict=True)]
    print(
        f"median error {median_error(found.values()):.1%}; of each repetition {', '.join(f'{e:.1%}' for e in single)}"
    )
    rows = [{"variant": variant, **_row(p, resolution)} for (variant, _), p in found.items()]
    origin = {**environment(), "threads": torch.get_num_threads(), "repetitions": repetitions}
    output.write_text(json.dumps({"environment": origin, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def _median(predictions: list[Prediction]) -> Prediction:
    """The medians over the repetitions; calls are added up."""
    timings = [p.measured for p in predictions]
    times = {name: median(getattr(t, name) for t in timings) for name in ("p20", "p50", "p80")}
    counts = {name: sum(getattr(t, name) for t in timings) for name in ("calls", "quiet")}
    measured = timings[0]._replace(**times, **counts)
    return Prediction(predictions[0].name, median(p.predicted for p in predictions), measured)


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
