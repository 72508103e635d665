"""Runs an objective over many networks and seeds: resumable, in parallel, and with the same results either way."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import torch

from effnet_ops.models import ScaledSpec, spec_from_dict, spec_to_dict
from effnet_ops.scaling.counters import count
from effnet_ops.scaling.machine import origin
from effnet_ops.scaling.objective import Objective, describe, scored
from effnet_ops.scaling.rows import Row, RowFile

FORMAT = "effnet_ops scaling runs"
FIELDS = ("key", "seed", "score", "details")


@dataclass(frozen=True)
class Job:
    """One run: a network, a seed, and tags that go with the result (JSON)."""

    spec: ScaledSpec
    seed: int
    tags: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What the run's outcome depends on beside the objective: the specification without its name, and the seed."""
        data = {key: value for key, value in spec_to_dict(self.spec).items() if key != "name"}
        text = json.dumps([data, self.seed], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Runs:
    """Rows in the order of the jobs; ``new`` of them were run now."""

    rows: tuple[Row, ...]
    new: int


def header(objective: Objective) -> Row:
    """What rows of one results file have in common."""
    return {"format": FORMAT, "objective": describe(objective)}


def evaluate(
    jobs: Sequence[Job],
    objective: Objective,
    *,
    results: str | os.PathLike[str] | None = None,
    workers: int = 1,
    progress: bool = False,
) -> Runs:
    """Run every job that ``results`` does not have yet, append each as it ends, and return all rows.

    A row holds ``key``, ``seed``, ``tags``, ``spec``, ``macs``, ``parameters``, ``score``, ``details`` (both from the
    objective), ``seconds`` and ``origin``. Where the objective fails, what was done before is in the file.

    Raises ValueError for workers below 1 or a results file that is damaged, foreign or in use; whatever the objective
    raises; RuntimeError where a worker process dies.
    """
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ValueError(f"workers must be a whole number of at least 1, got {workers!r}")
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(RowFile(results, header(objective), FIELDS)) if results is not None else None
        known = {row["key"]: row for row in (file.rows if file else ())}
        todo = list({job.key: job for job in jobs if job.key not in known}.values())
        for row in _bar(_run_all(todo, objective, workers), len(todo), progress):
            if file is not None:
                file.append(row)
            known[row["key"]] = row
    return Runs(tuple({**known[job.key], "tags": job.tags} for job in jobs), len(todo))


def spec_of(row: Row) -> ScaledSpec:
    """The network of a row."""
    return spec_from_dict(row["spec"])


def _run_all(todo: Sequence[Job], objective: Objective, workers: int) -> Iterator[Row]:
    """Rows as they are ready."""
    if workers == 1 or len(todo) < 2:
        yield from (_run(job, objective) for job in todo)
        return
    context = multiprocessing.get_context("spawn")
    workers = min(workers, len(todo))
    pool = ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,))
    try:
        waiting = iter(todo)
        running = {pool.submit(_run, job, objective) for _, job in zip(range(2 * workers), waiting, strict=False)}
        while running:
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                yield future.result()
            running |= {pool.submit(_run, job, objective) for _, job in zip(finished, waiting, strict=False)}
    except BrokenProcessPool:
        raise RuntimeError("a worker process died (out of memory, or killed); rows so far are in the file") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _run(job: Job, objective: Objective) -> Row:
    costs, start = count(job.spec), time.perf_counter()
    score = scored(objective, job.spec, job.seed)
    return {
        "key": job.key,
        "seed": job.seed,
        "tags": job.tags,
        "spec": spec_to_dict(job.spec),
        "macs": costs.macs,
        "parameters": costs.parameters,
        "score": score.value,
        "details": dict(score.details),
        "seconds": round(time.perf_counter() - start, 2),
        "origin": origin(),
    }


def _bar(rows: Iterator[Row], total: int, shown: bool) -> Iterator[Row]:
    """The rows, with a progress bar on stderr that knows the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task("runs", total=total)
        for row in rows:
            yield row
            bar.update(task, advance=1, description=f"{row['seconds']:.1f} s a run")
