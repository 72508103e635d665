"""Rows of measurements with their origin, and the files that keep them."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import effnet_ops
from effnet_ops import _native
from effnet_ops.scaling.machine import cpu_model

PACKAGES = (
    *("torch", "torchvision", "timm", "efficientnet_pytorch", "onnx", "onnxruntime", "openvino"),
    *("zentorch", "ncnn", "pnnx", "MNN", "ai-edge-litert", "litert-torch", "executorch"),
    *("lightning", "accelerate"),
)
_ORIGIN = ("commit", "uncommitted_changes", "cpu", "cores", "isa", "versions")


@dataclass(kw_only=True)
class Row:
    """One measurement of one provider, or why there is none.

    Attributes:
        operation: the model, or the kind of layer.
        layer: of a layer, the model and its name there.
        shape: of the input, as NxCxHxW, and of a layer's output.
        mode: forward, backward, forward+backward or step, and by whom that is taken.
        p20, p50, p80: milliseconds of one call.
        round_medians: milliseconds, one for each round; rounds of rows with the same ``run`` happened together.
        error: ||out - ref|| / ||ref|| against fp64.
        problem: why there are no times: a wrong result, or what was raised.
        choice: what the provider chose between, such as the memory layout.
        idle_load: cores that the process used while others were measured.
        bytes: those of input, output and parameters, each moved once.
        percent_of_fma_peak, percent_of_copy_peak: of what the machine was measured to reach with as many threads.
    """

    operation: str
    provider: str
    shape: str
    dtype: str
    device: str = "cpu"
    mode: str = "forward"
    layer: str | None = None
    threads: int | None = None
    run: str | None = None
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    repetitions: int | None = None
    round_medians: list[float] | None = None
    error: float | None = None
    problem: str | None = None
    choice: str | None = None
    idle_load: float | None = None
    bytes: int | None = None
    gb_per_s: float | None = None
    flops: int | None = None
    gflop_per_s: float | None = None
    percent_of_fma_peak: float | None = None
    percent_of_copy_peak: float | None = None
    saved_bytes: int | None = None
    peak_rss_bytes: int | None = None

    @property
    def key(self) -> tuple:
        """What a later measurement of the same thing replaces."""
        what = self.operation, self.layer, self.shape
        return *what, self.provider, self.dtype, self.device, self.mode, self.threads


def environment() -> dict[str, Any]:
    """Where and with what rows are measured."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "isa": _native.module.isa() if _native.module else None,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"effnet_ops": effnet_ops.__version__, "python": platform.python_version(), **_versions()},
        **_commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _commit() -> dict[str, Any]:
    """The commit of the checkout that the package runs from; nothing where it is installed elsewhere."""
    package = Path(effnet_ops.__file__).resolve().parent
    if not _git(package, "ls-files", "__init__.py"):
        return {"commit": None, "uncommitted_changes": False}
    changed = bool(_git(package, "status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/benchmarks/results"))
    return {"commit": _git(package, "rev-parse", "HEAD"), "uncommitted_changes": changed}


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


class Results:
    """A JSON file of rows: each with the number of the environment that it comes from, the newest of its key only."""

    def __init__(self, path: Path) -> None:
        """Read ``path`` if it exists; ValueError where it does not hold rows."""
        self.path = path
        self._environments: list[dict[str, Any]] = []
        self._rows: dict[tuple, tuple[Row, int]] = {}
        if not path.exists():
            return
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            self._environments = content["environments"]
            for fields in content["rows"]:
                origin = fields.pop("environment")
                row = Row(**fields)
                self._rows[row.key] = row, origin
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a file of benchmark rows: {error!r}") from error

    @property
    def rows(self) -> list[Row]:
        return [row for row, _ in self._rows.values()]

    def fresh(self, here: dict[str, Any], *, any_commit: bool = False) -> list[Row]:
        """The rows of the same machine, versions and commit; none of a commit where changes are uncommitted."""
        if here["uncommitted_changes"] and not any_commit:
            return []
        names = [name for name in _ORIGIN if not (any_commit and name in ("commit", "uncommitted_changes"))]
        same = {
            index
            for index, origin in enumerate(self._environments)
            if all(origin.get(name) == here[name] for name in names)
        }
        return [row for row, origin in self._rows.values() if origin in same]

    def add(self, rows: Iterable[Row], here: dict[str, Any]) -> None:
        """Put rows of one run in, in place of older ones, and write the file."""
        if here not in self._environments:
            self._environments.append(here)
        origin = self._environments.index(here)
        self._rows.update({row.key: (row, origin) for row in rows})
        self._write()

    def _write(self) -> None:
        used = sorted({origin for _, origin in self._rows.values()})
        rows = [
            {**{name: value for name, value in asdict(row).items() if value is not None}, "environment": used.index(at)}
            for row, at in self._rows.values()
        ]
        content = {"environments": [self._environments[origin] for origin in used], "rows": rows}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)
