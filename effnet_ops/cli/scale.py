"""`effnet-ops scale`: compound scaling from the terminal. What runs is in scale_*.py, imported when it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="scale",
    help="Compound scaling: the family's costs, a network for a budget, the search for coefficients, reports.",
    no_args_is_help=True,
)

Alpha = Annotated[float, typer.Option(help="Growth of depth for a step of phi, at least 1.")]
Beta = Annotated[float, typer.Option(help="Growth of width.")]
Gamma = Annotated[float, typer.Option(help="Growth of resolution.")]
Base = Annotated[str, typer.Option(help="The network that is scaled.")]
Results = Annotated[Path | None, typer.Option(help="File of results: a run that was killed goes on where it stopped.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes.")]
Seeds = Annotated[int, typer.Option(min=1, help="How often each network is trained.")]
Variant = Annotated[str, typer.Option(help="How networks run where time is measured: optimized, fused or stock.")]
Cache = Annotated[Path | None, typer.Option(help="File of measured times; by default one below ~/.cache.")]
Batch = Annotated[int, typer.Option(min=1, help="Images in a call, where time is measured.")]
Dtype = Annotated[str, typer.Option(help="Of the activations, where time is measured.")]
Device = Annotated[str, typer.Option(help="cpu, cuda ..., where time is measured.")]


@app.command("family")
def _family() -> None:
    """The released networks: costs, published accuracy and the phi that each axis implies."""
    from effnet_ops.cli.scale_laws import family

    family()


@app.command("plan")
def _plan(
    budget: Annotated[str, typer.Option(help="2GMACs, 800MFLOPs, 20Mparams, 100MB, 15ms ...")],
    alpha: Alpha = 1.2,
    beta: Beta = 1.1,
    gamma: Gamma = 1.15,
    base: Base = "efficientnet_b0",
    variant: Variant = "optimized",
    batch: Batch = 1,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    cache: Cache = None,
    output: Annotated[Path | None, typer.Option(help="Write the specification there, as JSON.")] = None,
) -> None:
    """The largest network of a law within a budget, and what a single axis would make of it."""
    from effnet_ops.cli.scale_laws import Measuring, plan

    plan(budget, (alpha, beta, gamma), base, Measuring(variant, batch, dtype, device, cache), output)


@app.command("search")
def _search(
    budget: Annotated[str | None, typer.Option(help="What the real networks may take; instead of --target.")] = None,
    target: Annotated[float, typer.Option(help="alpha beta^2 gamma^2 of the points, within the tolerance.")] = 2.0,
    tolerance: Annotated[float, typer.Option(help="Relative.")] = 0.1,
    phi: Annotated[float, typer.Option(help="Where the networks are compared.")] = 1.0,
    base: Base = "efficientnet_b0",
    objective: Annotated[
        str, typer.Option(help="published (a fit; trains nothing), digits (trains), or module:function of yours.")
    ] = "published",
    seeds: Seeds = 1,
    results: Results = None,
    workers: Workers = 1,
    top: Annotated[int, typer.Option(min=1, help="How many points to list.")] = 10,
    variant: Variant = "optimized",
    batch: Batch = 1,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    cache: Cache = None,
) -> None:
    """Grid search over alpha, beta and gamma under a constraint."""
    from effnet_ops.cli.scale_laws import Measuring
    from effnet_ops.cli.scale_search import search

    constraint = dict(budget=budget, target=target, tolerance=tolerance, phi=phi)
    run = dict(results=results, workers=workers)
    search(base, constraint, objective, seeds, run, top, Measuring(variant, batch, dtype, device, cache))


@app.command("compare")
def _compare(
    budget: Annotated[list[str] | None, typer.Option(help="One or more; by default 3 times the base network.")] = None,
    alpha: Alpha = 1.2,
    beta: Beta = 1.1,
    gamma: Gamma = 1.15,
    base: Annotated[str, typer.Option(help="The network that is scaled; tiny is for the digits.")] = "tiny",
    objective: Annotated[str, typer.Option(help="digits, published, or module:function of yours.")] = "digits",
    seeds: Seeds = 3,
    results: Results = None,
    workers: Workers = 1,
) -> None:
    """Depth, width and resolution alone against all three, at equal budgets."""
    from effnet_ops.cli.scale_search import compare

    compare(base, budget, (alpha, beta, gamma), objective, seeds, dict(results=results, workers=workers))


@app.command("report")
def _report(
    output: Annotated[Path, typer.Option(help="Folder for report.html and figures/.")] = Path("scaling-report"),
    alpha: Alpha = 1.2,
    beta: Beta = 1.1,
    gamma: Gamma = 1.15,
    measure: Annotated[bool, typer.Option(help="Measure this machine: about a minute when it is quiet.")] = True,
    variant: Variant = "optimized",
    batch: Batch = 1,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    cache: Cache = None,
) -> None:
    """A page on all of this, for a browser without network, with PNG and SVG of its figures."""
    from effnet_ops.cli.scale_laws import Measuring
    from effnet_ops.cli.scale_report import report

    report(output, (alpha, beta, gamma), Measuring(variant, batch, dtype, device, cache), measure)
