"""Argument checks of the public functions: every error names the argument and the value that is wrong."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable, Sequence
from numbers import Real

import torch
from torch import Tensor

from effnet_ops.reference.activation import ACTIVATIONS, GATES

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SAME: tuple[int, ...] = ()
"""TensorFlow's SAME padding as operators take it: resolved inside, from the input's size."""

LARGEST = 2**31 - 1
"""Of strides, paddings and dilations: no image has so many pixels, and sums of them still fit into 64 bits."""


def unknown_name(kind: str, name: object, known: Iterable[str], meant: str | None = None) -> ValueError:
    """An error for a name that is not in ``known``, with the closest one that is (``meant`` if it is one)."""
    known = list(known)
    close = [meant] if meant in known else difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    listed = f" (known: {', '.join(known)})" if len(known) <= 12 else ""
    return ValueError(f"unknown {kind} {name!r}{hint}{listed}")


def check_activation(name: str) -> None:
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise unknown_name("activation", name, ACTIVATIONS)


def check_gate(name: str) -> None:
    if not isinstance(name, str) or name not in GATES:
        raise unknown_name("gate", name, GATES)


def check_count(name: str, value: int, minimum: int = 1) -> int:
    """``value`` as an int of at least ``minimum``, or ValueError."""
    try:
        count = minimum - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = minimum - 1
    if count < minimum:
        raise ValueError(f"{name} must be a whole number of at least {minimum}, got {value!r}")
    return count


def check_number(name: str, value: float, minimum: float) -> None:
    """``value`` is a finite number of at least ``minimum``, or ValueError."""
    if isinstance(value, bool) or not isinstance(value, Real) or not minimum <= value < math.inf:
        raise ValueError(f"{name} must be a number of at least {minimum:g}, got {value!r}")


def pair(name: str, value: int | Sequence[int], minimum: int) -> tuple[int, int]:
    """``value`` as (vertical, horizontal), each from ``minimum`` to `LARGEST`; as in PyTorch, [2] is a pair, too."""
    items = integers(value, 2)
    if len(items) == 1:
        items *= 2
    if len(items) != 2:
        raise ValueError(f"{name} must be an int or a pair of ints, got {value!r}")
    for item in items:
        if not minimum <= item <= LARGEST:
            bound = f"at least {minimum}" if item < minimum else f"at most {LARGEST}"
            raise ValueError(f"{name} must be {bound}, got {value!r}")
    return items


def padding_sides(padding: int | str | Sequence[int]) -> tuple[int, ...]:
    """``padding`` as (top, bottom, left, right), each at most `LARGEST`, or `SAME` for "same"."""
    if isinstance(padding, str):
        if padding.lower() != "same":
            raise unknown_name("padding", padding, ["same"])
        return SAME
    sides = integers(padding, 4)
    if len(sides) == 1:
        sides *= 4
    if len(sides) == 2:
        sides = (sides[0], sides[0], sides[1], sides[1])
    if len(sides) != 4:
        raise ValueError(f'padding must be an int, a pair, (top, bottom, left, right) or "same", got {padding!r}')
    for side in sides:
        if not 0 <= side <= LARGEST:
            bound = "not be negative" if side < 0 else f"be at most {LARGEST}"
            raise ValueError(f"padding must {bound}, got {padding!r}")
    return sides


def integers(value: object, copies: int) -> tuple[int, ...]:
    """A whole number as so many ints, several as they are, () for anything else; NumPy's are as good as Python's."""
    if isinstance(value, int):
        return (value,) * copies
    try:
        if isinstance(value, (tuple, list)) or hasattr(value, "__iter__"):
            return tuple([item if isinstance(item, int) else operator.index(item) for item in value])
        return (operator.index(value),) * copies
    except TypeError:
        return ()


def resolve_padding(
    sides: Sequence[int], size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) in pixels; `SAME` puts the odd pixel of padding at the bottom and right."""
    if len(sides) == 4:
        return tuple(sides)
    resolved: list[int] = []
    for n, k, s, d in zip(size, kernel, stride, dilation, strict=True):
        total = ((n + s - 1) // s - 1) * s + (k - 1) * d + 1 - n
        # Only a window smaller than its stride can make it negative; elsewhere a max would hide from torch.export that
        # the output is ceil(n / s). sym_max of plain ints is what torch.compile cannot trace, max fixes a SymInt.
        if (k - 1) * d + 1 < s:
            total = max(total, 0) if isinstance(total, int) else torch.sym_max(total, 0)
        resolved += [total // 2, total - total // 2]
    return tuple(resolved)


def output_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """Height and width of a convolution's output; ``padding`` is (top, bottom, left, right)."""
    height, width = (
        (n + before + after - (k - 1) * d - 1) // s + 1
        for n, before, after, k, s, d in zip(size, padding[::2], padding[1::2], kernel, stride, dilation, strict=True)
    )
    return height, width


def check_input(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"x must be (N, C, H, W), got shape {tuple(x.shape)}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"x must be float32, float64, bfloat16 or float16, got {x.dtype}")


def check_parameter(name: str, p: Tensor | None, shape: Sequence[int | None], x: Tensor) -> None:
    """``p`` has ``shape`` (None is any size) on the device of ``x``, with its dtype, or fp32 where that is half.

    Vectors may be None; weights may not.
    """
    if p is None and len(shape) == 1:
        return
    if not isinstance(p, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(p).__name__}")
    size = p.shape
    if size != shape and (
        len(size) != len(shape) or any(want is not None and want != got for want, got in zip(shape, size, strict=True))
    ):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} must have shape ({wanted}), got {tuple(p.shape)} for x of shape {tuple(x.shape)}")
    half = x.dtype in (torch.bfloat16, torch.float16)
    if p.dtype != x.dtype and not (half and p.dtype == torch.float32):
        allowed = f"{x.dtype} or torch.float32" if half else f"{x.dtype}"
        raise TypeError(f"{name} must be {allowed} for x of {x.dtype}, got {p.dtype}")
    if p.device != x.device:
        raise ValueError(f"{name} is on {p.device}, but x is on {x.device}")


def fits(p: Tensor | None, shape: tuple[int, ...], x: Tensor) -> bool:
    """Whether `check_parameter` has nothing to find, at a glance: a block has some twenty parameters at each call."""
    return isinstance(p, Tensor) and p.shape == shape and p.dtype is x.dtype and p.device == x.device


def check_window(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """The output size of a convolution over x, or an error where the window does not fit once."""
    resolved = resolve_padding(padding, x.shape[2:], kernel, stride, dilation)
    size = output_size(x.shape[2:], kernel, stride, resolved, dilation)
    if 0 in x.shape[1:] or any(n < 1 for n in size):
        raise ValueError(
            f"kernel {tuple(kernel)} with padding {resolved} and dilation {tuple(dilation)} does not fit into x of "
            f"shape {tuple(x.shape)}: the output would be {size[0]}x{size[1]}"
        )
    return size
