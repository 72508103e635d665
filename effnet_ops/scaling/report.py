"""One HTML page on compound scaling that needs no network, with its figures as PNG and SVG beside it."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import jinja2
from matplotlib.figure import Figure

from effnet_ops.scaling import plots
from effnet_ops.scaling.comparison import Comparison
from effnet_ops.scaling.counters import convolution_cost, count
from effnet_ops.scaling.grid import SearchResult
from effnet_ops.scaling.latency import LatencyTable, machine_peaks, median_error
from effnet_ops.scaling.laws import CompoundScaling, implied_phi
from effnet_ops.scaling.machine import origin
from effnet_ops.scaling.marginal import marginal_gains
from effnet_ops.scaling.proxy import accuracy_fit, published_accuracy
from effnet_ops.scaling.published import RELEASED, SCALED_B0
from effnet_ops.scaling.receptive_field import effective_receptive_field, receptive_field

MEASURED = ("efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3")


class Table(NamedTuple):
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


class Drawing(NamedTuple):
    name: str
    caption: str
    figure: Figure


@dataclass
class Section:
    title: str
    paragraphs: list[str]
    drawings: list[Drawing] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def build_report(
    folder: Path,
    *,
    law: CompoundScaling | None = None,
    table: LatencyTable | None = None,
    grid: SearchResult | None = None,
    axes: Comparison | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write ``report.html`` and its figures into ``folder`` and return the page's path.

    Args:
        folder: is made where it is missing; files of the same names are replaced.
        law: whose networks are shown; the paper's by default. Its base must have B0's architecture.
        table: measures this machine: adds the times by layer, the roofline and the gains by the millisecond.
        grid, axes: results of a search and of a comparison on the digits, such as `study` makes them.
        say: is told each step.

    Raises OSError where the folder cannot be written.
    """
    law = law or CompoundScaling()
    say("counting")
    sections = [_family(), _laws(law), _convolutions(), _operations(), _fields(), _balance(), _pareto()]
    if table is not None:
        say("measuring this machine")
        sections += [_latency(table), _gains(table)]
    sections += _digits(grid, axes)
    say("drawing")
    return _write(folder, sections)


def _write(folder: Path, sections: list[Section]) -> Path:
    environment = jinja2.Environment(loader=jinja2.PackageLoader("effnet_ops.scaling"), autoescape=True)
    pages = []
    for section in sections:
        figures = []
        for name, caption, figure in section.drawings:
            plots.save(figure, folder / "figures", name)
            figures.append({"svg": plots.inline_svg(figure, name, caption), "caption": caption})
        pages.append({"title": section.title, "paragraphs": section.paragraphs, "tables": section.tables})
        pages[-1]["figures"] = figures
    today = datetime.date.today().isoformat()
    html = environment.get_template("report.html").render(
        title="Compound scaling of EfficientNets", origin=f"{origin()}, {today}", colors=plots.COLORS, sections=pages
    )
    path = folder / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


def family_rows() -> list[list[str]]:
    """B0 to B7: counted and published costs, published accuracy, and the phi of each axis."""
    rows = []
    for row in RELEASED:
        costs, phi = count(row.spec), implied_phi(row.spec)
        rows.append(
            [
                row.spec.name.removeprefix("efficientnet_").upper(),
                f"{costs.parameters / 1e6:.2f}",
                f"{row.parameters:g}",
                f"{costs.macs / 1e9:.3f}",
                f"{row.gmacs:g}",
                f"{row.top1:.1f}",
                *(f"{value:.2f}" for value in phi),
            ]
        )
    return rows


FAMILY_HEADINGS = (
    *("", "parameters (M)", "published", "multiply-adds (G)", "published", "top-1 (%)"),
    *("phi of depth", "of width", "of resolution"),
)


def _family() -> Section:
    text = (
        "Accuracy as published for ImageNet (arXiv 1905.11946; Lite: its authors' page), costs as this package counts "
        "them. The last three columns are the phi that each axis implies under the paper's coefficients: the released "
        "networks lie near the law, not on it."
    )
    caption = "More multiply-adds buy less and less accuracy; Lite leaves squeeze-and-excitation out."
    drawings = [Drawing("family", caption, plots.family())]
    return Section("The family", [text], drawings, [Table(FAMILY_HEADINGS, family_rows())])


def law_rows(law: CompoundScaling, phis: Sequence[float] = (0, 1, 2, 3, 4, 5, 6, 7)) -> list[list[str]]:
    """The law's networks: coefficients, what the formula promises and what rounding makes of it."""
    rows = []
    for phi in phis:
        network = law.network(phi)
        stages = network.spec.stages()
        rows.append(
            [
                f"{phi:g}",
                *(f"{value:.2f}" for value in network.coefficients),
                str(network.spec.resolution),
                str(sum(map(len, stages))),
                f"{network.count.parameters / 1e6:.2f}",
                f"{network.count.macs / 1e9:.3f}",
                f"{network.nominal_factor:.2f}x",
                f"{network.factor:.2f}x",
            ]
        )
    return rows


LAW_HEADINGS = (
    *("phi", "depth", "width", "resolution", "pixels", "blocks", "parameters (M)", "multiply-adds (G)"),
    *("formula", "real"),
)


def _laws(law: CompoundScaling) -> Section:
    one = law.network(1)
    text = (
        f"depth {law.alpha:g}^phi, width {law.beta:g}^phi, resolution {law.gamma:g}^phi: the formula promises "
        f"{law.growth:.2f}^phi times the multiply-adds. Repeats are rounded up, channels to multiples of 8, so at "
        f"phi = 1 the real network takes {one.factor:.2f}x, not {one.nominal_factor:.2f}x."
    )
    caption = "Any phi above 0 adds a block to every stage at once; further up the two lines come together."
    drawings = [Drawing("laws", caption, plots.laws(law))]
    return Section("The formula and the networks", [text], drawings, [Table(LAW_HEADINGS, law_rows(law))])


def _convolutions() -> Section:
    cost = convolution_cost(64, 72, 3)
    text = (
        "A standard convolution filters and mixes channels at once; a depthwise-separable one filters each channel and "
        "then mixes them with a 1x1 convolution. The saving is 1 / (1 / channels + 1 / k^2): for 3x3 it is "
        f"{cost.saving:.1f}x at 72 output channels and approaches 9x only in the limit."
    )
    caption = "The more output channels, the nearer the saving comes to k^2 (grey lines)."
    return Section("Two convolutions", [text], [Drawing("convolutions", caption, plots.convolutions())])


def _operations() -> Section:
    costs, found = count("efficientnet_b0"), plots.shares()
    text = (
        f"In B0 the depthwise convolutions do {found['multiply-adds']['depthwise']:.0%} of the multiply-adds, and with "
        f"their normalisation and activation they move {found['bytes, stock']['depthwise']:.0%} of the activations "
        f"where each operation runs by itself. Fusing moves {costs.fused_bytes / 1e6:.0f} MB an image instead of "
        f"{costs.stock_bytes / 1e6:.0f} MB (float32): {costs.fused_intensity:.0f} FLOPs a byte instead of "
        f"{costs.stock_intensity:.1f}."
    )
    caption = "Parameters, arithmetic and memory traffic sit in different places."
    return Section("Where the work is", [text], [Drawing("operations", caption, plots.operations())])


def _fields() -> Section:
    effective = effective_receptive_field("efficientnet_b0", 224, draws=2)
    size = receptive_field("efficientnet_b0").size
    outside = max(field.outside for field in effective)
    text = (
        f"By geometry, B0's last block sees {size} pixels, far more than its 224: depth and stride grow the field, and "
        "a larger image needs a larger one. Most of the gradient comes from a smaller part in the middle. Squeeze-and-"
        "excitation lets every block see the whole image, but in fresh networks at most "
        f"{outside:.1%} of the gradient takes that way."
    )
    caption = "Theoretical fields by stage, and the square with 90 % of the gradient in an untrained B0 at 224x224."
    return Section(
        "Receptive fields", [text], [Drawing("receptive_fields", caption, plots.receptive_fields(effective))]
    )


def _balance() -> Section:
    fit = accuracy_fit()
    text = (
        "Published accuracies fit a curve on which each axis pays less the further it is turned: top-1 = "
        f"{fit.ceiling:.1f} - {fit.weights.depth:.2f} d^-{fit.power:.1f} - {fit.weights.width:.2f} w^-{fit.power:.1f} "
        f"- {fit.weights.resolution:.2f} r^-{fit.power:.1f}, with d, w, r relative to B0 after rounding. It misses its "
        f"13 points by {fit.residual:.2f} % (root mean square). One axis alone cannot pass the ceiling that the other "
        "two leave; turning all three raises it. It is a summary of ImageNet results, no law of nature."
    )
    base = count("efficientnet_b0").macs
    rows = []
    for row in SCALED_B0:
        macs = count(row.spec).macs
        rows.append([row.spec.name, f"{row.gmacs:g}", f"{macs / 1e9:.2f}", f"{macs / base:.2f}x", f"{row.top1:.1f}"])
    note = (
        "The paper compares its scaled networks at 'about equal' cost; counted, the compound one takes "
        f"{count(SCALED_B0[4].spec).macs / count(SCALED_B0[2].spec).macs - 1:.0%} more multiply-adds than width only."
    )
    headings = ("", "published GMACs", "counted GMACs", "relative to B0", "top-1 (%)")
    caption = "Lines: the fit, shifted to the paper's table 7; points: that table."
    drawings = [Drawing("balance", caption, plots.balance())]
    return Section("Why balance wins", [text, note], drawings, [Table(headings, rows)])


def _pareto() -> Section:
    text = (
        "B0 with every combination of factors 1 to 2 on its axes. The score is the fit above: trust its slope, not its "
        "tenths. The command effnet-ops scale search does this with a training of yours."
    )
    drawing = Drawing(
        "pareto",
        "Candidates that no cheaper one beats are on the front.",
        plots.pareto(plots.scaled_candidates(), "gmacs", "multiply-adds (billions)"),
    )
    return Section("The Pareto front", [text], [drawing])


def _latency(table: LatencyTable) -> Section:
    predictions = table.validate(MEASURED)
    peaks, median = machine_peaks(table.dtype, table.device), median_error(predictions)
    text = (
        f"Measured now: variant {table.variant}, {table.provenance['dtype']}, batch {table.batch}, "
        f"{table.provenance['threads']} threads. The sum of layer times misses whole networks by {median:.1%} "
        f"(median). The machine reaches {peaks.flops / 1e9:.0f} GFLOP/s in a matrix product and copies "
        f"{peaks.bytes / 1e9:.0f} GB/s."
    )
    rows = []
    for p in predictions:
        p20, p50, p80 = (f"{seconds * 1e3:.2f}" for seconds in p.measured[:3])
        rows.append([p.name, f"{p.predicted * 1e3:.2f}", p50, f"{p20} to {p80}", f"{p.error:+.1%}"])
    if any(p.measured.quiet < p.measured.calls for p in predictions):
        text += " Other programs ran meanwhile, and some calls waited for a processor: measure again when it is quiet."
    headings = ("", "predicted (ms)", "measured (ms)", "20th to 80th percentile", "error")
    caption = "Each layer of B0 under the limits of arithmetic (flat) and memory (slope)."
    drawings = [Drawing("roofline", caption, plots.roofline(table, "efficientnet_b0", peaks))]
    return Section("This machine", [text], drawings, [Table(headings, rows)])


def _gains(table: LatencyTable) -> Section:
    rows = []
    for name in MEASURED:
        for gain in marginal_gains(name, published_accuracy, table.predict):
            rate = f"{gain.gain / (gain.cost * 1e3):.3f}" if gain.cost > 0 else "free"
            rows.append([gain.spec.name, f"{gain.gain:+.2f}", f"{gain.cost * 1e3:+.2f}", rate])
    text = (
        "What the next step along each axis brings, in fitted percent of top-1 for a millisecond of this machine; the "
        "best step of each network first. An axis grows by a tenth, or until rounding lets the network change."
    )
    headings = ("step", "gain (%)", "cost (ms)", "gain for a ms")
    return Section("Gain for a millisecond", [text], [], [Table(headings, rows)])


def _digits(grid: SearchResult | None, axes: Comparison | None) -> list[Section]:
    sections = []
    if grid is not None:
        text = (
            "Small networks trained on scikit-learn's digits, a grid over the three coefficients at about equal "
            f"multiply-adds, {len(grid.points[0].scores)} seeds each. Whiskers are the deviation over the seeds: a "
            "difference that is small beside them says nothing."
        )
        drawings = [Drawing("digits_grid", "Accuracy of each point of the grid.", plots.search_scores(grid))]
        sections.append(Section("Search on the digits", [text], drawings))
    if axes is not None:
        text = (
            "One axis against all three at equal budgets, with other seeds than the grid's. The digits have 8x8 "
            "pixels, so resolution enlarges what is there, and training is short, which is hard on depth: this shows "
            "how such a study is made, not what holds for ImageNet."
        )
        drawings = [
            Drawing("digits_scores", "Mean and standard error over the seeds.", plots.digits_scores(axes)),
            Drawing("digits_curves", "Accuracy after each epoch, with its deviation.", plots.digits_curves(axes, 3.0)),
        ]
        sections.append(
            Section("One axis against all three", [text], drawings, [Table(AXES_HEADINGS, axes_rows(axes))])
        )
    return sections


AXES_HEADINGS = ("", "multiply-adds", "parameters (k)", "accuracy (%)", "deviation", "gain over unscaled", "error")


def axes_rows(axes: Comparison) -> list[list[str]]:
    """Every outcome of a comparison, with its gain over the unscaled network, paired by seed."""
    rows = []
    for row in axes.outcomes:
        gain, error = row.gain(axes.base)
        paired = ["", ""] if row is axes.base else [f"{100 * gain:+.1f}", f"{100 * error:.1f}"]
        rows.append(
            [
                row.contender.way,
                f"{row.contender.factor:.2f}x",
                f"{row.contender.parameters / 1e3:.0f}",
                f"{100 * row.score:.1f}",
                f"{100 * row.deviation:.1f}",
                *paired,
            ]
        )
    return rows
