"""One model through every provider: each in a process of its own, in turn, and only where its output is right."""

from __future__ import annotations

import contextlib
import copy
import datetime
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import effnet_ops
from effnet_ops.benchmark import models, worker
from effnet_ops.benchmark.gate import Failed, gate, relative_error
from effnet_ops.benchmark.providers import DTYPES, Job, Provider, export_onnx
from effnet_ops.benchmark.rows import Row
from effnet_ops.benchmark.timing import percentiles
from effnet_ops.benchmark.worker import Measured, Round

INPUTS = 3
FLOOR = {"float32": 2e-6, "bfloat16": 1e-2}
"""Added to twice the stock model's own error, as the bound of a network's logits."""

PATIENCE = 300.0
"""Seconds that a provider has to build its model: a search through all kernels can take hours."""

Report = Callable[[str, int, int], None]
"""Takes what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class Settings:
    """What is compared. ``resolution`` None: the model's own. ``seconds``: of a provider in each round, at least."""

    model: str = "efficientnet_b0"
    batch: int = 1
    dtype: str = "float32"
    threads: int = 2
    resolution: int | None = None
    rounds: int = 7
    seconds: float = 0.3

    @property
    def size(self) -> tuple[int, int, int, int]:
        """Of the images, as (N, 3, H, W)."""
        side = self.resolution or models.default_resolution(self.model)
        return self.batch, 3, side, side

    @property
    def shape(self) -> str:
        return "x".join(map(str, self.size))

    def row(self, provider: str, **fields: Any) -> Row:
        what = {"operation": self.model, "shape": self.shape, "dtype": self.dtype, "threads": self.threads}
        return Row(provider=provider, **what, **fields)


class Process:
    """A worker (`worker.serve`) as seen by its parent."""

    def __init__(self, function: Callable[..., Any], arguments: tuple, log: Path) -> None:
        self._log = log
        self._connection, theirs = multiprocessing.Pipe()
        # Not multiprocessing.Process: a fork inherits pools whose threads are gone, and spawn runs the caller's script.
        with theirs, log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "effnet_ops.benchmark", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        worker.send(self._connection, (function, arguments))

    def receive(self, seconds: float | None = None) -> Any:
        """The answer to the oldest request, the first one being the building; `Failed` where it raised or died.

        ``seconds``: how long to wait for it.
        """
        if not self._connection.poll(seconds):
            self.process.kill()
            raise Failed(f"not ready within {seconds:.0f} seconds")
        try:
            good, value = worker.receive(self._connection)
        except (EOFError, ConnectionResetError):
            raise Failed(f"its process ended with exit code {self.process.wait()}{self._last_line()}") from None
        if not good:
            raise Failed(value)
        return value

    def ask(self, method: str, *arguments: Any) -> Any:
        with contextlib.suppress(BrokenPipeError):
            worker.send(self._connection, (method, arguments))
        return self.receive()

    def close(self) -> None:
        self._connection.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _last_line(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines() if self._log.exists() else []
        return f": {lines[-1]}" if lines else ""


class Reference:
    """The model in fp64: the logits of each input, and what the stock model's own rounding allows."""

    def __init__(self, model: nn.Module, inputs: Sequence[Tensor], dtype: str) -> None:
        exact_model = copy.deepcopy(model).double()
        rounded_model = copy.deepcopy(model).to(DTYPES[dtype])
        with torch.inference_mode(), effnet_ops.use_backend("reference"):
            self.logits = [exact_model(x.double()) for x in inputs]
            stock = [rounded_model(x.to(DTYPES[dtype])) for x in inputs]
        self.allowed = 2 * self.error(stock) + FLOOR[dtype]

    def error(self, logits: Sequence[Tensor]) -> float:
        """The worst relative error; infinite where the shapes are not the reference's."""
        if [tuple(y.shape) for y in logits] != [tuple(y.shape) for y in self.logits]:
            return float("inf")
        return max(relative_error(y, exact) for y, exact in zip(logits, self.logits, strict=True))

    def check(self, logits: Sequence[Tensor], remark: str = "") -> float:
        """The error; `Failed` where it is beyond what is allowed, with what is known of the provider's precision."""
        return gate("the logits", self.error(logits), self.allowed, remark)


@dataclass
class Entrant:
    """One of those that are compared, in a process of its own, with what has been measured of it so far."""

    name: str
    process: Process | None = None
    problem: str = ""
    error: float = 0.0
    choice: str = ""
    memory: int | None = None
    saved: int | None = None
    rounds: list[Round] = field(default_factory=list)

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """A failure ends this one's part and nobody else's."""
        try:
            yield
        except Failed as failure:
            self.problem = str(failure)
            self.close()

    def close(self) -> None:
        if self.process is not None:
            self.process.close()
            self.process = None

    def row(self, settings: Settings, run: str, mode: str = "forward") -> Row:
        what = {"run": run, "mode": mode, "choice": self.choice or None}
        if self.problem:
            return settings.row(self.name, problem=self.problem, **what)
        times = [1e3 * second for turn in self.rounds for second in turn.seconds]
        p20, p50, p80 = percentiles(times)
        return settings.row(
            self.name,
            p20=p20,
            p50=p50,
            p80=p80,
            repetitions=len(times),
            round_medians=[1e3 * statistics.median(turn.seconds) for turn in self.rounds],
            error=self.error,
            idle_load=statistics.median(turn.idle_load for turn in self.rounds),
            saved_bytes=self.saved,
            peak_rss_bytes=self.memory,
            **what,
        )


@dataclass
class _Contender(Entrant):
    """A provider."""

    provider: Provider = field(kw_only=True)


def compare(
    settings: Settings,
    providers: Sequence[Provider],
    report: Report = lambda what, done, total: None,
    quiet: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> list[Row]:
    """Measure each provider on a fresh model and fresh images.

    Args:
        settings: what to measure.
        providers: whose packages are installed.
        report: is told of the progress.
        quiet: a context that is entered while times are taken, for machines where others have to be asked to be still.

    Returns:
        A row for each provider: times, or the problem that it has.

    Raises:
        ValueError: the model is unknown, or does not take images of the resolution.
    """
    model = models.build(settings.model)
    with tempfile.TemporaryDirectory(prefix="effnet-ops-bench-") as folder:
        job = Job(Path(folder), settings.dtype, settings.threads)
        report("reference in fp64", 0, 1)
        reference = prepare(job, model, settings.size)
        entrants = [_Contender(provider.name, provider=provider) for provider in providers]
        try:
            _start(job, entrants, reference, report)
            with quiet():
                take_turns(entrants, settings, report)
                _finish(entrants, reference)
        finally:
            for entrant in entrants:
                entrant.close()
    run = run_name()
    return [entrant.row(settings, run) for entrant in entrants]


def run_name() -> str:
    """What rows that were measured together have in common: the time of day."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def prepare(job: Job, model: nn.Module, size: tuple[int, ...]) -> Reference:
    """Write what the workers load: the model with trained-like statistics, and fresh images."""
    model = models.with_statistics(model, size[-1])
    inputs = [torch.randn(size) for _ in range(INPUTS)]
    torch.save(model, job.folder / "model.pt")
    torch.save(inputs, job.folder / "inputs.pt")
    return Reference(model, inputs, job.dtype)


def _start(job: Job, entrants: list[_Contender], reference: Reference, report: Report) -> None:
    """Build each provider in its process, one after the other, and check what it computes."""
    unexported = _export(job, entrants, report)
    for done, entrant in enumerate(entrants):
        report(f"loading {entrant.provider.name}", done, len(entrants))
        if entrant.provider.exports and unexported:
            entrant.problem = unexported
            continue
        log = job.folder / f"{entrant.provider.name}.log"
        entrant.process = Process(Measured, (entrant.provider, job), log)
        with entrant.guarded():
            entrant.process.receive(PATIENCE)
            entrant.choice = entrant.process.ask("choice")
            entrant.error = reference.check(entrant.process.ask("logits"), entrant.provider.remark)


def _export(job: Job, entrants: list[_Contender], report: Report) -> str:
    """Write the ONNX file in a process of its own, if somebody needs it; the problem, or ""."""
    if not any(entrant.provider.exports for entrant in entrants):
        return ""
    report("exporting to ONNX", 0, len(entrants))
    process = Process(export_onnx, (job,), job.folder / "export.log")
    try:
        process.receive()
    except Failed as failure:
        return f"the export to ONNX failed: {failure}"
    finally:
        process.close()
    return ""


def take_turns(entrants: Sequence[Entrant], settings: Settings, report: Report) -> None:
    """Rounds in which everybody has one turn, in an order that changes; the first does not count.

    A process that has waited for the others to load has lost its place in the caches, and perhaps in memory.
    """
    order = random.Random()
    for done in range(-1, settings.rounds):
        report("measuring" if done >= 0 else "warming up", max(done, 0), settings.rounds)
        running = [entrant for entrant in entrants if entrant.process]
        for entrant in order.sample(running, len(running)):
            with entrant.guarded():
                turn = entrant.process.ask("round", settings.seconds)
                if done >= 0:
                    entrant.rounds.append(turn)
    report("measuring", settings.rounds, settings.rounds)


def _finish(entrants: list[_Contender], reference: Reference) -> None:
    """Memory, and the outputs once more: what computed nonsense while it was timed has no time."""
    for entrant in entrants:
        if entrant.process is None:
            continue
        with entrant.guarded():
            if entrant.provider.heap:
                entrant.memory = entrant.process.ask("peak_memory")
            error = reference.check(entrant.process.ask("logits"), entrant.provider.remark)
            entrant.error = max(entrant.error, error)
