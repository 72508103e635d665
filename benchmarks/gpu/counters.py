"""Hardware counters from Nsight Compute: of our slowest kernels, and the DRAM bytes of one training step of B0.

python benchmarks/gpu/counters.py                  # at most 9 minutes; run it again to go on where it stopped

The kernels are chosen from the rows of ours.py, so that has to run first. `traffic` is the check of the byte model:
what a step moves, by kernel class, beside what the model says that its design has to.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import byte_model
from baselines import Scale, kernel_class, run_parts
from ours import OURS
from rows import Job, Work, existing_rows
from tools import Kernel, counters

HERE = Path(__file__).resolve().parent
SLOWEST = 8

TIME, READ, WRITTEN = "gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum"
OCCUPANCY = "sm__warps_active.avg.pct_of_peak_sustained_active"
ISSUE = "smsp__issue_active.avg.pct_of_peak_sustained_active"
UNITS = {
    "DRAM": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "L2": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "L1 and shared memory": "l1tex__throughput.avg.pct_of_peak_sustained_active",
    "the multiprocessors' pipes": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
}
"""How busy each part of the GPU is, in percent of the most that it can sustain."""
DETAILS = (
    "sm__maximum_warps_per_active_cycle_pct",
    "launch__registers_per_thread",
    "launch__shared_mem_per_block",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
)
METRICS = (TIME, READ, WRITTEN, OCCUPANCY, ISSUE, *UNITS.values(), *DETAILS)
BUSY = 60.0

DESIGNS = {
    "eager channels_last": "training: eager",
    "default channels_last": "training: pointwise ops fused",
    f"{OURS} replace_layers": "training: and both gradients at once (ours)",
}
"""Which design of the byte model each provider of the profile follows."""


def limit(values: dict[str, float]) -> str:
    """What holds a kernel up: the part that is busiest, or latency where none is busy, by NVIDIA's rule of 60 %."""
    shares = {name: values[metric] for name, metric in UNITS.items() if metric in values}
    if not shares:
        return "unknown: no throughput was counted"
    busiest = max(shares, key=lambda name: shares[name])
    if shares[busiest] >= BUSY:
        return f"{busiest}, {shares[busiest]:.0f} %"
    warps = f", {values[OCCUPANCY]:.0f} % of the warps resident" if OCCUPANCY in values else ""
    return f"latency: {busiest} at {shares[busiest]:.0f} % is the busiest{warps}"


def slowest(scale: Scale) -> Iterator[Job]:
    """Of each operation, backend and mode, the kernels that are furthest from the bandwidth of a copy."""
    rows = [row for row in existing_rows(scale.output) if row["part"] == "kernels" and "gb_per_s" in row]
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["gb_per_s"]):
        groups.setdefault((row["operation"], row["provider"], row["mode"]), []).append(row)
    each = max(1, SLOWEST // max(len(groups), 1))
    for row in (row for group in groups.values() for row in group[:each]):
        fields = [row[name] for name in ("operation", "provider", "shape", "dtype", "mode")]
        yield Job("counters", *fields, lambda key=row["key"]: Work(None, extra=lambda: _counted(scale, key)))


def _target(scale: Scale, script: str, part: str, key: str) -> list[str]:
    dry = ["--dry-run"] if scale.device == "cpu" else []
    return [sys.executable, str(HERE / script), *dry, "--part", part, "--once", key]


def _counted(scale: Scale, key: str) -> dict[str, Any]:
    """The longest kernel of the call; a second stage of sums beside it is named, not counted."""
    found = counters(_target(scale, "ours.py", "kernels", key), METRICS, end=scale.end)
    longest = max(found, key=lambda kernel: kernel.values.get(TIME, 0.0))
    return {
        "kernel": longest.name[:120],
        "launches": len(found),
        "counters": longest.values,
        "dram_bytes": sum(kernel.values.get(name, 0.0) for kernel in found for name in (READ, WRITTEN)),
        "limit": limit(longest.values),
    }


def traffic(scale: Scale) -> Iterator[Job]:
    """DRAM bytes by kernel class of a training step, with the caches as the step leaves them."""
    for provider, design in DESIGNS.items():
        script = "ours.py" if provider.startswith(OURS) else "baselines.py"
        if scale.device == "cpu" and provider.startswith("default"):
            continue
        batch, side = scale.training_batches[0], scale.resolution["efficientnet_b0"]
        fields = ("efficientnet_b0", provider, f"{batch}x3x{side}x{side}", "bf16", "step")
        key = " | ".join(("profile", *fields))

        def prepare(script: str = script, key: str = key, design: str = design, batch: int = batch) -> Work:
            return Work(None, extra=lambda: _traffic(scale, script, key, design, batch))

        yield Job("traffic", *fields, prepare)


def _traffic(scale: Scale, script: str, key: str, design: str, batch: int) -> dict[str, Any]:
    metrics = (TIME, READ, WRITTEN)
    found = counters(_target(scale, script, "profile", key), metrics, end=scale.end, warm_cache=True)
    return {
        "dram_bytes": by_class(found, READ, WRITTEN),
        "kernel_ms": {name: value / 1e6 for name, value in by_class(found, TIME).items()},
        "launches": len(found),
        "design": design,
        "model_bytes": byte_model.moved("b0", design) * batch,
    }


def by_class(kernels: list[Kernel], *metrics: str) -> dict[str, float]:
    """The sums of the metrics over the kernels of each class."""
    sums: dict[str, float] = {}
    for kernel in kernels:
        label = kernel_class(kernel.name)
        sums[label] = sums.get(label, 0.0) + sum(kernel.values.get(metric, 0.0) for metric in metrics)
    return sums


PARTS = {"traffic": traffic, "counters": slowest}


if __name__ == "__main__":
    sys.exit(run_parts(PARTS, __doc__))
