"""Every public name has a docstring: `make api` makes the reference of them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator

import pytest

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
