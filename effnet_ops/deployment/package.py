"""A model as an AOTInductor package: compiled ahead of time, and run without Python's part of PyTorch."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effnet_ops import internals
from effnet_ops.deployment.program import export_program

CHECK_INPUTS = "AOTI_RUNTIME_CHECK_INPUTS"
"""An environment variable that PyTorch reads once, when a package runs first."""


def export_package(
    model: nn.Module, example: Tensor, path: str | os.PathLike[str], *, dynamic: Iterable[str] = ("batch",)
) -> Path:
    """Compile ``model`` with AOTInductor and write it as a package, whose name ends with ".pt2".

    The package takes images of the example's dtype, device and memory format (contiguous or channels_last), and of its
    sizes but for the ``dynamic`` ones. By itself it does not look at them: `load_package` makes it look.

    Arguments and errors are those of `export_program`; also, ValueError for another suffix or a missing folder.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ValueError(f"the name of a package must end with .pt2, got {path.name}")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} for {path.name}")
    program = export_program(model, example, dynamic=dynamic)
    with torch.no_grad(), tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        # Else the check of the images refuses a batch of one.
        settings = {"aot_inductor.check_lowerbound": False}
        file = str(Path(folder, path.name))
        made = internals.compile_package(program, file, settings)
        os.replace(made, path)
    return path


def load_package(path: str | os.PathLike[str]) -> Callable[[Tensor], Any]:
    """A package that checks the dtype, sizes and strides of its images, as a function.

    A package that other means have loaded takes an image in another dtype or layout for one of the example's and
    answers wrongly, unless AOTI_RUNTIME_CHECK_INPUTS=1 is in the environment when it runs first. That is set here, for
    all packages of this process.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no package {path}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not an AOTInductor package, as export_package writes it")
    os.environ[CHECK_INPUTS] = "1"
    package = internals.load_package(str(path))

    def run(x: Tensor) -> Any:
        # Where sizes are open, PyTorch's check leaves out the strides of images, channels and rows.
        if not x.is_contiguous() and not (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
            raise ValueError(f"images must be contiguous or channels_last, got strides {x.stride()}")
        return package(x)

    return run
