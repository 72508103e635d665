"""Plots of rows: a roofline of the layers, bars of whole models, and how they scale with the batch and with threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from effnet_ops.benchmark.layers import FUNCTION, NETWORK
from effnet_ops.benchmark.providers import PROVIDERS
from effnet_ops.benchmark.rows import Row

_COLOURS = matplotlib.colormaps["tab10"].colors
COLOUR = {name: _COLOURS[index % 10] for index, name in enumerate(PROVIDERS)}
WORDS = ("pointwise", "depthwise", "squeeze_excite", "mbconv", "convolution", "linear")


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write the plots that the rows have data for, as SVG; rows without times are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = [row for row in rows if row.layer is None and row.p50 is not None]
    figures: dict[str, Figure | None] = {}
    for model in _distinct(row.operation for row in whole):
        own = [row for row in whole if row.operation == model]
        name = model.replace(":", "_")
        figures[f"end_to_end_{name}"] = _bars(model, own)
        for dtype in _distinct(row.dtype for row in own):
            same = [row for row in own if row.dtype == dtype]
            figures[f"batch_scaling_{name}_{dtype}"] = _batch_scaling(f"{model}, {dtype}", same)
            figures[f"thread_scaling_{name}_{dtype}"] = _thread_scaling(f"{model}, {dtype}", same)
    figures["models"] = _models(whole)
    for model, dtype, threads, batch in _distinct(
        (row.layer, row.dtype, row.threads, row.shape.split("x")[0]) for row in rows if row.operation == "network"
    ):
        chosen = [
            row
            for row in rows
            if row.layer
            and row.layer.split(" ")[0] == model
            and (row.dtype, row.threads, row.shape.split("x")[0]) == (dtype, threads, batch)
        ]
        title = f"{model}, batch {batch}, {dtype}, {threads} threads"
        name = f"roofline_{model.replace(':', '_')}_{batch}_{dtype}_{threads}"
        figures[name] = _roofline(title, chosen, [row for row in rows if row.threads == threads])
    return [_save(figure, folder / f"{name}.svg") for name, figure in figures.items() if figure is not None]


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _save(figure: Figure, path: Path) -> Path:
    # Without a date, and with names that do not change, the same rows give the same file.
    with matplotlib.rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none"}):
        FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None})
    return path


def _batch(row: Row) -> int:
    return int(row.shape.split("x")[0])


def _bars(model: str, rows: Sequence[Row]) -> Figure:
    """Milliseconds of each provider, with the 20th to 80th percentile; a column a batch, a row a dtype."""
    threads = max(row.threads for row in rows)
    rows = [row for row in rows if row.threads == threads]
    shapes = sorted({row.shape for row in rows}, key=lambda shape: int(shape.split("x")[0]))
    dtypes = _distinct(row.dtype for row in rows)
    figure = Figure(figsize=(4.2 * len(shapes), 3.2 * len(dtypes)), layout="constrained")
    grid = figure.subplots(len(dtypes), len(shapes), squeeze=False)
    for i, dtype in enumerate(dtypes):
        for j, shape in enumerate(shapes):
            same = sorted((r for r in rows if (r.dtype, r.shape) == (dtype, shape)), key=lambda r: -r.p50)
            axes: Axes = grid[i][j]
            axes.set_title(f"{shape}, {dtype}", fontsize=9)
            if not same:
                axes.axis("off")
                continue
            spread = [[max(r.p50 - r.p20, 0) for r in same], [max(r.p80 - r.p50, 0) for r in same]]
            names = [r.provider for r in same]
            axes.barh(names, [r.p50 for r in same], xerr=spread, color=[COLOUR.get(name) for name in names])
            axes.tick_params(labelsize=8)
            axes.set_xlabel("ms", fontsize=8)
    figure.suptitle(f"{model}, {threads} threads")
    return figure


def _lines(
    title: str, rows: Sequence[Row], x: Callable[[Row], int], y: Callable[[Row], float], labels: tuple[str, str]
) -> Figure | None:
    """A line a provider; None where there are fewer than two values of x."""
    if len({x(row) for row in rows}) < 2:
        return None
    figure = Figure(figsize=(8.0, 4.2), layout="constrained")
    axes = figure.subplots()
    for provider in _distinct(row.provider for row in rows):
        points = sorted((x(row), y(row)) for row in rows if row.provider == provider)
        if len(points) > 1:
            style = "-" if provider in PROVIDERS and PROVIDERS[provider].ours else "--"
            axes.plot(*zip(*points, strict=True), style, marker="o", color=COLOUR.get(provider), label=provider)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({x(row) for row in rows}), sorted({str(x(row)) for row in rows}, key=int))
    axes.set_ylim(bottom=0)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.set_title(title)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def _batch_scaling(title: str, rows: Sequence[Row]) -> Figure | None:
    threads = max(row.threads for row in rows)
    same = [row for row in rows if row.threads == threads]
    return _lines(
        f"{title}, {threads} threads", same, _batch, lambda r: 1e3 * _batch(r) / r.p50, ("batch", "images a second")
    )


def _thread_scaling(title: str, rows: Sequence[Row]) -> Figure | None:
    """Images a second over threads, at the largest batch that was measured with several numbers of them."""
    batches = [b for b in {_batch(r) for r in rows} if len({r.threads for r in rows if _batch(r) == b}) > 1]
    if not batches:
        return None
    batch = max(batches)
    same = [row for row in rows if _batch(row) == batch]
    images = ("threads", "images a second")
    return _lines(f"{title}, batch {batch}", same, lambda r: r.threads, lambda r: 1e3 * batch / r.p50, images)


def _models(rows: Sequence[Row]) -> Figure | None:
    """Time of each provider over that of the fastest peer, at batch 1 in float32, for all models."""
    threads = max((row.threads for row in rows), default=0)
    rows = [row for row in rows if _batch(row) == 1 and row.dtype == "float32" and row.threads == threads]
    models, providers = _distinct(row.operation for row in rows), _distinct(row.provider for row in rows)
    if len(models) < 2:
        return None
    figure = Figure(figsize=(max(8.0, 2.0 * len(models)), 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(providers)
    for index, provider in enumerate(providers):
        heights = []
        for model in models:
            times = {row.provider: row.p50 for row in rows if row.operation == model}
            peers = [time for name, time in times.items() if name not in PROVIDERS or not PROVIDERS[name].ours]
            heights.append(times.get(provider, 0) / min(peers, default=float("inf")))
        places = [at + index * width for at in range(len(models))]
        axes.bar(places, heights, width, color=COLOUR.get(provider), label=provider)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylim(0, 4)
    axes.set_xticks([at + 0.4 - width / 2 for at in range(len(models))], models, rotation=20, fontsize=8)
    axes.set_ylabel("time over the fastest peer's (cut at 4)")
    axes.set_title(f"batch 1, float32, {threads} threads")
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def _roofline(title: str, rows: Sequence[Row], all_rows: Sequence[Row]) -> Figure | None:
    """GFLOP/s of each layer over its operations a byte, under what the machine can do."""
    layers = [row for row in rows if row.flops and row.bytes and row.operation in WORDS]
    copies = [row.gb_per_s for row in all_rows if row.operation == "copy"]
    fma = {(r.provider, r.dtype): r.gflop_per_s for r in all_rows if r.operation == "multiply_add"}
    if not layers or not copies or not fma:
        return None
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.subplots()
    intensities = [row.flops / row.bytes for row in layers]
    low, high = min(intensities) / 2, max(intensities) * 2
    for (isa, dtype), peak in fma.items():
        axes.plot([low, high], [peak, peak], color="grey", linewidth=0.8)
        axes.annotate(f"{isa} {dtype}", (high, peak), fontsize=6, ha="right", va="bottom")
    axes.plot([low, high], [low * copies[-1], high * copies[-1]], color="grey", linewidth=0.8, linestyle=":")
    for word, colour in zip(WORDS, _COLOURS, strict=False):
        for provider, marker in ((NETWORK, "o"), (FUNCTION, "x")):
            points = [r for r in layers if r.operation == word and r.provider == provider]
            if points:
                where = "in the network" if provider == NETWORK else "alone, in cache"
                axes.scatter(
                    [r.flops / r.bytes for r in points],
                    [r.gflop_per_s for r in points],
                    color=colour,
                    marker=marker,
                    s=22,
                    label=f"{word}, {where}",
                )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(top=1.6 * max(fma.values()))
    axes.set_xlabel("operations a byte of input, output and parameters (dotted: copy bandwidth)")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(title)
    axes.legend(fontsize=7)
    return figure
