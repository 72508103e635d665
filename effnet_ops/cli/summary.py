"""`effnet-ops summary`: what a model costs and sees, stage by stage."""

from __future__ import annotations

from rich.table import Table

from effnet_ops.cli.console import bad_input, console, show
from effnet_ops.scaling import Count, ReceptiveField, count, receptive_field


def run(model: str, resolution: int | None) -> None:
    with bad_input():
        costs, field = count(model, resolution), receptive_field(model)
    show(_table(costs, field))
    if any(stage.sees_all for stage in field.stages):
        console.print(
            "sees: receptive field of the convolutions; squeeze-and-excitation makes every block see the whole image"
        )


def _table(costs: Count, field: ReceptiveField) -> Table:
    height, width = costs.resolution
    table = Table(title=f"{costs.name} at {height}x{width}", title_justify="left", show_footer=True)
    figures = dict(justify="right", no_wrap=True)
    table.add_column("stage", "total", overflow="fold")
    table.add_column("blocks", str(sum(stage.blocks for stage in costs.stages)), **figures)
    table.add_column("output", no_wrap=True)
    table.add_column("parameters", f"{costs.parameters:,}", **figures)
    table.add_column("MACs (M)", f"{costs.macs / 1e6:,.2f}", **figures)
    table.add_column("share", "100 %", **figures)
    table.add_column("sees", **figures)
    sizes = {stage.name: f"{stage.size} px" for stage in field.stages}
    for stage in costs.stages:
        table.add_row(
            stage.name,
            str(stage.blocks or ""),
            "x".join(map(str, stage.out_shape)),
            f"{stage.parameters:,}",
            f"{stage.macs / 1e6:,.2f}",
            f"{stage.macs / costs.macs:.1%}",
            sizes.get(stage.name, "all"),
        )
    return table
