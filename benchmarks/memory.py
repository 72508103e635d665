"""The largest batch whose training step fits into a given memory: eager PyTorch and replaced layers.

python benchmarks/memory.py                                  # B4 at 380 in 8 GB: some twenty minutes, and 9 GB free
python benchmarks/memory.py --model efficientnet_b0 --resolution 224 --limit-gb 4

Each try is a process of its own. A batch fits where the process's peak resident memory stays within the limit: with
PyTorch, parameters, gradients and optimizer, as a container counts it. The libraries' pages count, too.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Annotated

import timm
import torch
import torch.nn.functional as F
import typer
from rich.table import Table

import effnet_ops
from effnet_ops.benchmark.rows import Results, Row, environment
from effnet_ops.benchmark.worker import resident
from effnet_ops.checks import unknown_name
from effnet_ops.cli.console import fail, show

RESULTS = Path(__file__).resolve().parent / "results" / "memory.json"
STOCK = "eager_channels_last"
POLICIES = {STOCK: None, "effnet_ops_replace": "auto", "effnet_ops_replace_always": "always"}
"""What is compared, with its recompute policy; stock layers have none."""


def peak_of_step(name: str, resolution: int, batch: int, policy: str | None) -> int:
    """Peak resident bytes of this process in a training step of ``batch`` images, with SGD and momentum."""
    torch.set_num_threads(1)
    model = timm.create_model(name).train().to(memory_format=torch.channels_last)
    if policy is not None:
        report = effnet_ops.replace_layers(model)
        assert not report.skipped, report
        effnet_ops.set_recompute(policy)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)
    # The optimizer has its state before the step that counts.
    for images in (2, batch):
        x = torch.randn(images, 3, resolution, resolution).contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.zeros(images, dtype=torch.long)).backward()
        optimizer.step()
    return resident("VmHWM")


def in_own_process(name: str, resolution: int, batch: int, policy: str | None) -> int | None:
    """`peak_of_step` in a new process; None where that was ended, as for want of memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(peak_of_step, name, resolution, batch, policy).result()
        except BrokenProcessPool:
            return None


def largest_batch(peak: Callable[[int], int | None], limit: int, first: tuple[int, int]) -> dict[int, int | None]:
    """The peak memory of each batch tried; the last that fits and the first that does not are among them.

    Memory is nearly linear in the batch, so each try is where the line through the two nearest ones meets the limit.
    """
    tried = {batch: peak(batch) for batch in first}
    while True:
        fits = [batch for batch, used in tried.items() if used is not None and used <= limit]
        fails = [batch for batch in tried if batch not in fits]
        below, above = max(fits, default=0), min(fails, default=None)
        if above == below + 1:
            return tried
        guess = _meeting(tried, limit)
        # One more than what fits has to be seen to fail, and the limit lies between what is known.
        guess = max(guess + 1 if guess == below else guess, below + 1)
        guess = guess if above is None else min(guess, above - 1)
        tried[guess] = peak(guess)


def _meeting(tried: dict[int, int | None], limit: int) -> int:
    """The batch at which the line through the two known ones nearest to the limit meets it."""
    known = [(batch, used) for batch, used in tried.items() if used is not None]
    if len(known) < 2:
        return 0
    (one, used), (other, used_by_other) = sorted(known, key=lambda pair: abs(pair[1] - limit))[:2]
    return int(one + (limit - used) * (one - other) / (used - used_by_other))


def table_of(model: str, resolution: int, limit: int, largest: dict[str, int]) -> Table:
    table = Table(title=f"Training step of {model} at {resolution} in {limit / 1e9:g} GB, float32")
    for heading in ("", "largest batch", "over eager"):
        table.add_column(heading, justify="left" if not heading else "right")
    for provider, batch in largest.items():
        table.add_row(provider, str(batch), f"{batch / largest[STOCK]:.2f}x" if largest.get(STOCK) else "")
    return table


def main(
    model: str = "efficientnet_b4",
    resolution: int = 380,
    ways: Annotated[str, typer.Option(help="With commas between them.")] = ",".join(POLICIES),
    limit_gb: Annotated[float, typer.Option(help="GB of 1e9 bytes.")] = 8.0,
    output: Path = RESULTS,
) -> None:
    """Find the largest batch of each way; every try is a row with the peak memory of its process."""
    limit, kept, largest = int(limit_gb * 1e9), Results(output), {}
    here = environment()
    for provider in ways.split(","):
        if provider not in POLICIES:
            fail(unknown_name("way", provider, POLICIES))
        policy = POLICIES[provider]

        def peak(batch: int, provider: str = provider, policy: str | None = policy) -> int | None:
            used = in_own_process(model, resolution, batch, policy)
            print(f"{provider}, {batch} images: {'ended' if used is None else f'{used / 1e9:.2f} GB'}", flush=True)
            shape = f"{batch}x3x{resolution}x{resolution}"
            problem = "the process was ended" if used is None else None
            row = Row(operation=model, provider=provider, shape=shape, dtype="float32", mode="step", threads=1)
            row.peak_rss_bytes, row.problem = used, problem
            kept.add([row], here)
            return used

        tried = largest_batch(peak, limit, (2, 6))
        largest[provider] = max((b for b, used in tried.items() if used is not None and used <= limit), default=0)
    show(table_of(model, resolution, limit, largest))


if __name__ == "__main__":
    typer.run(main)
