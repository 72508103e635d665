"""Whether what a plan was read from is still the same: asked before each call of a fused layer."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

from effnet_ops import _native


class Places:
    """What the library's class of this name does, where there is no library."""

    def __init__(self, entries: list[Any]) -> None:
        pass

    def unchanged(self, entries: list[Any]) -> bool:
        at = 0
        while at < len(entries):
            items = list(chain.from_iterable(entries[at].items()))
            end = at + 1 + len(items)
            if len(entries) < end or any(a is not b for a, b in zip(entries[at + 1 : end], items, strict=True)):
                return False
            at = end
            if at < len(entries) and not isinstance(entries[at], dict):
                return False
        return True


class Snapshot:
    """The keys and values of dictionaries at one time."""

    __slots__ = ("_entries", "_places")

    def __init__(self, dictionaries: Iterable[dict[str, Any]]) -> None:
        self._entries = [entry for d in dictionaries for entry in (d, *chain.from_iterable(d.items()))]
        self._places = _places(self._entries)

    def holds(self) -> bool:
        """Whether each dictionary has the same objects in the same order as then."""
        return self._places.unchanged(self._entries)


_places = Places if _native.module is None else _native.module.Places
