"""Rows of GPU measurements: timed on the device, written as they come, and skipped where they exist already.

Needs only PyTorch. On the CPU, for a dry run, every job runs once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from tools import OutOfTime
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = Path(os.environ.get("EFFNET_OPS_GPU_ROWS") or ROOT / "benchmarks" / "results" / "gpu")
PART_SECONDS = 540.0


@dataclasses.dataclass(frozen=True)
class Work:
    """What is timed: ``run`` once is one call. ``error`` is checked against ``allowed`` before anything is timed.

    ``bytes`` and ``flops`` are the least that the operation has to move and compute. Without ``run`` there are no
    times: ``extra`` is the row.
    """

    run: Callable[[], object] | None
    bytes: int | None = None
    flops: int | None = None
    error: Callable[[], float] | None = None
    allowed: float = math.inf
    extra: Callable[[], dict[str, Any]] | None = None


@dataclasses.dataclass(frozen=True)
class Job:
    """One row to be: ``prepare`` allocates and returns the work. ``graph`` times the replay of a CUDA graph."""

    part: str
    operation: str
    provider: str
    shape: str
    dtype: str
    mode: str
    prepare: Callable[[], Work]
    graph: bool = False

    @property
    def key(self) -> str:
        fields = (self.part, self.operation, self.provider, self.shape, self.dtype, self.mode)
        return " | ".join((*fields, "graph")) if self.graph else " | ".join(fields)


def environment(device: str) -> dict[str, Any]:
    """Where and with what the rows are measured; no two that differ share a row."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "triton", "torchvision", "timm", "effnet_ops"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found: dict[str, Any] = {"device": "cpu", "versions": versions, "commit": _commit()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def _commit() -> str:
    """That of the checkout, or of EFFNET_OPS_COMMIT where the files came without their history."""
    if given := os.environ.get("EFFNET_OPS_COMMIT"):
        return given
    commit = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return commit + "+changes" if commit and changed else commit


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def relative_error(out: Tensor, exact: Tensor) -> float:
    return ((out.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30)).item()


class Stopwatch:
    """Seconds of each step of a row: where the time of a lent GPU went."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, step: str) -> None:
        now = time.monotonic()
        self.laps[step], self._last = round(now - self._last, 2), now


ATTEMPTS = 2
"""How often a job that fails is tried, each time by another process."""


class Session:
    """Runs jobs until the time is used up; rows go to one file a GPU, and a key that is there is not run again.

    ``stopped`` is why the last `run` ended before its jobs did.
    """

    def __init__(self, device: str, output: Path | None, seconds: float = PART_SECONDS) -> None:
        self.device = torch.device(device)
        self.environment = environment(device)
        self.identity = hashlib.sha1(json.dumps(self.environment, sort_keys=True).encode()).hexdigest()[:12]
        self.output = output
        self.end = time.monotonic() + seconds
        self.done, self._introduced = self._existing()
        self.failures = 0
        self.stopped = ""
        # Larger than any L2, and written between two calls: a user's tensors would not be in the cache either.
        self._flush = torch.empty(256 << 20 if device == "cuda" else 1, dtype=torch.uint8, device=self.device)

    def _existing(self) -> tuple[set[str], bool]:
        """The keys that are measured here or have failed often enough, and whether the file knows this environment."""
        if self.output is None or not self.output.exists():
            return set(), False
        lines = [json.loads(line) for line in self.output.read_text(encoding="utf-8").splitlines()]
        rows = [line for line in lines if line.get("environment") == self.identity and "key" in line]
        failures = Counter(row["key"] for row in rows if "failed" in row)
        done = {row["key"] for row in rows if "failed" not in row or failures[row["key"]] >= ATTEMPTS}
        return done, any(line.get("identity") == self.identity for line in lines)

    def run(self, jobs: Iterable[Job]) -> bool:
        """Measure what is missing; False if the time ran out first, or the device was lost."""
        for job in jobs:
            if job.key in self.done:
                continue
            try:
                if time.monotonic() > self.end:
                    raise OutOfTime
                row = self._measured(job)
            except OutOfTime:
                self.stopped = "out of time"
                return False
            self._write(job, row)
            self.done.add(job.key)
            if "failed" in row and self.lost():
                self.stopped = f"the device was lost by {job.key}"
                return False
        return True

    def lost(self) -> bool:
        """Whether this process cannot use the device any more, as after an access out of bounds."""
        if self.device.type != "cuda":
            return False
        try:
            torch.cuda.synchronize()
        except Exception:
            return True
        return False

    def _measured(self, job: Job) -> dict[str, Any]:
        spent = Stopwatch()
        try:
            work = job.prepare()
            spent.lap("prepare")
            error = None if work.error is None else work.error()
            spent.lap("check")
            if error is not None and not error <= work.allowed:
                raise RuntimeError(f"wrong result: error {error:.1e} where {work.allowed:.1e} is allowed")
            times = {} if work.run is None else self.times(work.run, job.graph)
            spent.lap("time")
            extra = work.extra() if work.extra else {}
            spent.lap("extra")
        except OutOfTime:
            raise
        except Exception as problem:
            self.failures += 1
            print(f"FAILED {job.key}: {problem}", flush=True)
            return {"failed": traceback.format_exception_only(problem)[-1].strip()[:500]}
        finally:
            if self.device.type == "cuda":
                # Of a lost device, which is found out where the row is written.
                with contextlib.suppress(Exception):
                    torch.cuda.empty_cache()
        row = {**times, "error": error, "bytes": work.bytes, "flops": work.flops}
        if work.bytes and times:
            row["gb_per_s"] = work.bytes / times["p50"] / 1e6
        if work.flops and times:
            row["gflop_per_s"] = work.flops / times["p50"] / 1e6
        row |= extra | {"seconds": spent.laps}
        return {name: value for name, value in row.items() if value is not None}

    def times(self, run: Callable[[], object], graph: bool = False) -> dict[str, Any]:
        """Milliseconds of one call at the 20th, 50th and 80th percentile."""
        if self.device.type == "cpu":
            start = time.perf_counter()
            run()
            elapsed = 1e3 * (time.perf_counter() - start)
            return {"p20": elapsed, "p50": elapsed, "p80": elapsed, "repetitions": 1}
        run = self._captured(run) if graph else run
        for _ in range(3):
            run()
        estimate = self._timed(run, 3)[1].item()
        repetitions = int(min(max(200.0 / max(estimate, 1e-3), 10), 200))
        samples = self._timed(run, repetitions)
        p20, p50, p80 = samples.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
        return {"p20": p20, "p50": p50, "p80": p80, "repetitions": repetitions}

    def _timed(self, run: Callable[[], object], repetitions: int) -> Tensor:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)]
        for start, end in pairs:
            self._flush.zero_()
            # A fifth of a millisecond in which the host gets ahead: a short kernel would wait for its launch.
            torch.cuda._sleep(400_000)
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return torch.tensor([start.elapsed_time(end) for start, end in pairs], dtype=torch.float64)

    @staticmethod
    def _captured(run: Callable[[], object]) -> Callable[[], object]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def _write(self, job: Job, row: dict[str, Any]) -> None:
        fields = {
            name: getattr(job, name) for name in ("part", "operation", "provider", "shape", "dtype", "mode", "graph")
        }
        if "failed" not in row:
            print(f"{row['p50']:10.4f} ms  {job.key}" if "p50" in row else f"{'':10}     {job.key}", flush=True)
        if self.output is None:
            return
        self.output.parent.mkdir(parents=True, exist_ok=True)
        lines = []
        if not self._introduced:
            self._introduced = True
            date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
            lines.append({"identity": self.identity, "environment": self.environment, "date": date})
        lines.append({"key": job.key, "environment": self.identity, **fields, **row})
        with self.output.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


def existing_rows(path: Path | None) -> list[dict[str, Any]]:
    """The rows of a file that did not fail: of each key, the last."""
    if path is None or not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in {row["key"]: row for row in lines if "key" in row}.values() if "failed" not in row]


def once(jobs: Iterable[Job], key: str, device: str) -> int:
    """Run one job's call inside a profiler's range, for tools that watch this process; 4 if there is no such job."""
    job = next((job for job in jobs if job.key == key), None)
    if job is None:
        print(f"no job {key!r}", file=sys.stderr)
        return 4
    run = job.prepare().run
    if device == "cpu":
        run()
        return 0
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    run()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return 0


def output_path(device: str) -> Path:
    """benchmarks/results/gpu/<name of the GPU>.jsonl, or in the folder that EFFNET_OPS_GPU_ROWS names."""
    name = torch.cuda.get_device_name(0) if device == "cuda" else "cpu"
    return RESULTS / f"{re.sub('[^a-z0-9]+', '_', name.lower()).strip('_')}.jsonl"
