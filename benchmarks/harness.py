"""What all benchmarks share: rows with their origin, the gate that a row has to pass, and how they are written."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import effnet_ops
from effnet_ops import _native
from effnet_ops.cli.info import cpu_model

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclass
class Row:
    """One measurement. Times are milliseconds of one call; ``error`` is ||out - ref|| / ||ref|| against fp64."""

    operation: str
    provider: str
    shape: str
    dtype: str
    device: str
    mode: str
    p20: float
    p50: float
    p80: float
    repetitions: int
    error: float
    bytes: int | None = None
    gb_per_s: float | None = None
    flops: int | None = None
    gflop_per_s: float | None = None
    saved_bytes: int | None = None
    peak_rss_bytes: int | None = None


class WrongResult(RuntimeError):
    """An output that disagrees with the reference: never a row."""


def relative_error(out: Tensor, ref: Tensor) -> float:
    return ((out.double() - ref.double()).norm() / ref.double().norm().clamp_min(1e-30)).item()


def gate(what: str, error: float, allowed: float) -> None:
    """Raise `WrongResult` unless the error is within its bound (NaN is not)."""
    if not error <= allowed:
        raise WrongResult(f"{what}: error {error:.1e} where {allowed:.1e} is allowed")


def environment() -> dict[str, object]:
    """Where and with what the rows were measured."""
    packages = ("torch", "torchvision", "timm", "efficientnet_pytorch")
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "isa": _native.module.isa() if _native.module else None,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {
            "effnet_ops": effnet_ops.__version__,
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in packages},
        },
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=False).stdout.strip()


def write(rows: list[Row], output: Path) -> None:
    """Rows as JSON, without the fields that do not apply to them, beside the environment."""
    output.parent.mkdir(parents=True, exist_ok=True)
    kept = [{key: value for key, value in asdict(row).items() if value is not None} for row in rows]
    output.write_text(json.dumps({"environment": environment(), "rows": kept}, indent=1) + "\n", encoding="utf-8")
    print(f"{len(rows)} rows written to {output}")
