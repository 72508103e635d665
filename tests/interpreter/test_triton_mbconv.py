"""Whole blocks on interpreted Triton kernels against the fp64 reference, over the cases of all backends."""

from __future__ import annotations

import pytest
import torch
from cases import MBCONV, MBConvCase
from helpers import (
    FORWARD_TOLERANCE,
    LAYOUTS,
    check,
    mbconv_bounds,
    mbconv_function,
    mbconv_tensors,
    names,
    prepared,
    relative_error,
)
from triton.runtime.interpreter import GridExecutor

import effnet_ops

pytestmark = pytest.mark.usefixtures("poison")

# One precision, mode and layout a case, in turn; more of them with `make test-all`.
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
MIXED = [(case, DTYPES[i % 4], bool(i // 4 % 2), LAYOUTS[i // 8 % 4]) for i, case in enumerate(MBCONV)]
ALL = [(case, dtype, training, LAYOUTS[1]) for case in MBCONV for dtype in DTYPES for training in (False, True)]
SMALL = [case for case in MBCONV if case.name != "large"]


@pytest.mark.parametrize(("case", "dtype", "training", "layout"), MIXED, ids=names(MBCONV))
def test_block(case: MBConvCase, dtype: torch.dtype, training: bool, layout: str) -> None:
    check(mbconv_function(case, training), mbconv_tensors(case), dtype, layout, **mbconv_bounds(case, dtype))


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype", "training", "layout"), ALL)
def test_block_in_every_way(case: MBConvCase, dtype: torch.dtype, training: bool, layout: str) -> None:
    check(mbconv_function(case, training), mbconv_tensors(case), dtype, layout, **mbconv_bounds(case, dtype))


@pytest.mark.parametrize(("case", "dtype"), [(c, DTYPES[i % 4]) for i, c in enumerate(SMALL)], ids=names(SMALL))
def test_inference(case: MBConvCase, dtype: torch.dtype) -> None:
    """Without anything to differentiate another operator runs."""
    function, inputs = mbconv_function(case, False), prepared(mbconv_tensors(case), dtype, "sliced_channels_last")
    with effnet_ops.use_backend("reference"):
        exact = function({name: value if value is None else value.double() for name, value in inputs.items()})
    assert relative_error(function(inputs), exact) <= FORWARD_TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("name", "launches"),
    [("folded", 4), ("folded_no_expansion", 3), ("folded_lite", 3), ("b0_style", 5), ("no_expansion", 4), ("lite", 4)],
)
def test_launches_of_inference(name: str, launches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As kernels/mbconv.py states; a batch of one is a latency of launches."""
    case = next(case for case in MBCONV if case.name == name)
    function, inputs = mbconv_function(case, False), prepared(mbconv_tensors(case), torch.float32, "channels_last")
    seen = []
    launch = GridExecutor.__call__
    monkeypatch.setattr(GridExecutor, "__call__", lambda *args, **kw: seen.append(args[0]) or launch(*args, **kw))
    function(inputs)
    assert len(seen) == launches
