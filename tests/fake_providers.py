"""Providers for the tests of the benchmark: each is built in a process of its own, which imports this module."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from effnet_ops import backends
from effnet_ops.benchmark.providers import Job, Provider, Runner

HUNGER = 16 << 20
"""Floats that the hungry one allocates in each call."""


def _runner(job: Job, run: Callable[[nn.Module, Tensor], Tensor]) -> Iterator[Runner]:
    model = job.model()
    yield Runner("", lambda x: x, torch.inference_mode()(lambda x: run(model, x)))


def _wrong(job: Job) -> Iterator[Runner]:
    return _runner(job, lambda model, x: model(x) * (1 + 1e-3))


def _later_wrong(job: Job) -> Iterator[Runner]:
    calls = iter(range(1_000_000))
    return _runner(job, lambda model, x: model(x) * (1 if next(calls) < 4 else float("nan")))


def _hungry(job: Job) -> Iterator[Runner]:
    return _runner(job, lambda model, x: model(x) + 0 * torch.ones(HUNGER).sum())


def _backend(job: Job) -> Iterator[Runner]:
    raise LookupError(backends.select(torch.empty(1, 1, 1, 1)))


def _dying(job: Job) -> Iterator[Runner]:
    print("out of luck", flush=True)
    os._exit(3)


def _slow(job: Job) -> Iterator[Runner]:
    time.sleep(3600)
    return _runner(job, lambda model, x: model(x))


FAKES = {
    function.__name__.strip("_"): Provider(function.__name__.strip("_"), function)
    for function in (_wrong, _later_wrong, _hungry, _backend, _dying, _slow)
}
