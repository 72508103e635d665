"""Builds shared libraries: _C, in which every CPU kernel is compiled once per instruction set, the same without Python
(libeffnet_ops.so), and _cuda.

EFFNET_OPS_BUILD=auto|cpu|cuda|none says what to build. `auto` builds what this machine can run, with CUDA if it has a
GPU or TORCH_CUDA_ARCH_LIST is set, and says what it left out. FORCE_CUDA=1 and `cuda` build every architecture without
a GPU, too. A choice that cannot be built is an error. EFFNET_OPS_ISAS=all|native: with `native` the CPU part is for
this processor alone, which takes less time. CXX, MAX_JOBS and CUDA_HOME are honoured. EFFNET_OPS_SANITIZE=1
adds the address and undefined-behaviour sanitizers to the CPU part.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
# Behind everything else: a build does not always look for modules beside setup.py, and setuptools loads what other
# packages register for every build, such as kernels.locking, which our folder kernels/ must not hide.
sys.path[:] = [*(path for path in sys.path if Path(path).resolve() != ROOT), str(ROOT)]

import setup_cuda  # noqa: E402

TORCH_TARGET = (2, 10)
CPP_LIBRARY = "libeffnet_ops.so"
CHOICES = {"EFFNET_OPS_BUILD": ("auto", "cpu", "cuda", "none"), "EFFNET_OPS_ISAS": ("all", "native")}
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


def choice_of(variable: str) -> str:
    choices = CHOICES[variable]
    choice = os.environ.get(variable, choices[0])
    if choice not in choices:
        raise SystemExit(f"{variable} must be one of {', '.join(choices)}, got {choice!r}")
    return choice


def find_compiler() -> list[str] | None:
    """The C++ compiler's command: CXX, or the first of the usual names that is installed."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    for name in names:
        command = shlex.split(name)
        if command and shutil.which(command[0]):
            return command
    return None


def accepts(compiler: list[str], flags: list[str], native: bool = False) -> bool:
    """Whether the compiler knows these flags and, where `native`, this processor has what they name."""
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "probe.cpp"), Path(folder, "probe")
        source.write_text("int main() { return 0; }\n")
        command = [*compiler, *flags, "-c", str(source), "-o", str(program)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return False
        if not native:
            return True
        supported = [f'__builtin_cpu_supports("{flag.removeprefix("-m")}")' for flag in flags]
        source.write_text(f"int main() {{ return !({' && '.join(supported)}); }}\n")
        done = subprocess.run([*compiler, str(source), "-o", str(program)], capture_output=True, check=False)
        return done.returncode == 0 and subprocess.run([str(program)], check=False).returncode == 0


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


@dataclass
class Plan:
    """What is built: decided, checked against the environment and printed before anything is compiled."""

    compiler: list[str] | None
    isas: list[str]
    required: bool
    cuda: setup_cuda.Plan | None = None
    cuda_required: bool = False

    @classmethod
    def make(cls) -> Plan:
        choice, native = choice_of("EFFNET_OPS_BUILD"), choice_of("EFFNET_OPS_ISAS") == "native"
        cuda_required = choice == "cuda" or os.environ.get("FORCE_CUDA", "0") == "1"
        if choice == "none":
            say("EFFNET_OPS_BUILD=none: the C++ part is left out, the reference backend runs everything")
            return cls(None, [], False)
        compiler = find_compiler()
        if reason := why_no_cpu(compiler):
            if choice != "auto" or cuda_required:
                asked = f"EFFNET_OPS_BUILD={choice}" if choice != "auto" else "FORCE_CUDA=1"
                raise SystemExit(f"{asked}, but {reason}")
            say(f"C++ left out: {reason}; the reference backend runs everything")
            return cls(None, [], False)
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        isas = [isa for isa, flags in ISA_FLAGS.items() if not flags or (x86 and accepts(compiler, flags, native))]
        say(f"C++ with {shlex.join(compiler)} for {', '.join(isas)}; torch target {'.'.join(map(str, TORCH_TARGET))}")
        cuda = cuda_plan(choice, cuda_required)
        return cls(compiler, isas, choice != "auto", cuda, cuda_required)


def cuda_plan(choice: str, required: bool) -> setup_cuda.Plan | None:
    if choice == "cpu" and not required:
        say("CUDA left out: EFFNET_OPS_BUILD=cpu")
        return None
    try:
        plan = setup_cuda.Plan.make(required)
    except setup_cuda.NotHere as reason:
        if required:
            raise SystemExit(f"effnet_ops: EFFNET_OPS_BUILD=cuda or FORCE_CUDA=1 asks for CUDA, but {reason}") from None
        say(f"CUDA left out: {reason}")
        return None
    say(str(plan))
    return plan


@dataclass
class Statements:
    """A build.ninja that makes one library; ``compile`` adds an object of it."""

    writer: Any
    compiler: list[str]
    objects: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        compiler = shlex.join(self.compiler)
        self.writer.rule("compile", f"{compiler} $flags -MMD -MF $out.d -c $in -o $out", deps="gcc", depfile="$out.d")
        self.writer.rule("link", f"{compiler} -shared $in -o $out $flags")

    def compile(self, source: Path, tag: str, flags: list[str], rule: str = "compile") -> None:
        target = f"{source.stem}.{tag}.o"
        self.writer.build(target, rule, str(source), variables={"flags": shlex.join(flags).replace("$", "$$")})
        self.objects.append(target)

    def link(self, output: Path, flags: list[str]) -> None:
        self.writer.build(str(output), "link", self.objects, variables={"flags": shlex.join(flags)})


def torch_root() -> Path:
    import torch

    return Path(torch.__file__).parent


def stable_abi_flags() -> list[str]:
    major, minor = TORCH_TARGET
    return [f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000", f"-I{torch_root() / 'include'}"]


def native_statements(plan: Plan, file: TextIO, output: Path) -> None:
    """Every kernel source once per instruction set, the rest once; _C, and beside it the library without Python."""
    import pybind11
    from ninja import ninja_syntax

    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    sanitize = []
    if os.environ.get("EFFNET_OPS_SANITIZE") == "1":
        sanitize = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    built = [f"-DEFFNET_BUILT_{isa.upper()}" for isa in plan.isas]
    version = subprocess.run([*plan.compiler, "--version"], capture_output=True, text=True, check=False).stdout
    target = ".".join(map(str, TORCH_TARGET))
    described = [f'-DEFFNET_COMPILER="{version.splitlines()[0]}"', f'-DEFFNET_TORCH_TARGET="{target}"']
    common = [*COMMON_FLAGS, *sanitize]
    ninja = Statements(ninja_syntax.Writer(file), plan.compiler)
    for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        if source.stem == "dispatch":
            ninja.compile(source, "once", [*common, *built])
            continue
        for isa in plan.isas:
            ninja.compile(source, isa, [*common, *ISA_FLAGS[isa], f"-DEFFNET_ISA_{isa.upper()}"])
    ninja.compile(ROOT / "csrc" / "bindings.cpp", "once", [*common, *stable_abi_flags()])
    ninja.compile(ROOT / "csrc" / "recording.cpp", "once", common)
    shared = list(ninja.objects)
    link = [*sanitize, f"-L{torch_root() / 'lib'}", "-ltorch_cpu"]
    # In Python the schemas are defined in Python.
    ninja.compile(ROOT / "csrc" / "schemas.cpp", "once", [*common, *stable_abi_flags()])
    ninja.link(output.with_name(CPP_LIBRARY), link)
    ninja.objects = shared
    ninja.compile(ROOT / "csrc" / "module.cpp", "once", [*common, *built, *described, *includes])
    ninja.link(output.with_name(f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"), link)


def cuda_statements(plan: Plan, file: TextIO, output: Path) -> None:
    """Every .cu for all architectures by nvcc, the bindings by the C++ compiler."""
    from ninja import ninja_syntax

    cuda = plan.cuda
    ninja = Statements(ninja_syntax.Writer(file), plan.compiler)
    nvcc = shlex.join(cuda.toolkit.command())
    ninja.writer.rule("nvcc", f"{nvcc} $flags -MMD -MF $out.d -c $in -o $out", deps="gcc", depfile="$out.d")
    for source in sorted(setup_cuda.SOURCES.glob("*.cu")):
        ninja.compile(source, "cuda", cuda.flags, "nvcc")
    made = ", ".join(map(str, cuda.architectures))
    described = [f'-DEFFNET_CUDA_ARCHITECTURES="{made}"', f'-DEFFNET_CUDA_TOOLKIT="{cuda.version}"']
    flags = [*COMMON_FLAGS, *stable_abi_flags(), "-DUSE_CUDA", f"-I{cuda.toolkit.include}", *described]
    ninja.compile(setup_cuda.SOURCES / "bindings.cpp", "cuda", flags)
    libraries = ["-ltorch_cpu", "-ltorch_cuda", str(cuda.toolkit.runtime)]
    ninja.link(output, [f"-L{torch_root() / 'lib'}", *libraries])


class NinjaBuild(build_ext):
    """Runs ninja on build files of our own: setuptools has no notion of one source with several sets of flags."""

    def get_ext_filename(self, name: str) -> str:
        """The library of C++ programs has a plain name; setuptools asks with and without the package's."""
        *package, module = name.split(".")
        return os.path.join(*package, CPP_LIBRARY) if module == CppLibrary.module else super().get_ext_filename(name)

    def build_extension(self, ext: Extension) -> None:
        from ninja import BIN_DIR

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        sanitized = "-sanitized" if os.environ.get("EFFNET_OPS_SANITIZE") == "1" else ""
        folder = ROOT / "build" / f"{ext.folder}-{sys.implementation.cache_tag}{sanitized}"
        folder.mkdir(parents=True, exist_ok=True)
        library = folder / output.name
        with (folder / "build.ninja").open("w") as file:
            ext.statements(ext.plan, file, library)
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        result = subprocess.run([str(Path(BIN_DIR, "ninja")), "-C", str(folder), *jobs], check=False)
        if result.returncode != 0:
            if ext.optional:
                say(f"{ext.title} left out: compiling failed (the messages are above); {ext.instead}")
            raise CompileError(f"compiling {ext.title} failed")
        # A fresh file, not the old one overwritten: a running process may have it mapped.
        output.unlink(missing_ok=True)
        shutil.copy2(library, output)
        say(f"built {output.name}")


class Library(Extension):
    """A library of the package: how its build.ninja is written, and what runs without it."""

    title, folder, instead = "C++", "native", "the reference backend runs everything"
    statements = staticmethod(native_statements)

    def __init__(self, name: str, plan: Plan, required: bool) -> None:
        super().__init__(name, sources=[], optional=not required)
        self.plan = plan


class CppLibrary(Library):
    """The kernels of `_C` and the schemas of the operators, for programs without Python: one more link."""

    title, module, instead = "the library for C++ programs", "libeffnet_ops", "Python needs it not"


class CudaLibrary(Library):
    title, folder, instead = "CUDA", "cuda", "the triton backend runs on GPUs"
    statements = staticmethod(cuda_statements)


def extensions() -> list[Extension]:
    if not {"build_ext", "bdist_wheel", "develop", "editable_wheel", "install", "build"} & set(sys.argv):
        return []
    plan = Plan.make()
    if plan.compiler is None:
        return []
    found: list[Extension] = [Library("effnet_ops._C", plan, plan.required)]
    found.append(CppLibrary(f"effnet_ops.{CppLibrary.module}", plan, plan.required))
    if plan.cuda is not None:
        found.append(CudaLibrary("effnet_ops._cuda", plan, plan.cuda_required))
    return found


setup(
    packages=[*find_packages(include=["effnet_ops", "effnet_ops.*"]), "effnet_ops.kernels"],
    package_dir={"effnet_ops.kernels": "kernels"},
    py_modules=["effnet_ops_autoload"],
    ext_modules=extensions(),
    cmdclass={"build_ext": NinjaBuild},
)
