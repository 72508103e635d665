"""The GPU benchmarks without a GPU: every part once on tiny shapes, what restarts, and the page made from rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks" / "gpu"


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}, cwd=ROOT
    )


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of all parts, but for those of single kernels, which the CPU could only interpret."""
    output = tmp_path_factory.mktemp("rows") / "machine.jsonl"
    for script in ("baselines.py", "ours.py"):
        done = run(script, "--dry-run", "--output", str(output))
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert done.stdout.endswith("complete; 0 failed\n")
    return output


def test_every_part_has_rows(measured: Path) -> None:
    found = [row for row in rows(measured) if "key" in row]
    parts = {"machine", "networks", "blocks", "elementwise", "profile", "depthwise", "operations"}
    assert {row["part"] for row in found} == parts
    assert len({row["key"] for row in found}) == len(found)
    assert all(row["p20"] <= row["p50"] <= row["p80"] for row in found)
    first = rows(measured)[0]
    assert {"identity", "environment", "date"} == set(first)
    assert {"torch", "triton", "timm"} <= set(first["environment"]["versions"]) and "commit" in first["environment"]


def test_second_run_goes_on_where_the_first_stopped(tmp_path: Path) -> None:
    output = tmp_path / "machine.jsonl"
    stopped = run("baselines.py", "--dry-run", "--part", "machine", "--seconds", "-1", "--output", str(output))
    assert stopped.returncode == 2 and not output.exists()
    arguments = ("--dry-run", "--part", "machine", "--output", str(output))
    assert run("baselines.py", *arguments).returncode == 0
    complete = output.read_text(encoding="utf-8")
    output.write_text("".join(complete.splitlines(keepends=True)[:3]), encoding="utf-8")
    assert run("baselines.py", *arguments).returncode == 0
    keys = [row["key"] for row in rows(output) if "key" in row]
    assert len(keys) == len(set(keys)) == complete.count('"key"')


def test_page_from_rows(measured: Path, tmp_path: Path) -> None:
    done = run("report.py", "--output", str(tmp_path / "gpu.md"), "--results", str(measured.parent))
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    for heading in ("Limits of the machine", "Networks", "Memory", "What lost", "Derived", "Targets"):
        assert f"# {heading}" in page
    assert "### Kernels\n\nNot measured." in page and "Nothing has been measured yet" not in page
    for plot in tmp_path.glob("*.png"):
        assert f"]({plot.name})" in page
    assert (tmp_path / "gpu_machine_networks.png").exists()


def test_committed_page_is_that_of_the_committed_rows(tmp_path: Path) -> None:
    assert run("report.py", "--output", str(tmp_path / "gpu.md")).returncode == 0
    assert (tmp_path / "gpu.md").read_text() == (ROOT / "docs" / "gpu.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_nothing_is_measured() -> None:
    done = run("baselines.py")
    assert done.returncode == 3 and "no GPU here" in done.stderr


@pytest.mark.slow
def test_tuning_interpreted() -> None:
    done = run("tune.py", "--dry-run", TRITON_INTERPRET="1")
    assert done.stdout.endswith("complete\n"), done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("by the rule") == 10


@pytest.mark.slow
def test_kernels_of_the_benchmark_interpreted() -> None:
    done = run("ours.py", "--dry-run", "--part", "kernels", TRITON_INTERPRET="1")
    assert done.stdout.endswith("complete; 0 failed\n"), done.stdout[-3000:] + done.stderr[-3000:]
