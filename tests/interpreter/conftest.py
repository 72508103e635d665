"""The Triton kernels in Triton's interpreter, on the CPU, in a test session of its own: see the Makefile.

Triton decides when a kernel is defined whether it is interpreted, so TRITON_INTERPRET=1 has to be in the environment
before anything is imported. Fixtures, cases and helpers are those of the other tests.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import effnet_ops
from effnet_ops.ops import gpu

sys.path.append(str(Path(__file__).parents[1] / "emulation"))

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("tests/interpreter needs TRITON_INTERPRET=1 in the environment")


@pytest.fixture(autouse=True)
def triton() -> Iterator[None]:
    """Every public function and operator runs on Triton kernels."""
    with effnet_ops.use_backend("triton"):
        yield


@pytest.fixture(scope="session")
def emulated_operators() -> None:
    """The CUDA C++ kernels, on the emulated GPU, as operators for the CPU."""
    import emulator
    from cuda_kernels import Kernels, register_operators

    if emulator.compiler() is None:
        pytest.skip("no C++ compiler knows -fsanitize=thread and -fsanitize=alignment")
    register_operators(Kernels())


@pytest.fixture
def cuda_depthwise(emulated_operators: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks convolve with the CUDA C++ kernels, and not with Triton's."""
    from effnet_ops.ops.triton import mbconv

    monkeypatch.setattr(gpu, "block_depthwise", lambda *_: "cuda")
    monkeypatch.delitem(mbconv._DEPTHWISE, "triton")
