"""Loads the compiled part, `effnet_ops._C`, if it was built; why it is missing otherwise."""

from __future__ import annotations

from types import ModuleType

import torch  # noqa: F401  (its libraries must be in the process before ours)

module: ModuleType | None = None
why_missing = ""

try:
    from effnet_ops import _C as module  # type: ignore[no-redef]
except ImportError as error:
    not_built = "cannot import name" in str(error)
    why_missing = "the C++ part was not built (see `effnet-ops info`)" if not_built else f"it does not load: {error}"
