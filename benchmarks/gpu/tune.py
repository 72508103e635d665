"""Times configurations of our kernels around the rule's on this GPU, and writes the faster ones to kernels/tuning.json.

python benchmarks/gpu/tune.py                      # at most 9 minutes; shapes that have an entry are not timed again

Each number of a configuration is halved and doubled in turn, and what is at least 3 % faster is kept. A configuration
that does not compile, or whose result differs from the rule's, is dropped; one that loses the device ends the script,
and the rule stays. Where a block would make both gradients of a product in one launch, two launches are timed, too, and
the table says which it will be ("fits").
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from baselines import DRY, REAL
from ours import kernels
from rows import PART_SECONDS, Job, Session, relative_error
from torch import Tensor

from effnet_ops.kernels import tuning

GAIN = 0.97


def candidates(config: tuning.Config, name: str) -> Iterator[tuning.Config]:
    if name == "fits":
        yield {**config, name: 1 - config[name]}
        return
    for value in (config[name] // 2, config[name] * 2):
        if value >= 1:
            yield {**config, name: value}


def first_result(run: Callable[[], Any]) -> Tensor:
    result = run()
    return result[0] if isinstance(result, tuple) else result


class Tuner:
    """Tunes the first operation that a call of a kernel's host function chooses a configuration for."""

    def __init__(self, session: Session, run: Callable[[], Any]) -> None:
        self.session, self.run = session, run
        self.asked: list[tuple[str, dict[str, int]]] = []
        choose = tuning.choose

        def record(operation: str, shape: dict[str, int], device: torch.device) -> tuning.Config:
            self.asked.append((operation, dict(shape)))
            return choose(operation, shape, device)

        with mock.patch.object(tuning, "choose", record):
            self.expected = first_result(run)
        self.operation, self.shape = self.asked[0]
        self.config = tuning.from_rule(self.operation, self.shape, tuning.architecture(session.device))

    def milliseconds(self, config: tuning.Config) -> float:
        """The median, or infinity for a configuration that cannot run or is wrong."""
        choose = tuning.choose

        def chosen(operation: str, shape: dict[str, int], device: torch.device) -> tuning.Config:
            return config if operation == self.operation else choose(operation, shape, device)

        with mock.patch.object(tuning, "choose", chosen):
            try:
                if not relative_error(first_result(self.run), self.expected) <= 1e-2:
                    return float("inf")
                return self.session.times(self.run)["p50"]
            except Exception as problem:
                print(f"  dropped {config}: {str(problem)[:100]}", flush=True)
                if self.session.lost():
                    raise
                return float("inf")

    def best(self) -> tuple[tuning.Config, float, float]:
        """The fastest configuration found, its time, and the rule's."""
        best, rule = self.config, self.milliseconds(self.config)
        fastest = rule
        for name in self.config:
            for config in candidates(best, name):
                elapsed = self.milliseconds(config)
                if elapsed < GAIN * fastest:
                    best, fastest = config, elapsed
        return best, fastest, rule


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=PART_SECONDS)
    parser.add_argument("--dry-run", action="store_true", help="under TRITON_INTERPRET=1: two shapes, nothing written")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        print("no GPU here: nothing is tuned", file=sys.stderr)
        return 3
    session = Session("cpu" if options.dry_run else "cuda", None, options.seconds)
    written = json.loads(tuning.TABLE.read_text(encoding="utf-8"))
    for job in kernels(DRY if options.dry_run else REAL):
        if not job.provider.endswith("triton"):
            continue
        if time.monotonic() > session.end:
            print("out of time: run the same command again to go on")
            return 2
        try:
            found = tuned(session, job, written)
        except Exception as problem:
            print(f"FAILED {job.key}: {problem}", flush=True)
            found = False
        lost = session.lost()
        if (found or lost) and not options.dry_run:
            tuning.TABLE.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
            # Two launches that are compared with one run as they were tuned.
            tuning.table.cache_clear()
            tuning._chosen.cache_clear()
        if lost:
            print(f"the device was lost by {job.key}: run the same command again to go on")
            return 2
    print("complete")
    return 0


def tuned(session: Session, job: Job, written: dict[str, Any]) -> bool:
    """Whether the shape of this job had no entry in the table ``written``, and has one now."""
    tuner = Tuner(session, job.prepare().run)
    arch, bucket = tuning.architecture(session.device).name, tuning.bucket(tuner.shape)
    entries = written["configurations"].setdefault(tuner.operation, {}).setdefault(arch, {})
    if bucket in entries:
        return False
    today = datetime.date.today().isoformat()
    # What stays if one of the others loses the device, so that the next run does not begin with this shape again.
    entries[bucket] = {**tuner.config, "origin": f"rule: another configuration lost the device, {today}"}
    config, elapsed, rule = tuner.best()
    if elapsed == float("inf"):
        del entries[bucket]
        print(f"{job.key}: nothing runs and gives the same result twice", flush=True)
        return False
    print(f"{job.key}: {rule:.4f} ms by the rule, {elapsed:.4f} ms with {config}", flush=True)
    device, triton = session.environment["device"], session.environment["versions"].get("triton")
    entries[bucket] = {**config, "origin": f"{device}, Triton {triton}, {today}: {elapsed:.4f} ms, rule {rule:.4f}"}
    return True


if __name__ == "__main__":
    sys.exit(main())
