"""A training step of whole models: eager PyTorch, torch.compile and ours; time, saved and peak memory.

python benchmarks/training_step.py                           # the standard set, about half an hour
python benchmarks/training_step.py --model efficientnet_b0 --batch 8
python benchmarks/training_step.py --model efficientnet_b0 --batch 8 --steps    # where our step goes, against the peaks
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from effnet_ops.benchmark.calibration import measure_peaks
from effnet_ops.benchmark.comparison import Settings
from effnet_ops.benchmark.rows import Results, Row, environment
from effnet_ops.benchmark.steps import rows_of, step_costs
from effnet_ops.benchmark.timing import ratio
from effnet_ops.benchmark.training import VARIANTS, compare_training
from effnet_ops.checks import unknown_name
from effnet_ops.cli.bench import check_dtypes, progress
from effnet_ops.cli.console import fail, show

RESULTS = Path(__file__).resolve().parent / "results"
STANDARD = (("efficientnet_b0", (1, 8, 32)), ("efficientnet_b2", (1, 4)), ("efficientnet_b4", (1,)))
OURS = "effnet_ops_replace"


def table_of(settings: Settings, rows: list[Row]) -> Table:
    """Times with their spread, and how many times as long as ours each takes."""
    title = f"Training step of {settings.model}, {settings.shape}, {settings.dtype}, {settings.threads} threads"
    table = Table(title=title)
    for heading in ("", "ms (20th to 80th percentile)", "over ours", "saved, MB", "peak memory, MB", "error of logits"):
        table.add_column(heading, justify="left" if not heading else "right")
    ours = next((row for row in rows if row.provider == OURS and row.round_medians), None)
    for row in rows:
        if row.problem:
            table.add_row(row.provider, row.problem)
            continue
        against = ""
        if ours is not None and row is not ours:
            slower = ratio(row.round_medians, ours.round_medians)
            against = f"{slower.p50:.2f}x ({slower.p20:.2f} to {slower.p80:.2f})"
        memory = ("" if value is None else f"{value / 1e6:.0f}" for value in (row.saved_bytes, row.peak_rss_bytes))
        table.add_row(
            row.provider, f"{row.p50:.1f} ({row.p20:.1f} to {row.p80:.1f})", against, *memory, f"{row.error:.1e}"
        )
    return table


def steps_table(settings: Settings, rows: list[Row]) -> Table:
    """Each step of the blocks against what this machine can do at best; the rest of the network in one line."""
    *steps, whole = rows
    table = Table(title=f"Steps of {settings.model}, {settings.shape}, {settings.threads} threads: {whole.p50:.0f} ms")
    for heading in ("", "ms", "of all", "GFLOP", "GFLOP/s (of peak)", "MB", "GB/s (of copy)"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in steps:
        table.add_row(
            *(row.layer.removeprefix(f"{settings.model} "), f"{row.p50:.1f}", f"{row.p50 / whole.p50:.1%}"),
            *(f"{row.flops / 1e9:.2f}", f"{row.gflop_per_s:.1f} ({row.percent_of_fma_peak:.0f}%)"),
            *(f"{row.bytes / 1e6:.0f}", f"{row.gb_per_s:.1f} ({row.percent_of_copy_peak:.0f}%)"),
        )
    rest = whole.p50 - sum(row.p50 for row in steps)
    table.add_row("outside of the blocks' kernels", f"{rest:.1f}", f"{rest / whole.p50:.1%}")
    return table


def main(
    model: Annotated[str | None, typer.Option(help="By default the standard set.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1)] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, or bfloat16 by autocast.")] = None,
    threads: Annotated[list[int] | None, typer.Option(min=1)] = None,
    resolution: int | None = None,
    variants: Annotated[str, typer.Option(help="With commas between them.")] = ",".join(VARIANTS),
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    seconds: Annotated[float, typer.Option(min=0.0, help="Of each turn, at least.")] = 1.0,
    steps: Annotated[bool, typer.Option(help="Instead: the steps of the blocks, ours alone, in float32.")] = False,
    output: Path = RESULTS / "training_step.json",
) -> None:
    """Compare training steps; exit code 1 if a result is wrong or a variant has no time."""
    names = variants.split(",")
    for name in names:
        if name not in VARIANTS:
            fail(unknown_name("variant", name, VARIANTS))
    check_dtypes(dtype or ())
    kept, failed = Results(output), False
    for name, batches in STANDARD if model is None else ((model, (8,)),):
        for kind in dtype or ("float32",):
            for count in threads or (torch.get_num_threads(),):
                for images in batch or batches:
                    settings = Settings(name, images, kind, count, resolution, rounds, seconds)
                    if steps:
                        rows = rows_of(settings, *step_costs(settings), measure_peaks(count))
                        show(steps_table(settings, rows))
                        kept.add(rows, environment())
                        continue
                    with progress() as report:
                        rows = compare_training(settings, [VARIANTS[one] for one in names], report)
                    show(table_of(settings, rows))
                    kept.add(rows, environment())
                    failed = failed or any(row.problem for row in rows)
    raise typer.Exit(int(failed))


if __name__ == "__main__":
    typer.run(main)
