"""What a plan was read from, looked at again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from effnet_ops import _native
from effnet_ops.surgery import snapshot

assert _native.module is not None, _native.why_missing
CHANGES: dict[str, Callable[[dict[str, Any], dict[str, Any]], object]] = {
    "nothing": lambda first, second: None,
    "an equal value": lambda first, second: first.update(a=(1.5, len(first))),
    "one more": lambda first, second: second.update(e=1),
    "one less": lambda first, second: second.pop("d"),
    "one less in the first": lambda first, second: first.pop("c"),
    "another order": lambda first, second: first.update(a=first.pop("a")),
    "another key": lambda first, second: second.update(e=second.pop("d")),
    "empty": lambda first, second: second.clear(),
}


@pytest.mark.parametrize("places", [snapshot.Places, _native.module.Places], ids=["python", "library"])
@pytest.mark.parametrize("change", CHANGES)
def test_snapshot(places: Callable[[list[Any]], Any], change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "_places", places)
    first, second = {"a": (1.5, 3), "b": None, "c": "text"}, {"d": object()}
    taken = snapshot.Snapshot([first, {}, second, {}])
    assert taken.holds()
    CHANGES[change](first, second)
    assert taken.holds() == (change == "nothing")
