"""docs/counters.md has what the counters say that are installed here: torch's always, and others where they are."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import flop_counters

ROOT = Path(__file__).resolve().parent.parent

SECTIONS = re.split(r"^## ", (ROOT / "docs" / "counters.md").read_text(encoding="utf-8"), flags=re.MULTILINE)


def rows() -> list[tuple[str | None, str, str, str, str]]:
    """(backend, network, counter, kind of model, what the page says) of each cell."""
    cells = []
    for section, backend in zip(SECTIONS, (None, "reference"), strict=True):
        for table in re.findall(r"(?:^\|.*\n)+", section, flags=re.MULTILINE):
            (network, *kinds), _, *lines = [
                [c.strip() for c in line.strip("|\n").split("|")] for line in table.splitlines()
            ]
            cells += [
                (backend, network, counter, kind, said)
                for counter, *values in lines
                for kind, said in zip(kinds, values, strict=True)
            ]
    return cells


CELLS = [cell for cell in rows() if cell[1] == "efficientnet_b0"]


@pytest.mark.parametrize(("backend", "network", "counter", "kind", "said"), CELLS)
def test_page_has_what_the_counter_says(backend: str | None, network: str, counter: str, kind: str, said: str) -> None:
    package, function = flop_counters.COUNTERS[counter]
    found = flop_counters.say(package, function, network, kind, backend)
    if found == "not installed":
        pytest.skip(f"{package} is not installed")
    assert found == said
