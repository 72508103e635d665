"""Inference of EfficientNet-B0: stock, with layers replaced, and optimized, in fp32 and bf16.

python benchmarks/inference.py                   # writes benchmarks/results/inference.json
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import timm
import torch
import typer
from harness import RESULTS, Row, WrongResult, gate, relative_error, write
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import effnet_ops
from effnet_ops.benchmark.timing import interleave

FLOOR = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def _replaced(model: nn.Module) -> nn.Module:
    effnet_ops.replace_layers(model)
    return model


VARIANTS: dict[str, tuple[Callable[[nn.Module], nn.Module], torch.memory_format, torch.dtype]] = {
    "stock": (lambda model: model, torch.contiguous_format, torch.float32),
    "stock channels_last": (lambda model: model, torch.channels_last, torch.float32),
    "replaced": (_replaced, torch.contiguous_format, torch.float32),
    "replaced channels_last": (_replaced, torch.channels_last, torch.float32),
    "optimized": (effnet_ops.optimize_for_inference, torch.channels_last, torch.float32),
    "stock channels_last bf16": (lambda model: model.bfloat16(), torch.channels_last, torch.bfloat16),
    "optimized bf16": (
        lambda model: effnet_ops.optimize_for_inference(model, dtype=torch.bfloat16),
        torch.channels_last,
        torch.bfloat16,
    ),
}


def trained_like(model: nn.Module) -> nn.Module:
    """Statistics from one batch, so that activations neither vanish nor explode on the way to the logits."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 224, 224))
    return model.eval()


def functions(stock: nn.Module, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Each variant's call, on its own copy of the model and its own layout and dtype of x."""
    calls = {}
    for name, (change, layout, dtype) in VARIANTS.items():
        model = change(copy.deepcopy(stock).to(memory_format=layout))
        value = x.to(dtype).contiguous(memory_format=layout)
        calls[name] = torch.inference_mode()(lambda model=model, value=value: model(value))
    return calls


def check(stock: nn.Module, x: Tensor, calls: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Each variant's error of the logits; ours is at most twice the worst stock model's of the same dtype."""
    with torch.inference_mode():
        exact = copy.deepcopy(stock).double()(x.double())
    found = {name: relative_error(call(), exact) for name, call in calls.items()}
    for name, (_, _, dtype) in VARIANTS.items():
        stocks = [found[other] for other, row in VARIANTS.items() if other.startswith("stock") and row[2] == dtype]
        gate(f"{name}: logits", found[name], 2 * max(stocks) + FLOOR[dtype])
    return found


def measure(stock: nn.Module, batch: int, resolution: int, seconds: float) -> list[Row]:
    x = torch.randn(batch, 3, resolution, resolution)
    calls = functions(stock, x)
    found = check(stock, x, calls)
    return [
        Row(
            "efficientnet_b0",
            name,
            f"{batch}x3x{resolution}x{resolution}",
            str(VARIANTS[name][2]).removeprefix("torch."),
            "cpu",
            "forward",
            *(t * 1e3 for t in timing[:3]),
            repetitions=timing.repetitions,
            error=found[name],
        )
        for name, timing in interleave(calls, seconds).items()
    ]


def show(rows: list[Row]) -> None:
    table = Table(title="Inference of efficientnet_b0")
    for heading in ("", "input", "ms (20th to 80th percentile)", "error of logits"):
        table.add_column(heading)
    for row in rows:
        table.add_row(row.provider, row.shape, f"{row.p50:.1f} ({row.p20:.1f} to {row.p80:.1f})", f"{row.error:.1e}")
    Console(width=120).print(table)


def main(
    batches: Annotated[list[int] | None, typer.Option(help="Batch sizes; 1 and 8 by default.")] = None,
    resolution: int = 224,
    seconds: Annotated[float, typer.Option(help="Time for all variants together, for each batch size.")] = 20.0,
    output: Path = RESULTS / "inference.json",
) -> None:
    """Compare inference before and after replace_layers and optimize_for_inference; exit code 1 on a wrong result."""
    torch.manual_seed(0)
    stock = trained_like(timm.create_model("efficientnet_b0"))
    try:
        rows = [row for batch in batches or (1, 8) for row in measure(stock, batch, resolution, seconds)]
    except WrongResult as error:
        sys.exit(f"wrong result: {error}")
    show(rows)
    write(rows, output)


if __name__ == "__main__":
    typer.run(main)
