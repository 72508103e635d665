"""The Triton kernels in Triton's interpreter, on the CPU, in a test session of its own: see the Makefile.

Triton decides when a kernel is defined whether it is interpreted, so TRITON_INTERPRET=1 has to be in the environment
before anything is imported. Fixtures, cases and helpers are those of the other tests.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

import effnet_ops

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("tests/interpreter needs TRITON_INTERPRET=1 in the environment")


@pytest.fixture(autouse=True)
def triton() -> Iterator[None]:
    """Every public function and operator runs on Triton kernels."""
    with effnet_ops.use_backend("triton"):
        yield
