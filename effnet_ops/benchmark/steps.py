"""Where the training step of a replaced model goes: time, operations and bytes of the steps of its blocks.

The steps F1 to F5 and B1 to B5, and what each has to move, are those of docs/mbconv.md.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from effnet_ops import _native
from effnet_ops.benchmark import models
from effnet_ops.benchmark.calibration import Peaks
from effnet_ops.benchmark.comparison import Settings
from effnet_ops.benchmark.layers import blocks_of
from effnet_ops.benchmark.rows import Row
from effnet_ops.benchmark.training import VARIANTS, TrainingStep, images
from effnet_ops.checks import output_size, padding_sides, resolve_padding
from effnet_ops.ops.mbconv import RECOMPUTED_CHANNELS
from effnet_ops.surgery.fused import AnyBlockPlan, FusedBlockPlan

FLOAT = 4
"""Bytes of a float32."""


class StepCost(NamedTuple):
    """One step, summed over all blocks and calls: seconds, floating-point operations, and bytes of activations."""

    seconds: float
    flops: int
    bytes: int


def rows_of(settings: Settings, costs: dict[str, StepCost], whole: float, peaks: Peaks) -> list[Row]:
    """A row for each step, and one for the whole training step."""
    found = []
    for name, cost in costs.items():
        rate, speed = cost.flops / cost.seconds / 1e9, cost.bytes / cost.seconds / 1e9
        row = settings.row("effnet_ops_replace", mode="step", layer=f"{settings.model} {name}", p50=cost.seconds * 1e3)
        row.flops, row.gflop_per_s, row.bytes, row.gb_per_s = cost.flops, rate, cost.bytes, speed
        row.percent_of_fma_peak = 100 * rate / peaks.of(settings.dtype)
        row.percent_of_copy_peak = 100 * speed / peaks.copy
        found.append(row)
    whole_row = settings.row("effnet_ops_replace", mode="step", layer=f"{settings.model} whole step", p50=whole * 1e3)
    return [*found, whole_row]


class _Sizes(NamedTuple):
    """Elements of a block's tensors, as docs/mbconv.md names them, and multiply-adds of its products."""

    x: int
    a: int
    d: int
    o: int
    expand: int
    square: int
    """Of x with a matrix of its own channels."""
    convolve: int
    project: int


def step_costs(settings: Settings, steps: int = 5) -> tuple[dict[str, StepCost], float]:
    """The costs of each step in a training step of the replaced model on channels_last images, and its seconds.

    Raises:
        ValueError: the model is unknown, or the dtype is not float32.
        RuntimeError: the C++ part is missing.
    """
    if settings.dtype != "float32":
        raise ValueError(f"the steps are measured in float32, not in {settings.dtype}")
    if _native.module is None:
        raise RuntimeError(f"the steps cannot be measured: {_native.why_missing}")
    model = models.build(settings.model)
    works = _works(model, settings)
    with tempfile.TemporaryDirectory(prefix="effnet-ops-bench-") as folder:
        torch.save(model, Path(folder, "model.pt"))
        training = TrainingStep(VARIANTS["effnet_ops_replace"], settings, Path(folder))
    found = []
    for _ in range(steps):
        start = time.perf_counter()
        times = _native.module.time_steps(training.step)
        found.append((time.perf_counter() - start, times))
    # The whole of the fastest: medians of each step would not add up.
    whole, times = min(found, key=lambda one: one[0])
    return {name: StepCost(seconds, *works[name]) for name, (seconds, _) in times.items()}, whole


def _works(model: nn.Module, settings: Settings) -> dict[str, tuple[int, int]]:
    """Operations and bytes of each step, over all blocks."""
    flops: dict[str, int] = defaultdict(int)
    moved: dict[str, int] = defaultdict(int)
    for _, plan, size in blocks_of(copy.deepcopy(model).eval(), images(settings)):
        for name, multiply_adds, elements in _steps(plan, _sizes(plan, size)):
            flops[name] += 2 * multiply_adds
            moved[name] += FLOAT * elements
    return {name: (flops[name], moved[name]) for name in flops}


def _sizes(plan: AnyBlockPlan, size: tuple[int, ...]) -> _Sizes:
    batch, channels, height, width = size
    conv = plan.expand[0] if isinstance(plan, FusedBlockPlan) else plan.depthwise[0]
    kernel, inner = tuple(conv.weight.shape[2:]), conv.weight.shape[0]
    padding = plan.padding(torch.empty(size, device="meta")) if callable(plan.padding) else plan.padding
    sides = resolve_padding(padding_sides(padding), (height, width), kernel, plan.stride, (1, 1))
    pixels = batch * prod(output_size((height, width), kernel, plan.stride, sides, (1, 1)))
    inside = batch * height * width
    out = inner if plan.project is None else plan.project[0].weight.shape[0]
    return _Sizes(
        *(inside * channels, inside * inner, pixels * inner, pixels * out),
        expand=inside * channels * inner,
        square=inside * channels * channels,
        convolve=pixels * conv.weight.numel(),
        project=pixels * inner * out,
    )


def _steps(plan: AnyBlockPlan, s: _Sizes) -> Iterator[tuple[str, int, int]]:
    """Name, multiply-adds and elements of each step, as the CPU's kernels do it."""
    if plan.project is None:
        return  # a layer: one convolution, which has no steps of a block
    if isinstance(plan, FusedBlockPlan):
        yield "F2", s.convolve, s.x + s.d
        yield "B4", 2 * s.convolve, 4 * s.d + 2 * s.x + s.o
    elif plan.expand is None:
        yield "F2", s.convolve, s.x + s.d
        yield "B4", 2 * s.convolve, 2 * s.d + 2 * s.x
    elif plan.expand[0].in_channels > RECOMPUTED_CHANNELS:
        yield "F1", s.expand, s.x + s.a
        yield "F2", s.convolve, s.a + s.d
        yield "B4", 2 * s.convolve, 2 * s.d + 2 * s.a
        yield "B5", 2 * s.expand, 2 * s.a + 2 * s.x + s.o
    else:
        yield "F1", s.square // 2, s.x
        yield "F2", s.expand + s.convolve, s.x + s.d
        yield "B4", s.expand + 2 * s.convolve, 2 * s.d + s.a + s.x
        yield "B5", 2 * s.expand + s.square, s.a + 3 * s.x + s.o
    yield "F3, F4", s.project, s.d + s.o
    yield "F5", 0, 3 * s.o
    yield "B1, B2", 2 * s.project, 4 * s.o + 2 * s.d
    yield "B3", 0, 0
