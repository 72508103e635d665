"""`effnet-ops bench`: inference with our layers against the other ways to run the same model on this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from effnet_ops.benchmark.comparison import Report, Settings, compare
from effnet_ops.benchmark.providers import DTYPES, PROVIDERS, Provider
from effnet_ops.benchmark.rows import Results, Row, cpu_model, environment
from effnet_ops.benchmark.timing import ratio
from effnet_ops.checks import unknown_name
from effnet_ops.cli.console import console, fail

OURS = [provider.name for provider in PROVIDERS.values() if provider.ours]


def run(settings: Sequence[Settings], peers: Sequence[str] | None, output: Path | None, fresh: bool) -> None:
    providers = chosen(peers)
    here = environment()
    try:
        results = Results(output) if output else None
    except ValueError as error:
        fail(error)
    wrong = 0
    for setting in settings:
        with progress() as report:
            try:
                rows = compare(setting, [p for p in providers if setting.dtype in p.dtypes], report)
            except (ValueError, ImportError) as error:
                fail(error)
        if results:
            results.add(rows, here)
        show(setting, rows)
        wrong += sum(row.problem is not None for row in rows)
    if wrong:
        console.print(f"[red]{wrong} of the rows above have no times[/red]")
        raise typer.Exit(1)


def chosen(peers: Sequence[str] | None) -> list[Provider]:
    """The providers to measure: ours and the peers asked for, all by default; what is not installed is named."""
    for name in peers or ():
        if name not in PROVIDERS:
            fail(unknown_name("peer", name, PROVIDERS))
    wanted = [p for name, p in PROVIDERS.items() if peers is None or name in peers or p.ours]
    for provider in wanted:
        if missing := provider.missing():
            console.print(f"{provider.name} is left out: pip install {' '.join(missing)}", highlight=False)
    return [provider for provider in wanted if not provider.missing()]


@contextlib.contextmanager
def progress() -> Iterator[Report]:
    """A bar for what is being done; without a terminal, a line whenever that changes."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("", total=1)
        before = ""

        def report(what: str, done: int, total: int) -> None:
            nonlocal before
            bars.update(task, description=what, completed=done, total=total)
            if not console.is_terminal and what != before:
                console.print(what, highlight=False, soft_wrap=True)
            before = what

        yield report


def show(settings: Settings, rows: Sequence[Row]) -> None:
    shape = rows[0].shape
    table = Table(
        title=f"{settings.model}, {shape}, {settings.dtype}, {settings.threads} threads of {cpu_model()}",
        title_justify="left",
        caption="Times: median (20th to 80th percentile). Ratios: how many times as long, round by round.",
    )
    for heading in ("", "ms", *(f"over {name}" for name in OURS), "peak MB", "error", ""):
        table.add_column(heading)
    for row in sorted(rows, key=lambda row: row.p50 or float("inf")):
        memory = "" if row.peak_rss_bytes is None else f"{row.peak_rss_bytes / 1e6:.1f}"
        error = "" if row.error is None else f"{row.error:.1e}"
        remark = f"[red]{escape(row.problem)}[/red]" if row.problem else row.choice or ""
        table.add_row(row.provider, times(row), *(_over(row, rows, name) for name in OURS), memory, error, remark)
    console.print(table)


def times(row: Row) -> str:
    return "" if row.p50 is None else f"{row.p50:.2f} ({row.p20:.2f} to {row.p80:.2f})"


def _over(row: Row, rows: Sequence[Row], name: str) -> str:
    ours = next((other for other in rows if other.provider == name), None)
    if ours is None or row.provider == name or row.round_medians is None or ours.round_medians is None:
        return ""
    spread = ratio(row.round_medians, ours.round_medians)
    return f"{spread.p50:.2f}x ({spread.p20:.2f} to {spread.p80:.2f})"


def settings(
    model: str,
    batches: Sequence[int],
    dtypes: Sequence[str],
    threads: int | None,
    resolution: int | None,
    rounds: int,
    seconds: float,
) -> list[Settings]:
    for dtype in dtypes:
        if dtype not in DTYPES:
            fail(unknown_name("dtype", dtype, DTYPES))
    return [
        Settings(model, batch, dtype, threads or torch.get_num_threads(), resolution, rounds, seconds)
        for dtype in dtypes
        for batch in batches
    ]
