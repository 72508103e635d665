"""Depthwise convolution on interpreted Triton kernels against the fp64 reference, over the cases of all backends."""

from __future__ import annotations

import pytest
import torch
from cases import DEPTHWISE, DepthwiseCase
from helpers import HALF, LAYOUTS, check, names
from test_depthwise import problem

pytestmark = pytest.mark.usefixtures("poison")

# Each case in fp32 and in one other precision, and in two of the layouts; `make test-all` runs all combinations.
OTHERS = (*HALF, torch.float64)
MIXED = [(case, LAYOUTS[i % 4], OTHERS[i % 3], LAYOUTS[(i + 1) % 4]) for i, case in enumerate(DEPTHWISE)]


@pytest.mark.parametrize(("case", "layout", "other", "other_layout"), MIXED, ids=names(DEPTHWISE))
def test_depthwise(case: DepthwiseCase, layout: str, other: torch.dtype, other_layout: str) -> None:
    check(*problem(case), torch.float32, layout)
    check(*problem(case), other, other_layout)
