"""Every operator on a GPU against the fp64 reference, over the cases, layouts and precisions of all backends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DEPTHWISE, MBCONV, POINTWISE, SQUEEZE_EXCITE, DepthwiseCase, MBConvCase, PointwiseCase
from cases import SqueezeExciteCase as SECase
from fused_depthwise import CASES, Fused, check_backward, check_forward
from fused_mbconv import CASES as FUSED_MBCONV
from fused_mbconv import Case as FusedCase
from fused_mbconv import bounds, function_of, tensors_of
from helpers import (
    FORWARD_TOLERANCE,
    HALF,
    LAYOUTS,
    Function,
    Tensors,
    check,
    mbconv_bounds,
    mbconv_function,
    mbconv_tensors,
    names,
    normal,
    prepared,
    relative_error,
)
from test_depthwise import problem as depthwise_problem
from test_pointwise import problem as pointwise_problem
from test_squeeze_excite import problem as squeeze_excite_problem
from torch import Tensor

import effnet_ops
from effnet_ops import backends
from effnet_ops.checks import pair

DTYPES = (torch.float32, *HALF)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def same_strides(x: Tensor, device: str) -> Tensor:
    """x on another device, a view of as much memory around it and with the same strides."""
    size = x.untyped_storage().nbytes() // x.element_size()
    return x.as_strided((size,), (1,), 0).to(device).as_strided(x.shape, x.stride(), x.storage_offset())


class OnGPU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return same_strides(x.detach(), "cuda")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return same_strides(grad, "cpu")


class OnCPU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return same_strides(x.detach(), "cpu")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return same_strides(grad, "cuda")


def on_gpu(function: Function, backend: str | None) -> Function:
    """The function with its tensors moved to the GPU and its result back, through autograd and with all strides.

    What is not in fp64, which is the reference's own call, runs on ``backend``, or by the automatic choice.
    """

    def moved(tensors: Tensors) -> Tensor:
        given = {name: None if value is None else OnGPU.apply(value) for name, value in tensors.items()}
        if next(value for value in given.values() if value is not None).dtype == torch.float64:
            return OnCPU.apply(function(given))
        if backend is None:
            return OnCPU.apply(function(given))
        with effnet_ops.use_backend(backend):
            assert backends.select(given["x"]) == backend
            return OnCPU.apply(function(given))

    return moved


def parity(
    function: Function,
    tensors: Tensors,
    dtype: torch.dtype,
    layout: str,
    backend: str | None = "triton",
    **tolerances: Any,
) -> None:
    check(on_gpu(function, backend), tensors, dtype, layout, **tolerances)


def laid_out(cases: list[Any]) -> list[tuple[Any, str]]:
    return [(case, LAYOUTS[i % 4]) for i, case in enumerate(cases)]


@pytest.mark.parametrize(("case", "layout"), laid_out(DEPTHWISE), ids=names(DEPTHWISE))
@by_dtype
def test_depthwise(case: DepthwiseCase, layout: str, dtype: torch.dtype, gpu_backend: str) -> None:
    stride, dilation = pair("stride", case.stride, 1), pair("dilation", case.dilation, 1)
    uncovered = backends.BACKENDS[gpu_backend].uncovered(backends.Window(case.kernel, stride, dilation))
    if uncovered:
        pytest.skip(f"{gpu_backend}: {uncovered}")
    parity(*depthwise_problem(case), dtype, layout, gpu_backend)


@pytest.mark.parametrize(("case", "layout"), laid_out(POINTWISE), ids=names(POINTWISE))
@by_dtype
def test_pointwise(case: PointwiseCase, layout: str, dtype: torch.dtype) -> None:
    parity(*pointwise_problem(case), dtype, layout)


@pytest.mark.parametrize(("case", "layout"), laid_out(SQUEEZE_EXCITE), ids=names(SQUEEZE_EXCITE))
@by_dtype
def test_squeeze_excite(case: SECase, layout: str, dtype: torch.dtype, gpu_backend: str) -> None:
    parity(*squeeze_excite_problem(case), dtype, layout, gpu_backend)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("case", "layout"), laid_out(MBCONV), ids=names(MBCONV))
@by_dtype
def test_mbconv(case: MBConvCase, layout: str, dtype: torch.dtype, training: bool, block_request: str | None) -> None:
    function, tensors = mbconv_function(case, training), mbconv_tensors(case, dtype)
    parity(function, tensors, dtype, layout, block_request, **mbconv_bounds(case, dtype))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("case", "layout"), laid_out(FUSED_MBCONV), ids=names(FUSED_MBCONV))
@by_dtype
def test_fused_mbconv(case: FusedCase, layout: str, dtype: torch.dtype, training: bool) -> None:
    parity(function_of(case, training), tensors_of(case), dtype, layout, **bounds(dtype))


@by_dtype
def test_fused_mbconv_of_realistic_size(dtype: torch.dtype) -> None:
    """Many programs at once, and in evaluation without gradients."""
    case = FusedCase("v2_s_stage_2", (16, 24, 75, 75), 96, 48, stride=(2, 2))
    parity(function_of(case, True), tensors_of(case), dtype, "channels_last", **bounds(dtype))
    tensors = prepared(tensors_of(case), dtype, "channels_last")
    with torch.no_grad():
        exact = function_of(case, False)({n: None if v is None else v.double() for n, v in tensors.items()})
        found = [on_gpu(function_of(case, False), "triton")(tensors) for _ in range(2)]
    assert torch.equal(*found) and relative_error(found[0], exact) <= FORWARD_TOLERANCE[dtype]


@pytest.mark.parametrize("gpu_backend", ["cuda"])
@pytest.mark.parametrize(("case", "layout"), laid_out(MBCONV), ids=names(MBCONV))
@by_dtype
def test_mbconv_inference(case: MBConvCase, layout: str, dtype: torch.dtype, gpu_backend: str) -> None:
    """Without gradients, which is what the kernels of `cuda` are for."""
    tensors = prepared(mbconv_tensors(case, dtype), dtype, layout)
    function = mbconv_function(case, False)
    with torch.no_grad():
        exact = function({name: None if value is None else value.double() for name, value in tensors.items()})
        found = on_gpu(function, gpu_backend)(tensors)
    assert relative_error(found, exact) <= FORWARD_TOLERANCE[dtype]


@pytest.mark.parametrize("gpu_backend", ["cuda"])
@pytest.mark.parametrize("batch", [1, 64])
def test_mbconv_inference_of_realistic_size(batch: int, gpu_backend: str) -> None:
    """Many blocks at once, of the products that fill a GPU and of those that do not."""
    case = MBConvCase("b0_stage_5", (batch, 112, 14, 14), 192, 672, 28, kernel=(5, 5), stride=2)
    tensors = prepared(mbconv_tensors(case), torch.bfloat16, "channels_last")
    function = mbconv_function(case, False)
    with torch.no_grad():
        exact = function({name: None if value is None else value.double() for name, value in tensors.items()})
        found = [on_gpu(function, gpu_backend)(tensors) for _ in range(2)]
    assert torch.equal(*found) and relative_error(found[0], exact) <= FORWARD_TOLERANCE[torch.bfloat16]


@by_dtype
def test_realistic_size(dtype: torch.dtype, block_request: str | None) -> None:
    """Many programs at once: what the interpreter, which runs them in turn, cannot show."""
    case = MBConvCase("b0_stage_3", (32, 24, 56, 56), 40, 144, 6, kernel=(5, 5), stride=2)
    function, tensors = mbconv_function(case, True), mbconv_tensors(case, dtype)
    parity(function, tensors, dtype, "channels_last", block_request, **mbconv_bounds(case, dtype))


@pytest.mark.parametrize("gpu_backend", ["cuda"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@by_dtype
def test_prologues_and_epilogues(
    case: Fused, dtype: torch.dtype, layout: torch.memory_format, gpu_backend: str
) -> None:
    check_forward(case, dtype, "cuda", layout)
    check_backward(case, dtype, "cuda", layout)


def test_more_than_two_to_the_31_elements() -> None:
    """The last image of a batch whose activations do not fit 32-bit offsets equals the same image alone."""
    if torch.cuda.mem_get_info()[0] < 28 << 30:
        pytest.skip("needs 28 GB of free GPU memory")
    weight = normal(16, 16, 1, 1).bfloat16().cuda()
    image = normal(1, 16, 512, 512).bfloat16().cuda().to(memory_format=torch.channels_last)
    x = image.expand(520, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    assert x.numel() > 2**31
    expected = effnet_ops.pointwise_conv2d(image, weight, activation="silu")
    assert torch.equal(effnet_ops.pointwise_conv2d(x, weight, activation="silu")[-1:], expected)
    filters = normal(16, 1, 3, 3).bfloat16().cuda()
    for layout in (torch.channels_last, torch.contiguous_format):
        image, x = image.contiguous(memory_format=layout), x.contiguous(memory_format=layout)
        for backend in [name for name in ("cuda", "triton") if not effnet_ops.available_backends()[name]]:
            with effnet_ops.use_backend(backend):
                expected = effnet_ops.depthwise_conv2d(image, filters, padding=1)
                found = effnet_ops.depthwise_conv2d(x, filters, padding=1)[-1:]
                assert relative_error(found, expected.double()) <= 1e-6
