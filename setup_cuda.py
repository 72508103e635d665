"""What setup.py and the tests know of CUDA: the toolkit, the architectures that are built, and the compiler's flags."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc" / "cuda"
OLDEST = 80
DEFAULT = ("8.0", "8.6", "8.9", "9.0a", "10.0+PTX")
FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-g0", f"-I{SOURCES}"]

# TORCH_CUDA_ARCH_LIST may name architectures as PyTorch does.
_NAMED = {"Ampere": "8.0 8.6+PTX", "Ada": "8.9+PTX", "Hopper": "9.0+PTX", "Blackwell": "10.0 12.0+PTX"}


class NotHere(Exception):
    """Why CUDA cannot be built, in words for the user."""


@dataclass(frozen=True)
class Architecture:
    """``name`` is what nvcc puts behind sm_ and compute_: "90a"; ``ptx`` adds code for later GPUs."""

    name: str
    ptx: bool = False

    @property
    def number(self) -> int:
        return int(self.name.rstrip("af"))

    @property
    def flags(self) -> list[str]:
        made = [f"-gencode=arch=compute_{self.name},code=sm_{self.name}"]
        return [*made, f"-gencode=arch=compute_{self.name},code=compute_{self.name}"] if self.ptx else made

    def __str__(self) -> str:
        return f"sm_{self.name}{' with PTX' if self.ptx else ''}"


@dataclass(frozen=True)
class Toolkit:
    """``home`` holds include/cuda_runtime.h; ``version`` is (major, minor)."""

    home: Path
    nvcc: Path
    version: tuple[int, int]

    @classmethod
    def find(cls) -> Toolkit:
        """CUDA_HOME's, or that of the nvcc on PATH; NotHere with the reason if there is none."""
        named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        home = Path(named) if named else _home_of(shutil.which("nvcc"))
        if home is None:
            raise NotHere("no CUDA toolkit was found: nvcc is not on PATH (set CUDA_HOME)")
        if not (home / "include" / "cuda_runtime.h").exists():
            where = f"CUDA_HOME={named}" if named else "the toolkit of the nvcc on PATH"
            raise NotHere(f"{where} has no include/cuda_runtime.h")
        nvcc = home / "bin" / "nvcc"
        match = re.search(r"release (\d+)\.(\d+)", _output([str(nvcc), "--version"]))
        if match is None:
            raise NotHere(f"{nvcc} does not run")
        return cls(home, nvcc, (int(match[1]), int(match[2])))

    @property
    def include(self) -> Path:
        return self.home / "include"

    @property
    def runtime(self) -> Path:
        """The shared CUDA runtime that is linked; PyTorch loads one of the same name."""
        for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
            for library in sorted((self.home / folder).glob("libcudart.so*")):
                return library
        raise NotHere(f"{self.home} has no libcudart.so")

    def supported(self) -> set[int]:
        """The architectures that this nvcc compiles for, as numbers: 90."""
        return {int(number) for number in re.findall(r"compute_(\d+)\b", _output([str(self.nvcc), "--list-gpu-arch"]))}

    def command(self, *flags: str) -> list[str]:
        """nvcc with the project's flags, and with CXX as its host compiler where that is set."""
        host = shlex.split(os.environ.get("CXX", ""))[:1]
        return [str(self.nvcc), *(f"-ccbin={name}" for name in host), *FLAGS, *flags]


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout + done.stderr if done.returncode == 0 else ""


def _home_of(nvcc: str | None) -> Path | None:
    """The toolkit of an nvcc, which may be a link to it or a script that calls it: a dry run tells."""
    if nvcc is None:
        return None
    beside = Path(nvcc).resolve().parent.parent
    if (beside / "include" / "cuda_runtime.h").exists():
        return beside
    said = re.search(r"^#\$ TOP=(.+)$", _output([nvcc, "--dryrun", "-x", "cu", os.devnull]), re.MULTILINE)
    return Path(said[1].strip()).resolve() if said else beside


def architectures(toolkit: Toolkit, listed: str) -> tuple[list[Architecture], list[str]]:
    """What a list such as "8.0;9.0a+PTX" comes to with this nvcc, and what was left out of it, with why.

    An empty list is the default. Lists for several packages have what is older than 8.0, too: that is left out. What no
    architecture is, or nvcc does not know, is an error when it was asked for.
    """
    words = listed.replace(";", " ").replace(",", " ").split()
    words = [part for word in words for part in _NAMED.get(word.removesuffix("+PTX"), word).split()]
    supported, found, left_out = toolkit.supported(), [], []
    for word in words or DEFAULT:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
        if match is None:
            raise NotHere(f"TORCH_CUDA_ARCH_LIST: {word!r} is no architecture such as 8.0, 9.0a or 10.0+PTX")
        arch = Architecture(f"{match[1]}{match[2]}{match[3]}", bool(match[4]))
        if arch.number < OLDEST:
            left_out.append(f"{arch} (the kernels need 8.0)")
        elif arch.number in supported:
            found.append(arch)
        elif words:
            raise NotHere(f"nvcc {'.'.join(map(str, toolkit.version))} does not know {word}")
        else:
            left_out.append(f"{arch} (unknown to nvcc {'.'.join(map(str, toolkit.version))})")
    if not found:
        raise NotHere(f"no architecture is left: {', '.join(left_out)}")
    if left_out and not words:
        # PTX of an "a" architecture runs on that one alone.
        newest = max((arch for arch in found if arch.name.isdigit()), key=lambda arch: arch.number)
        found = [Architecture(arch.name, arch.ptx or arch is newest) for arch in found]
    return found, left_out


def own_architectures() -> str:
    """The architectures of the GPUs in this machine, as TORCH_CUDA_ARCH_LIST has them; "" without any."""
    import torch

    if torch.version.cuda is None:
        return ""
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return " ".join(f"{major}.{minor}{'a' * (major == 9)}" for major, minor in sorted(found) if major >= OLDEST // 10)


@dataclass(frozen=True)
class Plan:
    """A CUDA library that can be built here."""

    toolkit: Toolkit
    architectures: list[Architecture]
    left_out: list[str]

    @classmethod
    def make(cls, required: bool) -> Plan:
        """What to build, or NotHere with the reason.

        Without being asked, by ``required`` or TORCH_CUDA_ARCH_LIST, only for the GPUs of this machine, if it has any:
        compiling for every architecture takes minutes that most who build here have no use for.
        """
        import torch

        if torch.version.cuda is None:
            raise NotHere(f"torch {torch.__version__} is built without CUDA")
        toolkit = Toolkit.find()
        if toolkit.version[0] != int(torch.version.cuda.partition(".")[0]):
            ours = ".".join(map(str, toolkit.version))
            raise NotHere(
                f"the toolkit is CUDA {ours}, and torch {torch.__version__} is built for {torch.version.cuda}"
            )
        listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
        if not listed and not required:
            listed = own_architectures()
            if not listed:
                raise NotHere("no GPU is visible here, and none is asked for (FORCE_CUDA=1 builds for all of them)")
        plan = cls(toolkit, *architectures(toolkit, listed))
        plan.toolkit.runtime  # noqa: B018  (raises where there is none)
        return plan

    @property
    def version(self) -> str:
        return ".".join(map(str, self.toolkit.version))

    @property
    def flags(self) -> list[str]:
        return [flag for arch in self.architectures for flag in arch.flags]

    def __str__(self) -> str:
        made = f"CUDA {self.version} for {', '.join(map(str, self.architectures))}"
        return made + (f"; left out: {', '.join(self.left_out)}" if self.left_out else "")
