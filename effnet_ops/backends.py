"""Who runs a call, and why: one predicate a backend serves the automatic choice and an explicit request."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from effnet_ops import _native
from effnet_ops.checks import FLOAT_DTYPES, unknown_name


class Backend(NamedTuple):
    """``unavailable()`` is "" or why the backend can run nothing here; ``refuses(x)`` why it cannot run on x."""

    unavailable: Callable[[], str]
    refuses: Callable[[Tensor], str]


def _cpu_refuses(x: Tensor) -> str:
    if x.device.type != "cpu":
        return f"x is on {x.device}"
    if x.layout is not torch.strided:
        return f"x has layout {x.layout}"
    if x.dtype not in FLOAT_DTYPES:
        return f"x is {x.dtype}"
    return ""


BACKENDS: dict[str, Backend] = {
    "cpu": Backend(lambda: _native.why_missing, _cpu_refuses),
    "reference": Backend(lambda: "", lambda x: ""),
}
"""In the order of the automatic choice; `reference` runs everything and comes last."""

# Not a ContextVar: torch.compile can neither trace nor guard one.
_requested = threading.local()
_automatic = [name for name, backend in BACKENDS.items() if not backend.unavailable()]


def _check(name: str) -> str:
    if name not in BACKENDS:
        raise unknown_name("backend", name, BACKENDS)
    if reason := BACKENDS[name].unavailable():
        raise RuntimeError(f"backend {name!r} cannot run here: {reason}")
    return name


_environment = _check(os.environ["EFFNET_OPS_BACKEND"]) if os.environ.get("EFFNET_OPS_BACKEND") else None


def available_backends() -> dict[str, str]:
    """Every backend's name and "" if it can run on this machine, or else the reason why it cannot."""
    return {name: backend.unavailable() for name, backend in BACKENDS.items()}


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator inside the ``with`` block, or the decorated function, on the backend ``name``.

    Raises ValueError for an unknown name, RuntimeError where the backend cannot run on this machine, and, inside,
    RuntimeError for each call that it does not cover. EFFNET_OPS_BACKEND in the environment sets the default.
    """
    previous = getattr(_requested, "name", None)
    _requested.name = _check(name)
    try:
        yield
    finally:
        _requested.name = previous


def select(x: Tensor, uncovered: str = "") -> str:
    """The backend that runs this call on x; ``uncovered`` is why the fused operators do not fit it, if they do not."""
    requested = getattr(_requested, "name", None) or _environment
    if requested is not None:
        reason = BACKENDS[requested].refuses(x) or (uncovered if requested != "reference" else "")
        if reason:
            raise RuntimeError(f"backend {requested!r} cannot run this call: {reason}")
        return requested
    if not uncovered:
        for name in _automatic:
            if not BACKENDS[name].refuses(x):
                return name
    return "reference"
