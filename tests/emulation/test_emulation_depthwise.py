"""The CUDA kernels of depthwise convolution on the emulated GPU, against fp64."""

from __future__ import annotations

import pytest
import torch
from cases import DEPTHWISE, DepthwiseCase
from depthwise_problems import (
    BackwardFusion,
    Fusion,
    Geometry,
    covered,
    exact_backward,
    exact_forward,
    images,
    run_backward,
    run_forward,
)
from helpers import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, names, relative_error
from torch import Tensor

from kernels import Kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COVERED = [case for case in DEPTHWISE if covered(case)]
SMALL = [case for case in COVERED if case.name != "large"]
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
BACKWARD = {
    "plain": BackwardFusion(),
    "fused": BackwardFusion(
        after=True, a_activation="silu", statistics=True, gate=True, norm=True, activation="silu",
        wanted=("dx", "dw", "sums"),
    ),
    "everything": BackwardFusion(
        after=True, a_activation="hardswish", statistics=True, gate=True, norm=True, activation="hardswish",
        residual=True, wanted=("dx", "dw", "db", "sums"),
    ),
    "constants": BackwardFusion(after=True, a_activation="silu", activation="relu", residual=True),
    "input": BackwardFusion(wanted=("dx",)),
    "weight": BackwardFusion(after=True, a_activation="relu6", statistics=True, wanted=("dw", "db")),
}  # fmt: skip
# One kind and precision a case, in turn; all of them with `make test-all`.
MIXED_FORWARD = [(case, list(FORWARD)[i % 5], DTYPES[i % 3]) for i, case in enumerate(SMALL)]
MIXED_BACKWARD = [(case, list(BACKWARD)[i % 6], DTYPES[(i + i // 6) % 3]) for i, case in enumerate(SMALL)]


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


def check_backward(kernels: Kernels, case: DepthwiseCase, fusion: BackwardFusion, dtype: torch.dtype) -> None:
    geometry = Geometry.of(case)
    given, found = run_backward(kernels, geometry, fusion, dtype)
    exact = exact_backward(geometry, fusion, given)
    errors = {}
    for name, value in found.items():
        value = images(value) if name == "dx" else value.double().sum(0) if name == "sums" else value
        errors[name] = relative_error(value, exact[name])
    assert all(error <= GRADIENT_TOLERANCE[dtype] for error in errors.values()), errors


def ids(problems: list[tuple[DepthwiseCase, str, torch.dtype]]) -> list[str]:
    return [f"{case.name}-{kind}-{str(dtype).removeprefix('torch.')}" for case, kind, dtype in problems]


@pytest.mark.parametrize(("case", "kind", "dtype"), MIXED_FORWARD, ids=ids(MIXED_FORWARD))
def test_forward(kernels: Kernels, case: DepthwiseCase, kind: str, dtype: torch.dtype) -> None:
    check_forward(kernels, case, FORWARD[kind], dtype)


@pytest.mark.parametrize(("case", "kind", "dtype"), MIXED_BACKWARD, ids=ids(MIXED_BACKWARD))
def test_backward(kernels: Kernels, case: DepthwiseCase, kind: str, dtype: torch.dtype) -> None:
    check_backward(kernels, case, BACKWARD[kind], dtype)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", COVERED, ids=names(COVERED))
def test_in_every_way(kernels: Kernels, case: DepthwiseCase, dtype: torch.dtype, seed: int) -> None:
    for fusion in FORWARD.values():
        kernels.reset(seed)
        check_forward(kernels, case, fusion, dtype)
    for fusion in BACKWARD.values():
        kernels.reset(seed)
        check_backward(kernels, case, fusion, dtype)
