"""Writes docs/scaling.md and its figures from scaling.md.jinja, with every number from effnet_ops.scaling."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2

from effnet_ops.models.spec import BlockSpec
from effnet_ops.scaling import (
    CompoundScaling,
    accuracy_fit,
    convolution_cost,
    count,
    count_block,
    effective_receptive_field,
    implied_phi,
    marginal_gains,
    plots,
    published_accuracy,
    receptive_field,
)
from effnet_ops.scaling.digits import TINY
from effnet_ops.scaling.published import RELEASED, SCALED_B0
from effnet_ops.scaling.study import SHIPPED, axis_study, grid_study

DOCS = Path(__file__).resolve().parent
LATENCY = DOCS.parent / "benchmarks" / "results" / "scaling_latency.json"


def values() -> dict[str, Any]:
    """What the template refers to."""
    law, grid, axes = CompoundScaling(), grid_study(SHIPPED), axis_study(SHIPPED)
    tiny = count(TINY)
    factors = [point.macs / tiny.macs for point in grid.points]

    def at(way: str, factor: float) -> Any:
        rows = (row for row in axes.outcomes if row.contender.way == way)
        return min(rows, key=lambda row: abs(row.contender.factor - factor))

    return {
        "x": lambda value: f"{value:.1f}x",
        "pct": lambda value: f"{value:.0%}".replace("%", " %"),
        "pct1": lambda value: f"{value:.1%}".replace("%", " %"),
        "convolution_cost": convolution_cost,
        "count": count,
        "rf": lambda member: receptive_field(f"efficientnet_{member}").size,
        **_blocks(),
        **_fields(),
        "operations": list(plots.OPERATIONS),
        "shares": plots.shares(),
        "law": law,
        **_smallest_step(law),
        "law_networks": [law.network(phi) for phi in range(8)],
        "released": [_released(row) for row in RELEASED],
        "table7": SCALED_B0,
        "fit": accuracy_fit(),
        "points": len(RELEASED) + len(SCALED_B0),
        "gains": [(f"B{i}", _gains(f"efficientnet_b{i}")) for i in (0, 2, 4, 7)],
        "tiny": tiny,
        "grid": grid,
        "grid_low": f"{min(factors):.1f}",
        "grid_high": f"{max(factors):.1f}",
        "grid_shown": [*grid.points[:5], *grid.points[-3:]],
        "axes": axes,
        "at": at,
        "duel": at("grid's best", 3).gain(at("resolution only", 3)),
        "signed": lambda share: f"{100 * share:+.1f} points",
        "latency": _latency(),
    }


def _blocks() -> dict[str, Any]:
    def block(t: float, k: int, se: float) -> Any:
        return count_block(BlockSpec("mbconv", 80, 80, k, 1, t, se), 14)

    blocks = [
        (f"t = {t}, k = {k}, {'SE' if se else 'no SE'}", block(t, k, se))
        for t, k, se in ((3, 3, 0.25), (6, 3, 0.25), (6, 5, 0.25), (6, 3, 0.0))
    ]
    full, bare = blocks[1][1], blocks[3][1]
    return {
        "blocks": blocks,
        "se_macs": 1 - bare.macs / full.macs,
        "se_weights": 1 - bare.parameters / full.parameters,
    }


def _fields() -> dict[str, Any]:
    """The last field of each stage. Sizes are rounded: the last bits of a sum decide on a pixel."""
    fields = effective_receptive_field("efficientnet_b0", 224, draws=1)
    last = {field.stage: field for field in fields}
    return {
        "fields": list(last.values()),
        "outside": max(field.outside for field in fields),
        "near": lambda size: size if size < 10 else f"{10 * round(size / 10)}",
        "near_pct": lambda share: f"{-(-100 * share // 1):.0f} %",
    }


def _smallest_step(law: CompoundScaling) -> dict[str, Any]:
    network, base = law.network(0.001), law.network(0)
    longer = (a.blocks > b.blocks for a, b in zip(network.count.stages, base.count.stages, strict=True))
    return {"grown": sum(longer), "smallest": network.factor}


def _released(row: Any) -> SimpleNamespace:
    spec, base = row.spec, RELEASED[0].spec
    nominal = spec.depth * spec.width**2 * (spec.resolution / base.resolution) ** 2
    return SimpleNamespace(
        name=spec.name.removeprefix("efficientnet_").upper(),
        count=count(spec),
        top1=row.top1,
        phi=implied_phi(spec),
        nominal=nominal,
        factor=count(spec).macs / count(base).macs,
    )


def _gains(name: str) -> list[Any]:
    return marginal_gains(name, published_accuracy, lambda spec: count(spec).macs / 1e9)


def _latency() -> SimpleNamespace:
    data = json.loads(LATENCY.read_text(encoding="utf-8"))
    errors = [abs(row["error"]) for row in data["rows"]]
    return SimpleNamespace(
        rows=data["rows"],
        cpu=data["environment"]["cpu"],
        threads=data["environment"]["threads"],
        resolution=data["rows"][0]["resolution"],
        median=statistics.median(errors),
        largest=max(errors),
    )


def page() -> str:
    """The text of docs/scaling.md."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string((DOCS / "scaling.md.jinja").read_text(encoding="utf-8"))
    return "\n".join(line.rstrip() for line in template.render(values()).split("\n"))


def draw(folder: Path) -> None:
    """The figures that the page shows."""
    axes = axis_study(SHIPPED)
    fields = effective_receptive_field("efficientnet_b0", 224, draws=1)
    figures = {
        "convolutions": plots.convolutions(),
        "operations": plots.operations(),
        "receptive_fields": plots.receptive_fields(fields),
        "laws": plots.laws(),
        "balance": plots.balance(),
        "digits_scores": plots.digits_scores(axes),
        "digits_curves": plots.digits_curves(axes, 3.0),
    }
    for name, figure in figures.items():
        plots.save(figure, folder, name, formats=("svg",))


if __name__ == "__main__":
    (DOCS / "scaling.md").write_text(page(), encoding="utf-8")
    draw(DOCS / "figures")
