"""Fixtures of all tests: a seed of its own for every test, poisoned memory, and the backends that can run here."""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import effnet_ops

# The checkout's folder kernels/ must not hide the package of that name, which transformers imports if it is installed.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [*(path for path in sys.path if Path(path).resolve() != ROOT), str(ROOT)]

# Two test processes on two cores: a second thread in each only waits. The tests that are about threads ask for more.
torch.set_num_threads(1)

# Interpreted Triton kernels need an environment, and so a session, of their own.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreter"]

AVAILABLE = [
    name
    for name, reason in effnet_ops.available_backends().items()
    if not reason and not effnet_ops.backends.BACKENDS[name].refuses(torch.empty(1, 1, 1, 1))
]


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    """Inputs differ between tests, and with EFFNET_OPS_TEST_SEED in the environment, but not between two runs."""
    base = int(os.environ.get("EFFNET_OPS_TEST_SEED", "0"))
    torch.manual_seed(base + zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def poison() -> Iterator[None]:
    """Fill uninitialised memory with NaN, so that an element which a kernel forgets to write fails the test."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Run the kernels on two threads."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(params=AVAILABLE)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend that can run here, on the CPU's tensors, in use."""
    with effnet_ops.use_backend(request.param):
        yield request.param
