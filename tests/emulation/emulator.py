"""Compiles device sources for the host, runs them on an emulated GPU, and gives the detectors' reports as exceptions.

docs/emulation.md describes the machine. Objects are kept in build/emulation under a hash of all that went into them, so
that a session compiles what changed, once, whatever the number of its processes: they share the work through locks.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CUDA = ROOT / "csrc" / "cuda"
ACTIVATIONS = ROOT / "csrc" / "activations.h"
FOLDER = ROOT / "build" / "emulation"
_INCLUDE = "tests/emulation/include"

_COMMON = ["-std=c++17", "-g1", "-fno-omit-frame-pointer", "-fPIC", "-Wall", "-Wno-unknown-pragmas"]
_RUNTIME = [*_COMMON, "-O2", f"-I{_INCLUDE}"]
# None of these changes what a kernel computes; -ffp-contract=off keeps the compiler from fusing of its own accord.
_DEVICE = [
    *_COMMON, "-x", "c++", "-Og", "-ffp-contract=off", "-fno-strict-aliasing", "-fsanitize=thread",
    "-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero",
    "-include", f"{_INCLUDE}/prelude.h", f"-I{_INCLUDE}", "-Icsrc/cuda",
]  # fmt: skip


_KINDS = {"input": 0, "output": 1, "inout": 2}


class EmulationError(AssertionError):
    """What a detector found: the kernel, block and thread, the address, and the lines of the source."""


@functools.cache
def compiler() -> str | None:
    """A C++ compiler with the instrumentation that the detectors need, or None."""
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++")):
        path = shutil.which(name)
        if path is None:
            continue
        command = [path, *_DEVICE, "-c", "-o", os.devnull, "-"]
        if subprocess.run(command, input=b"", cwd=ROOT, capture_output=True, check=False).returncode == 0:
            return path
    return None


def _hash(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@functools.cache
def _headers(folder: str) -> str:
    """What the objects of a folder's sources may depend on."""
    shadows = [*sorted((HERE / "include").iterdir()), HERE / "runtime" / "emulation.h"]
    more = {"runtime": HERE / "runtime", "samples": HERE / "samples"}.get(folder, CUDA)
    files = [*shadows, ACTIVATIONS, *(path for path in sorted(more.iterdir()) if path.suffix in (".h", ".cuh"))]
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    return _hash(version, [(path.name, path.read_bytes()) for path in files])


@contextlib.contextmanager
def _lock(path: Path, wait: bool) -> Iterator[bool]:
    """Whether this process holds the lock; with ``wait`` it does."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def _run(command: Sequence[str], out: Path) -> None:
    """``command`` writes ``out``, which appears whole or not at all."""
    partial = out.with_suffix(f".{os.getpid()}")
    done = subprocess.run([*command, "-o", str(partial)], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    partial.rename(out)


def _prune(current: Path) -> None:
    """Removes what earlier versions of the same source left, unless another process may still want it."""
    for path in FOLDER.glob(current.name.rsplit("-", 1)[0] + "-*"):
        if path.name.split(".")[0] != current.name.split(".")[0] and path.stat().st_mtime < time.time() - 3600:
            path.unlink(missing_ok=True)


def _object(source: Path) -> tuple[Path, list[str]]:
    """Where a source's object lies, and the command that makes it."""
    name = str(source.relative_to(ROOT))
    flags = _RUNTIME if source.parent.name == "runtime" else _DEVICE
    key = _hash(_headers(source.parent.name), flags, source.read_bytes())
    return FOLDER / f"{source.stem}-{key}.o", [compiler(), *flags, "-c", name]


def build(name: str, sources: Sequence[Path]) -> Path:
    """The shared library of ``sources`` and the runtime."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    objects = dict(_object(source) for source in [*sorted((HERE / "runtime").glob("*.cpp")), *sources])
    missing = [path for path in objects if not path.exists()]
    while missing:
        # First what nobody works at, then what somebody does.
        for wait in (False, True):
            for path in missing:
                with _lock(path.with_suffix(".lock"), wait) as mine:
                    if mine and not path.exists():
                        _run(objects[path], path)
                        _prune(path)
        missing = [path for path in missing if not path.exists()]
    library = FOLDER / f"{name}-{_hash(sorted(objects))}.so"
    with _lock(library.with_suffix(".lock"), True):
        if not library.exists():
            _run([compiler(), "-shared", "-Wl,-z,defs", *map(str, sorted(objects)), "-lm"], library)
            _prune(library)
    return library


class Machine:
    """An emulated GPU with the kernels of one library, and the memory that they may touch.

    Tensors lie in the emulated GPU's memory until the next `reset`: do not use them after it.
    """

    def __init__(self, name: str, sources: Sequence[Path]) -> None:
        self.path = build(name, sources)
        self.library = ctypes.CDLL(str(self.path))
        self.library.emulation_allocate.restype = ctypes.c_void_p
        self.library.emulation_allocate.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
        self.library.emulation_free.argtypes = [ctypes.c_void_p]
        self.library.emulation_reset.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_size_t, *[ctypes.c_uint64] * 2]
        self.library.emulation_error.restype = ctypes.c_char_p
        for name in ("emulation_accesses", "emulation_launches", "emulation_kernel"):
            getattr(self.library, name).restype = ctypes.c_uint64
        self.reset()

    def reset(
        self,
        seed: int = 0,
        *,
        multiprocessors: int = 4,
        shared_limit: int = 227 * 1024,
        blocks: tuple[int, int] = (0, 2**63),
    ) -> None:
        """Forget all tensors and reports.

        Args:
            seed: other than 0, blocks and threads run in a random order.
            multiprocessors, shared_limit: of the device; the latter is what a block may ask for, in bytes.
            blocks: the first block that runs, and the one after the last; not for cooperative launches.
        """
        self.library.emulation_reset(seed, multiprocessors, shared_limit, *blocks)

    def sabotage(
        self, file: str = "", line: int = 0, *, late_groups: int = 0, without_tensor_maps: bool = False
    ) -> None:
        """Break the kernels until the next reset, to see that it is noticed.

        Args:
            file, line: barriers there do nothing; ``file`` is the end of its path.
            late_groups: waits for asynchronous copies leave so many groups more open.
            without_tensor_maps: no tensor can be mapped, as with an old driver.
        """
        self.library.emulation_break(file.encode(), line, late_groups, without_tensor_maps)

    @property
    def accesses(self) -> int:
        """How many accesses to shared and global memory were checked since the last reset."""
        return self.library.emulation_accesses()

    @property
    def launches(self) -> int:
        return self.library.emulation_launches()

    @property
    def launched(self) -> list[str]:
        """The kernels launched since the last reset, in order, with their template arguments."""
        offsets = map(self.library.emulation_kernel, map(ctypes.c_uint64, range(self.launches)))
        return [self._frames(offset)[-1][0] for offset in offsets]

    def empty(
        self,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        kind: str = "output",
        misalignment: int = 16,
        fill: bool = True,
    ) -> Tensor:
        """A tensor in guarded memory, full of NaN, that kernels may write, and read once it is written.

        ``kind``: "input" may not be written, "inout" may be read at once. It begins ``misalignment`` bytes behind a
        multiple of 256: by default it has just the alignment that kernels.h asks for. Without
        ``fill`` it is zero, and takes no memory where nobody touches it.
        """
        count = torch.Size(shape).numel()
        size = count * dtype.itemsize
        address = self.library.emulation_allocate(name.encode(), size, misalignment, _KINDS[kind])
        if not address:
            raise MemoryError(f"no {size} bytes for {name}")
        if count == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        buffer = (ctypes.c_char * size).from_address(address)
        tensor = torch.frombuffer(buffer, dtype=dtype).view(shape)
        return tensor.fill_(float("nan")) if fill and dtype.is_floating_point else tensor

    def upload(self, name: str, values: Tensor, *, kind: str = "input", misalignment: int = 16) -> Tensor:
        """The values in guarded memory, contiguous."""
        return self.empty(name, values.shape, values.dtype, kind=kind, misalignment=misalignment).copy_(values)

    def free(self, tensor: Tensor) -> None:
        """From here on, kernels that touch it are reported."""
        self.library.emulation_free(tensor.data_ptr())

    def check(self) -> None:
        """Raise what a detector has reported."""
        report = self.library.emulation_error().decode()
        if report:
            raise EmulationError(self._explain(report))

    def call(self, function: str, *arguments: Any, result: Any = ctypes.c_int) -> Any:
        """The result of one of the library's functions; `EmulationError` if a detector speaks meanwhile."""
        called = getattr(self.library, function)
        called.restype = result
        value = called(*arguments)
        self.check()
        return value

    def _explain(self, report: str) -> str:
        """The report with source lines instead of code addresses."""
        report = re.sub(r"\{kernel:(\d+)\}", lambda match: self._frames(int(match[1]))[-1][0], report)

        def stack(match: re.Match[str]) -> str:
            # What stands for an instruction is not the culprit, and below the kernel is the machinery of the launch.
            found = [place for offset in match[1].split() for _, place in self._frames(int(offset) - 1)]
            places = [place for place in found if "tests/emulation/runtime" not in place and _INCLUDE not in place]
            return "".join(f"\n    {place}" for place in places if not place.startswith(("/usr", "?")))

        report = re.sub(r"\{stack:([\d ]*)\}", stack, report)
        # The address is where the call to the detector returns to.
        return re.sub(r"\{code:(\d+)\}", lambda match: self._frames(int(match[1]) - 1)[0][1], report)

    @functools.lru_cache(maxsize=256)  # noqa: B019
    def _frames(self, offset: int) -> list[tuple[str, str]]:
        """Functions and lines at an offset in the library, the innermost inlined function first."""
        tool = shutil.which("addr2line")
        if tool is None:
            return [(f"{self.path.name}+{offset:#x}",) * 2]
        command = [tool, "-e", str(self.path), "-fCi", hex(offset)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        places = [place.split(" (")[0].replace(f"{ROOT}/", "") for place in lines[1::2]]
        return list(zip(lines[::2], places, strict=True))
