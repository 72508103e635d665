"""The command `effnet-ops`. Each sub-command has a module of its own, which is imported only when it runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from effnet_ops.cli import scale

app = typer.Typer(
    name="effnet-ops",
    help="Fused EfficientNet operators: what they are on this machine, whether they are right, and what they bring.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(scale.app)

MOST_THREADS = 4 * (os.cpu_count() or 1)
Backend = Annotated[str | None, typer.Option(help="Run on this backend only (see `effnet-ops info`).")]


def _version(wanted: bool) -> None:
    if wanted:
        from effnet_ops import __version__

        typer.echo(f"effnet-ops {__version__}")
        raise typer.Exit


@app.callback()
def _effnet_ops(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


@app.command("info")
def _info() -> None:
    """Versions, devices, what was built, and which backends can run here (and why not)."""
    from effnet_ops.cli.info import run

    run()


@app.command("check")
def _check(
    backend: Backend = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float64, bfloat16 or float16 only.")] = None,
) -> None:
    """Test every operator on this machine against the fp64 reference; exit code 1 if one is wrong."""
    from effnet_ops.cli.check import run

    run(backend, dtype)


@app.command("classify")
def _classify(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files of any kind.")],
    top: Annotated[int, typer.Option(min=1, max=1000, help="How many classes to list.")] = 5,
    backend: Backend = None,
) -> None:
    """Name what is on each picture, with EfficientNet-Lite0 and its ImageNet weights."""
    from effnet_ops.cli.classify import run

    run(images, top, backend)


@app.command("summary")
def _summary(
    model: Annotated[str, typer.Argument(help="A name such as efficientnet_b0.")],
    resolution: Annotated[int | None, typer.Option(min=1, help="Height and width of the input, in pixels.")] = None,
) -> None:
    """Shapes, parameters, multiply-adds and receptive field of a model, stage by stage."""
    from effnet_ops.cli.summary import run

    run(model, resolution)


@app.command("demo")
def _demo(
    output: Annotated[Path, typer.Option(help="Where to save the picture of the photographs.")] = Path("demo.png"),
    seconds: Annotated[float, typer.Option(min=0.0, help="Time for each row of the speed table; 0: no table.")] = 9.0,
) -> None:
    """Classify real photographs before and after replace_layers, and time it; exit code 1 if a logit moved by 1e-4."""
    from effnet_ops.cli.demo import run

    run(output, seconds)


@app.command("bench")
def _bench(
    model: Annotated[str, typer.Option(help="A timm model, or torchvision:NAME or effnet_ops:NAME.")] = (
        "efficientnet_b0"
    ),
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Images at once; repeat for several.  [1]")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32 or bfloat16; repeat for both.  [float32]")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=MOST_THREADS, help="Of every provider; by default PyTorch's number.")
    ] = None,
    resolution: Annotated[int | None, typer.Option(min=1, help="Height and width; by default the model's own.")] = None,
    peers: Annotated[str | None, typer.Option(help="Only these beside ours, with commas between them.")] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Each layer too, beside the machine's peaks.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="How often every provider has a turn.")] = 7,
    seconds: Annotated[float, typer.Option(min=0.0, help="Of each turn, at least.")] = 0.3,
    json: Annotated[Path | None, typer.Option(help="Keep the rows in this file; what it has is not repeated.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Repeat also what the file has of this commit.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw plots into this folder.")] = None,
) -> None:
    """Compare inference with PyTorch, torch.compile, ONNX Runtime and OpenVINO; exit code 1 if an output is wrong."""
    import torch

    from effnet_ops.benchmark.comparison import Settings
    from effnet_ops.cli.bench import check_dtypes, chosen, run, tasks_of

    dtypes, threads = dtype or ["float32"], threads or torch.get_num_threads()
    check_dtypes(dtypes)
    settings = [
        Settings(model, size, name, threads, resolution, rounds, seconds) for name in dtypes for size in batch or [1]
    ]
    providers = chosen(None if peers is None else [name for name in peers.split(",") if name])
    run(tasks_of(settings, providers, layers), json, fresh, plot)


@app.command("try")
def _try(
    model: Annotated[
        str, typer.Argument(help="A timm model, torchvision:NAME, effnet_ops:NAME, MODULE:FACTORY or a file.")
    ],
    weights: Annotated[Path | None, typer.Option(help="A state dict for it (.pt, .safetensors).")] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Load files that may run code, too.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Images at once.")] = 2,
    resolution: Annotated[int | None, typer.Option(min=1, help="Height and width; by default the model's own.")] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="Of each measurement; 0: none.")] = 6.0,
    json: Annotated[Path | None, typer.Option(help="Write the result to this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with every layer to this file.")] = None,
) -> None:
    """Replace the layers of a model of your own, check it against fp64, and time it; exit code 1 if it disagrees."""
    from effnet_ops.cli.try_model import run

    run(model, weights, trust, batch, resolution, seconds, json, html)
