"""What a GPU that is lent for a quarter of an hour is asked, in the order of its worth, in one command.

python3 benchmarks/gpu/lent.py --seconds 560       # rows, logs and a summary in $OUT
python3 benchmarks/gpu/lent.py --seconds 150       # goes on where that was cut off
python3 benchmarks/gpu/lent.py --dry-run           # the same on the CPU, with tiny shapes

Each part runs in a process of its own, with a deadline of its own, and writes its rows as they come. These processes
are forks of one that has imported everything and has not touched the GPU: a start costs a second, not ten. Meanwhile
the other cores fill the compilers' caches. Where most of what is tried first is wrong, nothing is measured: the time is
better kept.

EFFNET_OPS_COMMIT names the commit of these files, which come without their history. `make gpu-carry` has built the CUDA
library for build/lent; without it, or where it does not load, it is built here.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import site
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from baselines import Scale

ROOT = Path(__file__).resolve().parent.parent.parent
CARRIED = ROOT / "build" / "lent"
COMMITTED = ROOT / "benchmarks" / "results" / "gpu"
GRACE = 4.0
"""Seconds that a process gets to end by itself when its time is up, and that the summary takes."""
PATIENCE = 120.0
"""Seconds that a part waits for what is compiled in the background."""
LOSSES = 6
"""How often a part may lose the GPU and go on in another process."""
SMALL = r"^(?!.*(k7|case 4 )).*%s"
"""What has no 7x7 window: a kernel for one of these takes Triton up to a minute to compile."""
LOST, TOO_LONG = 2, 100
"""Exit codes: of a script that lost the GPU or had no time left, and of one that did not end by itself."""


class Part(NamedTuple):
    """Something to run: a script of this folder with its arguments, for at most so many seconds.

    It begins when the background jobs that it ``needs`` are done, or have failed, or `PATIENCE` is over.
    """

    name: str
    script: str
    arguments: tuple[str, ...]
    seconds: float
    needs: tuple[str, ...] = ()


def parts(scale: Scale) -> list[Part]:
    """All that is measured, in order."""
    many, few = scale.inference_batches[0], scale.inference_batches[-1]
    step = scale.training_batches[-1]
    few = 1 if 1 in scale.inference_batches else few
    b0 = rf"efficientnet_b0 \| %s \| ({many}x\S* \| bf16 \| forward|{step}x\S* \| bf16 \| step)"
    b4 = rf"efficientnet_b4 \| %s \| ({many}x\S* \| bf16 \| forward|{scale.training_batches[0]}x\S* \| bf16 \| step)"
    latency = rf"efficientnet_b0 \| %s \| {few}x\S* \| bf16 \| forward"
    stock, compiled, ours = "eager channels_last", "default channels_last", "effnet_ops .*"
    networks, filled = ("--part", "networks", "--only"), ("fill networks",)
    warm = ("compile forward", "compile step")

    def fused(backend: str) -> tuple[str, ...]:
        return "--part", "kernels", "--only", rf"\| depthwise \| effnet_ops {backend}"

    plain, cudnn = r"channels_last \| \S* \S* \S* \| bf16", r"cudnn channels_last \| .* bf16 \| (forward|both)"
    return [
        Part("smoke: cuda", "smoke", ("--only", "effnet_ops (cuda|cpu)"), 60),
        Part("smoke: triton", "smoke", ("--only", SMALL % "effnet_ops triton"), 90, ("fill smoke",)),
        Part("smoke: network", "smoke", ("--only", "effnet_ops replace_layers"), 30, ("fill smoke",)),
        Part("tests: cuda", "tests", ("-n", "4", "-k", "cuda"), 45),
        Part("limits", "baselines", ("--part", "machine", "--only", "copy|bf16"), 20, warm),
        Part("B0: stock", "baselines", (*networks, b0 % stock), 40),
        Part("B0: ours", "ours", (*networks, b0 % ours), 120, filled),
        Part("B0: compiled", "baselines", (*networks, b0 % compiled), 90, warm),
        Part("depthwise: cuda", "ours", fused("cuda"), 60),
        Part("blocks: cuda", "ours", ("--part", "kernels", "--only", r"\| mbconv \| effnet_ops cuda"), 30),
        Part("blocks: triton", "ours", ("--part", "kernels", "--only", r"\| mbconv \| effnet_ops triton"), 30, filled),
        Part("depthwise: cuDNN", "baselines", ("--part", "depthwise", "--only", cudnn), 90),
        Part("depthwise: ours", "ours", ("--part", "depthwise", "--only", plain), 60, ("fill plain",)),
        Part("batch 1: ours", "ours", (*networks, latency % ours), 40, ("fill batch 1",)),
        Part("batch 1: stock", "baselines", (*networks, latency % stock), 30),
        Part("profile: ours", "ours", ("--part", "profile"), 30),
        Part("profile: stock", "baselines", ("--part", "profile", "--only", "eager"), 20),
        Part("depthwise: triton", "ours", fused("triton"), 60, ("fill depthwise",)),
        Part("B4: ours", "ours", (*networks, b4 % ours), 60, ("fill B4",)),
        Part("B4: stock", "baselines", (*networks, b4 % stock), 40),
        Part("products", "ours", ("--part", "kernels", "--only", r"\| pointwise"), 80, ("fill products",)),
        Part("batch 1: compiled", "baselines", (*networks, latency % compiled), 70),
        Part("smoke: 7x7", "smoke", ("--only", "effnet_ops triton"), 60, ("fill 7x7",)),
        Part("tests", "tests", ("-n", "12"), 150),
        Part("memcheck", "sanitize", ("--only", "memcheck"), 90, ("fill sanitizer",)),
        Part("B4: compiled", "baselines", (*networks, b4 % compiled), 150),
        Part("B0: max-autotune", "baselines", (*networks, b0 % "max-autotune channels_last"), 240),
        Part("traffic", "counters", ("--part", "traffic"), 90),
        Part("racecheck", "sanitize", ("--only", "racecheck|synccheck"), 120),
        Part("counters", "counters", ("--part", "counters"), 120),
        Part("squeeze and excite", "ours", ("--part", "operations", "--only", r"\| squeeze_excite"), 90),
    ]


Fill = tuple[str, str, str]
"""What is compiled for Triton: its name, the part of precompile.py, and a pattern for the calls of that."""


def fills(scale: Scale) -> list[Fill]:
    """What is compiled for Triton meanwhile, in order."""
    many, step = scale.inference_batches[0], scale.training_batches[-1]
    return [
        ("fill smoke", "smoke", SMALL % ""),
        ("fill networks", "networks", rf"efficientnet_b0 ({many} forward|{step} step)"),
        ("fill depthwise", "kernels", r"\| depthwise"),
        ("fill plain", "depthwise", r"channels_last \| \S* \S* \S* \| bf16"),
        ("fill batch 1", "networks", r"efficientnet_b0 1 forward"),
        ("fill B4", "networks", rf"efficientnet_b4 ({many} forward|{scale.training_batches[0]} step)"),
        ("fill products", "kernels", r"\| pointwise"),
        ("fill 7x7", "smoke", ""),
        ("fill sanitizer", "sanitizer", ""),
    ]


def warmups(scale: Scale) -> list[Part]:
    """What torch.compile makes of B0, made once beforehand: its caches serve the process that measures."""
    networks = ("--warm", "--part", "networks", "--only")
    many, step = scale.inference_batches[0], scale.training_batches[-1]
    default = r"efficientnet_b0 \| default channels_last"
    return [
        Part("compile forward", "baselines", (*networks, rf"{default} \| {many}x\S* \| bf16 \| forward$"), 120),
        Part("compile step", "baselines", (*networks, rf"{default} \| {step}x\S* \| bf16 \| step$"), 150),
    ]


class Taken(NamedTuple):
    """How many seconds a part waited and ran, and how it ended."""

    name: str
    waited: float
    ran: float
    ending: str


class Schedule:
    """Runs parts one after the other until the time is up; ``run(part, seconds)`` gives a part's exit code.

    ``ready(name)`` says whether a background job is done, ``clock`` is time.monotonic or stands for it.
    """

    def __init__(
        self, seconds: float, run: Callable[[Part, float], int], ready: Callable[[str], bool],
        clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], object] = time.sleep,
    ) -> None:  # fmt: skip
        self.run_part, self.ready, self.clock, self.sleep = run, ready, clock, sleep
        self.begin = clock()
        self.end = self.begin + seconds - GRACE
        self.taken: list[Taken] = []

    def run(self, listed: Sequence[Part], go_on: Callable[[Part], bool] = lambda part: True) -> None:
        """Run the parts; none begins after the end, or after one behind which ``go_on`` says no."""
        for part in listed:
            began = self.clock()
            if began >= self.end:
                self.taken.append(Taken(part.name, 0.0, 0.0, "not begun"))
                continue
            patience = min(began + PATIENCE, self.end)
            while self.clock() < patience and not all(map(self.ready, part.needs)):
                self.sleep(0.2)
            waited = self.clock() - began
            ending = self._until(part, min(self.clock() + part.seconds, self.end))
            self.taken.append(Taken(part.name, waited, self.clock() - began - waited, ending))
            if not go_on(part):
                return

    def _until(self, part: Part, limit: float) -> str:
        """How a part ended that goes on after it lost the GPU, as often as `LOSSES`."""
        for _ in range(LOSSES):
            left = limit - self.clock()
            if left <= 1:
                return "out of time"
            code = self.run_part(part, left)
            if code != LOST:
                return {0: "complete", 1: "failed rows"}.get(code, f"exit code {code}")
        return f"lost the GPU {LOSSES} times"


def install() -> None:
    """Make the package importable here, with the libraries that came along."""
    for library in CARRIED.glob("*.so"):
        shutil.copy2(library, ROOT / "effnet_ops")
    if importlib.util.find_spec("effnet_ops") is None:
        _pip(EFFNET_OPS_BUILD="none")
        # What makes an editable install importable is read when Python starts.
        site.addsitedir(sysconfig.get_path("purelib"))


def build_again(reason: str) -> None:
    """Build the CUDA library here, where the one that came along does not run, and begin again."""
    if os.environ.get("EFFNET_OPS_BUILT_HERE"):
        print(f"the backend cuda does not run: {reason}", flush=True)
        return
    print(f"the CUDA library that came along does not run, and is built here: {reason}", flush=True)
    (ROOT / "effnet_ops" / "_cuda.so").unlink(missing_ok=True)
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    capability = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    _pip(FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST=capability.replace("9.0", "9.0a"))
    os.environ["EFFNET_OPS_BUILT_HERE"] = "1"
    os.execv(sys.executable, [sys.executable, *sys.argv])


def _pip(**environment: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "-e",
        ".",
    ]
    subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=False)


class Processes:
    """The parts as forks of this process, which has imported what they need, and the jobs in the background."""

    def __init__(self, dry: bool, output: Path | None, log: Path) -> None:
        import baselines
        import counters
        import ours
        import precompile
        import sanitize
        import smoke

        self.mains = {
            "baselines": baselines.PARTS,
            "ours": ours.PARTS,
            "smoke": {"smoke": smoke.smoke},
            "sanitize": {"sanitizer": sanitize.sanitizer},
            "counters": counters.PARTS,
        }
        self.run_parts, self.precompile = baselines.run_parts, precompile
        self.dry, self.output, self.log = dry, output, log
        self.context = multiprocessing.get_context("fork")
        self.background: dict[str, BaseProcess] = {}
        self.filled = {name: self.context.Event() for name, *_ in fills(baselines.DRY if dry else baselines.REAL)}

    def start(self, target: Callable[..., int], *arguments: object) -> BaseProcess:
        def begin() -> None:
            # A group of its own, so that it ends with all that it has started.
            os.setsid()
            with self.log.open("a") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            # Where it was when its time was up.
            faulthandler.register(signal.SIGTERM, all_threads=True, chain=True)
            sys.exit(target(*arguments))

        process = self.context.Process(target=begin)
        process.start()
        return process

    def script(self, part: Part, seconds: float) -> int:
        """What the command line of a part's script does, in this process."""
        print(f"==> {part.name}", flush=True)
        if part.script == "tests":
            return self.tests(part.arguments, seconds)
        sys.argv = [part.script, *part.arguments, "--seconds", str(seconds)]
        sys.argv += ["--dry-run"] if self.dry else []
        sys.argv += ["--output", str(self.output)] if self.output else []
        return self.run_parts(self.mains[part.script], None)

    def tests(self, arguments: Sequence[str], seconds: float) -> int:
        """tests/gpu; an interrupted pytest still says what has failed so far."""
        command = [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", "tests/gpu", *arguments]
        with (self.log.parent / "tests.txt").open("a", encoding="utf-8") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT)
            try:
                return process.wait(max(seconds - 2 * GRACE, 1.0))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
                process.wait(GRACE)
        return TOO_LONG

    def run(self, part: Part, seconds: float) -> int:
        return end(self.start(self.script, part, seconds), seconds + GRACE / 2)

    def gpu(self, architecture: Sequence[Any]) -> Any:
        return self.precompile.Gpu(self.precompile.tuning.Architecture(*architecture), launchers=True)

    def in_background(self, warm: Sequence[Part], gpu: Any, seconds: float, fill: Sequence[Fill]) -> None:
        """Begin to fill the compilers' caches; without a GPU only PyTorch's."""
        self.background = {part.name: self.start(self.script, part, part.seconds) for part in warm}
        if gpu is not None:
            self.background["fill"] = self.start(self.fill, gpu, seconds, fill)

    def fill(self, gpu: Any, seconds: float, wanted: Sequence[Fill]) -> int:
        """Compile what is wanted of `fills`, and say so."""
        begin = time.monotonic()
        listed = {self.precompile.Wanted(part, only): name for name, part, only in wanted}

        def finished(one: Any) -> None:
            print(f"{listed[one]} after {time.monotonic() - begin:.0f} s", flush=True)
            self.filled[listed[one]].set()

        # Some cores are left to PyTorch's compiler and to the smoke test.
        workers = max((os.cpu_count() or 1) - 4, 1)
        settings = {"dry": self.dry, "seconds": seconds, "method": "fork", "workers": workers}
        counts = self.precompile.fill(list(listed), gpu, **settings, finished=finished)
        return self.precompile.say(counts, time.monotonic() - begin)

    def ready(self, name: str) -> bool:
        """Whether a background job is done, well or not."""
        if name in self.filled and self.filled[name].is_set():
            return True
        job = self.background.get("fill" if name in self.filled else name)
        return job is None or not job.is_alive()

    def stop(self) -> None:
        for process in self.background.values():
            end(process, 0)


def end(process: BaseProcess, seconds: float) -> int:
    """The exit code of a process that has so many seconds left; it is ended with all that it started."""
    process.join(seconds)
    for kind in (signal.SIGTERM, signal.SIGKILL):
        if process.is_alive():
            os.killpg(process.pid, kind)
            process.join(GRACE / 4)
    return TOO_LONG if process.exitcode is None or process.exitcode < 0 else process.exitcode


def describe_gpu(path: Path) -> int:
    """Write what the kernels' rules must know of this GPU, and its rows' file; shows that a fork can use it, too."""
    import torch
    from rows import output_path

    from effnet_ops.kernels import tuning

    architecture = tuning.architecture(torch.device("cuda", 0))
    path.write_text(json.dumps({"architecture": architecture, "rows": output_path("cuda").name}), encoding="utf-8")
    return 0


def written(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a file by their keys: of each key, the last."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return {line["key"]: line for line in lines if "key" in line}


def mostly_wrong(path: Path, provider: str) -> bool:
    """Whether more than half of a provider's rows of the smoke test have failed."""
    rows = [row for row in written(path).values() if row["part"] == "smoke" and row["provider"] == provider]
    return 2 * sum("failed" in row for row in rows) > len(rows)


def summary(path: Path, taken: Sequence[Taken]) -> list[str]:
    """The times, what failed, the smoke test's largest errors, and what took how long."""
    rows = written(path)
    text = [f"{row['p50']:9.4f} ms{_rate(row)}  {key}" for key, row in rows.items() if "p50" in row]
    text += [f"FAILED {key}: {row['failed'][:150]}" for key, row in rows.items() if "failed" in row]
    smoke = [row for row in rows.values() if row["part"] == "smoke"]
    text.append(
        f"smoke test: {len(smoke)} rows, {sum('failed' in row for row in smoke)} failed; largest errors passed:"
    )
    passed = sorted((row for row in smoke if "error" in row), key=lambda row: -row["error"])
    text += [f"{row['error']:9.1e}  {row['key']}" for row in passed[:5]]
    return [*text, *(f"{t.name:20} waited {t.waited:4.0f} s, ran {t.ran:4.0f} s: {t.ending}" for t in taken)]


def _rate(row: dict[str, Any]) -> str:
    return f" {row['gb_per_s']:6.0f} GB/s" if "gb_per_s" in row else " " * 12


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=560.0, help="what the whole call may take")
    parser.add_argument("--part", action="append", metavar="NAME", help="only this part; may be repeated")
    parser.add_argument("--anyway", action="store_true", help="measure even if most of the smoke test is wrong")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, once")
    parser.add_argument("--output", type=Path, help="the folder for rows and logs; $OUT by default")
    options = parser.parse_args()
    began = time.monotonic()
    if not options.dry_run and not os.environ.get("EFFNET_OPS_COMMIT"):
        parser.error("EFFNET_OPS_COMMIT must name the commit of these files: rows belong to one")
    folder = options.output or Path(os.environ.get("OUT") or CARRIED / "out")
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["EFFNET_OPS_GPU_ROWS"] = str(folder)
    if not options.dry_run:
        # Both compilers' kernels in one place, where a later call on the same machine finds them again.
        os.environ["TRITON_CACHE_DIR"] = str(CARRIED / "triton")
        install()
        for kept in (COMMITTED, CARRIED / "rows"):
            if kept.exists():
                shutil.copytree(kept, folder, dirs_exist_ok=True)
    return measure(options, folder, began)


def measure(options: argparse.Namespace, folder: Path, began: float) -> int:
    from baselines import DRY, REAL

    scale, log = (DRY if options.dry_run else REAL), folder / "log.txt"
    processes = Processes(options.dry_run, folder / "cpu.jsonl" if options.dry_run else None, log)
    gpu, rows = None, folder / "cpu.jsonl"
    if not options.dry_run:
        import effnet_ops

        if reason := effnet_ops.available_backends()["cuda"]:
            build_again(reason)
        if end(processes.start(describe_gpu, folder / "gpu.json"), 60):
            print(log.read_text(encoding="utf-8")[-3000:])
            return 1
        described = json.loads((folder / "gpu.json").read_text(encoding="utf-8"))
        gpu, rows = processes.gpu(described["architecture"]), folder / described["rows"]
    schedule = Schedule(options.seconds - (time.monotonic() - began), processes.run, processes.ready)
    chosen = [part for part in parts(scale) if part.name in (options.part or [part.name])]
    needed = {name for part in chosen for name in part.needs}
    warm = [part for part in warmups(scale) if part.name in needed]
    processes.in_background(warm, gpu, options.seconds, [one for one in fills(scale) if one[0] in needed])

    def go_on(part: Part) -> bool:
        if rows.exists() and not options.dry_run:
            (CARRIED / "rows").mkdir(parents=True, exist_ok=True)
            shutil.copy2(rows, CARRIED / "rows")
        backend = part.name.removeprefix("smoke: ")
        stop = backend != part.name and mostly_wrong(rows, f"effnet_ops {backend}") and not options.anyway
        if stop:
            print(f"most of what {backend} computes is wrong: nothing is measured (--anyway measures)")
        return not stop

    try:
        schedule.run(chosen, go_on)
    finally:
        processes.stop()
        text = "\n".join(summary(rows, schedule.taken))
        (folder / "summary.txt").write_text(text + "\n", encoding="utf-8")
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
