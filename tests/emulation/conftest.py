"""Libraries of emulated kernels, one a session, and a machine without tensors for every test."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import emulator
import pytest
from cuda_kernels import Kernels, register_operators


@pytest.fixture(scope="session")
def needs_compiler() -> None:
    if emulator.compiler() is None:
        pytest.skip("no C++ compiler knows -fsanitize=thread and -fsanitize=alignment")


@pytest.fixture(scope="session")
def sample_machine(needs_compiler: None) -> emulator.Machine:
    return emulator.Machine("samples", sorted((emulator.HERE / "samples").glob("*.cu")))


@pytest.fixture
def samples(sample_machine: emulator.Machine) -> Iterator[emulator.Machine]:
    """The kernels of samples/."""
    sample_machine.reset()
    yield sample_machine
    sample_machine.reset()


@pytest.fixture(scope="session")
def kernel_machine(needs_compiler: None) -> Kernels:
    return Kernels()


@pytest.fixture
def kernels(kernel_machine: Kernels) -> Iterator[Kernels]:
    """The kernels of csrc/cuda."""
    kernel_machine.reset()
    yield kernel_machine
    kernel_machine.reset()


@pytest.fixture(scope="session")
def bindings(kernel_machine: Kernels) -> ctypes.CDLL:
    """The bindings beside the emulated kernels, registered for the CPU."""
    return register_operators(kernel_machine)
