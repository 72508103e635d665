"""Who runs an operator on CUDA tensors: CUDA C++ kernels, Triton's, or the fallback.

A request is honoured where the requested backend has a kernel. Where both backends have one, `gpu_choice.json` decides,
by operator and shape: data with an origin, either "measured on <GPU>" or "byte model", which
`benchmarks/gpu/choice.py` writes. It is of channels_last tensors: depthwise convolutions of contiguous ones run on
`cuda`, which reads and writes them as they are, where Triton's kernels need copies (docs/layouts.md).

In inference both have kernels for whole blocks. Triton's convolve with those of `cuda`: see `block_depthwise`. In
training only Triton has.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effnet_ops import backends
from effnet_ops.ops import _library, cuda, triton
from effnet_ops.ops.cuda.depthwise import too_large

TABLE = Path(__file__).with_name("gpu_choice.json")
GPU_BACKENDS = {"cuda": cuda, "triton": triton}
BLOCK_DEPTHWISE, BLOCK_DEPTHWISE_ORIGIN = "cuda", "measured on NVIDIA H200, batch 256, bf16"
"""Whose depthwise kernels blocks run on, where both can, and why.

In training, over the shapes of B0, with all that a block fuses into them, those of `cuda` are 0.95 to 1.7 times as
fast as Triton's forward, and 2.3 to 5.6 times backward.
"""

_logger = logging.getLogger(__name__)
_chosen: dict[tuple[Any, ...], Callable[..., Any]] = {}
_MOST_CHOSEN = 4096


@functools.cache
def table() -> dict[str, Any]:
    """operator -> {"default": .., "origin": .., "shapes": shape -> {"backend": .., "origin": ..}}"""
    return json.loads(TABLE.read_text(encoding="utf-8"))["operators"]


def bucket(x: Sequence[int], kernel: int | None, stride: int | None, element_size: int) -> str:
    """The name of the shapes that share an entry: of (N, C, H, W) the batch counts by powers of four."""
    batch = 1
    while 4 * batch <= x[0]:
        batch *= 4
    window = "" if kernel is None else f",kernel={kernel},stride={stride}"
    return f"batch={batch},channels={x[1]},height={x[2]},width={x[3]}{window},element_size={element_size}"


def has_planes(x: Tensor) -> bool:
    """Whether an operator's result for x (N, C, H, W) is contiguous, with several channels of several pixels."""
    several = len(x.shape) == 4 and x.shape[1] > 1 and x.shape[2] * x.shape[3] > 1
    return several and _library.memory_format(x) == torch.contiguous_format


def preferred(operator: str, x: Tensor, window: backends.Window | None) -> tuple[str, str]:
    """The backend for a call that both have kernels for, and the origin of the choice: mostly the table's."""
    if window is not None and has_planes(x):
        return "cuda", "byte model, contiguous"
    entry = table()[operator]
    sizes = (None, None) if window is None else (window.kernel[0], window.stride[0])
    found = entry["shapes"].get(bucket(x.shape, *sizes, x.element_size()))
    return (found["backend"], found["origin"]) if found else (entry["default"], entry["origin"])


def _able(operator: str, backend: str, x: Tensor, window: backends.Window | None) -> bool:
    runs = operator in GPU_BACKENDS[backend].WORDS and not backends.unavailable(backend)
    return runs and not backends.why_not(backend, x, window)


def choose(operator: str, x: Tensor, window: backends.Window | None) -> str:
    """The backend that runs this operator on x, or "reference".

    A request that has no kernel for the call is an error of the public function already; the operator itself is right
    all the same.
    """
    able = [name for name in GPU_BACKENDS if _able(operator, name, x, window)]
    requested = backends.requested()
    if requested in able:
        return requested
    if len(able) < 2:
        return able[0] if able else "reference"
    name, origin = preferred(operator, x, window)
    _announce(operator, name, origin)
    return name


def without(backend: str, operator: str, call: Any) -> Any:
    """The call of an operator for which ``backend`` turned out to have no kernel."""
    for name, other in GPU_BACKENDS.items():
        if name != backend and _able(operator, name, call.x, None):
            return other.implementation(operator)(call)
    return call.reference()


def block_depthwise(x: Tensor, expanded: Sequence[int], window: backends.Window, sides: Sequence[int]) -> str:
    """The backend of the depthwise convolution in a block on Triton kernels: "triton" where that was asked for.

    ``x`` is the block's, ``expanded`` the size (N, C, H, W) of what is convolved, ``sides`` its padding.
    """
    if backends.requested() == "triton" or not _able("depthwise_conv2d", BLOCK_DEPTHWISE, x, window):
        return "triton"
    if too_large(expanded, window.kernel[0], sides):
        return "triton"
    _announce("the depthwise convolution of a block", BLOCK_DEPTHWISE, BLOCK_DEPTHWISE_ORIGIN)
    return BLOCK_DEPTHWISE


@functools.cache
def _announce(operator: str, backend: str, origin: str) -> None:
    _logger.info("%s on a GPU runs on %s by default (%s)", operator, backend, origin)


def _implementation(operator: str, x: Tensor, window: backends.Window | None) -> Callable[..., Any]:
    """What runs the arguments of an operator."""
    place = () if window is None else (has_planes(x), *map(tuple, window))
    key = (operator, backends.requested(), x.device, x.dtype, x.shape, *place)
    found = _chosen.get(key)
    if found is None:
        name = choose(operator, x, window)
        found = _library.OPERATORS[operator].fallback if name == "reference" else _launched(operator, name)
        # Images of ever new sizes must not fill memory; a hit, which each call pays for, keeps no order of use.
        if len(_chosen) >= _MOST_CHOSEN:
            _chosen.clear()
        _chosen[key] = found
    return found


def _launched(operator: str, backend: str) -> Callable[..., Any]:
    function = _library.OPERATORS[operator].unpacking(GPU_BACKENDS[backend].implementation(operator))
    return function if backend == "cuda" else Replayed(function)


class Replayed:
    """An operator on Triton kernels, whose host code runs once for arguments of the same sizes.

    What it launches is recorded (`kernels/launching.py`). A call that cannot be recorded, and any while somebody
    watches launches, goes the whole way.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        from effnet_ops.kernels import launching, pointwise

        self._function, self._launching, self._precision = function, launching, pointwise.precision
        self._recordings: dict[tuple[Any, ...], Any] = {}

    def __call__(self, *args: Any) -> Any:
        # Triton launches on the current device, whatever the tensors' device is.
        with torch.cuda.device_of(args[0]):
            return self.run(torch.cuda.current_stream().cuda_stream, *args)

    def run(self, stream: int, *args: Any) -> Any:
        """The operator on a stream, which is the current one."""
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        pointers = [tensor.data_ptr() for tensor in tensors]
        begins = [pointer for pointer in pointers if pointer]
        if len(set(begins)) < len(begins) or self._launching.watched():
            return self._function(*args)
        key = (args[0].device, self._precision(args[0].dtype), *map(_kind, args))
        recording = self._recordings.get(key)
        if recording is not None:
            return recording(tensors, pointers, stream)
        return self._function(*args) if key in self._recordings else self._record(key, tensors, args)

    def _record(self, key: tuple[Any, ...], tensors: list[Tensor], args: Sequence[Any]) -> Any:
        with self._launching.Recorder(tensors) as recorder:
            result = self._function(*args)
        # Images of ever new sizes must not fill memory.
        if len(self._recordings) >= _MOST_CHOSEN:
            self._recordings.clear()
        try:
            self._recordings[key] = recorder.finish(result)
        except self._launching.Unrecordable as reason:
            _logger.info("each call runs its host code, since %s", reason)
            self._recordings[key] = None
        return result


def _kind(argument: Any) -> Any:
    """What of an argument decides which kernels are launched, and how."""
    if isinstance(argument, Tensor):
        return argument.shape, argument.stride(), argument.dtype, argument.data_ptr() % 16
    return tuple(argument) if isinstance(argument, list) else argument


def _register(operator: str) -> None:
    signature = _library.OPERATORS[operator].signature
    at = [argument.name for argument in signature.arguments].index("x")
    convolves = operator.startswith("depthwise_conv2d")

    def kernel(*args: Any) -> Any:
        window = None
        if convolves:
            call = signature.parse(args)
            window = getattr(call, "call", call).window()
        return _implementation(operator, args[at], window)(*args)

    _library.library.impl(operator, kernel, "CUDA")


def register() -> None:
    """Register every operator that has kernels for CUDA tensors; called once, when all operators are defined."""
    for operator in triton.WORDS:
        _register(operator)
