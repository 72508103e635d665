"""The GPU benchmarks without a GPU: every part once on tiny shapes, what restarts, and the page made from rows."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks" / "gpu"))

import baselines
import choice
import counters
import fp64
import lent
import ours
import precompile
import sanitize
import smoke
import tools
import tune
from ahead_of_time import tuned_for
from baselines import DRY, REAL
from rows import ATTEMPTS, Job, Session, Work

import effnet_ops
from effnet_ops.ops import gpu

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


@pytest.mark.slow
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


@pytest.mark.slow
def test_page_from_rows(measured: Path, tmp_path: Path) -> None:
    done = run("report.py", "--output", str(tmp_path / "gpu.md"), "--results", str(measured.parent))
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    for heading in (
        "Limits of the machine",
        "Networks",
        "Memory",
        "What lost",
        "Derived",
        "Targets",
        "Memory and race",
    ):
        assert f"# {heading}" in page
    assert "### Kernels\n\nNot measured." in page and "Nothing has been measured yet" not in page
    assert not list(tmp_path.glob("*.png"))
    assert (
        run("report.py", "--output", str(tmp_path / "gpu.md"), "--results", str(measured.parent), "--plots").returncode
        == 0
    )
    page = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert all(f"]({plot.name})" in page for plot in tmp_path.glob("*.png"))
    assert (tmp_path / "gpu_machine_networks.png").exists()


def test_committed_page_is_that_of_the_committed_rows(tmp_path: Path) -> None:
    assert run("report.py", "--output", str(tmp_path / "gpu.md")).returncode == 0
    assert (tmp_path / "gpu.md").read_text() == (ROOT / "docs" / "gpu.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_nothing_is_measured() -> None:
    done = run("baselines.py")
    assert done.returncode == 3 and "no GPU here" in done.stderr


def tool(folder: Path, name: str, text: str) -> str:
    """A program that stands for one of NVIDIA's."""
    path = folder / name
    path.write_text("#!/bin/sh\n" + text, encoding="utf-8")
    path.chmod(0o755)
    return str(path)


# As ncu 2025.3 prints `--csv --page raw`: a line of names, one of units, and one a launch, numbers with commas.
COUNTED = """==PROF== Connected to process 4711
"ID","Kernel Name","Grid Size","gpu__time_duration.sum","dram__bytes_read.sum","dram__bytes_write.sum",\
"dram__throughput.avg.pct_of_peak_sustained_elapsed","lts__throughput.avg.pct_of_peak_sustained_elapsed",\
"sm__warps_active.avg.pct_of_peak_sustained_active","launch__registers_per_thread"
"","","","ns","byte","byte","%","%","%","register/thread"
"0","void depthwise_forward_kernel<Traits<float, 3>>(A)","(1, 1, 1)","2,000","1,500","500","81.5","40","62","96"
"1","cudnn_bn_fw_tr","(1, 1, 1)","1000","250.5","","12","14","n/a","32"
==PROF== Disconnected from process 4711
""".replace("\\\n", "")


def test_counters_as_they_are_printed() -> None:
    first, second = tools.parse_counters(COUNTED, counters.METRICS)
    assert first.name.startswith("void depthwise_forward_kernel<Traits<float, 3>>")
    assert (first.values[counters.TIME], first.values[counters.READ], first.values[counters.WRITTEN]) == (
        2000,
        1500,
        500,
    )
    assert counters.WRITTEN not in second.values and counters.OCCUPANCY not in second.values
    assert counters.limit(first.values) == "DRAM, 82 %"
    assert counters.limit(second.values) == "latency: L2 at 14 % is the busiest"
    assert counters.by_class([first, second], counters.READ, counters.WRITTEN) == {
        "depthwise": 2000,
        "batch norm": 250.5,
    }
    assert tools.parse_counters("==ERROR== nothing", counters.METRICS) == []


def test_metrics_that_a_version_lacks_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "counted").write_text(COUNTED, encoding="utf-8")
    script = f"""case "$*" in
*{counters.ISSUE}*) echo "==ERROR== Failed to find metric {counters.ISSUE}"; exit 1;;
*) cat {tmp_path}/counted;;
esac"""
    monkeypatch.setenv("NCU", tool(tmp_path, "ncu", script))
    assert len(tools.counters(["true"], counters.METRICS, end=math.inf)) == 2
    monkeypatch.setenv("NCU", tool(tmp_path, "broken", "echo '==ERROR== ERR_NVGPUCTRPERM'; exit 1"))
    with pytest.raises(RuntimeError, match="ERR_NVGPUCTRPERM"):
        tools.counters(["true"], counters.METRICS, end=math.inf)
    monkeypatch.setenv("NCU", str(tmp_path / "none"))
    with pytest.raises(RuntimeError, match=r"was not found \(set NCU\)"):
        tools.counters(["true"], counters.METRICS, end=math.inf)


@pytest.mark.slow
def test_rows_of_counters_and_traffic(measured: Path, tmp_path: Path) -> None:
    """From a kernel's row to what limits it, with a tool that runs the program and prints what another would."""
    key = "kernels | depthwise | effnet_ops cuda | 2x96x32x32 k3 s2 | bf16 | forward"
    fields = dict(zip(("part", "operation", "provider", "shape", "dtype", "mode"), key.split(" | "), strict=True))
    output = tmp_path / "machine.jsonl"
    output.write_text(measured.read_text(encoding="utf-8"), encoding="utf-8")
    row = {"key": key, "environment": rows(output)[0]["identity"], **fields, "graph": False}
    row |= {"p20": 1.0, "p50": 1.0, "p80": 1.0, "gb_per_s": 0.01, "bytes": 1000}
    with output.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    (tmp_path / "counted").write_text(COUNTED, encoding="utf-8")
    ncu = tool(tmp_path, "ncu", f'echo "$@" >> {tmp_path}/commands; cat {tmp_path}/counted')
    done = run("counters.py", "--dry-run", "--output", str(output), NCU=ncu)
    assert done.stdout.endswith("complete; 0 failed\n"), done.stdout[-2000:] + done.stderr[-2000:]
    found = {row["part"]: row for row in rows(output) if row.get("part") in ("counters", "traffic")}
    assert found["counters"]["limit"] == "DRAM, 82 %" and found["counters"]["launches"] == 2
    assert found["traffic"]["dram_bytes"] == {"depthwise": 2000, "batch norm": 250.5}
    assert found["traffic"]["model_bytes"] > 0
    commands = (tmp_path / "commands").read_text(encoding="utf-8")
    assert f"--once {key}" in commands and "--once profile | efficientnet_b0 | eager channels_last" in commands
    assert "--clock-control none" in commands
    page = tmp_path / "gpu.md"
    assert run("report.py", "--output", str(page), "--results", str(tmp_path)).returncode == 0
    text = page.read_text(encoding="utf-8")
    assert "DRAM, 82 %" in text and "byte model" in text and "| 2.25 |" in text


def test_one_row_in_a_profilers_range(measured: Path) -> None:
    """What the tools are given to watch; a key that no job has is an error."""
    key = next(row["key"] for row in rows(measured) if row.get("part") == "profile" and "replace" in row["provider"])
    assert run("ours.py", "--dry-run", "--part", "profile", "--once", key).returncode == 0
    assert run("ours.py", "--dry-run", "--part", "profile", "--once", key + "!").returncode == 4


@pytest.mark.parametrize(
    ("summary", "code", "failure"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, ""),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, ""),
        ("========= ERROR SUMMARY: 3 errors", 1, "found 3 errors"),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)", 0, "found 2 errors"),
        ("Device not supported", 1, "printed no summary"),
        ("========= ERROR SUMMARY: 0 errors", 5, "the program failed under memcheck"),
    ],
)
def test_what_the_sanitizer_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, summary: str, code: int, failure: str
) -> None:
    monkeypatch.setenv("COMPUTE_SANITIZER", tool(tmp_path, "sanitizer", f"echo '{summary}'; exit {code}"))
    if failure and "errors" not in failure:
        with pytest.raises(RuntimeError, match=failure):
            tools.sanitize(["true"], "memcheck", end=math.inf)
    else:
        expected = int(failure.split()[1]) if failure else 0
        assert tools.sanitize(["true"], "memcheck", end=math.inf).errors == expected


def test_tool_that_the_time_cut_off_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row says that a tool took too long only if it had all of its own time."""
    monkeypatch.setenv("COMPUTE_SANITIZER", tool(tmp_path, "sanitizer", "exec sleep 60"))
    session = Session("cpu", tmp_path / "machine.jsonl", seconds=0.5)
    job = Job("sanitizer", "memcheck", "ours", "all", "bf16", "all", lambda: Work(None, extra=watched))

    def watched() -> dict[str, int]:
        return {"errors": tools.sanitize(["true"], "memcheck", end=session.end).errors}

    assert not session.run([job]) and not session.output.exists()
    session.end = math.inf
    monkeypatch.setattr(tools, "TOOL_SECONDS", 0.1)
    assert session.run([job])
    assert "took more than" in rows(session.output)[-1]["failed"]


def failing(problem: Exception) -> Job:
    def prepare() -> Work:
        raise problem

    return Job("kernels", "depthwise", "ours", "1x1", "bf16", "forward", prepare)


def test_kernel_that_does_not_fit_costs_its_own_row(tmp_path: Path) -> None:
    """Whatever Triton raises; another process tries it once more, and no third one does."""

    class OutOfResources(Exception):
        pass

    output = tmp_path / "machine.jsonl"
    good = Job("kernels", "depthwise", "ours", "2x2", "bf16", "forward", lambda: Work(lambda: None))
    for attempt in range(ATTEMPTS + 1):
        session = Session("cpu", output)
        assert session.run([failing(OutOfResources("shared memory")), good])
        assert session.failures == (attempt < ATTEMPTS)
    keys = [row["key"] for row in rows(output) if "key" in row]
    assert keys.count(good.key) == 1 and len(keys) == 1 + ATTEMPTS
    assert sum("identity" in row for row in rows(output)) == 1


def test_lost_device_ends_the_run_after_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing works after an illegal access, not even what tidies up; later rows are left to another process."""

    def illegal(*_: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    session = Session("cpu", tmp_path / "machine.jsonl")
    session.device = torch.device("cuda")
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, illegal)
    later = Job("kernels", "depthwise", "ours", "2x2", "bf16", "forward", lambda: pytest.fail("not now"))
    assert not session.run([failing(RuntimeError("an illegal memory access was encountered")), later])
    assert session.stopped.startswith("the device was lost by kernels | depthwise")
    (row,) = (row for row in rows(session.output) if "key" in row)
    assert "illegal memory access" in row["failed"]


def test_what_the_targets_ask_is_measured_first() -> None:
    networks = list(baselines.networks(REAL))
    assert [job.provider for job in networks[:6:2]] == [
        "eager channels_last",
        "default channels_last",
        "eager contiguous",
    ]
    b0 = [job for job in networks if job.operation == "efficientnet_b0"]
    assert {job.shape for job in networks[:6]} == {"256x3x224x224"} and networks[: len(b0) // 2] == b0[: len(b0) // 2]
    autotuned = [i for i, job in enumerate(networks) if job.provider.startswith("max-autotune")]
    assert networks[autotuned[0]].shape == "256x3x224x224" and networks[autotuned[0]].mode == "forward"
    assert autotuned[2:] == list(range(autotuned[2], len(networks)))
    mine = [(job.operation, job.mode, job.shape.split("x")[0]) for job in ours.networks(REAL)]
    order = [("forward", "256"), ("step", "128"), ("step", "256"), ("forward", "1"), ("forward", "32")]
    assert list(dict.fromkeys(mine))[:5] == [("efficientnet_b0", *one) for one in order]
    plain = list(baselines.depthwise(REAL))
    shapes = len({job.shape for job in plain})
    assert {(job.provider, job.dtype) for job in plain[: 2 * shapes]} == {("cudnn channels_last", "bf16")}


def test_v2_has_rows_of_its_blocks_and_of_the_network() -> None:
    """The five kinds of V2-B0's Fused-MBConv blocks; a dry run prepares the first two of them."""
    for script in (baselines, ours):
        fused = dict.fromkeys((job.operation, job.shape) for job in script.blocks(REAL) if "fused" in job.operation)
        assert [shape for _, shape in fused] == [
            f"256x{size}" for size in ("32x112x112", "16x112x112", "32x56x56", "32x56x56", "48x28x28")
        ]
        assert "tf_efficientnetv2_b0" in {job.operation for job in script.networks(REAL)}
    keys = [job.key for script in (baselines, ours) for job in script.blocks(REAL)]
    assert len(keys) == len(set(keys))


def test_block_is_checked_against_the_stock_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What replaces it may be wrong in every precision."""
    (job, *_) = ours.blocks(DRY)
    right = job.prepare()
    assert right.error() < right.allowed
    replace = effnet_ops.replace_layers

    def wrong(model: torch.nn.Module) -> None:
        replace(model)
        with torch.no_grad():
            model.blocks[0][0].conv_dw.weight.mul_(2)

    monkeypatch.setattr(effnet_ops, "replace_layers", wrong)
    assert job.prepare().error() > right.allowed


def test_moments_from_parts() -> None:
    y = torch.randn(2, 5, 7, 3, dtype=torch.float64)
    parts = [y[0, :2], y[0, 2:], y[1]]
    rows = [part.flatten(0, -2) for part in parts]
    partials = [torch.stack([torch.full((3,), len(r)), r.mean(0), len(r) * r.var(0, correction=0)]) for r in rows]
    assert fp64.error(fp64.merged(torch.stack(partials)), fp64.moments(y)) < 1e-12


def test_sums_of_a_gate() -> None:
    """The third is that of slopes, here by differences."""
    x, dx, norm = torch.randn(2, 6, 3), torch.randn(2, 6, 3).double(), torch.rand(3, 3) + 0.5
    sums = fp64.gate_sums(dx, x, norm)
    step = torch.zeros(3, 3)
    step[2] = 1e-4
    high, low = (torch.nn.functional.silu(fp64.norm(x, norm + sign * step)) for sign in (1, -1))
    slope = (high - low) / (2 * step[2, 0].double())
    centred = x.double() - norm[0].double()
    expected = [dx * (high + low) / 2, dx * slope, slope, dx * slope * centred, slope * centred]
    assert fp64.error([sums], [torch.stack(expected, 1).sum(2)]) < 1e-3


class Clock:
    """Stands for time: parts take as long as they are told, and sleeping passes it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def scheduled(seconds: float, takes: dict[str, list[tuple[float, int]]], ready_at: float = 0.0) -> lent.Schedule:
    """A schedule whose part ``name`` takes so long and ends with that code, at its first, second, .. start."""
    clock, left = Clock(), {name: list(runs) for name, runs in takes.items()}

    def run(part: lent.Part, limit: float) -> int:
        took, code = left[part.name].pop(0)
        clock.now += min(took, limit)
        return code if took <= limit else lent.TOO_LONG

    return lent.Schedule(seconds, run, lambda name: clock.now >= ready_at, clock, clock.sleep)


def part(name: str, seconds: float = 50.0, needs: tuple[str, ...] = ()) -> lent.Part:
    return lent.Part(name, "ours", (), seconds, needs)


def endings(schedule: lent.Schedule) -> list[tuple[str, str]]:
    return [(taken.name, taken.ending) for taken in schedule.taken]


def test_parts_of_a_lent_gpu_have_deadlines() -> None:
    """A part that takes too long costs its own time, and none begins when the whole time is up."""
    schedule = scheduled(100 + lent.GRACE, {"a": [(10, 0)], "b": [(500, 0)], "c": [(39.5, 1)], "d": []})
    schedule.run([part("a"), part("b"), part("c"), part("d")])
    assert endings(schedule) == [
        ("a", "complete"), ("b", f"exit code {lent.TOO_LONG}"), ("c", "failed rows"), ("d", "out of time"),
    ]  # fmt: skip
    assert [taken.ran for taken in schedule.taken[:2]] == [10, 50]
    schedule = scheduled(60 + lent.GRACE, {"a": [(500, 0)], "b": [(500, 0)], "c": []})
    schedule.run([part("a"), part("b"), part("c")])
    assert [taken.ran for taken in schedule.taken] == [50, 10, 0] and schedule.taken[2].ending == "not begun"


def test_part_that_lost_the_gpu_goes_on_in_another_process() -> None:
    schedule = scheduled(500, {"a": [(10, lent.LOST), (10, lent.LOST), (10, 0)], "b": [(1, lent.LOST)] * 20})
    schedule.run([part("a"), part("b")])
    assert endings(schedule) == [("a", "complete"), ("b", f"lost the GPU {lent.LOSSES} times")]


def test_part_waits_for_what_is_compiled_but_not_for_ever() -> None:
    schedule = scheduled(500, {"a": [(10, 0)], "b": [(10, 0)]}, ready_at=30)
    schedule.run([part("a"), part("b", needs=("fill",))])
    assert [taken.waited for taken in schedule.taken] == pytest.approx([0, 20], abs=0.5)
    schedule = scheduled(500, {"a": [(10, 0)]}, ready_at=1e9)
    schedule.run([part("a", needs=("fill",))])
    assert schedule.taken[0].waited == pytest.approx(lent.PATIENCE, abs=0.5) and schedule.taken[0].ran == 10


def test_nothing_is_measured_of_what_is_wrong(tmp_path: Path) -> None:
    schedule = scheduled(500, {"smoke: cuda": [(1, 1)], "B0: ours": []})
    schedule.run([part("smoke: cuda"), part("B0: ours")], lambda done: done.name != "smoke: cuda")
    assert endings(schedule) == [("smoke: cuda", "failed rows")]
    lines = [{"key": str(i), "part": "smoke", "provider": "effnet_ops cuda", "failed": "wrong"} for i in range(3)]
    lines += [{"key": str(i), "part": "smoke", "provider": "effnet_ops cuda", "error": 0.0} for i in range(2, 5)]
    output = tmp_path / "rows.jsonl"
    output.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert not lent.mostly_wrong(output, "effnet_ops cuda"), "the last row of a key counts"
    output.write_text("".join(json.dumps(line) + "\n" for line in lines[:4]), encoding="utf-8")
    assert lent.mostly_wrong(output, "effnet_ops cuda") and not lent.mostly_wrong(output, "effnet_ops triton")


def test_order_of_a_lent_gpu() -> None:
    """Right or wrong, then limits, B0 and depthwise convolutions, then all else; what each needs is compiled before."""
    names = [one.name for one in lent.parts(REAL)]
    first = ["smoke: cuda", "smoke: triton", "limits", "B0: stock", "B0: ours", "B0: compiled", "depthwise: cuda"]
    assert [name for name in names if name in first] == first
    assert max(names.index(name) for name in first) < min(names.index(name) for name in ("batch 1: ours", "B4: ours"))
    made = {name for name, *_ in lent.fills(REAL)} | {one.name for one in lent.warmups(REAL)}
    assert {need for one in lent.parts(REAL) for need in one.needs} == made


@pytest.mark.slow
def test_every_part_of_a_lent_gpu_has_rows() -> None:
    """Its pattern fits rows that its script has."""
    everything = {"baselines": baselines.PARTS, "ours": ours.PARTS, "smoke": {"smoke": smoke.smoke}}
    everything |= {"sanitize": {"sanitizer": sanitize.sanitizer}}
    with pytest.MonkeyPatch.context() as patch:
        for module in (ours, smoke, sanitize):
            patch.setattr(module, "gpu_backends", lambda scale: ["cuda", "triton"])
        patch.setattr(ours, "_both_fit", lambda scale, shape: False)
        keys = {
            script: [job.key for jobs in scripts.values() for job in jobs(REAL._replace(device="cuda"))]
            for script, scripts in everything.items()
        }
    for one in [*lent.parts(REAL), *lent.warmups(REAL)]:
        if one.script in keys and "--only" in one.arguments:
            pattern = one.arguments[one.arguments.index("--only") + 1]
            assert any(re.search(pattern, key) for key in keys[one.script]), one
    for name, script, only in lent.fills(REAL):
        gpu_there = precompile.this_gpu(90)
        assert any(re.search(only, call) for call, _ in precompile.calls(script, False, gpu_there)), name


@pytest.mark.slow
def test_dry_run_of_a_lent_gpu(tmp_path: Path) -> None:
    """The same command on the CPU; a second one has nothing left to measure, and says so."""
    chosen = [word for name in ("limits", "B0: ours", "depthwise: cuDNN", "traffic") for word in ("--part", name)]
    arguments = ("--dry-run", "--seconds", "300", "--output", str(tmp_path), *chosen)
    first = run("lent.py", *arguments)
    assert first.returncode == 0, first.stdout + first.stderr
    found = [row for row in rows(tmp_path / "cpu.jsonl") if "key" in row]
    assert {row["part"] for row in found} == {"machine", "networks", "depthwise", "traffic"}
    measured = [row for row in found if "failed" not in row]
    assert all(set(row["seconds"]) == {"prepare", "check", "time", "extra"} for row in measured)
    assert all("ncu was not found" in row["failed"] for row in found if "failed" in row)
    assert "B0: ours             waited    0 s" in first.stdout and (tmp_path / "summary.txt").exists()
    again = run("lent.py", *arguments)
    assert again.returncode == 0
    assert [row for row in rows(tmp_path / "cpu.jsonl") if "p50" in row] == [row for row in found if "p50" in row]


def test_rows_of_a_lent_gpu_belong_to_a_commit(tmp_path: Path) -> None:
    done = run("lent.py", "--output", str(tmp_path), EFFNET_OPS_COMMIT="")
    assert done.returncode == 2 and "EFFNET_OPS_COMMIT must name the commit" in done.stderr


@pytest.mark.slow
def test_smoke_test_interpreted(tmp_path: Path) -> None:
    arguments = ("--dry-run", "--output", str(tmp_path / "rows.jsonl"), "--only", "fused|bf16 . gradients")
    done = run("smoke.py", *arguments, TRITON_INTERPRET="1")
    assert done.stdout.endswith("complete; 0 failed\n"), done.stdout[-3000:] + done.stderr[-3000:]


def test_rows_know_their_commit_without_a_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFNET_OPS_COMMIT", "0123abc")
    assert Session("cpu", None).environment["commit"] == "0123abc"


@pytest.mark.slow
def test_reduced_table_under_the_sanitizer(tmp_path: Path) -> None:
    """The tool is one that runs the program it is given, and finds nothing."""
    script = 'shift 4; "$@" && echo "========= ERROR SUMMARY: 0 errors"'
    output = tmp_path / "machine.jsonl"
    sanitizer = tool(tmp_path, "sanitizer", script)
    done = run("sanitize.py", "--dry-run", "--output", str(output), COMPUTE_SANITIZER=sanitizer)
    assert done.stdout.endswith("complete; 0 failed\n"), done.stdout[-2000:] + done.stderr[-2000:]
    (row,) = (row for row in rows(output) if "key" in row)
    assert (row["operation"], row["errors"], row["calls"]) == ("memcheck", 0, 30)


# What a part launches for one shape, compiled for a GPU: how many kernels are compiled, and found in the cache.
PRECOMPILED = """
import json, sys
import ours, precompile
from baselines import DRY
from shapes import Depthwise
scale = DRY._replace(device=sys.argv[1])
with precompile.compiling(precompile.this_gpu(90)) as counts:
    ours.depthwise_kernel(scale, Depthwise(40, 3, 2, 30), "backward", "triton").run()
print(json.dumps(counts))
"""


@pytest.mark.slow
def test_precompiled_kernels_are_those_that_real_tensors_ask_for(tmp_path: Path) -> None:
    """Another process, with real tensors, finds all of them in the cache, and compiles nothing."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(BENCHMARKS)}
    environment.pop("TRITON_INTERPRET", None)

    def counts(device: str) -> dict[str, int]:
        command = [sys.executable, "-c", PRECOMPILED, device]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert counts("meta") == {"compiled": 2}
    assert counts("cpu") == {"found": 2}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_precompiling_needs_a_gpu_or_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["precompile.py"])
    assert precompile.main() == 3 and "--target" in capsys.readouterr().err


@pytest.mark.slow
def test_precompiling_in_parallel(tmp_path: Path) -> None:
    """All that networks and single kernels launch; a second run has nothing to compile."""
    arguments = ("--dry-run", "--target", "90", "--workers", "2", "--seconds", "1200")
    parts = ("--part", "networks", "--part", "kernels")
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    first, second = (run("precompile.py", *arguments, *parts, **environment) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stdout + second.stdout
    assert ", 0 failed" in first.stdout and "0 kernels compiled, 0 found" not in first.stdout
    assert second.stdout.startswith("0 kernels compiled, ") and ", 0 failed" in second.stdout


def test_choice_where_nearly_all_measured_shapes_agree() -> None:
    """Then the model has no say on the others, either."""
    operator = "depthwise_conv2d_backward"
    base = {operator: {"default": "triton", "origin": choice.MODEL, "shapes": {"c": {"backend": "triton"}}}}
    few = [choice.Compared(operator, str(i), 1.0, 2.0) for i in range(choice.ENOUGH - 1)]
    table = choice.overlaid(json.loads(json.dumps(base)), few, "measured")[operator]
    assert table["default"] == "triton" and "c" in table["shapes"] and len(table["shapes"]) == choice.ENOUGH
    many = [*few, *few[:3], choice.Compared(operator, "other", 2.0, 1.0)]
    table = choice.overlaid(base, many, "measured")[operator]
    assert (table["default"], table["origin"]) == ("cuda", "measured")
    assert table["shapes"] == {"other": {"backend": "triton", "origin": "measured"}}


def test_choice_by_what_was_measured() -> None:
    fields = {"part": "depthwise", "operation": "depthwise", "dtype": "bf16", "mode": "both gradients"}
    shape = "256x96x112x112 k3 s2"
    times = {"effnet_ops cuda channels_last": 2.0, "effnet_ops triton channels_last": 1.0, "cudnn channels_last": 0.5}
    found = [{**fields, "shape": shape, "provider": provider, "p50": p50} for provider, p50 in times.items()]
    key = gpu.bucket((256, 96, 112, 112), 3, 2, 2)
    assert list(choice.measured(found)) == [choice.Compared("depthwise_conv2d_backward", key, 2.0, 1.0)]
    base = choice.table([choice.Compared("depthwise_conv2d_backward", key, 1.0, 2.0)], choice.MODEL)
    assert base["depthwise_conv2d_backward"] == {"default": "cuda", "origin": choice.MODEL, "shapes": {}}
    both = choice.overlaid(base, list(choice.measured(found)), "measured on a GPU")
    expected = {key: {"backend": "triton", "origin": "measured on a GPU"}}
    assert both["depthwise_conv2d_backward"]["shapes"] == expected


def test_both_gradients_are_measured_where_blocks_make_them_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among others, the expansion and the projection that move most of B0's bytes."""
    monkeypatch.setattr(ours, "gpu_backends", lambda scale: ["triton"])
    with tuned_for("sm_90"):
        jobs = [job for job in ours.kernels(REAL._replace(device="cpu")) if job.operation == "pointwise"]
    found = {job.shape for job in jobs if job.mode == "both gradients"}
    assert {"256x16x112x112 -> 96", "256x96x56x56 -> 24"} <= found < {job.shape for job in jobs}


def test_candidates_of_the_tuner() -> None:
    """Neighbours of each number, and of whether both gradients are one launch the other answer."""
    config = {"block_p": 32, "num_warps": 1, "fits": 1}
    assert list(tune.candidates(config, "block_p")) == [{**config, "block_p": 16}, {**config, "block_p": 64}]
    assert list(tune.candidates(config, "num_warps")) == [{**config, "num_warps": 2}]
    assert list(tune.candidates(config, "fits")) == [{**config, "fits": 0}]


@pytest.mark.slow
def test_tuning_interpreted() -> None:
    done = run("tune.py", "--dry-run", TRITON_INTERPRET="1")
    assert done.stdout.endswith("complete\n"), done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("by the rule") == 12 and done.stdout.count("both gradients") == 2


@pytest.mark.slow
def test_kernels_of_the_benchmark_interpreted() -> None:
    done = run("ours.py", "--dry-run", "--part", "kernels", TRITON_INTERPRET="1")
    assert done.stdout.endswith("complete; 0 failed\n"), done.stdout[-3000:] + done.stderr[-3000:]
    assert "both gradients" in done.stdout
