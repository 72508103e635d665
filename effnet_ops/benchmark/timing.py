"""Times of several functions that are compared with each other on a machine that others use too."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch


class Timing(NamedTuple):
    """Seconds of one call: the median, and the 20th and 80th percentiles around it."""

    p20: float
    p50: float
    p80: float
    repetitions: int


LEAST_ROUNDS = 3


def interleave(
    functions: Mapping[str, Callable[[], object]],
    seconds: float,
    warmup: int = 2,
    report: Callable[[float], object] = lambda share: None,
) -> dict[str, Timing]:
    """Call the functions in turn for about ``seconds`` in total, at least three rounds, and return each one's times.

    A machine that slows down hits all of them alike, and every round has an order of its own (the same ones in each
    run), since a function pays for the caches and the freed memory that the one before it left behind. ``report`` is
    told after each call, outside its time, which share of the work is done.
    """
    names = list(functions)
    calls, least = 0, len(names) * (warmup + LEAST_ROUNDS)
    for name in names * warmup:
        functions[name]()
        calls += 1
        report(calls / least)
    samples: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    rounds, begin = 0, time.perf_counter()
    while rounds < LEAST_ROUNDS or time.perf_counter() < begin + seconds:
        for name in order.sample(names, len(names)):
            start = time.perf_counter()
            functions[name]()
            samples[name].append(time.perf_counter() - start)
            calls += 1
            # The warm-up was reported by calls alone, so time counts for what is left after it.
            before = len(names) * warmup / least
            spent = (time.perf_counter() - begin) / seconds if seconds > 0 else 1.0
            report(min(calls / least, before + (1 - before) * spent, 1.0))
        rounds += 1
    return {name: Timing(*percentiles(values), rounds) for name, values in samples.items()}


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    quantiles = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return tuple(torch.tensor(values, dtype=torch.float64).quantile(quantiles).tolist())


class Ratio(NamedTuple):
    """How many times as long one takes as another: the median over the rounds, and its spread."""

    p20: float
    p50: float
    p80: float


def ratio(slower: Sequence[float], faster: Sequence[float]) -> Ratio:
    """``slower`` over ``faster``, round by round: what slows the machine in a round hits both.

    Args:
        slower, faster: the medians of the same rounds.
    """
    return Ratio(*percentiles([a / b for a, b in zip(slower, faster, strict=True)]))
