"""Builds what travels to a lent GPU, where compiling would cost its time: build/lent/.

python benchmarks/gpu/carry.py                     # the CUDA library for sm_90a
python benchmarks/gpu/carry.py python3.12          # and the C++ part for the Python of the lent machine

Of the C++ part only one source knows Python: it is compiled again with that one's headers, and linked with the objects
of the build that is here.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parent.parent.parent
CARRIED = ROOT / "build" / "lent"
FACTS = "import sysconfig; print(sysconfig.get_paths()['include']); print(sysconfig.get_config_var('EXT_SUFFIX'))"


def cuda_library() -> Path:
    environment = {"FORCE_CUDA": "1", "EFFNET_OPS_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": "9.0a"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "build/carried"]
    subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=True)
    (built,) = (ROOT / "build" / "carried" / "effnet_ops").glob("_cuda*.so")
    # Without the name of this Python, which the library has nothing of, every Python finds it.
    return Path(shutil.copy2(built, CARRIED / "_cuda.so"))


def cpp_part(python: str) -> Path:
    """The C++ part for another Python, from the objects of this one's build."""
    include, suffix = subprocess.run([python, "-c", FACTS], capture_output=True, text=True, check=True).stdout.split()
    folder = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
    statements = re.sub(r"\$\n\s+", "", (folder / "build.ninja").read_text(encoding="utf-8"))
    compiler = re.search(r"rule compile\n\s+command = (\S+)", statements)[1]
    flags = re.search(r"build module\.once\.o: compile (\S+)\n\s+flags = (.*)", statements)
    link = re.search(r"build \S+: link .*\n\s+flags = (.*)", statements)[1]
    own = shlex.split(flags[2].replace(sysconfig.get_paths()["include"], include))
    module, output = CARRIED / "module.o", CARRIED / f"_C{suffix}"
    subprocess.run([compiler, *own, "-c", flags[1], "-o", str(module)], check=True)
    objects = sorted(str(path) for path in folder.glob("*.o") if path.name != "module.once.o")
    subprocess.run([compiler, "-shared", *objects, str(module), "-o", str(output), *shlex.split(link)], check=True)
    module.unlink()
    return output


def main(
    python: Annotated[str | None, typer.Argument(help="An interpreter of the lent machine's version.")] = None,
) -> None:
    """Build both libraries into build/lent."""
    CARRIED.mkdir(parents=True, exist_ok=True)
    for path in [cuda_library(), *([cpp_part(python)] if python else [])]:
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    typer.run(main)
