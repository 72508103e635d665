"""Every public name has a docstring, of which `make api` makes the reference; a page has the figures of its rows."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

MODULES = ("", "functional", "layers", "models", "surgery", "deployment", "scaling", "distributed")


def public(module: object) -> Iterator[tuple[str, object]]:
    """The functions and classes that a module offers: those of ``__all__``, else those defined there."""
    offered = getattr(module, "__all__", None)
    for name, value in vars(module).items():
        own = getattr(value, "__module__", None) == module.__name__
        if (name in offered if offered is not None else own and not name.startswith("_")) and (
            inspect.isclass(value) or inspect.isfunction(value)
        ):
            yield name, value


@pytest.mark.parametrize("name", MODULES)
def test_public_names_have_docstrings(name: str) -> None:
    module = importlib.import_module(f"effnet_ops.{name}".rstrip("."))
    # A dataclass without one has its signature.
    without = [each for each, value in public(module) if (value.__doc__ or f"{each}(").startswith(f"{each}(")]
    assert module.__doc__ and not without


def test_shares_of_the_peak_are_those_of_the_rows() -> None:
    """docs/cpu.md: V2's layers inside the network, equal ones as one line with their median."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text(encoding="utf-8"))["rows"]
    found: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        network, _, layer = row.get("layer", "").partition(" ")
        label = {"tf_efficientnetv2_b0": "V2-B0", "efficientnetv2_s": "V2-S"}.get(network)
        if label and row["provider"] == "optimize_for_inference" and row["operation"] != "dispatch":
            found.setdefault((label, layer or "all"), []).append(row)
    page = (ROOT / "docs" / "cpu.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| (V2-\w+) \| (\S+?)(\d*)(?: to (\d+))? \| ([\d.]+) \| (\d+) % \|$", page, re.MULTILINE)
    assert len(lines) == 28
    for network, layer, first, last, ms, share in lines:
        names = [f"{layer}{i}" for i in range(int(first), int(last or first) + 1)] if first else [layer]
        each = [row for name in names for row in found[network, name]]
        assert len(each) == len(names)
        assert f"{statistics.median(row['p50'] for row in each):.2f}" == ms, (network, layer)
        assert f"{statistics.median(row['percent_of_fma_peak'] for row in each):.0f}" == share, (network, layer)


@pytest.mark.parametrize("name", MODULES)
def test_public_methods_have_docstrings(name: str) -> None:
    """Their own or those of a base class; what torch.nn.Module calls by itself needs none."""
    module = importlib.import_module(f"effnet_ops.{name}".rstrip("."))
    methods = [
        f"{offered}.{method}"
        for offered, value in public(module)
        if inspect.isclass(value)
        for method, member in vars(value).items()
        if not method.startswith("_") and method not in ("forward", "extra_repr", "train")
        if (inspect.isfunction(member) or isinstance(member, (property, classmethod, staticmethod)))
        and not inspect.getdoc(getattr(value, method))
    ]
    assert not methods
