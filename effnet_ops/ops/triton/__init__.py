"""The operators on Triton kernels: one file a word, with functions of the operators' names that take their calls.

`ops/gpu.py` registers them for CUDA. Where kernels are interpreted they are registered here for CPU, for as long as the
backend `triton` is asked for. Triton is imported by the first call. PyTorch's compiler sees the operators only, never
these kernels.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch

from effnet_ops import backends, internals
from effnet_ops.ops import _library

WORDS = {
    "depthwise_conv2d": "depthwise",
    "depthwise_conv2d_backward": "depthwise",
    "pointwise_conv2d": "pointwise",
    "pointwise_conv2d_backward": "pointwise",
    "squeeze_excite": "squeeze_excite",
    "squeeze_excite_backward": "squeeze_excite",
    "mbconv_inference": "mbconv",
    "mbconv_training": "mbconv",
    "mbconv_backward": "mbconv",
    "fused_mbconv_inference": "fused_mbconv",
    "fused_mbconv_training": "fused_mbconv",
    "fused_mbconv_backward": "fused_mbconv",
}
"""The file that has each operator."""


@functools.cache
def implementation(name: str) -> Callable[..., Any]:
    """The operator called ``name`` on Triton kernels."""
    return getattr(importlib.import_module(f"{__name__}.{WORDS[name]}"), name)


def _register_interpreter(name: str) -> None:
    compiled = torch.library.get_kernel(f"{_library.NAMESPACE}::{name}", "CPU")
    unpacking = _library.OPERATORS[name].unpacking

    def kernel(keyset: internals.Keys, *args: Any) -> Any:
        if backends.requested() == "triton":
            return unpacking(implementation(name))(*args)
        return compiled.call_boxed(keyset, *args)

    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Warning only once for all operators,  other operators may also be overridden"
        )
        _library.library.impl(name, kernel, "CPU", with_keyset=True, allow_override=True)


def register_interpreter() -> None:
    """Register every operator that has kernels, where they are interpreted; called once, when all are defined."""
    if backends.INTERPRETED and not backends.unavailable("triton"):
        for name in WORDS:
            _register_interpreter(name)
