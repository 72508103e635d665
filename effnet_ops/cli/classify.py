"""`effnet-ops classify`: what is on a picture, by Lite0 with its ImageNet weights."""

from __future__ import annotations

from pathlib import Path

import torch
import typer
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from effnet_ops.cli.console import complain, console, need, on_backend, show
from effnet_ops.cli.pictures import UnreadableImage, imagenet_labels, lite0, preprocess, read_image


def run(paths: list[Path], top: int, backend: str | None) -> None:
    need("PIL.Image")
    labels, unreadable = imagenet_labels(), 0
    with on_backend(backend), torch.inference_mode():
        model = lite0()
        for path in paths:
            try:
                image = preprocess(read_image(path))
            except UnreadableImage as error:
                complain(error)
                unreadable += 1
                continue
            console.print(Text(str(path), style="bold"), soft_wrap=True)
            show(_table(model(image).softmax(1)[0], top, labels))
    if unreadable:
        raise typer.Exit(2)


def _table(probabilities: torch.Tensor, top: int, labels: list[str]) -> Table:
    table = Table(show_header=False, box=None)
    table.add_column(overflow="fold")
    table.add_column(no_wrap=True)
    table.add_column()
    for value, index in zip(*(t.tolist() for t in probabilities.topk(top)), strict=True):
        table.add_row(labels[index], f"{value:6.1%}", ProgressBar(total=1.0, completed=value, width=30))
    return table
