"""A training step of EfficientNet-B0: time, activation memory that autograd saves, and peak memory of the process.

python benchmarks/training_step.py               # writes benchmarks/results/training_step.json
"""

from __future__ import annotations

import copy
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import timm
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import effnet_ops
from effnet_ops.benchmark.gate import Failed, gate, relative_error
from effnet_ops.benchmark.rows import Results, Row, environment
from effnet_ops.benchmark.timing import interleave

RESULTS = Path(__file__).resolve().parent / "results"
VARIANTS = {
    "stock": (False, torch.contiguous_format),
    "stock channels_last": (False, torch.channels_last),
    "replaced": (True, torch.contiguous_format),
    "replaced channels_last": (True, torch.channels_last),
}


def variant(stock: nn.Module, name: str) -> nn.Module:
    replaced, layout = VARIANTS[name]
    model = copy.deepcopy(stock).train()
    if replaced:
        effnet_ops.replace_layers(model)
    return model.to(memory_format=layout)


def training_step(model: nn.Module, x: Tensor, target: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()

    return step


def saved_bytes(model: nn.Module, x: Tensor, target: Tensor) -> int:
    """Bytes of the distinct storages that autograd keeps between forward and backward, parameters and buffers apart."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    # The graph holds what it packed until `loss` goes, so no address is used twice.
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.cross_entropy(model(x), target)
    total = sum(sizes.values())
    del loss
    return total


def peak_rss(name: str, batch: int, resolution: int) -> int:
    """Bytes by which two steps raise the resident memory of a fresh process at its peak (Linux only)."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_rss, (name, batch, resolution))


def _peak_rss(name: str, batch: int, resolution: int) -> int:
    model = variant(timm.create_model("efficientnet_b0"), name)
    run = training_step(model, *_data(batch, resolution, VARIANTS[name][1]))
    # Forgets the peak of importing PyTorch (proc(5), clear_refs).
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    run()
    run()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _data(batch: int, resolution: int, layout: torch.memory_format) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, resolution, resolution, generator=generator)
    return x.contiguous(memory_format=layout), torch.randint(1000, (batch,), generator=generator)


def errors(stock: nn.Module, batch: int, resolution: int) -> dict[str, float]:
    """Each variant's error of the logits in training mode; ours at most twice the worse stock layout's, or an error."""
    x, _ = _data(batch, resolution, torch.contiguous_format)
    with torch.no_grad():
        exact = copy.deepcopy(stock).double().train()(x.double())
        found = {
            name: relative_error(variant(stock, name)(x.contiguous(memory_format=layout)), exact)
            for name, (_, layout) in VARIANTS.items()
        }
    allowed = 2 * max(found[name] for name, (replaced, _) in VARIANTS.items() if not replaced)
    for name, (replaced, _) in VARIANTS.items():
        if replaced:
            gate(f"{name}: logits", found[name], allowed)
    return found


def show(rows: list[Row]) -> None:
    table = Table(title=f"Training step of efficientnet_b0, {rows[0].shape}, fp32")
    for heading in ("", "ms (20th to 80th percentile)", "saved activations, MB", "peak memory, MB", "error of logits"):
        table.add_column(heading)
    for row in rows:
        memory = (f"{row.saved_bytes / 1e6:.1f}", f"{row.peak_rss_bytes / 1e6:.0f}")
        table.add_row(row.provider, f"{row.p50:.1f} ({row.p20:.1f} to {row.p80:.1f})", *memory, f"{row.error:.1e}")
    Console(width=120).print(table)


def main(
    batch: int = 8,
    resolution: int = 224,
    seconds: Annotated[float, typer.Option(help="Time for all four variants together.")] = 60.0,
    output: Path = RESULTS / "training_step.json",
) -> None:
    """Compare a training step before and after replace_layers; exit code 1 if a result is wrong."""
    torch.manual_seed(0)
    stock = timm.create_model("efficientnet_b0")
    try:
        found = errors(stock, batch, resolution)
    except Failed as error:
        sys.exit(str(error))
    models = {name: variant(stock, name) for name in VARIANTS}
    data = {name: _data(batch, resolution, layout) for name, (_, layout) in VARIANTS.items()}
    saved = {name: saved_bytes(models[name], *data[name]) for name in VARIANTS}
    times = interleave({name: training_step(models[name], *data[name]) for name in VARIANTS}, seconds, warmup=1)
    rows = [
        Row(
            operation="efficientnet_b0",
            provider=name,
            shape=f"{batch}x3x{resolution}x{resolution}",
            dtype="float32",
            mode="step",
            threads=torch.get_num_threads(),
            p20=1e3 * timing.p20,
            p50=1e3 * timing.p50,
            p80=1e3 * timing.p80,
            repetitions=timing.repetitions,
            error=found[name],
            saved_bytes=saved[name],
            peak_rss_bytes=peak_rss(name, batch, resolution),
        )
        for name, timing in times.items()
    ]
    show(rows)
    Results(output).add(rows, environment())


if __name__ == "__main__":
    typer.run(main)
