"""Whether what a plan was read from is still the same: asked before each call of a fused layer."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

from effnet_ops import _native


def unchanged(entries: list[Any]) -> bool:
    """What the library's function of this name does, where there is no library."""
    at = 0
    while at < len(entries):
        if not isinstance(entries[at], dict):
            return False
        items = list(chain.from_iterable(entries[at].items()))
        end = at + 1 + len(items)
        if len(entries) < end or any(a is not b for a, b in zip(entries[at + 1 : end], items, strict=True)):
            return False
        at = end
    return True


class Snapshot:
    """The keys and values of dictionaries at one time."""

    __slots__ = ("_entries",)

    def __init__(self, dictionaries: Iterable[dict[str, Any]]) -> None:
        self._entries = [entry for d in dictionaries for entry in (d, *chain.from_iterable(d.items()))]

    def holds(self) -> bool:
        """Whether each dictionary has the same objects in the same order as then."""
        return _unchanged(self._entries)


_unchanged = unchanged if _native.module is None else _native.module.unchanged
