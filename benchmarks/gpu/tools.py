"""Runs NVIDIA's tools on a command and reads what they print: Nsight Compute's counters, compute-sanitizer's findings.

NCU and COMPUTE_SANITIZER in the environment name other programs than those on PATH. Clocks are left as they are.
"""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from typing import NamedTuple


class Kernel(NamedTuple):
    """One launch: the kernel's name and its metrics, in base units (bytes, nanoseconds, percent)."""

    name: str
    values: dict[str, float]


class Findings(NamedTuple):
    """How many errors a tool reported, and what it printed."""

    errors: int
    text: str


def _tool(variable: str, name: str) -> str:
    found = shutil.which(os.environ.get(variable, name))
    if found is None:
        raise RuntimeError(f"{os.environ.get(variable, name)} was not found (set {variable})")
    return found


class OutOfTime(Exception):
    """The time of this run of the benchmark was up before the tool had all of its own."""


TOOL_SECONDS = 400.0
"""What a tool may take for one row."""


def _run(command: Sequence[str], end: float) -> subprocess.CompletedProcess[str]:
    left = max(end - time.monotonic(), 0.0)
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=min(left, TOOL_SECONDS))
    except subprocess.TimeoutExpired:
        if left < TOOL_SECONDS:
            raise OutOfTime from None
        raise RuntimeError(f"{command[0]} took more than {TOOL_SECONDS:.0f} s") from None


def counters(target: Sequence[str], metrics: Sequence[str], *, end: float, warm_cache: bool = False) -> list[Kernel]:
    """The launches of ``target`` between its profiler's start and stop, in order.

    Metrics that this version of Nsight Compute or this GPU does not have are left out. ``warm_cache`` leaves the caches
    as one kernel hands them to the next; without it each kernel starts with empty ones.

    Raises RuntimeError where the tool is missing, fails or takes too long, `OutOfTime` at ``end`` (time.monotonic()).
    """
    wanted = list(metrics)
    while wanted:
        command = [_tool("NCU", "ncu"), "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none"]
        command += ["--cache-control", "none" if warm_cache else "all", "--profile-from-start", "off"]
        done = _run([*command, "--metrics", ",".join(wanted), *target], end)
        unknown = set(re.findall(r"[Ff]ailed to find metric:? '?([\w.]+)", done.stdout + done.stderr)) & set(wanted)
        if not unknown:
            break
        wanted = [name for name in wanted if name not in unknown]
    found = parse_counters(done.stdout, wanted)
    if not found:
        raise RuntimeError(f"ncu gave no kernel (exit code {done.returncode}): {(done.stdout + done.stderr)[-500:]}")
    return found


def parse_counters(text: str, metrics: Sequence[str]) -> list[Kernel]:
    """The kernels in ``ncu --csv --page raw``: a line of names, one of units, then one a launch."""
    lines = text.splitlines(keepends=True)
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    kernels = []
    for row in csv.DictReader(io.StringIO("".join(line for line in lines[first:] if line.startswith('"')))):
        if row["ID"]:
            values = {name: _number(row[name]) for name in metrics if row.get(name)}
            kernels.append(Kernel(row["Kernel Name"], {k: v for k, v in values.items() if v is not None}))
    return kernels


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


_SUMMARIES = (r"ERROR SUMMARY: (\d+) error", r"RACECHECK SUMMARY: (\d+) hazard")


def sanitize(target: Sequence[str], tool: str, *, end: float) -> Findings:
    """What compute-sanitizer's ``tool`` finds in ``target``: memcheck, racecheck, initcheck or synccheck.

    Raises RuntimeError where the tool is missing, prints no summary or takes too long, or where the target itself fails
    without an error of the tool; `OutOfTime` at ``end`` (time.monotonic()).
    """
    command = [_tool("COMPUTE_SANITIZER", "compute-sanitizer"), "--tool", tool, "--print-limit", "20", *target]
    done = _run(command, end)
    text = done.stdout + done.stderr
    counts = [int(count) for pattern in _SUMMARIES for count in re.findall(pattern, text)]
    if not counts:
        raise RuntimeError(f"{tool} printed no summary (exit code {done.returncode}): {text[-500:]}")
    if done.returncode and not sum(counts):
        raise RuntimeError(f"the program failed under {tool} (exit code {done.returncode}): {text[-500:]}")
    return Findings(sum(counts), text)
