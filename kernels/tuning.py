"""Which tile sizes, warps and stages a kernel runs with: data with an origin, and a rule where there is no data.

`tuning.json` holds, for each operation, architecture and bucketed shape, a configuration and where it comes from. What
is not in it gets the operation's heuristic, a function of the shape and the architecture. Nothing is ever timed at a
call: a first call at a new shape must not stall.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from effnet_ops.checks import unknown_name

TABLE = Path(__file__).with_name("tuning.json")

Config = dict[str, int]
Heuristic = Callable[[Mapping[str, int], "Architecture"], Config]

_logger = logging.getLogger(__name__)
_heuristics: dict[str, Heuristic] = {}


class Architecture(NamedTuple):
    """What a rule may know of a GPU. ``shared_bytes`` is the most that one program can have."""

    name: str
    multiprocessors: int
    shared_bytes: int


ARCHITECTURES = {
    "sm_80": Architecture("sm_80", 108, 163 * 1024),
    "sm_89": Architecture("sm_89", 128, 99 * 1024),
    "sm_90": Architecture("sm_90", 132, 227 * 1024),
    "sm_100": Architecture("sm_100", 148, 227 * 1024),
}
"""A100, RTX 4090, H100 and H200, B200: what tests compile kernels for."""


def element(x: torch.Tensor) -> dict[str, int]:
    """What a shape says of a dtype: fp16 is as small as bf16, but its activations are exact and take more registers."""
    return {"element_size": x.element_size(), "float16": int(x.dtype == torch.float16)}


def heuristic(operation: str) -> Callable[[Heuristic], Heuristic]:
    """Decorator: the rule for ``operation``, called with the shape and the architecture."""

    def register(rule: Heuristic) -> Heuristic:
        _heuristics[operation] = rule
        return rule

    return register


def bucket(shape: Mapping[str, int]) -> str:
    """The name of the shapes that share a configuration: numbers above 512 are rounded up to a power of two.

    Channels and windows decide which tiles fit and stay as they are up to there; pixels only decide how many there are.
    """
    rounded = {name: n if n <= 512 else 1 << (n - 1).bit_length() for name, n in sorted(shape.items())}
    return ",".join(f"{name}={n}" for name, n in rounded.items())


def choose(operation: str, shape: Mapping[str, int], device: torch.device) -> Config:
    """The configuration of ``operation`` for this shape on this device: from the table, or else from the rule.

    Args:
        shape: what the operation's rule asks for, such as {"pixels": 802816, "channels_in": 16, "channels_out": 96}.

    Raises:
        ValueError: no such operation.
    """
    return _chosen(operation, device, tuple(shape.items()))


# Images of ever new sizes must not fill memory.
@functools.lru_cache(maxsize=4096)
def _chosen(operation: str, device: torch.device, items: tuple[tuple[str, int], ...]) -> Config:
    shape, arch = dict(items), architecture(device)
    if operation not in _heuristics:
        raise unknown_name("operation", operation, _heuristics)
    entry = table().get(operation, {}).get(arch.name, {}).get(bucket(shape))
    if entry is not None:
        return {name: value for name, value in entry.items() if name != "origin"}
    if arch.name != "interpreter":
        _announce(operation, arch.name, bucket(shape))
    return _heuristics[operation](shape, arch)


@functools.cache
def _announce(operation: str, arch: str, shape: str) -> None:
    _logger.info("no tuned configuration of %s for %s at %s: using the rule", operation, arch, shape)


def from_rule(operation: str, shape: Mapping[str, int], arch: Architecture) -> Config:
    """What the operation's rule alone says."""
    return _heuristics[operation](shape, arch)


@functools.cache
def table() -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """operation -> architecture -> bucket -> configuration with its "origin"."""
    return json.loads(TABLE.read_text(encoding="utf-8"))["configurations"]


@functools.cache
def architecture(device: torch.device) -> Architecture:
    """The architecture of a CUDA device; on the CPU, under the interpreter, a small one that makes few programs."""
    if device.type != "cuda":
        return Architecture("interpreter", 2, 163 * 1024)
    properties = torch.cuda.get_device_properties(device)
    name = f"sm_{properties.major}{properties.minor}"
    return Architecture(name, properties.multi_processor_count, properties.shared_memory_per_block_optin)
