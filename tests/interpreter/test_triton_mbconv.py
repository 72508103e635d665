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
from effnet_ops.kernels import pointwise

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
# What differs in the kernels' work, one precision, mode and layout each, in turn; `make test-all` runs all cases.
QUICK = (
    "b0_style", "no_expansion_residual", "lite", "odd_channels", "mobilenet_v3", "drop_path_without_residual",
    "affine_free", "folded", "one_pixel", "residual", "trained", "folded_no_expansion",
    "empty_batch", "dilated",
)  # fmt: skip
CASES = [case for case in MBCONV if case.name in QUICK]
MIXED = [(case, DTYPES[i % 4], bool(i // 4 % 2), LAYOUTS[i // 2 % 4]) for i, case in enumerate(CASES)]
ALL = [(case, dtype, training, LAYOUTS[1]) for case in MBCONV for dtype in DTYPES for training in (False, True)]


@pytest.mark.parametrize(("case", "dtype", "training", "layout"), MIXED, ids=names(CASES))
def test_block(case: MBConvCase, dtype: torch.dtype, training: bool, layout: str) -> None:
    check(mbconv_function(case, training), mbconv_tensors(case, dtype), dtype, layout, **mbconv_bounds(case, dtype))


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype", "training", "layout"), ALL)
def test_block_in_every_way(case: MBConvCase, dtype: torch.dtype, training: bool, layout: str) -> None:
    check(mbconv_function(case, training), mbconv_tensors(case, dtype), dtype, layout, **mbconv_bounds(case, dtype))


MIXED_BACKENDS = [
    ("b0_style", torch.bfloat16, True), ("no_expansion_residual", torch.float32, True),
    ("lite", torch.float16, False), ("odd_channels", torch.float32, True), ("folded", torch.bfloat16, False),
    ("one_pixel", torch.float16, True),
]  # fmt: skip


@pytest.mark.usefixtures("cuda_depthwise")
@pytest.mark.parametrize(("name", "dtype", "training"), MIXED_BACKENDS)
def test_block_with_cuda_depthwise(name: str, dtype: torch.dtype, training: bool) -> None:
    """As blocks run on a GPU: the depthwise convolution, both ways, on CUDA C++ kernels, here emulated."""
    case = next(case for case in MBCONV if case.name == name)
    bounds = mbconv_bounds(case, dtype)
    check(mbconv_function(case, training), mbconv_tensors(case, dtype), dtype, "channels_last", **bounds)


@pytest.mark.parametrize("name", ["b0_style", "no_expansion_residual", "lite"])
def test_both_gradients_of_products_in_one_launch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the early blocks run in 16 bits, here in fp64, where nothing hides behind rounding."""
    case, fused = next(case for case in MBCONV if case.name == name), []
    both = pointwise.both_gradients
    monkeypatch.setattr(pointwise, "both_fit", lambda *_, **__: True)
    monkeypatch.setattr(pointwise, "both_gradients", lambda *args, **kw: fused.append(args) or both(*args, **kw))
    bounds = mbconv_bounds(case, torch.float64)
    check(mbconv_function(case, True), mbconv_tensors(case), torch.float64, **bounds)
    assert len(fused) == (1 if "no_expansion" in name else 2)


def test_half_parameters() -> None:
    case, dtype = next(case for case in MBCONV if case.name == "no_expansion_residual"), torch.bfloat16
    bounds = mbconv_bounds(case, dtype)
    check(mbconv_function(case, True), mbconv_tensors(case, dtype), dtype, parameter_dtype=dtype, **bounds)


@pytest.mark.parametrize(("case", "dtype"), [(c, DTYPES[(i + 1) % 4]) for i, c in enumerate(CASES)], ids=names(CASES))
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
