"""Tests that need an NVIDIA GPU; without one each of them is skipped, with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from effnet_ops import available_backends

HERE = Path(__file__).resolve().parent
REASON = available_backends()["triton"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if REASON and HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=f"backend triton: {REASON}"))
