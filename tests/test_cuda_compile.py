"""The CUDA kernels compiled for sm_80 and sm_90a, without a GPU: no spills, and the budgets of csrc/cuda/budgets.json.

`make test` compiles what is for bf16 or for every type for sm_90a, unless it has passed before and nothing has changed
since (csrc/cuda/passed.json, written by `make cuda-gates`). `make test-all` compiles all of it, for sm_80 and the other
architectures that are built, too. The figures are ptxas's own.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import setup_cuda

ROOT = setup_cuda.ROOT
ARCHITECTURES = (setup_cuda.Architecture("80"), setup_cuda.Architecture("90a"))
BUDGETS = json.loads((setup_cuda.SOURCES / "budgets.json").read_text(encoding="utf-8"))["kernels"]
SOURCES = sorted(setup_cuda.SOURCES.glob("*.cu"))
PASSED = setup_cuda.SOURCES / "passed.json"
SLOW = pytest.mark.slow

_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


class Usage(NamedTuple):
    """What ptxas says of one kernel for one architecture; ``local_bytes`` is where spilled registers live."""

    symbol: str
    architecture: str
    registers: int
    local_bytes: int
    static_shared_bytes: int


def usages(text: str) -> list[Usage]:
    """The kernels in the output of ``nvcc -Xptxas -v``."""
    found = []
    for match in _ENTRY.finditer(text):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        local = int(match["stack"]) + int(match["stores"]) + int(match["loads"])
        static = int(shared[1]) if shared else 0
        found.append(Usage(match["name"], match["arch"], int(match["registers"]), local, static))
    return found


def kernel_of(symbol: str) -> str:
    """The template that a mangled name is of: the name with a budget that it holds, with its length before it."""
    return next((name for name in BUDGETS if f"{len(name)}{name}" in symbol), symbol)


def toolkit() -> setup_cuda.Toolkit:
    try:
        return setup_cuda.Toolkit.find()
    except setup_cuda.NotHere as reason:
        pytest.skip(str(reason))


def others() -> list[setup_cuda.Architecture]:
    """What else is built, without PTX."""
    built, _ = setup_cuda.architectures(toolkit(), " ".join(setup_cuda.DEFAULT))
    return [setup_cuda.Architecture(found.name) for found in built if found.name not in {a.name for a in ARCHITECTURES}]


def compiled(source: Path, folder: Path, architectures: Sequence[setup_cuda.Architecture]) -> list[Usage]:
    flags = [flag for architecture in architectures for flag in architecture.flags]
    command = toolkit().command(*flags, "-Xptxas", "-v", "-c", str(source), "-o", str(folder / "kernels.o"))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return usages(done.stderr + done.stdout)


def problems(found: list[Usage]) -> list[str]:
    wrong = []
    for usage in found:
        budget = BUDGETS.get(kernel_of(usage.symbol))
        if budget is None:
            wrong.append(f"{usage.symbol} has no budget")
        elif usage.local_bytes or usage.registers > budget["registers"] or usage.static_shared_bytes:
            wrong.append(f"{usage}, where {budget['registers']} registers, no spills and no static memory are allowed")
    return wrong


def fingerprint(source: Path, architecture: setup_cuda.Architecture) -> str:
    """Of all that decides what ptxas says of a source: it, every header, the budgets, the flags and the toolkit."""
    folder = setup_cuda.SOURCES
    headers = sorted([*folder.glob("*.h"), *folder.glob("*.cuh"), folder.parent / "activations.h"])
    flags = [flag.replace(str(ROOT), "") for flag in (*setup_cuda.FLAGS, *architecture.flags)]
    said = [str(toolkit().version), *flags, json.dumps(BUDGETS)]
    digest = hashlib.sha256("\n".join(said).encode())
    for path in (source, *headers):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def passed() -> dict[str, str]:
    return json.loads(PASSED.read_text(encoding="utf-8")) if PASSED.exists() else {}


def is_for_one_more_type(source: Path) -> bool:
    return source.stem.endswith(("_f16", "_f32"))


@pytest.mark.parametrize(
    ("source", "architecture"),
    [
        pytest.param(path, architecture, id=f"{path.stem}-{architecture.name}", marks=SLOW if slow else [])
        for path in SOURCES
        for architecture in ARCHITECTURES
        for slow in [is_for_one_more_type(path) or architecture is not ARCHITECTURES[-1] or "planes" in path.stem]
    ],
)
def test_kernels_keep_to_their_budgets(
    source: Path, architecture: setup_cuda.Architecture, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    name, records = f"{source.stem}-{architecture.name}", "EFFNET_OPS_RECORD_GATES" in os.environ
    now = fingerprint(source, architecture)
    if request.config.getoption("-m") == "not slow" and passed().get(name) == now and not records:
        pytest.skip("it has passed, and nothing has changed since: csrc/cuda/passed.json")
    found = compiled(source, tmp_path, [architecture])
    assert {usage.architecture for usage in found} in (set(), {architecture.name})
    assert problems(found) == []
    if records:
        PASSED.write_text(json.dumps(passed() | {name: now}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def test_a_change_of_a_header_or_a_budget_compiles_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source, architecture = SOURCES[0], ARCHITECTURES[-1]
    before = fingerprint(source, architecture)
    assert before == fingerprint(source, architecture) != fingerprint(SOURCES[1], architecture)
    assert before != fingerprint(source, ARCHITECTURES[0])
    monkeypatch.setitem(BUDGETS, "sum_partials_kernel", {"registers": 41, "shared_bytes": 1024})
    assert fingerprint(source, architecture) != before
    monkeypatch.undo()
    folder = tmp_path / "csrc" / "cuda"
    shutil.copytree(setup_cuda.SOURCES, folder)
    shutil.copy(setup_cuda.SOURCES.parent / "activations.h", folder.parent)
    monkeypatch.setattr(setup_cuda, "SOURCES", folder)
    copied = fingerprint(source, architecture)
    (folder.parent / "activations.h").write_text("// another\n", encoding="utf-8")
    assert fingerprint(source, architecture) != copied


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=[path.stem for path in SOURCES])
def test_kernels_keep_to_their_budgets_on_all_architectures(source: Path, tmp_path: Path) -> None:
    assert len(others()) >= 3
    found = compiled(source, tmp_path, others())
    assert {usage.architecture for usage in found} in (set(), {architecture.name for architecture in others()})
    assert problems(found) == []


def test_bindings_use_the_stable_abi_alone(tmp_path: Path) -> None:
    """No symbol of ATen or c10 is undefined, so that one build serves later versions of PyTorch."""
    if torch.version.cuda is None:
        pytest.skip("this PyTorch is built without CUDA")
    nm, compiler = shutil.which("nm"), shutil.which("g++") or shutil.which("c++")
    assert nm and compiler, "nm (binutils) and a C++ compiler are needed"
    includes = [f"-I{Path(torch.__file__).parent / 'include'}", f"-I{toolkit().include}"]
    described = ['-DEFFNET_CUDA_ARCHITECTURES=""', '-DEFFNET_CUDA_TOOLKIT=""']
    flags = ["-std=c++17", "-fPIC", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", *includes, *described]
    source, target = setup_cuda.SOURCES / "bindings.cpp", tmp_path / "bindings.o"
    subprocess.run([compiler, *flags, "-c", str(source), "-o", str(target)], check=True)
    listing = subprocess.run([nm, "--undefined-only", str(target)], capture_output=True, text=True, check=True)
    undefined = [line.split()[-1] for line in listing.stdout.splitlines()]
    assert "aoti_torch_get_current_cuda_stream" in undefined and "aoti_torch_create_device_guard" in undefined
    assert [symbol for symbol in undefined if "2at" in symbol or "3c10" in symbol] == []


LOAD = """
import ctypes, pathlib, sys, torch, effnet_ops
(library,) = pathlib.Path(sys.argv[1]).rglob("_cuda*.so")
torch.ops.load_library(str(library))
assert torch._C._dispatch_has_kernel_for_dispatch_key("effnet_ops::cuda_depthwise_forward", "CUDA")
architectures = ctypes.CDLL(str(library)).effnet_cuda_architectures
architectures.restype = ctypes.c_char_p
assert architectures() == b"sm_90a", architectures()
"""


@pytest.mark.slow
def test_library_builds_and_loads(tmp_path: Path) -> None:
    """As a user on an H100 gets it; nothing of it runs here."""
    toolkit()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)]
    variables = {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0a"}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "for sm_90a" in done.stdout
    subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], check=True)


def test_every_budget_is_of_a_kernel() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in setup_cuda.SOURCES.glob("*.cu*"))
    assert [name for name in BUDGETS if not re.search(rf"\b{name}\b", text)] == []


def test_a_kernel_that_spills_is_found(tmp_path: Path) -> None:
    """Two hundred sums that stay alive over a loop do not fit into 64 registers."""
    body = "".join(f"s[{i}] = fmaf(s[{i}], x[{i}], x[{i + 1}]);" for i in range(200))
    source = tmp_path / "spills.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024) sum_partials_kernel(float* p, int n) {\n"
        "float s[200], x[201]; for (int i = 0; i < 200; ++i) s[i] = p[i * 3 + threadIdx.x];\n"
        f"while (n--) {{ for (int i = 0; i < 201; ++i) x[i] = p[i + n]; {body} }}\n"
        "for (int i = 0; i < 200; ++i) p[i * 5 + threadIdx.x] = s[i];\n}\n"
    )
    found = compiled(source, tmp_path, ARCHITECTURES)
    assert len(found) == len(ARCHITECTURES) and all(usage.local_bytes > 0 for usage in found)
    assert len(problems(found)) == len(ARCHITECTURES)


def test_what_ptxas_prints() -> None:
    text = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z19sum_partials_kernelPf' for 'sm_80'
ptxas info    : Function properties for _Z19sum_partials_kernelPf
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes cumulative stack size, 1024 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_Z19sum_partials_kernelPd' for 'sm_90a'
ptxas info    : Function properties for _Z19sum_partials_kernelPd
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, 360 bytes cmem[0]
"""
    assert usages(text) == [
        Usage("_Z19sum_partials_kernelPf", "80", 40, 28, 1024),
        Usage("_Z19sum_partials_kernelPd", "90a", 32, 0, 0),
    ]
    assert len(problems(usages(text))) == 1 and kernel_of("_Z19sum_partials_kernelPd") == "sum_partials_kernel"
