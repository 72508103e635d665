"""What an operator made of its arguments at one call, kept for other inputs of that shape: create, then run.

Creating is the call itself: while it is recorded, the operators leave their kernels, with all that they unpacked and
checked (csrc/recording.h).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from effnet_ops import _native, backends, context, internals


def unobserved(x: Tensor) -> bool:
    """Whether no mode, transform, profiler or gradient would see an operator on x, but its kernel alone."""
    return (
        type(x) is Tensor
        and not torch.is_grad_enabled()
        and not internals.dispatch_modes()
        and not internals.function_mode()
        and not internals.profiler()
        and not internals.tracer()
        and not torch.is_autocast_enabled("cpu")
        and not context.in_transform()
        and not x.is_neg()
    )


def fits(x: Tensor) -> bool:
    """Whether a kernel can run on x, and nobody else has to see the call."""
    runs_here = _native.module is not None and x.is_cpu and backends.requested() in (None, "cpu")
    return runs_here and x.numel() > 0 and unobserved(x)


class Prepared:
    """CPU kernels for one shape, layout and dtype of x and the tensors that their operators have accepted with it.

    They have the addresses of the tensors, so that a call does not unpack them; `holds` must be asked before `run`.
    """

    __slots__ = ("_addresses", "_kernels", "_shape", "_sizes", "_strides", "_tensors")

    def __init__(self, kernels: Any, y: Tensor, tensors: Sequence[Tensor]) -> None:
        self._kernels, self._shape, self._strides = kernels, y.shape, y.stride()
        self._tensors = list(tensors)
        self._addresses, self._sizes = list(map(Tensor.data_ptr, tensors)), list(map(Tensor.numel, tensors))

    def holds(self, x: Tensor) -> bool:
        """Whether x fits, and the tensors' memory is as it was: it moves when it is sent to another process."""
        return fits(x) and (
            not self._tensors
            or (
                list(map(Tensor.data_ptr, self._tensors)) == self._addresses
                and list(map(Tensor.numel, self._tensors)) == self._sizes
                and all(map(Tensor.is_contiguous, self._tensors))
            )
        )

    def run(self, x: Tensor) -> Tensor:
        y = torch.empty_strided(self._shape, self._strides, dtype=x.dtype)
        self._kernels.run(x.data_ptr(), y.data_ptr())
        return y

    def __len__(self) -> int:
        return len(self._kernels)


class _Watch(internals.DispatchMode):
    """Whether nothing runs but operators of ours and views: an operation in place leaves no trace in addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.alone = True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.alone = self.alone and (function.namespace == "effnet_ops" or function.is_view)
        return function(*args, **(kwargs or {}))


def record(x: Tensor, function: Callable[[Tensor], Any], tensors: Sequence[Tensor]) -> tuple[Any, Prepared | None]:
    """``function(x)``, and what runs it again on other values: None where it did more than call operators in turn.

    ``tensors`` are those whose memory the kernels read beside x, as long as somebody may change them.
    """
    # Of others' tensors, no reference may be held where PyTorch counts them, as torch.utils.swap_tensors does.
    recording = _native.module.Recording(not tensors)
    try:
        with _Watch() as watch:
            y = function(x)
    except BaseException:
        recording.finish(0, 0)
        raise
    if not watch.alone or not _is_whole(y):
        # Something else ran, or y is a part of what a kernel wrote.
        recording.finish(0, 0)
        return y, None
    kernels = recording.finish(x.data_ptr(), y.data_ptr())
    return y, None if kernels is None else Prepared(kernels, y, tensors)


def _is_whole(y: Any) -> bool:
    """Whether y is a tensor with all of its memory, as a kernel writes it."""
    if type(y) is not Tensor or y.numel() * y.element_size() != y.untyped_storage().nbytes():
        return False
    return y.is_contiguous() or (y.dim() == 4 and y.is_contiguous(memory_format=torch.channels_last))


class PreparedCalls:
    """What is prepared for the inputs that one layer has seen lately, with other arguments that stay as they are."""

    __slots__ = ("_calls", "_failures", "_tensors")
    most, tries = 8, 2
    """How many are kept, and how often one is tried: a first call packs weights, which is no part of the call."""

    def __init__(self, tensors: Sequence[Tensor] = ()) -> None:
        self._tensors = tensors
        self._calls: dict[Any, Prepared] = {}
        self._failures: dict[Any, int] = {}

    def run(self, x: Tensor, function: Callable[[Tensor], Any]) -> Any:
        """``function(x)``, by what is prepared where such an x has been here before."""
        key = (x.shape, x.stride(), x.dtype)
        known = self._calls.get(key)
        if known is not None and known.holds(x) and not _native.module.recording():
            return known.run(x)
        if self._failures.get(key, 0) >= self.tries or not fits(x):
            return function(x)
        y, prepared = record(x, function, self._tensors)
        kept: dict[Any, Any] = self._failures if prepared is None else self._calls
        if len(kept) >= self.most:
            kept.clear()
        kept[key] = kept.get(key, 0) + 1 if prepared is None else prepared
        return y
