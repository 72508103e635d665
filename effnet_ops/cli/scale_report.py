"""`effnet-ops scale report`."""

from __future__ import annotations

import contextlib
from pathlib import Path

from effnet_ops.cli.console import bad_input, complain, console, need
from effnet_ops.cli.scale_laws import Measuring
from effnet_ops.scaling import CompoundScaling
from effnet_ops.scaling.study import SHIPPED, axis_study, grid_study


def report(output: Path, coefficients: tuple[float, float, float], measuring: Measuring, measure: bool) -> None:
    need("matplotlib", extra="plots")
    need("jinja2", extra="plots")
    from effnet_ops.scaling.report import build_report

    with bad_input(), contextlib.ExitStack() as stack:
        measuring.empty()
        table = stack.enter_context(measuring.table()) if measure else None
        page = build_report(
            output,
            law=CompoundScaling(*coefficients),
            table=table,
            grid=grid_study(SHIPPED),
            axes=axis_study(SHIPPED),
            say=complain,
        )
    console.print(f"{page}, and its figures beside it in figures/", soft_wrap=True)
