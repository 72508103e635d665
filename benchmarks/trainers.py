"""Training by timm's parts, by Lightning and by accelerate: stock layers and replaced ones; time and memory of a step.

python benchmarks/trainers.py                            # B0 on digits, a few minutes
python benchmarks/trainers.py --trainers timm --steps 10 # without Lightning and accelerate

Each run is a process of its own, stock and replaced in turn. Its losses have to be those of the stock run. The digits
are scikit-learn's, enlarged.
"""

from __future__ import annotations

import itertools
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy
import timm
import timm.loss
import timm.optim
import timm.utils
import torch
import torch.nn.functional as F
import typer
from rich.table import Table
from timm.data import Mixup
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader

import effnet_ops
from effnet_ops.benchmark.comparison import run_name
from effnet_ops.benchmark.rows import Results, Row, environment
from effnet_ops.benchmark.timing import percentiles, ratio
from effnet_ops.benchmark.worker import PeakMemory
from effnet_ops.checks import unknown_name
from effnet_ops.cli.console import fail, show
from effnet_ops.scaling.digits import digits

RESULTS = Path(__file__).resolve().parent / "results" / "trainers.json"
STOCK, OURS = "eager_channels_last", "effnet_ops_replace"
LEARNING_RATE = 0.002

Batch = tuple[Tensor, Tensor]
Trainer = Callable[[nn.Module, Sequence[Batch], Path, int, Callable[[float], object]], None]
"""Trains a model, one step a batch, and tells the loss of each. The first step's number is the next argument but one:
from 1 on, it goes on from the checkpoint in the folder. It leaves one there. A step's number is its seed."""


def by_timm(
    model: nn.Module, batches: Sequence[Batch], folder: Path, first: int, report: Callable[[float], object]
) -> None:
    """The loop of timm's training script: its optimizer, scheduler, mixup, scaler and average of the weights."""
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=LEARNING_RATE, weight_decay=0.01)
    scheduler = CosineLRScheduler(optimizer, t_initial=30, warmup_t=5, warmup_lr_init=1e-5)
    scaler, mixup = timm.utils.NativeScaler("cpu"), Mixup(mixup_alpha=0.2, label_smoothing=0.1, num_classes=10)
    ema = timm.utils.ModelEmaV3(model, decay=0.9)
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler, "ema": ema.module}
    if first:
        state = torch.load(folder / "timm.pt")
        for name, part in parts.items():
            part.load_state_dict(state[name])
    for step, (images, labels) in enumerate(batches, first):
        scheduler.step(step)
        torch.manual_seed(step)
        numpy.random.seed(step)
        # Mixup writes to the pictures that it is given.
        images, targets = mixup(images.clone(), labels)
        loss = timm.loss.SoftTargetCrossEntropy()(model(images), targets)
        optimizer.zero_grad()
        scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
        ema.update(model, step=step)
        report(loss.item())
    torch.save({name: part.state_dict() for name, part in parts.items()}, folder / "timm.pt")


def by_lightning(
    model: nn.Module, batches: Sequence[Batch], folder: Path, first: int, report: Callable[[float], object]
) -> None:
    """Lightning's Trainer, one epoch a call."""
    import lightning

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Batch, index: int) -> Tensor:
            images, labels = batch
            torch.manual_seed(self.global_step)
            return F.cross_entropy(self.model(images), labels)

        def on_train_batch_end(self, outputs: Any, batch: Batch, index: int) -> None:
            report(outputs["loss"].item())

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), LEARNING_RATE)
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)]

    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=2 if first else 1, default_root_dir=folder, **quiet)
    saved = folder / "lightning.ckpt"
    trainer.fit(Task(), DataLoader(list(batches), batch_size=None), ckpt_path=saved if first else None)
    trainer.save_checkpoint(saved)


def by_accelerate(
    model: nn.Module, batches: Sequence[Batch], folder: Path, first: int, report: Callable[[float], object]
) -> None:
    """The loop of accelerate's documentation."""
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
    loader = DataLoader(list(batches), batch_size=None)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    if first:
        accelerator.load_state(str(folder))
    for step, (images, labels) in enumerate(loader, first):
        torch.manual_seed(step)
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        report(loss.item())
    accelerator.save_state(str(folder))


TRAINERS: dict[str, Trainer] = {"timm": by_timm, "lightning": by_lightning, "accelerate": by_accelerate}


class Task(NamedTuple):
    """What all runs train: a model of timm, and how many digits of which size it gets in each of how many steps."""

    model: str
    batch: int
    resolution: int
    steps: int

    def batches(self) -> list[Batch]:
        images, labels = digits()
        size = (self.resolution, self.resolution)
        made = []
        for step in range(self.steps):
            at = torch.arange(step * self.batch, (step + 1) * self.batch) % len(images)
            large = F.interpolate(images[at], size, mode="bilinear").expand(-1, 3, -1, -1)
            made.append((large.contiguous(memory_format=torch.channels_last), labels[at]))
        return made


class Run(NamedTuple):
    """Losses and seconds of the steps, and by how many bytes they raised the process's memory at its peak."""

    losses: list[float]
    seconds: list[float]
    peak: int | None


WARM_UP = 3
"""Steps at the beginning whose time does not count."""


def run(trainer: str, provider: str, task: Task, threads: int) -> Run:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = timm.create_model(task.model, num_classes=10).train().to(memory_format=torch.channels_last)
    if provider == OURS:
        report = effnet_ops.replace_layers(model)
        assert not report.skipped, report
    batches, losses, ends = task.batches(), [], []

    def note(loss: float) -> None:
        losses.append(loss)
        ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder, PeakMemory() as memory:
        TRAINERS[trainer](model, batches, Path(folder), 0, note)
    seconds = [end - start for start, end in itertools.pairwise(ends)]
    return Run(losses, seconds[WARM_UP - 1 :], memory.bytes)


def in_own_process(*arguments: Any) -> Run:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run, *arguments).result()


def rows_of(trainer: str, task: Task, threads: int, runs: dict[str, list[Run]]) -> list[Row]:
    """A row for each provider; an error where the first loss is not that of the stock model, within fp32's noise."""
    name, rows = run_name(), []
    expected = runs[STOCK][0].losses[0]
    for provider, own in runs.items():
        shape = f"{task.batch}x3x{task.resolution}x{task.resolution}"
        row = Row(operation=task.model, provider=provider, shape=shape, dtype="float32", mode=f"step by {trainer}")
        row.threads, row.run, row.error = threads, name, max(abs(r.losses[0] / expected - 1) for r in own)
        if row.error < 1e-4:
            times = [1e3 * value for each in own for value in each.seconds]
            row.p20, row.p50, row.p80 = percentiles(times)
            row.repetitions = len(times)
            row.round_medians = [1e3 * percentiles(each.seconds)[1] for each in own]
            row.peak_rss_bytes = max((each.peak for each in own if each.peak is not None), default=None)
        else:
            row.problem = f"the first loss is {own[0].losses[0]:.6f}, and {expected:.6f} of the stock model"
        rows.append(row)
    return rows


def table_of(task: Task, rows: list[Row]) -> Table:
    """Times with their spread, and how many times as long as ours stock layers take."""
    table = Table(title=f"Training {task.model} on digits of {task.resolution} pixels, {task.batch} a step, float32")
    for heading in ("", "", "ms a step (20th to 80th percentile)", "over ours", "peak memory, MB"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in rows:
        if row.problem:
            table.add_row(row.mode, row.provider, row.problem)
            continue
        ours = next((r for r in rows if r.mode == row.mode and r.provider == OURS and not r.problem), None)
        against = "" if ours in (None, row) else f"{ratio(row.round_medians, ours.round_medians).p50:.2f}x"
        memory = "" if row.peak_rss_bytes is None else f"{row.peak_rss_bytes / 1e6:.0f}"
        times = f"{row.p50:.0f} ({row.p20:.0f} to {row.p80:.0f})"
        table.add_row(row.mode, row.provider, times, against, memory)
    return table


def main(
    model: str = "efficientnet_b0",
    batch: Annotated[int, typer.Option(min=1)] = 16,
    resolution: Annotated[int, typer.Option(min=8)] = 96,
    steps: Annotated[int, typer.Option(min=WARM_UP + 2)] = 30,
    trainers: Annotated[str, typer.Option(help="With commas between them.")] = ",".join(TRAINERS),
    rounds: Annotated[int, typer.Option(min=1)] = 2,
    threads: Annotated[int, typer.Option(min=1)] = torch.get_num_threads(),
    output: Path = RESULTS,
) -> None:
    """Compare the steps of each trainer, stock and replaced; exit code 1 if a loss is wrong."""
    task, kept, all_rows = Task(model, batch, resolution, steps), Results(output), []
    for trainer in trainers.split(","):
        if trainer not in TRAINERS:
            fail(unknown_name("trainer", trainer, TRAINERS))
        runs: dict[str, list[Run]] = {STOCK: [], OURS: []}
        for _ in range(rounds):
            for provider, own in runs.items():
                own.append(in_own_process(trainer, provider, task, threads))
                print(f"{trainer}, {provider}: {1e3 * percentiles(own[-1].seconds)[1]:.0f} ms a step", flush=True)
        rows = rows_of(trainer, task, threads, runs)
        kept.add(rows, environment())
        all_rows += rows
    show(table_of(task, all_rows))
    raise typer.Exit(int(any(row.problem for row in all_rows)))


if __name__ == "__main__":
    typer.run(main)
