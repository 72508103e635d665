"""The CUDA kernels of squeeze-and-excitation on the emulated GPU, against fp64."""

from __future__ import annotations

import pytest
import torch
from cases import SQUEEZE_EXCITE, SqueezeExciteCase
from cuda_kernels import Kernels
from helpers import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, names, relative_error
from squeeze_excite_problems import (
    backward_from_partials,
    backward_from_tensor,
    forward_from_partials,
    forward_from_tensor,
)
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIXED = [(case, DTYPES[i % 3]) for i, case in enumerate(SQUEEZE_EXCITE)]
by_case = pytest.mark.parametrize("case", SQUEEZE_EXCITE, ids=names(SQUEEZE_EXCITE))
by_case_and_dtype = pytest.mark.parametrize(("case", "dtype"), MIXED, ids=names(SQUEEZE_EXCITE))


def check(found: dict[str, Tensor], exact: dict[str, Tensor], bounds: dict[torch.dtype, float]) -> None:
    """Results in fp32 of activations in half precision are as accurate as fp32 allows."""
    errors = {name: relative_error(value, exact[name]) for name, value in found.items()}
    assert all(errors[name] <= bounds[value.dtype] for name, value in found.items()), errors


@by_case_and_dtype
def test_forward_from_tensor(kernels: Kernels, case: SqueezeExciteCase, dtype: torch.dtype) -> None:
    check(*forward_from_tensor(kernels, case, dtype, None), FORWARD_TOLERANCE)


@by_case_and_dtype
def test_forward_behind_a_normalisation(kernels: Kernels, case: SqueezeExciteCase, dtype: torch.dtype) -> None:
    found, exact = forward_from_tensor(kernels, case, dtype, "silu")
    # bf16 activations take an approximate SiLU.
    bounds = FORWARD_TOLERANCE if dtype != torch.bfloat16 else {torch.float32: FORWARD_TOLERANCE[torch.bfloat16]}
    check(found, exact, bounds)


@by_case
def test_forward_from_partials(kernels: Kernels, case: SqueezeExciteCase) -> None:
    for parts in (1, 3):
        kernels.reset()
        check(*forward_from_partials(kernels, case, parts), FORWARD_TOLERANCE)


@by_case_and_dtype
def test_backward_from_tensor(kernels: Kernels, case: SqueezeExciteCase, dtype: torch.dtype) -> None:
    check(*backward_from_tensor(kernels, case, dtype), GRADIENT_TOLERANCE)


@by_case
@pytest.mark.parametrize("rows", [1, 5], ids="rows={}".format)
def test_backward_from_partials(kernels: Kernels, case: SqueezeExciteCase, rows: int) -> None:
    check(*backward_from_partials(kernels, case, 2, rows), GRADIENT_TOLERANCE)
