"""Whole blocks in inference: ops/cuda/mbconv.py, the bindings and the emulated kernels, against fp64."""

from __future__ import annotations

import pytest
import torch
from cases import MBCONV, MBConvCase
from helpers import (
    FORWARD_TOLERANCE,
    HALF,
    LAYOUTS,
    expected_strides,
    mbconv_groups,
    mbconv_tensors,
    names,
    prepared,
    relative_error,
)

from effnet_ops.checks import padding_sides, pair
from effnet_ops.ops import cuda
from effnet_ops.ops.mbconv import MBConvCall

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIXED = [(case, DTYPES[i % 3], LAYOUTS[i % 4]) for i, case in enumerate(MBCONV)]


def call_of(case: MBConvCase, tensors: dict[str, torch.Tensor | None]) -> MBConvCall:
    groups = mbconv_groups(case, tensors)
    pairs = {name: pair(name, getattr(case, name), 1) for name in ("stride", "dilation")}
    config = case.config | pairs | {"padding": padding_sides(case.padding)}
    return MBConvCall.of(tensors["x"], **groups, **config, drop_path=tensors["drop_path"])


def check_block(case: MBConvCase, dtype: torch.dtype, layout: str, parameters: torch.dtype | None = None) -> None:
    tensors = prepared(mbconv_tensors(case), dtype, layout, parameters)
    exact = call_of(case, {name: None if t is None else t.double() for name, t in tensors.items()}).reference()
    call = call_of(case, tensors)
    with torch.no_grad():
        y = cuda.implementation("mbconv_inference")(call)
    assert y.dtype == dtype and y.shape == exact.shape and y.stride() == expected_strides(call.x, y.shape)
    assert relative_error(y, exact) <= FORWARD_TOLERANCE[dtype]


@pytest.mark.usefixtures("bindings", "poison")
@pytest.mark.parametrize(("case", "dtype", "layout"), MIXED, ids=names(MBCONV))
def test_block(case: MBConvCase, dtype: torch.dtype, layout: str) -> None:
    check_block(case, dtype, layout)


@pytest.mark.usefixtures("bindings", "poison")
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_block_with_parameters_in_half_precision(dtype: torch.dtype) -> None:
    check_block(MBCONV[0], dtype, "channels_last", dtype)


@pytest.mark.slow
@pytest.mark.usefixtures("bindings", "poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MBCONV, ids=names(MBCONV))
def test_block_in_every_precision(case: MBConvCase, dtype: torch.dtype) -> None:
    check_block(case, dtype, "channels_last")


@pytest.mark.usefixtures("bindings")
def test_what_the_kernels_do_not_cover_runs_all_the_same() -> None:
    """A larger window, more channels than a tile of x has room for, a dilation where there was none before."""
    for dilation in (1, 2):
        case = MBConvCase("dilated", (1, 8, 9, 9), 8, 16, 2, residual=True, dilation=dilation)
        check_block(case, torch.float32, "channels_last")
    check_block(MBConvCase("7x7", (1, 8, 9, 9), 8, 16, 2, kernel=(7, 7)), torch.float32, "channels_last")
    wide = MBConvCase("wide", (1, 4000, 2, 2), 8, 16, None)
    check_block(wide, torch.float32, "channels_last")
