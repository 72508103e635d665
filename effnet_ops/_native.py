"""Loads the compiled part, `effnet_ops._C`, if it was built; why it is missing otherwise."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch  # noqa: F401  (its libraries must be in the process before ours)

module: ModuleType | None = None
why_missing = ""

try:
    module = importlib.import_module("effnet_ops._C")
except ModuleNotFoundError:
    why_missing = "the C++ part was not built: install effnet_ops with a C++ compiler at hand"
except ImportError as error:
    why_missing = f"the C++ part does not load: {error}"
