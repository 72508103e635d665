"""The CUDA kernels of depthwise convolution on the emulated GPU, against fp64."""

from __future__ import annotations

import pytest
import torch
from cases import DEPTHWISE, DepthwiseCase
from depthwise_problems import Fusion, Geometry, covered, exact_forward, images, run_forward
from helpers import FORWARD_TOLERANCE, relative_error
from kernels import Kernels
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = [case for case in DEPTHWISE if covered(case) and case.name != "large"]
PLAIN = Fusion(bias=True, out_activation="silu", pool=True)
FORWARD = {
    "inference": PLAIN,
    "training": Fusion(norm=True, activation="silu", statistics=True),
    "everything": Fusion(
        norm=True, activation="silu", gate=True, bias=True, out_norm=True, out_activation="hardswish", pool=True,
        statistics=True,
    ),
    "gradient": Fusion(norm=True, activation="hardswish", out_norm=True, out_activation="silu", grad=True),
    "relu": Fusion(activation="relu", gate=True, out_activation="relu6", pool=True),
}  # fmt: skip
# One kind and precision a case, in turn; all of them with `make test-all`.
MIXED = [(case, list(FORWARD)[i % 5], DTYPES[i % 3]) for i, case in enumerate(SMALL)]
ALL = [(case, kind, dtype) for case in SMALL for kind in FORWARD for dtype in DTYPES]


def check_forward(kernels: Kernels, case: DepthwiseCase, fusion: Fusion, dtype: torch.dtype) -> None:
    geometry = Geometry.of(case)
    found = run_forward(kernels, geometry, fusion, dtype)
    exact = exact_forward(geometry, fusion, found)
    bound = FORWARD_TOLERANCE[dtype]
    y = images(found["y"])
    assert relative_error(y, exact) <= bound
    if fusion.pool:
        assert relative_error(found["pool"].double().sum(1), exact.sum((2, 3))) <= bound
    if fusion.statistics and geometry.batch > 0:
        check_statistics(found["statistics"], y)


def check_statistics(partials: Tensor, stored: Tensor) -> None:
    """Of the values as stored, so that their own rounding does not count."""
    count, mean, squares = partials.double().unbind(1)
    variance, expected = torch.var_mean(stored, (0, 2, 3), correction=0)
    assert torch.equal(count.sum(0), torch.full_like(expected, stored[:, 0].numel()))
    total = (count * mean).sum(0) / count.sum(0)
    assert relative_error(total, expected, floor=variance.sqrt().norm().item()) <= 2e-6
    assert relative_error((squares + count * (mean - total) ** 2).sum(0) / count.sum(0), variance) <= 2e-6


@pytest.mark.parametrize(("case", "kind", "dtype"), MIXED, ids=[f"{case.name}-{kind}" for case, kind, _ in MIXED])
def test_forward(kernels: Kernels, case: DepthwiseCase, kind: str, dtype: torch.dtype) -> None:
    check_forward(kernels, case, FORWARD[kind], dtype)
