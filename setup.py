"""Builds the C++ part: one shared library in which every CPU kernel is compiled once per instruction set.

EFFNET_OPS_BUILD=auto|cpu|cuda|none says what to build. `auto` builds what this machine can and says what it left
out; an explicit choice that cannot be built is an error. CXX, MAX_JOBS, FORCE_CUDA and TORCH_CUDA_ARCH_LIST are
honoured. EFFNET_OPS_SANITIZE=1 adds the address and undefined-behaviour sanitizers.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
TORCH_TARGET = (2, 10)
CHOICES = ("auto", "cpu", "cuda", "none")
COMMON_FLAGS = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno"]
COMMON_FLAGS += ["-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized"]
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = [*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
ISA_FLAGS = {
    "baseline": [],
    "avx2": AVX2_FLAGS,
    "avx512": AVX512_FLAGS,
    "avx512_bf16": [*AVX512_FLAGS, "-mavx512bf16"],
}


def say(message: str) -> None:
    print(f"effnet_ops: {message}", flush=True)


def build_choice() -> str:
    choice = os.environ.get("EFFNET_OPS_BUILD", "auto")
    if choice not in CHOICES:
        raise SystemExit(f"EFFNET_OPS_BUILD must be one of {', '.join(CHOICES)}, got {choice!r}")
    return choice


def find_compiler() -> list[str] | None:
    """The C++ compiler's command: CXX, or the first of the usual names that is installed."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    for name in names:
        command = shlex.split(name)
        if command and shutil.which(command[0]):
            return command
    return None


def accepts(compiler: list[str], flags: list[str]) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "empty.cpp")
        source.write_text("int main() { return 0; }\n")
        command = [*compiler, *flags, "-c", str(source), "-o", str(source.with_suffix(".o"))]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def why_no_cpu(compiler: list[str] | None) -> str:
    """Why the C++ part cannot be built here, or ""."""
    if compiler is None:
        return "no C++ compiler was found (set CXX, or install g++ or clang++)"
    if not accepts(compiler, []):
        return f"the C++ compiler {shlex.join(compiler)} does not work"
    for module in ("torch", "pybind11", "ninja"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed where the build runs"
    import torch

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < TORCH_TARGET:
        return f"torch {torch.__version__} is older than {'.'.join(map(str, TORCH_TARGET))}"
    return ""


def cuda_state() -> str:
    """What CUDA toolkit and torch are here, and which architectures would be built."""
    nvcc = shutil.which("nvcc")
    arch = os.environ.get("TORCH_CUDA_ARCH_LIST", "default")
    return f"nvcc {'found' if nvcc else 'not found'}, TORCH_CUDA_ARCH_LIST {arch}"


@dataclass
class Plan:
    """What is built: decided, checked against the environment and printed before anything is compiled."""

    compiler: list[str] | None
    isas: list[str]
    required: bool

    @classmethod
    def make(cls) -> Plan:
        choice = build_choice()
        force_cuda = os.environ.get("FORCE_CUDA", "0") == "1"
        if choice == "none":
            say("EFFNET_OPS_BUILD=none: the C++ part is left out, the reference backend runs everything")
            return cls(None, [], False)
        if not list((ROOT / "csrc" / "cuda").glob("*.cu")):
            message = f"this version has no CUDA kernels ({cuda_state()})"
            if choice == "cuda" or force_cuda:
                raise SystemExit(f"effnet_ops: EFFNET_OPS_BUILD=cuda or FORCE_CUDA=1 asks for CUDA, but {message}")
            say(f"CUDA left out: {message}")
        compiler = find_compiler()
        if reason := why_no_cpu(compiler):
            if choice != "auto":
                raise SystemExit(f"effnet_ops: EFFNET_OPS_BUILD={choice}, but {reason}")
            say(f"C++ left out: {reason}; the reference backend runs everything")
            return cls(None, [], False)
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        isas = [isa for isa, flags in ISA_FLAGS.items() if not flags or (x86 and accepts(compiler, flags))]
        say(f"C++ with {shlex.join(compiler)} for {', '.join(isas)}; torch target {'.'.join(map(str, TORCH_TARGET))}")
        return cls(compiler, isas, choice != "auto")


def build_statements(plan: Plan, folder: Path, output: Path) -> str:
    """The text of build.ninja: every kernel source once per instruction set, the rest once."""
    import pybind11
    import torch
    from ninja import ninja_syntax

    torch_root = Path(torch.__file__).parent
    includes = [f"-I{torch_root / 'include'}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    sanitize = []
    if os.environ.get("EFFNET_OPS_SANITIZE") == "1":
        sanitize = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    built = [f"-DEFFNET_BUILT_{isa.upper()}" for isa in plan.isas]
    major, minor = TORCH_TARGET
    target = f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"
    version = subprocess.run([*plan.compiler, "--version"], capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )[0]
    described = [f'-DEFFNET_COMPILER="{version}"', f'-DEFFNET_TORCH_TARGET="{major}.{minor}"']

    with (folder / "build.ninja").open("w") as file:
        ninja = ninja_syntax.Writer(file)
        compiler = shlex.join(plan.compiler)
        ninja.rule("compile", f"{compiler} $flags -MMD -MF $out.d -c $in -o $out", deps="gcc", depfile="$out.d")
        ninja.rule("link", f"{compiler} -shared $in -o $out $flags")
        objects: list[str] = []

        def compile_one(source: Path, tag: str, flags: list[str]) -> None:
            target_path = f"{source.stem}.{tag}.o"
            flags = [*COMMON_FLAGS, *sanitize, *flags]
            ninja.build(target_path, "compile", str(source), variables={"flags": shlex.join(flags).replace("$", "$$")})
            objects.append(target_path)

        for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
            if source.stem == "dispatch":
                compile_one(source, "once", built)
                continue
            for isa in plan.isas:
                compile_one(source, isa, [*ISA_FLAGS[isa], f"-DEFFNET_ISA_{isa.upper()}"])
        compile_one(ROOT / "csrc" / "bindings.cpp", "once", [target, *includes])
        compile_one(ROOT / "csrc" / "module.cpp", "once", [*built, *described, *includes])
        link_flags = [*sanitize, f"-L{torch_root / 'lib'}", "-ltorch_cpu"]
        ninja.build(str(output), "link", objects, variables={"flags": shlex.join(link_flags)})
    return str(folder)


class NinjaBuild(build_ext):
    """Runs ninja on a build file of our own: setuptools has no notion of one source with several sets of flags."""

    def build_extension(self, ext: Extension) -> None:
        from ninja import BIN_DIR

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        sanitized = "-sanitized" if os.environ.get("EFFNET_OPS_SANITIZE") == "1" else ""
        folder = ROOT / "build" / f"native-{sys.implementation.cache_tag}{sanitized}"
        folder.mkdir(parents=True, exist_ok=True)
        library = folder / output.name
        build_statements(ext.plan, folder, library)
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        result = subprocess.run([str(Path(BIN_DIR, "ninja")), "-C", str(folder), *jobs], check=False)
        if result.returncode != 0:
            if not ext.plan.required:
                say("C++ left out: compiling failed (the messages are above); the reference backend runs everything")
            raise CompileError("compiling the C++ part failed")
        # A fresh file, not the old one overwritten: a running process may have it mapped.
        output.unlink(missing_ok=True)
        shutil.copy2(library, output)
        say(f"built {output.name}")


def extensions() -> list[Extension]:
    if not {"build_ext", "bdist_wheel", "develop", "editable_wheel", "install", "build"} & set(sys.argv):
        return []
    plan = Plan.make()
    if plan.compiler is None:
        return []
    ext = Extension("effnet_ops._C", sources=[], optional=not plan.required)
    ext.plan = plan
    return [ext]


setup(
    packages=[*find_packages(include=["effnet_ops", "effnet_ops.*"]), "effnet_ops.kernels"],
    package_dir={"effnet_ops.kernels": "kernels"},
    package_data={"effnet_ops.kernels": ["tuning.json"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": NinjaBuild},
)
