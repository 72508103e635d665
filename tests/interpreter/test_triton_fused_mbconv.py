"""Whole Fused-MBConv blocks on interpreted Triton kernels against the fp64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, HALF, LAYOUTS, check, names, prepared, relative_error
from test_fused_mbconv import CASES, NAMED, Case, function_of, tensors_of
from triton.runtime.interpreter import GridExecutor

import effnet_ops

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
MIXED = [(case, DTYPES[i % 4], LAYOUTS[i // 2 % 4]) for i, case in enumerate(CASES)]
ALL = [(case, dtype, training) for case in CASES for dtype in DTYPES for training in (False, True)]


def bounds(dtype: torch.dtype) -> dict[str, Any]:
    """As on the CPU: what training keeps is rounded to half precision."""
    return {"gradient_tolerance": 3 * GRADIENT_TOLERANCE[dtype], "rounded_to": dtype} if dtype in HALF else {}


@pytest.mark.parametrize(("case", "dtype", "layout"), MIXED, ids=names(CASES))
def test_block(case: Case, dtype: torch.dtype, layout: str) -> None:
    check(function_of(case, True), tensors_of(case), dtype, layout, **bounds(dtype))
