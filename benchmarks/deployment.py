"""Models in each way that they leave Python, stock to own: errors, our operators and times, for docs/deployment.md.

python benchmarks/deployment.py                    # B0 at batch 1 and 8: what the page claims of speed
python benchmarks/deployment.py --part equality    # errors and operators of all models: times of one round, not shown

The kinds of one way are measured in rotation, each in a process of its own. Rows and table are written after each way,
and no way is begun after --minutes. What the file has of this machine and these versions, of any commit, is not
measured again: call it again to go on, with --again to replace rows.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from effnet_ops.benchmark.comparison import Settings, compare
from effnet_ops.benchmark.deployment import KINDS, NO_OWN, WAYS, kinds_of, provider
from effnet_ops.benchmark.rows import Results, Row, environment
from effnet_ops.checks import unknown_name
from effnet_ops.cli.console import fail

ROOT = Path(__file__).resolve().parent.parent
PAGE, RESULTS = ROOT / "docs" / "deployment.md", ROOT / "benchmarks" / "results" / "deployment.json"
BEGIN, END = "<!-- table: benchmarks/deployment.py -->", "<!-- end of table -->"
B0 = "efficientnet_b0"
MODELS = (B0, "tf_efficientnet_b1", "mobilenetv3_large_100", "mobilenetv2_100", "tf_efficientnetv2_s")


def parts(threads: int) -> dict[str, list[Settings]]:
    """What is measured, by the name of the part."""
    return {
        "speed": [Settings(B0, batch, threads=threads, rounds=7, seconds=0.3) for batch in (1, 8)],
        "equality": [Settings(name, 1, threads=threads, rounds=1, seconds=0.1) for name in MODELS],
    }


def is_known(settings: Settings, provider: str, rows: list[Row]) -> bool:
    """Whether a row has what these settings ask for; a row of one round has no times for those of several."""
    key = settings.row(provider).key
    return any(row.key == key and (row.problem or len(row.round_medians or ()) >= settings.rounds) for row in rows)


def measure(settings: Settings, way: str, results: Results) -> None:
    here = environment()
    print(f"{settings.model} {settings.shape}: {way}", flush=True)
    kinds = [provider(way, kind, settings.model) for kind in kinds_of(settings.model)]
    rows = compare(settings, [each for each in kinds if not each.missing()])
    rows = [replace(row, provider=f"{way}, {row.provider}") for row in rows]
    for row in rows:
        print(f"    {row.provider}: {_cell(row)}", flush=True)
    results.add(rows, here)


def table(rows: list[Row]) -> str:
    """Markdown: a line for each model and kind, a column for each way."""
    lines = [f"| model, images | kind | {' | '.join(WAYS)} |", "| --- " * (len(WAYS) + 2) + "|"]
    found = {(row.operation, row.shape, row.provider): row for row in rows}
    for operation, shape in dict.fromkeys((row.operation, row.shape) for row in rows):
        for kind in KINDS:
            if kind not in kinds_of(operation):
                lines.append(f"| {operation}, {shape} | {kind} | {' | '.join([NO_OWN] * len(WAYS))} |")
                continue
            cells = [_cell(found.get((operation, shape, f"{way}, {kind}"))) for way in WAYS]
            if any(cells):
                lines.append(f"| {operation}, {shape} | {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row.problem:
        return row.problem
    time_of_call = f"{row.p50:.1f} ms, " if len(row.round_medians or ()) > 1 else ""
    return f"{time_of_call}{row.error:.0e}, {row.choice}"


def write_table(page: Path, rows: list[Row]) -> None:
    before, _, rest = page.read_text().partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.partition(END)[2]}")


def main(
    part: Annotated[list[str] | None, typer.Option(help="speed or equality; speed alone without it.")] = None,
    model: Annotated[str | None, typer.Option(help="Another model instead of those of a part, at batch 1.")] = None,
    way: Annotated[list[str] | None, typer.Option(help=f"Only some of {', '.join(WAYS)}.")] = None,
    minutes: Annotated[float, typer.Option(help="No way is begun after these.")] = 12,
    again: Annotated[bool, typer.Option(help="Measure what is known, too.")] = False,
    output: Path = RESULTS,
    page: Path = PAGE,
) -> None:
    """Measure, and write the rows and the page's table."""
    known = parts(torch.get_num_threads())
    for name in part or ():
        if name not in known:
            fail(unknown_name("part", name, known))
    for name in way or ():
        if name not in WAYS:
            fail(unknown_name("way", name, WAYS))
    check_page(page)
    results, end = Results(output), time.monotonic() + 60 * minutes
    chosen = [settings for name in part or ["speed"] for settings in known[name]]
    if model is not None:
        chosen = [replace(known["equality"][0], model=model)]
    left = [(settings, each) for settings in chosen for each in way or WAYS]
    if not again:
        rows = results.fresh(environment(), any_commit=True)
        left = [what for what in left if not all_known(*what, rows)]
    for number, what in enumerate(left):
        if time.monotonic() > end:
            print(f"{len(left) - number} of {len(left)} ways are left: call this again to go on")
            break
        measure(*what, results)
        write_table(page, results.rows)
    write_table(page, results.rows)


def all_known(settings: Settings, way: str, rows: list[Row]) -> bool:
    return all(is_known(settings, f"{way}, {kind}", rows) for kind in kinds_of(settings.model))


def check_page(page: Path) -> None:
    """Before minutes of measuring: the page is there, with the place of its table."""
    if not page.is_file():
        fail(f"there is no page {page}")
    if not all(mark in page.read_text() for mark in (BEGIN, END)):
        fail(f"{page} has no place for the table: {BEGIN} and {END}")


if __name__ == "__main__":
    typer.run(main)
