"""`effnet-ops try`: what the fused layers do to a model of one's own, whether it stays right, and what it gains."""

from __future__ import annotations

import copy
import html
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import typer
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from effnet_ops.benchmark import models
from effnet_ops.benchmark.timing import interleave
from effnet_ops.benchmark.worker import saved_bytes
from effnet_ops.cli.bench import progress
from effnet_ops.cli.console import bad_input, console, fail, need, need_file, show
from effnet_ops.cli.try_parity import Examination, Report, examine, tensors_in
from effnet_ops.models.files import first_line, load_model
from effnet_ops.surgery import optimize_for_inference, replace_layers

_NOUNS = {"block": "MBConv blocks", "depthwise": "depthwise convolutions", "squeeze_excite": "squeeze-and-excitation"}


def run(
    name: str, weights: Path | None, trust: bool, batch: int, resolution: int | None, seconds: float,
    as_json: Path | None, as_html: Path | None,
) -> None:  # fmt: skip
    """Do all of it; ends with exit code 2 on bad input and 1 if anything disagrees."""
    for path in (as_json, as_html):
        if path is not None:
            need_file(path)
    model, size = load(name, trust)
    if weights is not None:
        load_weights(model, weights)
    x = images(model, batch, resolution or size)
    stages = ["replacing", "evaluating", "optimizing", "training", "restoring", "measuring"]
    with progress() as bar:

        def report(what: str) -> None:
            bar(f"{name}: {what}", stages.index(what), len(stages))

        try:
            found = examine(model, x, report)
            gains = measure(model, x, seconds, report)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            fail(f"{name} does not run on images of shape {tuple(x.shape)}: {first_line(error)}")
    _show(name, x, found, gains)
    result = {"model": name, "shape": list(x.shape), **asdict(found), "wrong": found.wrong(), "measured": gains}
    if as_json is not None:
        as_json.write_text(json.dumps(result, indent=1) + "\n")
    if as_html is not None:
        as_html.write_text(page(result, found))
    if found.wrong():
        raise typer.Exit(1)


def load(name: str, trust: bool) -> tuple[nn.Module, int]:
    """The model behind a name, ``module:factory`` or a file, and the height of its images."""
    path = Path(name)
    if path.suffix in (".pt", ".pth", ".pt2", ".ckpt", ".bin", ".safetensors") or path.is_file():
        with bad_input():
            return load_file(path, trust), 224
    first, colon, factory = name.partition(":")
    if colon and first not in models.LIBRARIES:
        return _made(first, factory), 224
    with bad_input():
        need(models.split(name)[0], extra="bench")
        model = models.build(name)
        size = models.default_resolution(name)
    return models.with_statistics(model, size), size


def _made(module: str, factory: str) -> nn.Module:
    sys.path.insert(0, "")
    try:
        made = importlib.import_module(module)
        for part in factory.split("."):
            made = getattr(made, part)
        model = made if isinstance(made, nn.Module) else made()
    except Exception as error:  # somebody else's code can raise anything
        fail(f"{module}:{factory} gives no model: {type(error).__name__}: {first_line(error)}")
    if not isinstance(model, nn.Module):
        fail(f"{module}:{factory} gives a {type(model).__name__}, not a torch.nn.Module")
    return model


def load_file(path: Path, trust: bool) -> nn.Module:
    """The model in a file. Nothing in the file is executed, unless it is trusted; ValueError says what that needs."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    if path.suffix == ".pt2":
        if not trust:
            raise ValueError(
                f"{path} is an exported program, which may run code when it is loaded: --trust allows that"
            )
        return torch.export.load(path).module()
    if path.suffix == ".safetensors" or _is_state(path):
        raise ValueError(f"{path} has weights and no model: name the model, and give the file to --weights")
    try:
        return load_model(path)
    except ValueError as error:
        if not trust:
            raise ValueError(f"{error}; a pickled module may run code when it is loaded: --trust allows that") from None
    model = torch.load(path, map_location="cpu", weights_only=False)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{path} holds a {type(model).__name__}, not a torch.nn.Module")
    return model


def _is_state(path: Path) -> bool:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a file of something else can make the unpickler raise anything
        return False
    return isinstance(content, dict) and "format" not in content


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict, without running code that the file may hold."""
    with bad_input():
        if path.suffix == ".safetensors":
            try:
                state = importlib.import_module("safetensors.torch").load_file(path)
            except ImportError:
                fail("this needs the package safetensors: pip install safetensors")
        else:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except OSError:
                raise
            except Exception as error:  # as above
                raise ValueError(f"{path} has more than weights: {first_line(error)}") from None
        for key in ("state_dict", "model", "model_state_dict"):
            state = state.get(key, state) if isinstance(state, dict) else state
        try:
            model.load_state_dict(state)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} does not fit the model: {first_line(error)}") from None


def images(model: nn.Module, batch: int, resolution: int) -> Tensor:
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        fail(f"{type(model).__name__} has no convolution that takes images")
    torch.manual_seed(0)
    return torch.randn(batch, first.in_channels, resolution, resolution)


def measure(model: nn.Module, x: Tensor, seconds: float, report: Report) -> dict[str, dict[str, float]]:
    """Milliseconds of inference and of a training step, and MB that training keeps for its backward pass."""
    report("measuring")
    layout = torch.channels_last
    stock = copy.deepcopy(model).to(memory_format=layout)
    ours = copy.deepcopy(stock)
    replace_layers(ours)
    networks = {"stock": stock, "replaced": ours, "optimized": optimize_for_inference(stock)}
    x = x.to(memory_format=layout)
    found: dict[str, dict[str, float]] = {name: {} for name in networks}
    if seconds > 0:
        times = interleave({name: _inference(m.eval(), x) for name, m in networks.items()}, seconds)
        for name, timing in times.items():
            found[name]["inference ms"] = 1e3 * timing.p50
    training = {name: networks[name].train() for name in ("stock", "replaced")}
    for name, m in training.items():
        found[name]["kept MB"] = saved_bytes(lambda m=m: m(x), m) / 1e6
    if seconds > 0:
        for name, timing in interleave({name: _training(m, x) for name, m in training.items()}, seconds).items():
            found[name]["training ms"] = 1e3 * timing.p50
    return found


def _inference(model: nn.Module, x: Tensor) -> Callable[[], object]:
    def call() -> object:
        with torch.inference_mode():
            return model(x)

    return call


def _training(model: nn.Module, x: Tensor) -> Callable[[], object]:
    def call() -> None:
        model.zero_grad(set_to_none=True)
        sum(y.sum() for y in tensors_in(model(x))).backward()

    return call


def _show(name: str, x: Tensor, found: Examination, gains: dict[str, dict[str, float]]) -> None:
    counts = [f"{found.replaced[kind]} of {n} {_NOUNS.get(kind, 'other blocks')}" for kind, n in found.found.items()]
    console.print(
        f"{name}, {tuple(x.shape)}: {', '.join(counts) or 'nothing'} replaced; {found.optimized}", soft_wrap=True
    )
    for reason, count in found.reasons().items():
        console.print(f"  {count} left: {escape(reason)}", highlight=False, soft_wrap=True)
    table = Table(title="relative errors against fp64", title_justify="left")
    for heading in ("", "ours", "stock", "ours in fp64"):
        table.add_column(heading)
    for key, value in found.fp64.items():
        table.add_row(
            key,
            *(f"{errors[key]:.1e}" if key in errors else "" for errors in (found.ours, found.stock)),
            f"{value:.1e}",
        )
    show(table)
    table = Table(title="medians, channels_last", title_justify="left")
    headings = list(dict.fromkeys(key for row in gains.values() for key in row))
    for heading in ("", *headings):
        table.add_column(heading)
    for row, values in gains.items():
        table.add_row(row, *(_with_ratio(values, gains["stock"], heading) for heading in headings))
    if headings:
        show(table)
    for problem in found.wrong():
        console.print(f"[red]{escape(problem)}[/red]")
    console.print("bit for bit restored" if found.restored else "[red]not restored[/red]")


def _with_ratio(values: dict[str, float], stock: dict[str, float], key: str) -> str:
    if key not in values:
        return ""
    return f"{values[key]:.2f}" if values is stock else f"{values[key]:.2f} ({stock[key] / values[key]:.2f}x)"


def page(result: dict[str, Any], found: Examination) -> str:
    """The result as one page of HTML, with every layer."""

    def table(headings: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
        lines = ["<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row) + "</tr>"
                 for tag, row in (("th", headings), *(("td", row) for row in rows))]  # fmt: skip
        return "<table>" + "\n".join(lines) + "</table>"

    errors = [(key, found.ours.get(key, ""), found.stock.get(key, ""), value) for key, value in found.fp64.items()]
    measured = [(name, *(f"{k}: {v:.2f}" for k, v in row.items())) for name, row in result["measured"].items()]
    layers = [(name or "the model itself", kind, reason or "replaced") for name, kind, reason in found.layers]
    title = html.escape(f"effnet-ops try {result['model']}, {result['shape']}")
    body = [
        f"<h1>{title}</h1>",
        f"<p>{html.escape('; '.join(found.wrong()) or 'Everything agrees.')} {html.escape(found.optimized)}</p>",
        table(("", "error", "the stock model's own", "difference in fp64"), errors),
        table(("", "", "", ""), measured),
        table(("layer", "kind", "what was done"), layers),
    ]
    style = "<style>body{font-family:sans-serif}td,th{padding:2px 12px;text-align:left}</style>"
    return f"<!doctype html><meta charset=utf-8><title>{title}</title>{style}" + "\n".join(body) + "\n"
