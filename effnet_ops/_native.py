"""Loads the compiled parts, `effnet_ops._C` and the CUDA library, if they were built, and says why not otherwise."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import torch

module: ModuleType | None = None
why_missing = ""

try:
    module = importlib.import_module("effnet_ops._C")
except ModuleNotFoundError:
    why_missing = "the C++ part was not built: install effnet_ops with a C++ compiler at hand"
except ImportError as error:
    why_missing = f"the C++ part does not load: {error}"


def cuda_library() -> Path | None:
    """The file of the CUDA library, if it was built. It is no Python module: it only registers operators."""
    spec = importlib.util.find_spec("effnet_ops._cuda")
    return None if spec is None or spec.origin is None else Path(spec.origin)


@functools.cache
def load_cuda() -> str:
    """Register the CUDA operators, once; "" or why they cannot be. Needs no GPU, but a PyTorch built with CUDA."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    library = cuda_library()
    if library is None:
        return "the CUDA part was not built: install effnet_ops with a CUDA toolkit at hand and FORCE_CUDA=1"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"the CUDA part does not load: {error}"
    return ""


def cuda_build_info() -> dict[str, str]:
    """The toolkit and the architectures that the CUDA library was built with; empty where it cannot be loaded."""
    if load_cuda():
        return {}
    library, found = ctypes.CDLL(str(cuda_library())), {}
    for name in ("toolkit", "architectures"):
        function = getattr(library, f"effnet_cuda_{name}")
        function.restype = ctypes.c_char_p
        found[name] = function().decode()
    return found
