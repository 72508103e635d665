"""What every kernel module lists of itself, so that it can be compiled and checked without a GPU."""

from __future__ import annotations

from typing import Any, NamedTuple


class Compiled(NamedTuple):
    """One kernel at one real configuration.

    ``signature`` gives each run-time argument its Triton type, such as "*bf16", "i32" or "fp32"; arguments that are
    constants or None are in ``constants``. Pointers are taken to be 16-byte aligned, as PyTorch's allocations are.
    ``representative`` puts it into the set that every test run compiles.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    representative: bool = False
