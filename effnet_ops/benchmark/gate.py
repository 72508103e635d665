"""The gate that every row has to pass: a time of a wrong result is no time."""

from __future__ import annotations

from torch import Tensor


class Failed(RuntimeError):
    """A result that disagrees with the reference, or what else went wrong with a provider, as one line."""


def relative_error(out: Tensor, ref: Tensor) -> float:
    """||out - ref|| / ||ref||, in fp64."""
    return ((out.double() - ref.double()).norm() / ref.double().norm().clamp_min(1e-30)).item()


def gate(what: str, error: float, allowed: float, remark: str = "") -> float:
    """``error``, or `Failed`, with the remark, where it is not within its bound (NaN is not)."""
    if not error <= allowed:
        known = f" ({remark})" if remark else ""
        raise Failed(f"wrong result of {what}: error {error:.1e} where {allowed:.1e} is allowed{known}")
    return error
