"""Who runs a call, and why: one predicate a backend serves the automatic choice and an explicit request."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from effnet_ops import _native, internals
from effnet_ops.checks import FLOAT_DTYPES, unknown_name


class Window(NamedTuple):
    """Of a depthwise convolution, each (vertical, horizontal)."""

    kernel: Sequence[int]
    stride: Sequence[int]
    dilation: Sequence[int]


class Backend(NamedTuple):
    """``unavailable()`` is "" or why the backend can run nothing here; ``refuses(x)`` why it cannot run on x.

    ``uncovered(window)`` is why it has no kernel for a depthwise convolution with this window, ``lacks(operation,
    window)`` why it has none for an operation: a public function's name, or "mbconv_inference" for a block with
    constant statistics and no gradient.
    """

    unavailable: Callable[[], str]
    refuses: Callable[[Tensor], str]
    uncovered: Callable[[Window], str] = lambda window: ""
    lacks: Callable[[str, Window | None], str] = lambda operation, window: ""


def _refuses_type(x: Tensor) -> str:
    if x.layout is not torch.strided:
        return f"x has layout {x.layout}"
    if x.dtype not in FLOAT_DTYPES:
        return f"x is {x.dtype}"
    return ""


def _cpu_refuses(x: Tensor) -> str:
    return f"x is on {x.device}" if x.device.type != "cpu" else _refuses_type(x)


INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Whether Triton kernels are interpreted, slowly, on the CPU: Triton itself asks once, when a kernel is defined."""

_CUDA_OPERATIONS = ("depthwise_conv2d", "squeeze_excite", "mbconv_inference")
_CUDA_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CUDA_KERNELS, _CUDA_STRIDES = (3, 5, 7), (1, 2)
_OLDEST_GPU = (8, 0)
_MOST_TAPS, _WIDEST_WINDOW, _LONGEST_STRIDE = 49, 13, 8


def _triton_unavailable() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if INTERPRETED:
        return ""
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs, and this PyTorch is built for AMD's"
    # Not is_available(), after which a forked process cannot use the GPU. Triton alone imports without a driver, too.
    return (
        ""
        if torch.cuda.device_count()
        else "there is no NVIDIA GPU, or no driver for it (TRITON_INTERPRET=1 needs none)"
    )


@functools.cache
def _refuses_gpu(index: int) -> str:
    capability = torch.cuda.get_device_capability(index)
    if capability >= _OLDEST_GPU:
        return ""
    have, need = (".".join(map(str, pair)) for pair in (capability, _OLDEST_GPU))
    return f"cuda:{index} has compute capability {have}, and the kernels need {need}"


# torch.compile looks through the cache.
internals.constant(_refuses_gpu.__wrapped__)


def _cuda_unavailable() -> str:
    # A missing GPU is no reason to load a library.
    if torch.version.cuda is not None and _native.cuda_library() is not None and not torch.cuda.device_count():
        return "there is no NVIDIA GPU, or no driver for it"
    return _native.load_cuda()


def _cuda_refuses(x: Tensor) -> str:
    if x.device.type != "cuda":
        return f"x is on {x.device}"
    if x.layout is torch.strided and x.dtype not in _CUDA_DTYPES:
        return f"x is {x.dtype}, and the kernels are for float32, float16 and bfloat16"
    return _refuses_gpu(x.device.index) or _refuses_type(x)


def _cuda_uncovered(window: Window) -> str:
    (height, width), stride, dilation = window
    if height != width or height not in _CUDA_KERNELS:
        return f"a {height}x{width} kernel is not 3x3, 5x5 or 7x7"
    if stride[0] != stride[1] or stride[0] not in _CUDA_STRIDES:
        return f"stride {tuple(stride)} is not (1, 1) or (2, 2)"
    return f"dilation {tuple(dilation)} is not (1, 1)" if max(dilation) > 1 else ""


def _cuda_lacks(operation: str, window: Window | None) -> str:
    if operation == "mbconv":
        return "it has no kernels for mbconv with batch statistics or gradients"
    if operation == "mbconv_inference" and window is not None and max(window.kernel) > 5:
        return f"its kernels for a whole block are 3x3 and 5x5, and this one is {window.kernel[0]}x{window.kernel[1]}"
    return "" if operation in _CUDA_OPERATIONS else f"it has no kernels for {operation}"


def _triton_refuses(x: Tensor) -> str:
    kind = x.device.type
    if kind == "cuda" and not INTERPRETED:
        return _refuses_gpu(x.device.index) or _refuses_type(x)
    return _refuses_type(x) if kind == "cpu" and INTERPRETED else f"x is on {x.device}"


def _triton_uncovered(window: Window) -> str:
    """The kernels unroll the window, and so cannot have any size."""
    (height, width), stride, dilation = window
    reach = max((height - 1) * dilation[0], (width - 1) * dilation[1]) + 1
    if height * width > _MOST_TAPS:
        return f"a {height}x{width} kernel has more than {_MOST_TAPS} taps"
    if reach > _WIDEST_WINDOW:
        return f"a {height}x{width} kernel with dilation {tuple(dilation)} reaches further than {_WIDEST_WINDOW} pixels"
    return f"stride {tuple(stride)} is longer than {_LONGEST_STRIDE}" if max(stride) > _LONGEST_STRIDE else ""


BACKENDS: dict[str, Backend] = {
    "cpu": Backend(lambda: _native.why_missing, _cpu_refuses),
    "cuda": Backend(_cuda_unavailable, _cuda_refuses, _cuda_uncovered, _cuda_lacks),
    "triton": Backend(_triton_unavailable, _triton_refuses, _triton_uncovered),
    "reference": Backend(lambda: "", lambda x: ""),
}
"""In the order of the automatic choice; `reference` runs everything and comes last.

Where `cuda` and `triton` both can, it is the table of `ops/gpu.py` that decides, shape by shape.
"""


class _Requested(threading.local):
    """The name that each thread asks for. Not a ContextVar: torch.compile can neither trace nor guard one."""

    name: str | None = None


_requested = _Requested()
# Found once, since torch.compile cannot trace the search.
_reasons = {name: backend.unavailable() for name, backend in BACKENDS.items()}
_automatic = [name for name, reason in _reasons.items() if not reason]


def unavailable(name: str) -> str:
    """Why this backend can run nothing here, or ""."""
    return _reasons[name]


def _check(name: str) -> str:
    if name not in BACKENDS:
        raise unknown_name("backend", name, BACKENDS)
    if reason := unavailable(name):
        raise RuntimeError(f"backend {name!r} cannot run here: {reason}")
    return name


_environment = _check(os.environ["EFFNET_OPS_BACKEND"]) if os.environ.get("EFFNET_OPS_BACKEND") else None


def available_backends() -> dict[str, str]:
    """Every backend's name and "" if it can run on this machine, or else the reason why it cannot."""
    return dict(_reasons)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator inside the ``with`` block, or the decorated function, on the backend ``name``.

    Raises ValueError for an unknown name, RuntimeError where the backend cannot run on this machine, and, inside,
    RuntimeError for each call that it does not cover. EFFNET_OPS_BACKEND in the environment sets the default. What
    torch.compile makes of a function asks at each call: put this around the call, since inside it is only traced.
    """
    with _request(_check(name)):
        yield


@contextlib.contextmanager
def _request(name: str | None) -> Iterator[None]:
    previous = _requested.name
    _requested.name = name
    try:
        yield
    finally:
        _requested.name = previous


def requested() -> str | None:
    """The backend that this thread asks for by `use_backend` or the environment, or None for the automatic choice.

    While PyTorch exports to ONNX it is the reference: ONNX has no operators of ours, but all that this is made of.
    """
    return "reference" if exports_to_onnx() else _requested.name or _environment


def exports_to_onnx() -> bool:
    """Whether PyTorch is recording this call for an ONNX file."""
    recording = torch.compiler.is_exporting() if torch.compiler.is_compiling() else internals.tracer()
    # torch.onnx takes a microsecond to answer, so it is asked last.
    return recording and torch.onnx.is_in_onnx_export()


def resume(name: str | None) -> contextlib.AbstractContextManager[None]:
    """Ask for what `requested` gave before, in the thread and at the time of a backward pass."""
    return contextlib.nullcontext() if name == requested() else _request(name)


def why_not(name: str, x: Tensor, window: Window | None = None, operation: str = "") -> str:
    """Why the backend has no kernel of the operation for x and, where it has one, a depthwise window."""
    backend = BACKENDS[name]
    reason = backend.lacks(operation, window) if operation else ""
    return reason or backend.refuses(x) or ("" if window is None else backend.uncovered(window))


def select(x: Tensor, uncovered: str = "", window: Window | None = None, operation: str = "") -> str:
    """The backend that runs this call on x; ``uncovered`` is why the fused operators do not fit it, if they do not.

    ``operation`` is the name of the public function. Among `cuda` and `triton` the operator itself decides.
    """
    name = requested()
    if name is not None:
        reason = why_not(name, x, window, operation) or (uncovered if name != "reference" else "")
        if reason:
            raise RuntimeError(f"backend {name!r} cannot run this call: {reason}")
        return name
    if not uncovered:
        for name in _automatic:
            if not why_not(name, x, window, operation):
                return name
    return "reference"
