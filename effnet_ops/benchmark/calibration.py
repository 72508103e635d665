"""What the machine can do at best, measured by loops that are compiled with the package: multiply-adds and copies."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from effnet_ops import _native
from effnet_ops.benchmark.rows import Row

COPIED = 256 << 20
"""Bytes of each of the two arrays: well beyond the last cache level of any processor of today but a few."""


class Peaks(NamedTuple):
    """The best of several runs on ``threads`` threads at once.

    Attributes:
        multiply_adds: GFLOP/s by (instruction set, dtype); a multiply-add is two operations.
        copy: GB/s read and written together.
    """

    threads: int
    multiply_adds: dict[tuple[str, str], float]
    copy: float

    def of(self, dtype: str, isa: str | None = None) -> float:
        """GFLOP/s that kernels in ``dtype`` could reach with an instruction set, by default with the best for it.

        float32's where there are no instructions for ``dtype``.
        """
        found = {
            kind: [peak for (name, kind_), peak in self.multiply_adds.items() if kind_ == kind and isa in (None, name)]
            for kind in (dtype, "float32")
        }
        return max(found[dtype] or found["float32"])

    def rows(self) -> list[Row]:
        rows = [
            Row(operation="multiply_add", provider=isa, shape="", dtype=dtype, threads=self.threads, gflop_per_s=peak)
            for (isa, dtype), peak in self.multiply_adds.items()
        ]
        copy = Row(
            operation="copy",
            provider="memcpy",
            shape=f"{COPIED >> 20} MiB",
            dtype="uint8",
            threads=self.threads,
            gb_per_s=self.copy,
        )
        return [*rows, copy]


def measure_peaks(threads: int, seconds: float = 0.05, repetitions: int = 5) -> Peaks:
    """Measure for about ``seconds`` x ``repetitions`` each; RuntimeError where the C++ part is missing."""
    native = _native.module
    if native is None:
        raise RuntimeError(f"the peaks of the machine cannot be measured: {_native.why_missing}")
    multiply_adds = {}
    for isa in native.available_isas():
        for dtype in ("float32", "bfloat16"):
            if native.multiply_adds(isa, dtype == "bfloat16", 1):
                multiply_adds[isa, dtype] = _multiply_adds(isa, dtype == "bfloat16", threads, seconds, repetitions)
    return Peaks(threads, multiply_adds, _copy(threads, repetitions))


def _multiply_adds(isa: str, bfloat16: bool, threads: int, seconds: float, repetitions: int) -> float:
    native, probe = _native.module, 100_000
    native.multiply_adds(isa, bfloat16, probe)
    start = time.perf_counter()
    native.multiply_adds(isa, bfloat16, probe)
    iterations = max(probe, int(probe * seconds / (time.perf_counter() - start)))
    operations = threads * native.multiply_adds(isa, bfloat16, iterations)
    return operations / 1e9 / _best(threads, repetitions, lambda _: native.multiply_adds(isa, bfloat16, iterations))


def _copy(threads: int, repetitions: int) -> float:
    part = COPIED // threads
    # Written to, since the pages of fresh zeros are all the same one.
    sources = [bytearray(b"\1") * part for _ in range(threads)]
    destinations = [bytearray(b"\2") * part for _ in range(threads)]
    copy = _native.module.copy
    return 2 * part * threads / 1e9 / _best(threads, repetitions, lambda i: copy(destinations[i], sources[i]))


def _best(threads: int, repetitions: int, function: Callable[[int], object]) -> float:
    """Seconds from the common start of ``function(0)`` ... on all threads to the last one's end, at best."""
    barrier = threading.Barrier(threads)

    def timed(index: int) -> tuple[float, float]:
        barrier.wait()
        start = time.perf_counter()
        function(index)
        return start, time.perf_counter()

    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repetitions):
            starts, ends = zip(*pool.map(timed, range(threads)), strict=True)
            best = min(best, max(ends) - min(starts))
    return best
