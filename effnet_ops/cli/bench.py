"""`effnet-ops bench`: inference with our layers against the other ways to run the same model on this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from effnet_ops.benchmark import models
from effnet_ops.benchmark.calibration import Peaks
from effnet_ops.benchmark.comparison import Report, Settings, compare
from effnet_ops.benchmark.gate import Failed
from effnet_ops.benchmark.layers import FUNCTION, NETWORK, profile
from effnet_ops.benchmark.providers import DTYPES, PROVIDERS, Provider
from effnet_ops.benchmark.rows import Results, Row, cpu_model, environment
from effnet_ops.benchmark.timing import ratio
from effnet_ops.checks import unknown_name
from effnet_ops.cli.console import bad_input, console, counted, fail, need, need_file, need_folder, show
from effnet_ops.models.files import first_line

OURS = [provider.name for provider in PROVIDERS.values() if provider.ours]


@dataclass(frozen=True)
class Task:
    """One table: the providers on one model, or, without providers, the layers of our optimized model."""

    settings: Settings
    providers: tuple[Provider, ...] = ()

    def measured(self, rows: Sequence[Row]) -> bool:
        """Whether the rows have all that this would measure, without a problem."""
        s = self.settings
        if not self.providers:
            return any(
                (row.operation, row.layer, row.dtype, row.threads) == ("network", s.model, s.dtype, s.threads)
                and row.shape.startswith(s.shape)
                for row in rows
            )
        have = {row.key for row in rows if row.problem is None}
        return all(s.row(provider.name).key in have for provider in self.providers)


def run(tasks: Sequence[Task], output: Path | None, fresh: bool, plots: Path | None) -> None:
    """Do the tasks one after the other and keep what each gives at once; what ``output`` already has is not repeated.

    Ends with exit code 2 on bad input and 1 if an output was wrong.
    """
    if plots is not None:
        need("matplotlib", extra="bench")
    _check(tasks)
    if plots is not None:
        need_folder(plots)
    if output is not None:
        need_file(output)
    here, rows, problems = environment(), [], 0
    with bad_input():
        results = Results(output) if output else None
    for task in tasks:
        if results and not fresh and task.measured(results.fresh(here)):
            console.print(f"{_title(task.settings)}: already in {output}", highlight=False, soft_wrap=True)
            continue
        found = _do(task)
        rows += found
        problems += sum(row.problem is not None for row in found)
        if results:
            with bad_input():
                results.add(found, here)
    if plots is not None:
        from effnet_ops.benchmark.plots import draw

        with bad_input():
            paths = draw(results.rows if results else rows, plots)
        for path in paths:
            console.print(f"plot: {path}", highlight=False, soft_wrap=True)
    if problems:
        console.print(f"[red]rows above without times: {problems}[/red]")
        raise typer.Exit(1)


def _check(tasks: Sequence[Task]) -> None:
    for name in dict.fromkeys(task.settings.model for task in tasks):
        try:
            models.split(name)
        except ValueError as error:
            fail(error)
        need(models.split(name)[0], extra="bench")
        try:
            models.check(name)
        except ValueError as error:
            fail(error)


def _do(task: Task) -> list[Row]:
    """Measure and show one task."""
    with progress() as report:
        if task.providers:
            try:
                found = compare(task.settings, task.providers, report)
            except (ValueError, RuntimeError) as error:
                fail(f"{_title(task.settings)} cannot be measured: {first_line(error)}")
        else:
            try:
                peaks, found = profile(task.settings, report)
            except (Failed, RuntimeError) as error:
                console.print(f"[red]layers of {_title(task.settings)}: {escape(str(error))}[/red]")
                return [task.settings.row(NETWORK, layer=task.settings.model, problem=str(error))]
    if task.providers:
        show_providers(task.settings, found)
        return found
    show_layers(task.settings, peaks, found)
    return [*peaks.rows(), *found]


def chosen(peers: Sequence[str] | None) -> list[Provider]:
    """The providers to measure: ours and the peers asked for, all by default; what is not installed is named.

    Optional ones are named only where they were asked for.
    """
    for name in peers or ():
        if name not in PROVIDERS:
            fail(unknown_name("peer", name, PROVIDERS))
    wanted = [provider for name, provider in PROVIDERS.items() if peers is None or name in peers or provider.ours]
    for provider in wanted:
        if (missing := provider.missing()) and not (provider.optional and peers is None):
            console.print(f"{provider.name} is left out: pip install {' '.join(missing)}", highlight=False)
    return [provider for provider in wanted if not provider.missing()]


def check_dtypes(dtypes: Sequence[str]) -> None:
    for dtype in dtypes:
        if dtype not in DTYPES:
            fail(unknown_name("dtype", dtype, DTYPES))


def tasks_of(settings: Sequence[Settings], providers: Sequence[Provider], layers: bool) -> list[Task]:
    """A comparison for each of the settings, among the providers that have its dtype, and its layers if wanted."""
    tasks = []
    for setting in settings:
        tasks.append(Task(setting, tuple(provider for provider in providers if setting.dtype in provider.dtypes)))
        if layers:
            tasks.append(Task(setting))
    return tasks


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


def _title(settings: Settings) -> str:
    return f"{settings.model}, {settings.shape}, {settings.dtype}, {counted(settings.threads, 'thread')}"


def show_providers(settings: Settings, rows: Sequence[Row]) -> None:
    """The providers' times and how many times as long as ours they take, the fastest first."""
    table = Table(
        title=f"{_title(settings)} of {cpu_model()}",
        title_justify="left",
        caption="ms and ratios: median (20th to 80th percentile); a ratio says how many times as long it takes.",
    )
    table.add_column("", overflow="fold")
    for heading in ("ms", *(f"over {name.replace('_', ' ')}" for name in OURS), "peak MB", "error"):
        table.add_column(heading)
    table.add_column("", overflow="fold")
    for row in sorted(rows, key=lambda row: row.p50 or float("inf")):
        memory = "" if row.peak_rss_bytes is None else f"{row.peak_rss_bytes / 1e6:.1f}"
        error = "" if row.error is None else f"{row.error:.1e}"
        remark = f"[red]{escape(row.problem)}[/red]" if row.problem else row.choice or ""
        table.add_row(row.provider, times(row), *(_over(row, rows, name) for name in OURS), memory, error, remark)
    show(table)


def times(row: Row) -> str:
    """The median with its spread."""
    return "" if row.p50 is None else f"{row.p50:.2f} ({row.p20:.2f} to {row.p80:.2f})"


def _over(row: Row, rows: Sequence[Row], name: str) -> str:
    ours = next((other for other in rows if other.provider == name), None)
    if ours is None or row.provider == name or row.round_medians is None or ours.round_medians is None:
        return ""
    spread = ratio(row.round_medians, ours.round_medians)
    return f"{spread.p50:.2f}x ({spread.p20:.2f} to {spread.p80:.2f})"


def show_layers(settings: Settings, peaks: Peaks, rows: Sequence[Row]) -> None:
    """Each layer's time, and its rates beside the machine's peaks: first in the running network, then alone."""
    flops, copy = peaks.of(settings.dtype), peaks.copy
    headings = {NETWORK: f"inside {NETWORK}'s network", FUNCTION: "functions alone, their data in cache"}
    for provider, heading in headings.items():
        table = Table(
            title=f"{_title(settings)}: {heading}; peaks: {flops:.0f} GFLOP/s, copy {copy:.1f} GB/s",
            title_justify="left",
        )
        for name in ("layer", "kind", "shape"):
            table.add_column(name, overflow="fold")
        for name in ("ms", "GFLOP/s (of peak)", "GB/s (of copy)"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            if row.provider == provider:
                table.add_row(row.layer.removeprefix(settings.model).strip(), row.operation, row.shape, *_rates(row))
        if table.row_count:
            show(table)


def _rates(row: Row) -> tuple[str, str, str]:
    compute = f"{row.gflop_per_s:.1f} ({row.percent_of_fma_peak:.0f} %)" if row.flops else ""
    moved = f"{row.gb_per_s:.1f} ({row.percent_of_copy_peak:.0f} %)" if row.bytes else ""
    return f"{row.p50:.3f}", compute, moved
