"""Imports effnet_ops when a saved program asks PyTorch for one of its operators.

`import torch` calls `register`, the entry point in the group torch.backends of pyproject.toml. This is a module of its
own so that it imports nothing of the package: programs that never use it would pay for that at every start.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

_NAME = "effnet_ops"


class _Operators(torch._ops._OpNamespace):
    """``torch.ops.effnet_ops`` until an operator is asked for: PyTorch makes the lasting one in its place."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            return super().__getattr__(name)
        if torch.ops.__dict__.get(_NAME) is self:
            del torch.ops.__dict__[_NAME]
        importlib.import_module(_NAME)
        return getattr(getattr(torch.ops, _NAME), name)


def register() -> None:
    """Make the first use of an operator, such as by torch.export.load, import effnet_ops."""
    torch.ops.__dict__.setdefault(_NAME, _Operators(_NAME))
