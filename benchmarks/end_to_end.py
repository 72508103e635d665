"""Inference of whole models, ours and every peer, and the layers of ours: the standard set, with plots.

python benchmarks/end_to_end.py                  # writes benchmarks/results/cpu.json and plots beside it
python benchmarks/end_to_end.py --part models --part layers --rounds 3 --output build/cpu.json
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer

from effnet_ops.benchmark.comparison import Settings
from effnet_ops.checks import unknown_name
from effnet_ops.cli.bench import Task, chosen, run, tasks_of
from effnet_ops.cli.console import fail

RESULTS = Path(__file__).resolve().parent / "results"
B0, B4 = "efficientnet_b0", "efficientnet_b4"
FAMILY = ("tf_efficientnet_lite0", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3", "efficientnet_b7")
QUICK = ("eager_channels_last", "compile_freezing", "onnxruntime", "openvino")
"""The peers of the long lists; the full comparison has the others."""


def standard_set(threads: int, rounds: int, seconds: float) -> dict[str, list[Task]]:
    """The parts of the standard set by name, in the order in which they are measured."""

    def settings(models: Iterable[str], batches: Iterable[int], dtype: str = "float32", count: int = threads):
        return [Settings(model, batch, dtype, count, None, rounds, seconds) for model in models for batch in batches]

    everybody, quick = chosen(None), chosen(QUICK)
    main = [
        setting
        for dtype in ("float32", "bfloat16")
        for setting in (*settings([B0], (1, 8), dtype), *settings([B4], (1,), dtype))
    ]
    fewer = [setting for count in range(1, threads) for setting in settings([B0], (1, 8), count=count)]
    layers = [*settings([B0, B4], (1,)), *settings([B0], (1,), "bfloat16"), *settings([B0], (8,))]
    return {
        "models": tasks_of(main, everybody, layers=False),
        "layers": [Task(setting) for setting in layers],
        "batches": tasks_of(settings([B0], (2, 4, 16)), quick, layers=False),
        "threads": tasks_of(fewer, quick, layers=False),
        "family": tasks_of(settings((*FAMILY, "mobilenetv2_100"), (1,)), quick, layers=False),
    }


def main(
    part: Annotated[list[str] | None, typer.Option(help="Only models, layers, batches, threads or family.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often every provider has a turn.")] = 7,
    seconds: Annotated[float, typer.Option(min=0.0, help="Of each turn, at least.")] = 0.3,
    output: Path = RESULTS / "cpu.json",
    fresh: Annotated[bool, typer.Option("--fresh", help="Repeat also what the file has of this commit.")] = False,
) -> None:
    """Measure the standard set; what the file already has of this commit is not repeated."""
    parts = standard_set(torch.get_num_threads(), rounds, seconds)
    for name in part or ():
        if name not in parts:
            fail(unknown_name("part", name, parts))
    run([task for name in part or parts for task in parts[name]], output, fresh, output.parent)


if __name__ == "__main__":
    typer.run(main)
