"""The search for the largest batch that fits into a given memory, and the bytes that it counts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import memory


@pytest.mark.parametrize("noise", [0, 90, -90])
@pytest.mark.parametrize("limit", [150, 1000, 1099, 8000])
def test_largest_batch_is_the_last_that_fits(limit: int, noise: int) -> None:
    def peak(batch: int) -> int | None:
        return None if batch > 100 else 50 + 100 * batch + (noise if batch > 6 else 0)

    expected = max(batch for batch in range(100) if batch == 0 or peak(batch) <= limit)
    tried = memory.largest_batch(peak, limit, (2, 6))
    assert max((batch for batch, used in tried.items() if used is not None and used <= limit), default=0) == expected
    assert len(tried) <= 6


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_a_try_is_a_process_of_its_own() -> None:
    assert memory.in_own_process("efficientnet_lite0", 32, 2, "always") > 100e6
