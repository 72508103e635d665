"""The figures of compound scaling, by matplotlib (extra ``plots``); each function draws one and returns it."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes as Plot
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from effnet_ops.scaling.comparison import Comparison
from effnet_ops.scaling.counters import convolution_cost, count
from effnet_ops.scaling.grid import SearchResult
from effnet_ops.scaling.latency import LatencyTable, Peaks
from effnet_ops.scaling.laws import Axes, CompoundScaling, implied_phi, realised_axes, scaled
from effnet_ops.scaling.pareto import pareto_front
from effnet_ops.scaling.proxy import accuracy_fit
from effnet_ops.scaling.published import LITE, RELEASED, SCALED_B0
from effnet_ops.scaling.receptive_field import EffectiveField, receptive_field

TEXT, MUTED, GRID = "#1f2328", "#59636e", "#d1d9e0"
SERIES = ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#9a6700", "#bf3989")
ON_SERIES = "#ffffff"
COLORS = {
    "text": TEXT,
    "muted": MUTED,
    "grid": GRID,
    "on": ON_SERIES,
    **{f"s{i}": color for i, color in enumerate(SERIES, 1)},
}
"""Colours by name; in a page, CSS variables of these names take their place (`inline_svg`)."""

WAYS = {"depth only": 0, "width only": 1, "resolution only": 2, "paper's compound": 3, "grid's best": 4}
MARKERS = "osD^vP"
STYLE = {
    "axes.edgecolor": MUTED,
    "axes.grid": True,
    "axes.labelcolor": TEXT,
    "axes.prop_cycle": matplotlib.cycler(color=SERIES),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": TEXT,
    "axes.titlesize": 10,
    "figure.figsize": (4.3, 3.2),
    "figure.constrained_layout.use": True,
    "font.size": 9.5,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.markersize": 5,
    "svg.fonttype": "none",
    "text.color": TEXT,
    "xtick.color": MUTED,
    "xtick.labelcolor": TEXT,
    "ytick.color": MUTED,
    "ytick.labelcolor": TEXT,
}


@contextmanager
def _drawn() -> Iterator[tuple[Figure, Plot]]:
    """A figure and its plot in the house style, whatever the user's own configuration says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure()
        yield figure, figure.add_subplot()


def _log_axis(axis: object, values: Sequence[float], suffix: str = "") -> None:
    """A logarithmic axis with plain numbers at ``values``."""
    axis.set_ticks(list(values))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{suffix}"))
    axis.set_minor_formatter(NullFormatter())


def family() -> Figure:
    """Published accuracy of the released networks over the multiply-adds that `count` finds."""
    with _drawn() as (figure, plot):
        for index, (label, rows) in enumerate((("B0 to B7", RELEASED), ("Lite0 to Lite4", LITE))):
            x = [count(row.spec).macs / 1e9 for row in rows]
            y = [row.top1 for row in rows]
            plot.plot(x, y, marker=MARKERS[index], label=label)
            for row, a, b in zip(rows, x, y, strict=True):
                name = row.spec.name.removeprefix("efficientnet_").replace("lite", "L").upper()
                plot.annotate(name, (a, b), (3, -11), textcoords="offset points", fontsize=8, color=MUTED)
        plot.set_xscale("log")
        _log_axis(plot.xaxis, (0.3, 1, 3, 10, 30))
        plot.set(xlabel="multiply-adds (billions)", ylabel="top-1 on ImageNet, published (%)")
        plot.set_ylim(bottom=74)
        plot.legend(loc="lower right")
    return figure


def laws(law: CompoundScaling | None = None, largest: float = 7.0) -> Figure:
    """What the formula promises for each phi, and the real networks' multiply-adds."""
    law = law or CompoundScaling()
    phis = np.linspace(0.0, largest, 141).tolist()
    networks = [law.network(phi) for phi in phis]
    with _drawn() as (figure, plot):
        plot.plot(phis, [n.nominal_factor for n in networks], "--", label="formula")
        plot.plot(phis, [n.factor for n in networks], label="real network", drawstyle="steps-post")
        base = networks[0].count.macs
        released = [(sum(implied_phi(row.spec, law)) / 3, count(row.spec).macs / base) for row in RELEASED[1:]]
        plot.plot(*zip(*released, strict=True), "D", color=SERIES[2], label="B1 to B7 at their mean phi")
        plot.set_yscale("log")
        _log_axis(plot.yaxis, (1, 3, 10, 30, 100), "x")
        plot.set(xlabel="phi", ylabel="multiply-adds relative to phi = 0")
        plot.legend(loc="lower right")
    return figure


def convolutions(kernel_sizes: Sequence[int] = (3, 5, 7)) -> Figure:
    """How many multiply-adds a depthwise-separable convolution saves, over its output channels."""
    channels = np.unique(np.geomspace(8, 2048, 60).round()).astype(int).tolist()
    with _drawn() as (figure, plot):
        for k, style in zip(kernel_sizes, ("-", "--", ":"), strict=False):
            plot.plot(channels, [convolution_cost(64, c, k).saving for c in channels], style, label=f"{k}x{k}")
            plot.axhline(k**2, color=GRID, linewidth=1, zorder=0)
        plot.set_xscale("log")
        plot.set_yscale("log")
        _log_axis(plot.xaxis, (8, 32, 128, 512, 2048))
        _log_axis(plot.yaxis, (4, 9, 16, 25, 49), "x")
        plot.set(xlabel="output channels", ylabel="standard over separable")
        plot.legend(title="kernel", loc="upper left")
    return figure


OPERATIONS = {
    "stem": ("conv",),
    "1x1 convolutions": ("pointwise",),
    "depthwise": ("depthwise",),
    "squeeze-and-excitation": ("squeeze_excite",),
    "classifier": ("linear",),
}


def shares(spec: str = "efficientnet_b0") -> dict[str, dict[str, float]]:
    """For parameters, multiply-adds and bytes (stock, fused): the share of each operation of `OPERATIONS`."""
    costs = count(spec)
    found = {}
    for label, total in _TOTALS.items():
        found[label] = {
            name: sum(getattr(row, total) for row in costs.layers if row.kind in kinds) / getattr(costs, total)
            for name, kinds in OPERATIONS.items()
        }
    return found


_TOTALS = {
    "parameters": "parameters",
    "multiply-adds": "macs",
    "bytes, stock": "stock_bytes",
    "bytes, fused": "fused_bytes",
}


def operations(spec: str = "efficientnet_b0") -> Figure:
    """Where parameters, multiply-adds and bytes of activations go, by operation."""
    found = shares(spec)
    with _drawn() as (figure, plot):
        figure.set_size_inches(4.3, 3.0)
        left = np.zeros(len(found))
        for color, name in zip(SERIES, OPERATIONS, strict=False):
            widths = np.array([100 * row[name] for row in found.values()])
            plot.barh(list(found), widths, left=left, color=color, label=name, height=0.6)
            for y, (start, width) in enumerate(zip(left, widths, strict=True)):
                if width >= 6:
                    plot.text(
                        start + width / 2, y, f"{width:.0f}", ha="center", va="center", color=ON_SERIES, fontsize=8.5
                    )
            left += widths
        plot.invert_yaxis()
        plot.grid(False)
        plot.set(xlabel="share (%)", xlim=(0, 100))
        figure.legend(loc="outside upper center", ncols=2)
    return figure


def receptive_fields(effective: Sequence[EffectiveField], members: Sequence[str] = ("b0", "b3", "b7")) -> Figure:
    """The field of each stage: theoretical for some members, effective for B0."""
    with _drawn() as (figure, plot):
        for index, member in enumerate(members):
            stages = receptive_field(f"efficientnet_{member}").stages
            sizes = [stage.size for stage in stages]
            plot.plot(range(len(sizes)), sizes, marker=MARKERS[index], label=f"{member.upper()}, theoretical")
        last = {field.stage: field.size for field in effective}
        plot.plot(range(len(last)), list(last.values()), "P:", color=SERIES[3], label="B0, 90 % of the gradient")
        plot.axhline(224, color=MUTED, linewidth=0.8)
        plot.text(0, 224, "B0's image", va="bottom", fontsize=8, color=MUTED)
        plot.set_yscale("log")
        _log_axis(plot.yaxis, (3, 10, 30, 100, 300, 1000, 3000))
        plot.set_xticks(range(len(last)), ["stem", *(str(i) for i in range(1, len(last)))])
        plot.set(xlabel="stage", ylabel="pixels on a side")
        plot.legend(loc="lower right")
    return figure


def balance() -> Figure:
    """Fitted accuracy of B0 scaled along one axis and along all three, with the published points."""
    fit, costs = accuracy_fit(), count("efficientnet_b0").macs
    powers = {"depth": (1.0, 0, 0), "width": (0, 1.0, 0), "resolution": (0, 0, 1.0), "compound": (0.28, 0.14, 0.21)}
    with _drawn() as (figure, plot):
        for index, (name, exponents) in enumerate(powers.items()):
            reach = np.linspace(0.0, 1.0, 40)
            largest = 8.0 ** (1.0 / (exponents[0] + 2 * exponents[1] + 2 * exponents[2]))
            axes = [Axes(*(largest ** (t * e) for e in exponents)) for t in reach]
            x = [a.depth * a.width**2 * a.resolution**2 for a in axes]
            plot.plot(x, [fit.accuracy(a) + fit.offset for a in axes], color=SERIES[index], label=name)
            row = SCALED_B0[index + 1]
            plot.plot(count(row.spec).macs / costs, row.top1, MARKERS[index], color=SERIES[index], markeredgecolor=TEXT)
        plot.plot(1.0, SCALED_B0[0].top1, "*", color=TEXT, markersize=9)
        plot.set_xscale("log")
        _log_axis(plot.xaxis, (1, 2, 4, 8), "x")
        plot.set(xlabel="multiply-adds relative to B0", ylabel="top-1 on ImageNet (%)")
        plot.legend(loc="upper left")
    return figure


def pareto(candidates: Sequence[Mapping[str, float]], cost: str, label: str, score: str = "score") -> Figure:
    """All candidates over one cost, with their Pareto front; ``label`` names the cost and its unit."""
    front = pareto_front(candidates, (cost,), score)
    with _drawn() as (figure, plot):
        x, y = ([c[key] for c in candidates] for key in (cost, score))
        plot.plot(x, y, ".", color=MUTED, alpha=0.6, label="candidates")
        plot.step([c[cost] for c in front], [c[score] for c in front], where="post", color=SERIES[1])
        plot.plot([c[cost] for c in front], [c[score] for c in front], "o", color=SERIES[1], label="Pareto front")
        plot.set(xlabel=label, ylabel="score")
        plot.legend(loc="lower right")
    return figure


def roofline(table: LatencyTable, spec: str, peaks: Peaks) -> Figure:
    """Each layer's FLOPs a second over its FLOPs a byte, under what the machine can do at most."""
    points = layer_rates(table, spec)
    with _drawn() as (figure, plot):
        lowest = min(intensity for _, intensity, _ in points) / 2
        highest = max(peaks.ridge, *(intensity for _, intensity, _ in points)) * 2
        x = np.geomspace(lowest, highest, 100)
        plot.plot(x, np.minimum(peaks.flops, x * peaks.bytes) / 1e9, color=MUTED, label="this machine's limit")
        kinds = {"stem": "stem and head", "head": "stem and head"}
        for index, kind in enumerate(("blocks", "stem and head")):
            rows = [(i, rate) for name, i, rate in points if kinds.get(name, "blocks") == kind]
            plot.plot(
                [i for i, _ in rows],
                [r / 1e9 for _, r in rows],
                MARKERS[index],
                color=SERIES[index],
                label=kind,
                alpha=0.8,
            )
        plot.set_xscale("log")
        plot.set_yscale("log")
        _log_axis(plot.xaxis, _decades(lowest, highest))
        _log_axis(plot.yaxis, _decades(*plot.get_ylim()))
        plot.set(xlabel="FLOPs a byte of memory traffic", ylabel="GFLOP/s")
        plot.legend(loc="lower right")
    return figure


def _decades(low: float, high: float) -> list[float]:
    values = [m * 10.0**e for e in range(-3, 7) for m in (1, 2, 5)]
    return [value for value in values if low <= value <= high]


def layer_rates(table: LatencyTable, spec: str) -> list[tuple[str, float, float]]:
    """Each layer's name, FLOPs a byte (stock or fused, as the table's variant runs it) and FLOPs a second."""
    costs = count(spec, batch=table.batch, dtype=table.dtype)
    moved = "stock_bytes" if table.variant == "stock" else "fused_bytes"
    found = []
    for unit, timing in table.layer_times(spec):
        rows = [row for row in costs.layers if row.name.startswith(f"{unit.name}.") or row.stage == unit.name]
        flops = sum(row.flops for row in rows)
        found.append(
            (unit.name, flops / sum(getattr(row, moved) + row.weight_bytes for row in rows), flops / timing.p50)
        )
    return found


def digits_scores(comparison: Comparison) -> Figure:
    """Accuracy over multiply-adds for each way of scaling, with the standard error of the mean."""
    with _drawn() as (figure, plot):
        base = comparison.base
        for way, index in _ways(comparison).items():
            rows = [base, *(o for o in comparison.outcomes if o.contender.way == way)]
            x = [row.contender.factor * 1.02 ** (index - 2) for row in rows]
            errors = [100 * row.deviation / len(row.seeds) ** 0.5 for row in rows]
            plot.errorbar(
                x,
                [100 * row.score for row in rows],
                errors,
                color=SERIES[index],
                marker=MARKERS[index],
                capsize=2,
                label=way,
            )
        plot.set_xscale("log")
        _log_axis(plot.xaxis, (1, 2, 3, 4, 5), "x")
        plot.set(xlabel="multiply-adds relative to the unscaled network", ylabel="accuracy on unseen digits (%)")
        figure.legend(loc="outside upper center", ncols=2)
    return figure


def digits_curves(comparison: Comparison, factor: float) -> Figure:
    """Accuracy after each epoch at the budget nearest to ``factor``, mean and deviation over the seeds."""
    with _drawn() as (figure, plot):
        for way, index in _ways(comparison).items():
            rows = [o for o in comparison.outcomes if o.contender.way == way]
            row = min(rows, key=lambda o: abs(o.contender.factor - factor))
            mean, deviation = (100 * np.array(values) for values in zip(*row.curve(), strict=True))
            epochs = range(1, len(mean) + 1)
            plot.plot(epochs, mean, color=SERIES[index], marker=MARKERS[index], markersize=3.5, label=way)
            plot.fill_between(epochs, mean - deviation, mean + deviation, color=SERIES[index], alpha=0.12, linewidth=0)
        plot.set(xlabel="epoch", ylabel="accuracy on unseen digits (%)", ylim=(40, None))
        figure.legend(loc="outside upper center", ncols=2)
    return figure


def _ways(comparison: Comparison) -> dict[str, int]:
    """Every way of scaling with the index of its colour and marker, the same in every figure."""
    names = dict.fromkeys(o.contender.way for o in comparison.outcomes[1:])
    return {name: WAYS.get(name, len(WAYS)) for name in names}


def search_scores(result: SearchResult) -> Figure:
    """The points of a grid search, the best on top, with the deviation over the seeds."""
    with _drawn() as (figure, plot):
        points = result.points
        figure.set_size_inches(4.3, 1.0 + 0.2 * len(points))
        labels = [f"{p.point.law.alpha:.2f}  {p.point.law.beta:.2f}  {p.point.law.gamma:.2f}" for p in points]
        means, errors = [p.score for p in points], [p.deviation for p in points]
        plot.errorbar(means, range(len(points)), xerr=errors, fmt="o", capsize=2)
        plot.set_yticks(range(len(points)), labels)
        plot.invert_yaxis()
        plot.set(xlabel="score", ylabel="alpha  beta  gamma")
    return figure


def scaled_candidates(
    steps: Sequence[float] = (1.0, 1.2, 1.4, 1.7, 2.0), base: str = "efficientnet_b0"
) -> list[dict[str, object]]:
    """Every combination of the steps on the three axes of B0, with multiply-adds (billions) and the fitted accuracy."""
    fit = accuracy_fit()
    candidates = []
    for depth in steps:
        for width in steps:
            for resolution in steps:
                name = f"depth {depth:g} width {width:g} resolution {resolution:g}"
                spec = scaled(base, Axes(depth, width, resolution), name)
                gmacs = count(spec).macs / 1e9
                candidates.append({"spec": spec, "gmacs": gmacs, "score": fit.accuracy(realised_axes(spec))})
    return candidates


def save(figure: Figure, folder: Path, name: str, formats: Sequence[str] = ("svg", "png")) -> None:
    """Write the figure into ``folder``, once in each format, on white."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        for kind in formats:
            metadata = {"Date": None, "Creator": None} if kind == "svg" else None
            figure.savefig(folder / f"{name}.{kind}", facecolor="white", dpi=200, metadata=metadata)


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an ``<svg>`` element for a page whose CSS defines the variables of `COLORS`."""
    target = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = target.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{name}-", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for key, color in COLORS.items():
        svg = svg.replace(color, f"var(--{key})")
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    label = html.escape(description, quote=True)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
