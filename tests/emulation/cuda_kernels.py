"""The kernels of csrc/cuda on the emulated GPU: kernels.h as ctypes structures, calls with tensors, operators."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import emulator
import torch
from emulator import ACTIVATIONS, CUDA, HERE, Machine
from torch import Tensor

_TORCH = Path(torch.__file__).parent

_TYPES = {
    "char": ctypes.c_char,
    "int": ctypes.c_int,
    "float": ctypes.c_float,
    "bool": ctypes.c_bool,
    "int64_t": ctypes.c_int64,
    "size_t": ctypes.c_size_t,
    "cudaStream_t": ctypes.c_void_p,
}
DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@functools.cache
def interface() -> tuple[dict[str, type[ctypes.Structure]], dict[str, dict[str, int]]]:
    """The structures and the enumerations of kernels.h by name, read from the header itself and from activations.h."""
    text = re.sub(r"//[^\n]*", "", (CUDA / "kernels.h").read_text())
    enums = {
        name: {key: int(value) for key, value in re.findall(r"(\w+) = (\d+)", body)}
        for name, body in re.findall(r"enum class (\w+) : int \{([^}]*)\}", text)
    }
    for name in ("Activation", "Gate"):
        (listed,) = re.findall(rf"#define EFFNET_{name.upper()}S\(X\) (.*)", ACTIVATIONS.read_text())
        enums[name] = {key: value for value, key in enumerate(re.findall(r"X\((\w+)\)", listed))}
    structures: dict[str, type[ctypes.Structure]] = {}
    for name, base, body in re.findall(r"struct (\w+)(?: : (\w+)<void>)? \{([^}]*)\}", text):
        fields = list(structures[base]._fields_) if base else []
        for statement in filter(None, (part.strip() for part in body.split(";"))):
            kind, declarators = re.fullmatch(r"(?:const )?(\w+)\b(.*)", statement, re.S).groups()
            for declarator in declarators.split(","):
                field, count = re.fullmatch(r"[*\s]*(\w+)(?:\[(\d+)\])?\s*", declarator).groups()
                type_ = ctypes.c_int if kind in enums else _TYPES.get(kind) or structures.get(kind)
                if "*" in declarator:
                    type_ = ctypes.c_char_p if kind == "char" else ctypes.c_void_p
                fields.append((field, type_ * int(count) if count else type_))
        structures[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return structures, enums


def structure(name: str, values: Mapping[str, Any]) -> ctypes.Structure:
    """A structure of kernels.h: tensors and None for pointers, names for enumerations, mappings for structures."""
    structures, enums = interface()
    made = structures[name]()
    known = dict(made._fields_)
    for key, value in values.items():
        if key not in known:
            raise KeyError(f"{name} of kernels.h has no {key}, but {list(known)}")
        if isinstance(value, Tensor):
            value = value.data_ptr() if value.numel() else None
        elif isinstance(value, Mapping):
            value = structure(known[key].__name__, value)
        elif isinstance(value, str):
            (value,) = {names[value] for names in enums.values() if value in names}
        elif isinstance(value, torch.dtype):
            value = enums["DType"][DTYPES[value]]
        setattr(made, key, value)
    return made


class Kernels(Machine):
    """An emulated GPU with the kernels of csrc/cuda."""

    def __init__(self) -> None:
        super().__init__("kernels", [HERE / "bindings.cpp", *sorted(CUDA.glob("*.cu"))])
        self.multiprocessors = 4
        self.shared_limit = 227 * 1024
        self.major = 9

    def reset(self, seed: int = 0, *, major: int = 9, **options: Any) -> None:
        """``major`` is that of the compute capability: from 9 on, rows may come by bulk copies."""
        super().reset(seed, **options)
        self.major = major
        self.multiprocessors = options.get("multiprocessors", 4)
        self.shared_limit = options.get("shared_limit", 227 * 1024)

    def _device(self) -> ctypes.Structure:
        values = {"multiprocessors": self.multiprocessors, "major": self.major, "max_shared_bytes": self.shared_limit}
        return structure("Device", values)

    def why_not(self, name: str, **values: Any) -> str | None:
        """Why no kernel covers this problem, or None."""
        reason = self.plan(name, **values).why_not
        return None if reason is None else reason.decode()

    def wants_copies(self, name: str, **values: Any) -> bool:
        """Whether contiguous activations of a depthwise problem are better copied to channels_last."""
        given = (structure(name, values), self.plan(name, **values), self._device())
        return self.call(f"wants_copies_{name}", *map(ctypes.byref, given), result=ctypes.c_bool)

    def plan(self, name: str, **values: Any) -> ctypes.Structure:
        problem, device, found = structure(name, values), self._device(), structure("Plan", {})
        arguments = (ctypes.byref(item) for item in (problem, device, found))
        self.call(f"plan_{name}", *arguments, result=None)
        return found

    def run(self, name: str, **values: Any) -> None:
        """Plans and launches; an `EmulationError` is a detector's report."""
        given = (structure(name, values), self.plan(name, **values), self._device())
        error = self.call(f"run_{name}", *map(ctypes.byref, given))
        assert error == 0, f"{name} returned the error {error}"


@functools.cache
def register_operators(kernels: Kernels) -> ctypes.CDLL:
    """The library of csrc/cuda/bindings.cpp on these kernels: the operators `cuda_*`, registered for the CPU."""
    sources = [CUDA / "bindings.cpp", HERE / "adopt.cpp"]
    flags = ["-std=c++17", "-O1", "-fPIC", "-DEFFNET_EMULATED", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += [f"-I{HERE / 'include'}", f"-I{_TORCH / 'include'}", "-shared"]
    link = [str(kernels.path), f"-Wl,-rpath,{kernels.path.parent}", f"-L{_TORCH / 'lib'}", "-ltorch_cpu"]
    text = [path.read_bytes() for path in (*sources, CUDA / "kernels.h", CUDA.parent / "stable.h", ACTIVATIONS)]
    key = hashlib.sha256(repr((flags, link, text)).encode()).hexdigest()[:16]
    library = kernels.path.parent / f"torch_bindings-{key}.so"
    if not library.exists():
        emulator._run([emulator.compiler(), *flags, *map(str, sources), *link], library)
    torch.ops.load_library(str(library))
    return ctypes.CDLL(str(library))
