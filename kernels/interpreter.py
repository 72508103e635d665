"""Triton 3.6's interpreter turns arrays of one element into loop bounds, which NumPy 2.4 has made an error.

`repair` is called once where kernels are interpreted; compiled kernels are not concerned.
"""

from __future__ import annotations

from typing import Any


def repair() -> None:
    """Let scalars of the interpreter be loop bounds again."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch
