"""Compiles without a GPU what the package would launch on one, and reads what the machine code of each kernel needs.

Host code runs on meta tensors while its launches are recorded, so what is compiled is what is launched.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction

from effnet_ops.kernels import tuning

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPES = {torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


class Launch(NamedTuple):
    """One kernel with the types of its run-time arguments, its constants, warps, stages, most registers, and grid."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int
    maxnreg: int | None
    programs: int
    values: tuple[tuple[str, int], ...]
    """The run-time integers."""

    @property
    def compiled_key(self) -> tuple[Any, ...]:
        """Equal where the machine code is."""
        return self.kernel.__name__, self.signature, repr(self.constants), *self[3:6]

    def __str__(self) -> str:
        shown = {name: value for name, value in self.constants if value is not None}
        return f"{self.kernel.__name__}({shown}, warps={self.num_warps})"


class Usage(NamedTuple):
    """What one program needs: registers a thread, bytes of stack (spilled registers live there), of shared memory."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    ptx: str


@contextlib.contextmanager
def recorded(architecture: str) -> Iterator[list[Launch]]:
    """The launches inside the ``with`` block, as host code makes them for this architecture; nothing is launched."""
    launches: list[Launch] = []

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(_launch(kernel, args, grid, kwargs))

    with tuned_for(architecture), pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        yield launches


@contextlib.contextmanager
def tuned_for(architecture: str) -> Iterator[None]:
    """Configurations are those of this architecture, whatever the device."""
    tuning._chosen.cache_clear()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tuning, "architecture", lambda device: tuning.ARCHITECTURES[architecture])
            yield
    finally:
        tuning._chosen.cache_clear()


def distinct(launches: Iterable[Launch]) -> list[Launch]:
    """One launch for each machine code."""
    return list({launch.compiled_key: launch for launch in launches}.values())


def _launch(kernel: JITFunction, args: tuple[Any, ...], grid: Any, kwargs: dict[str, Any]) -> Launch:
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in kwargs}
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    constant = {param.name for param in kernel.params if param.is_constexpr}
    signature, constants, integers = {}, {}, {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            signature[name] = TYPES[value.dtype]
        elif value is None or name in constant:
            constants[name] = value
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            integers[name] = value
        else:
            signature[name] = "fp32"
    programs = 1
    for size in grid(values) if callable(grid) else grid:
        programs *= size
    return Launch(
        kernel,
        tuple(signature.items()),
        tuple(constants.items()),
        options.get("num_warps", 4),
        options.get("num_stages", 3),
        options.get("maxnreg"),
        programs,
        tuple(integers.items()),
    )


def _source(launch: Launch) -> ASTSource:
    """Pointers are taken to be 16-byte aligned, as PyTorch's are."""
    names, types = launch.kernel.arg_names, dict(launch.signature)
    signature = {name: types.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in launch.constants}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    return ASTSource(launch.kernel, signature, constants, aligned)


def _target(architecture: str) -> GPUTarget:
    return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)


# Once in a session what several tests look at.
_compiled: dict[tuple[Any, ...], Usage] = {}


def compile_launch(launch: Launch, architecture: str) -> Usage:
    """Compile for an architecture such as "sm_90"."""
    key = (architecture, *launch.compiled_key)
    if key not in _compiled:
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "maxnreg": launch.maxnreg}
        compiled = triton.compile(_source(launch), target=_target(architecture), options=options)
        _compiled[key] = Usage(*_resources(compiled.asm["cubin"]), compiled.metadata.shared, compiled.asm["ptx"])
    return _compiled[key]


def intermediate(launch: Launch, architecture: str) -> str:
    """The text of Triton's intermediate representation (TTIR), which takes a tenth of the time of machine code."""
    source, target = _source(launch), _target(architecture)
    backend = make_backend(target)
    options = backend.parse_options({"num_warps": launch.num_warps, "num_stages": launch.num_stages})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    module = source.make_ir(target, options, functions, modules, context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    return str(stages["ttir"](module, {}))


def accesses(ptx: str) -> set[tuple[str, int]]:
    """How a program reads and writes global memory: ("load", "copy" to shared memory or "store", bytes a thread)."""
    found = set()
    for kind, modifiers, bits in re.findall(r"\b(ld|st)\.global((?:[.:]+\w+)*)\.[bfsu](\d+)", ptx):
        vector = re.search(r"\.v(\d)", modifiers)
        found.add(("load" if kind == "ld" else "store", int(bits) // 8 * (int(vector[1]) if vector else 1)))
    return found | {("copy", size) for group in copies(ptx) for size in group}


def copies(ptx: str) -> list[list[int]]:
    """The bytes a thread of each copy to shared memory, for each group of copies: one load of the kernel's text."""
    groups = re.split(r"cp\.async\.commit_group", ptx)
    pattern = re.compile(r"cp\.async\.\w+\.shared\.global\s*\[[^]]*\],\s*\[[^]]*\],\s*(\w+)")
    return [[int(size, 0) for size in pattern.findall(group)] for group in groups]


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of the only kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local
