"""Models in each way that they leave Python, stock to own: errors, our operators and times, for docs/deployment.md.

python benchmarks/deployment.py                    # B0 at batch 1 and 8: what the page claims of speed, ten minutes
python benchmarks/deployment.py --part equality    # the other models, whose times are of a few calls

The kinds of one way are measured in rotation, each in a process of its own. What the file has of this commit is not
measured again; the table on the page is written anew from all rows.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from effnet_ops.benchmark.comparison import Settings, compare
from effnet_ops.benchmark.deployment import KINDS, WAYS, kinds_of, provider
from effnet_ops.benchmark.rows import Results, Row, environment
from effnet_ops.checks import unknown_name
from effnet_ops.cli.console import fail

ROOT = Path(__file__).resolve().parent.parent
PAGE, RESULTS = ROOT / "docs" / "deployment.md", ROOT / "benchmarks" / "results" / "deployment.json"
BEGIN, END = "<!-- table: benchmarks/deployment.py -->", "<!-- end of table -->"
B0 = "efficientnet_b0"
OTHERS = ("tf_efficientnet_b1", "mobilenetv3_large_100", "mobilenetv2_100")


def parts(threads: int) -> dict[str, list[Settings]]:
    """What is measured, by the name of the part."""
    return {
        "speed": [Settings(B0, batch, threads=threads, rounds=7, seconds=0.3) for batch in (1, 8)],
        "equality": [Settings(name, 1, threads=threads, rounds=1, seconds=0.1) for name in OTHERS],
    }


def measure(settings: Settings, ways: list[str], results: Results) -> None:
    here = environment()
    known = {row.key for row in results.fresh(here)}
    for way in ways:
        if all(settings.row(f"{way}, {kind}").key in known for kind in kinds_of(settings.model)):
            continue
        print(f"{settings.model} {settings.shape}: {way}", flush=True)
        kinds = [provider(way, kind, settings.model) for kind in kinds_of(settings.model)]
        rows = compare(settings, [each for each in kinds if not each.missing()])
        rows = [replace(row, provider=f"{way}, {row.provider}") for row in rows]
        for row in rows:
            print(f"    {row.provider}: {row.problem or f'{row.p50:.2f} ms, error {row.error:.1e}, {row.choice}'}")
        results.add(rows, here)


def table(rows: list[Row]) -> str:
    """Markdown: a line for each model and kind, a column for each way."""
    lines = [f"| model, images | kind | {' | '.join(WAYS)} |", "| --- " * (len(WAYS) + 2) + "|"]
    found = {(row.operation, row.shape, row.provider): row for row in rows}
    for operation, shape in dict.fromkeys((row.operation, row.shape) for row in rows):
        for kind in KINDS:
            cells = [_cell(found.get((operation, shape, f"{way}, {kind}"))) for way in WAYS]
            if any(cells):
                lines.append(f"| {operation}, {shape} | {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    return row.problem or f"{row.p50:.1f} ms, {row.error:.0e}, {row.choice}"


def write_table(page: Path, rows: list[Row]) -> None:
    before, _, rest = page.read_text().partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.partition(END)[2]}")


def main(
    part: Annotated[list[str] | None, typer.Option(help="speed or equality; speed alone without it.")] = None,
    model: Annotated[str | None, typer.Option(help="Another model instead of those of a part, at batch 1.")] = None,
    way: Annotated[list[str] | None, typer.Option(help=f"Only some of {', '.join(WAYS)}.")] = None,
    output: Path = RESULTS,
    page: Path = PAGE,
) -> None:
    """Measure, and write the rows and the page's table."""
    known, results = parts(torch.get_num_threads()), Results(output)
    for name in part or ():
        if name not in known:
            fail(unknown_name("part", name, known))
    for name in way or ():
        if name not in WAYS:
            fail(unknown_name("way", name, WAYS))
    chosen = [settings for name in part or ["speed"] for settings in known[name]]
    if model is not None:
        chosen = [replace(known["equality"][0], model=model)]
    for settings in chosen:
        measure(settings, list(way or WAYS), results)
    write_table(page, results.rows)


if __name__ == "__main__":
    typer.run(main)
