"""Compiles Triton kernels without a GPU, and reads what the machine code of each needs."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from effnet_ops.kernels.registry import Compiled

TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Usage(NamedTuple):
    """What one program needs: registers a thread, bytes of stack (spilled registers live there) and of shared memory."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    ttir: str


def compile_kernel(entry: Compiled, capability: int) -> Usage:
    """Compile ``entry`` for a compute capability such as 90, with pointers taken to be 16-byte aligned."""
    names = entry.kernel.arg_names
    constants = {(names.index(name),): value for name, value in entry.constants.items()}
    signature = {name: entry.signature.get(name, "constexpr") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(entry.kernel, signature, constants, aligned)
    options = {"num_warps": entry.num_warps, "num_stages": entry.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return Usage(*resources(compiled.asm["cubin"]), compiled.metadata.shared, compiled.asm["ttir"])


def resources(cubin: bytes) -> tuple[int, int]:
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
