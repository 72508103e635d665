"""Packed weights and the operators on them, on every instruction set of this machine, against the fp64 reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import FORWARD_TOLERANCE, LAYOUTS, expected_strides, lay_out, normal, relative_error
from torch import Tensor

from effnet_ops import _native, packing, reference, use_backend
from effnet_ops.ops import packed
from effnet_ops.params import ConvNormParams, SqueezeExciteParams

assert _native.module is not None, _native.why_missing
C = _native.module
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OPS = torch.ops.effnet_ops


@pytest.fixture(params=C.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = C.isa()
    C.set_isa(request.param)
    yield request.param
    C.set_isa(before)


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype is torch.bfloat16 else reference.compute_dtype(dtype)


def rounded(*values: Tensor, dtype: torch.dtype) -> list[Tensor]:
    return [value.to(dtype).double() for value in values]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("columns", "depth"), [(16, 8), (1, 1), (24, 33), (40, 7)])
def test_packing_is_undone_by_unpacking(columns: int, depth: int, dtype: torch.dtype) -> None:
    weight = torch.randn(columns, depth).to(dtype)
    panels = packing.pack(weight)
    assert panels.shape[0] * 16 >= columns and panels.shape[2] == 16 and panels.is_contiguous()
    assert torch.equal(packing.unpack(panels, columns, depth), weight)
    assert panels.double().sum() == pytest.approx(weight.double().sum().item(), abs=1e-9)
    filters = torch.randn(columns, 1, 3, 5)
    assert torch.equal(packing.unpack_depthwise(packing.pack_depthwise(filters)), filters)
    dense = torch.randn(columns, depth, 3, 2)
    assert torch.equal(packing.unpack_convolution(packing.pack_convolution(dense), columns, depth, (3, 2)), dense)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "channels", "out", "size"),
    [(1, 320, 96, 7), (2, 7, 17, 5), (1, 1280, 1000, 1), (3, 24, 144, 9), (1, 600, 24, 13), (5, 3, 1, 1)],
)
def test_pointwise(isa: str, batch: int, channels: int, out: int, size: int, dtype: torch.dtype, poison: None) -> None:
    x, weight, bias = normal(batch, channels, size, size), normal(out, channels) / channels**0.5, normal(out)
    panels = packing.pack(weight.to(product_dtype(dtype)))
    exact_x, exact_weight = rounded(x, dtype=dtype) + rounded(weight, dtype=product_dtype(dtype))
    exact = reference.pointwise_conv2d(exact_x, exact_weight.view(out, channels, 1, 1), bias, None, "silu")
    for layout in LAYOUTS:
        given = lay_out(x.to(dtype), layout)
        y = packed.pointwise(given, panels, bias.to(reference.compute_dtype(dtype)), "silu")
        assert y.stride() == expected_strides(given, y.shape)
        assert relative_error(y, exact) < FORWARD_TOLERANCE[dtype]


CONVOLUTIONS = [
    (1, 3, 32, (33, 20), (3, 3), (2, 2), (1, 1, 1, 1)),
    (2, 3, 24, (16, 17), (3, 3), (2, 2), ()),
    (1, 1, 17, (9, 9), (7, 5), (1, 2), (3, 3, 2, 2)),
    (2, 4, 40, (8, 8), (2, 2), (2, 2), (0, 0, 0, 0)),
    (1, 16, 5, (3, 3), (3, 3), (3, 3), (2, 0, 1, 1)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "channels", "out", "size", "kernel", "stride", "padding"), CONVOLUTIONS)
def test_convolution(
    isa: str, batch: int, channels: int, out: int, size: Any, kernel: Any, stride: Any, padding: Any, dtype: torch.dtype
) -> None:
    x, bias = normal(batch, channels, *size), normal(out)
    weight = normal(out, channels, *kernel) / (channels * kernel[0] * kernel[1]) ** 0.5
    panels = packing.pack_convolution(weight.to(reference.compute_dtype(dtype)))
    sides = packed.resolve_padding(padding, size, kernel, stride, (1, 1))
    exact = reference.convolution(*rounded(x, dtype=dtype), weight, bias, stride, sides, "silu")
    for layout in LAYOUTS:
        given = lay_out(x.to(dtype), layout)
        y = packed.convolution(given, panels, bias.to(panels.dtype), kernel, stride, padding, "silu")
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert relative_error(y, exact) < FORWARD_TOLERANCE[dtype]


BLOCKS = {
    "wide": (2, 24, 144, 24, 6, (18, 15), (3, 3), (1, 1), (1, 1, 1, 1), "silu"),
    "one image": (1, 16, 96, 24, 4, (20, 20), (5, 5), (2, 2), (), "silu"),
    "small images": (7, 40, 240, 40, 10, (7, 7), (5, 5), (1, 1), (2, 2, 2, 2), "silu"),
    "odd channels": (3, 7, 19, 7, 3, (6, 5), (3, 3), (1, 1), (1, 1, 1, 1), "hardswish"),
    "no gate": (2, 24, 56, 24, 0, (8, 9), (3, 3), (1, 1), (1, 1, 1, 1), "relu6"),
    "no expansion": (2, 32, 32, 16, 8, (17, 12), (3, 3), (1, 1), (1, 1, 1, 1), "silu"),
    "no expansion, odd": (1, 13, 13, 5, 2, (5, 6), (7, 3), (2, 1), (3, 3, 1, 1), "relu"),
    "one pixel": (2, 48, 288, 48, 12, (1, 1), (3, 3), (1, 1), (1, 1, 1, 1), "silu"),
    "narrow": (3, 24, 64, 40, 6, (9, 4), (5, 3), (2, 2), (), "silu"),
    "deep": (1, 300, 640, 300, 20, (4, 3), (3, 3), (1, 1), (1, 1, 1, 1), "silu"),
    "no gate, large": (2, 5, 37, 7, 0, (30, 21), (3, 3), (1, 1), (1, 1, 1, 1), "relu6"),
    "no gate, strided": (1, 16, 96, 24, 0, (33, 20), (5, 5), (2, 2), (), "relu"),
    "no gate, narrow": (3, 8, 40, 8, 0, (90, 3), (3, 3), (1, 1), (1, 1, 1, 1), "silu"),
    "no gate, deep": (1, 300, 320, 8, 0, (4, 20), (3, 3), (1, 1), (1, 1, 1, 1), "relu6"),
    "no expansion, no gate": (3, 32, 32, 16, 0, (20, 9), (3, 3), (1, 1), (1, 1, 1, 1), "hardswish"),
}


def block(name: str, dtype: torch.dtype) -> tuple[list[Any], Tensor, Tensor]:
    """The operator's arguments but for x, x in fp64, and the exact result for weights as they were rounded."""
    batch, channels, wide, out, reduced, size, kernel, stride, padding, activation = BLOCKS[name]
    wanted, compute = product_dtype(dtype), reference.compute_dtype(dtype)

    def product(columns: int, depth: int, to: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        weight = (normal(columns, depth) / depth**0.5).to(to)
        return packing.pack(weight), weight.double().view(columns, depth, 1, 1), normal(columns).to(compute) / 4

    x = normal(batch, channels, *size)
    filters = (normal(wide, 1, *kernel) / (kernel[0] * kernel[1]) ** 0.5).to(compute)
    depthwise_bias = normal(wide).to(compute) / 4
    expands = name.startswith("no expansion") is False
    expand, exact_expand, expand_bias = product(wide, channels, wanted) if expands else (None, None, None)
    reduce, exact_reduce, reduce_bias = product(reduced, wide, compute) if reduced else (None, None, None)
    excite, exact_excite, excite_bias = product(wide, reduced, compute) if reduced else (None, None, None)
    project, exact_project, project_bias = product(out, wide, wanted)
    residual = channels == out and stride == (1, 1)
    sides = packed.resolve_padding(padding, size, kernel, stride, (1, 1))
    squeeze_excite = None
    if reduced:
        parts = (exact_reduce, reduce_bias.double(), exact_excite, excite_bias.double())
        squeeze_excite = SqueezeExciteParams(*parts, "relu")
    exact, _ = reference.mbconv(
        *rounded(x, dtype=dtype),
        ConvNormParams(exact_expand, expand_bias.double()) if expands else None,
        ConvNormParams(filters.double(), depthwise_bias.double()),
        squeeze_excite,
        ConvNormParams(exact_project, project_bias.double()),
        stride=stride,
        padding=sides,
        activation=activation,
        gate="sigmoid",
        residual=residual,
        drop_path=None,
        training=False,
    )
    weights = [expand, expand_bias, packing.pack_depthwise(filters), depthwise_bias]
    weights += [reduce, reduce_bias, excite, excite_bias, project, project_bias]
    return [*weights, stride, padding, residual, activation, "relu", "sigmoid"], x, exact


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_mbconv(isa: str, name: str, dtype: torch.dtype, poison: None) -> None:
    args, x, exact = block(name, dtype)
    for layout in LAYOUTS:
        given = lay_out(x.to(dtype), layout)
        y = packed.mbconv(given, *args)
        assert y.stride() == expected_strides(given, y.shape)
        assert relative_error(y, exact) < FORWARD_TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["wide", "small images", "no gate", "no gate, large", "no gate, narrow"])
def test_threads_change_no_bit(name: str) -> None:
    args, x, _ = block(name, torch.float32)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append([packed.mbconv(x[:n].float(), *args) for n in range(x.shape[0] + 1)])
    torch.set_num_threads(1)
    for one, other in zip(results[0] * 2, results[1] + results[2], strict=True):
        assert torch.equal(one, other)


def sequence(name: str, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], list[int], list[list[Any]]]:
    """x, the arguments of a sequence whose last block has neither expansion nor gate, and those of its blocks."""
    first, x, _ = block(name, dtype)
    out = first[9].shape[0]
    project = packing.pack((normal(3, out) / out**0.5).to(product_dtype(dtype)))
    filters, bias = first[2].new_ones(3, 1, out) / 3, first[3].new_ones(out) / 8
    last = [
        None,
        None,
        filters,
        bias,
        *[None] * 4,
        project,
        bias[:3],
        (2, 1),
        (),
        False,
        "hardswish",
        "none",
        "hard_sigmoid",
    ]
    blocks = [first, first, last] if out == x.shape[1] else [first, last]
    tensors = [p for arguments in blocks for p in arguments[:10] if p is not None]
    numbers = [
        number
        for arguments in blocks
        for number in packed.SequenceBlock.of(arguments[0] is not None, arguments[4] is not None, *arguments[10:])
    ]
    return x.to(dtype), tensors, numbers, blocks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["wide", "odd channels", "one image", "no gate"])
def test_sequence_is_its_blocks(name: str, dtype: torch.dtype) -> None:
    x, tensors, numbers, blocks = sequence(name, dtype)
    for layout in LAYOUTS:
        y = given = lay_out(x, layout)
        for arguments in blocks:
            y = packed.mbconv(y, *arguments)
        found = packed.mbconv_sequence(given, tensors, numbers)
        assert torch.equal(found, y) and found.stride() == y.stride()
        assert relative_error(packed.reference_mbconv_sequence(given, tensors, numbers), y) < FORWARD_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["wide", "odd channels", "one image", "no gate, large"])
def test_prepared_sequence_is_the_sequence(name: str, dtype: torch.dtype, isa: str, poison: None) -> None:
    x, tensors, numbers, _ = sequence(name, dtype)
    x = lay_out(x, "channels_last")
    with torch.inference_mode():
        prepared = packed.prepare_sequence(x, tensors, numbers)
        expected = packed.mbconv_sequence(x, tensors, numbers)
        assert prepared.holds(x)
        found = prepared.run(x)
    assert torch.equal(found, expected) and found.stride() == expected.stride() and found.dtype is dtype


def test_prepared_sequence_does_not_hold() -> None:
    x, tensors, numbers, _ = sequence("wide", torch.float32)
    x = lay_out(x, "channels_last")
    with torch.inference_mode(False), torch.no_grad():
        prepared = packed.prepare_sequence(x, tensors, numbers)
        assert packed.prepare_sequence(x.contiguous(), tensors, numbers) is None
        assert prepared.holds(x)
        with torch.enable_grad():
            assert not prepared.holds(x)
        with torch.utils.flop_counter.FlopCounterMode(display=False):
            assert not prepared.holds(x)
        with torch.profiler.profile():
            assert not prepared.holds(x)
        with use_backend("reference"):
            assert not prepared.holds(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert not prepared.holds(x)
        assert prepared.holds(x)
        tensors[3].share_memory_()
        assert not prepared.holds(x)


def test_prepared_kernels_count_their_numbers() -> None:
    for function, arguments, count in (
        (C.prepare_sequence, ([[1, 2, 3]],), 31),
        (C.prepare_inference, ([1, 2, 3], [0.0] * 3), 40),
        (C.prepare_pointwise, ([1, 2, 3],), 7),
        (C.prepare_convolution, ([1, 2, 3],), 17),
        (C.prepare_average_pool, ([1, 2],), 3),
    ):
        with pytest.raises(ValueError, match=rf"takes {count} numbers, got"):
            function(0, *arguments)
    with pytest.raises(ValueError, match="eps takes 3 numbers, got 2"):
        C.prepare_inference(0, [0] * 40, [0.0] * 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prepared_layers(dtype: torch.dtype, isa: str, poison: None) -> None:
    x, bias = normal(2, 24, 9, 7).to(dtype), normal(40).to(reference.compute_dtype(dtype))
    product = packing.pack(normal(40, 24).to(product_dtype(dtype)))
    dense = packing.pack_convolution(normal(40, 24, 3, 5).to(bias.dtype))
    image = x.contiguous(memory_format=torch.channels_last)
    pixel = x[:, :, :1, :1].contiguous()
    for given, operator, prepare, arguments in (
        (image, packed.pointwise, packed.prepare_pointwise, (product, bias, "silu")),
        (pixel, packed.pointwise, packed.prepare_pointwise, (product, bias, "none")),
        (x, packed.convolution, packed.prepare_convolution, (dense, bias, (3, 5), (2, 1), (), "relu")),
        (image, packed.convolution, packed.prepare_convolution, (dense, bias, (3, 5), (1, 2), (1, 0, 2, 2), "none")),
        (image, packed.average_pool, packed.prepare_average_pool, (False,)),
        (image, packed.average_pool, packed.prepare_average_pool, (True,)),
    ):
        with torch.inference_mode():
            expected, prepared = operator(given, *arguments), prepare(given, *arguments)
            found = prepared.run(given)
        assert prepared.holds(given) is False and torch.equal(found, expected)
        assert found.stride() == expected.stride() and found.dtype is dtype
    other = torch.float32 if dtype is torch.bfloat16 else torch.bfloat16
    with torch.inference_mode():
        assert packed.prepare_pointwise(image.to(other), product, bias, "none") is None
    assert packed.prepare_pointwise(x, product, bias, "none") is None
    assert packed.prepare_average_pool(x, True) is None


def test_sequence_with_wrong_arguments() -> None:
    x, tensors, numbers, _ = sequence("wide", torch.float32)
    for given, settings, message in (
        (tensors[:-1], numbers, "more tensors than the"),
        ([*tensors, x], numbers, "tensors, got"),
        (tensors, numbers[:-1], "13 numbers"),
        (tensors, [], "13 numbers"),
        (tensors, [*numbers[:10], 5, *numbers[11:]], "number 10 of a block is 5"),
    ):
        with pytest.raises(RuntimeError, match=message):
            OPS.mbconv_sequence_packed(x, given, settings)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1280, 7, 7), (3, 19, 5, 4), (2, 40, 90, 100), (2, 8, 1, 1), (0, 8, 3, 3)], ids=str
)
def test_average_pool(isa: str, shape: tuple[int, ...], dtype: torch.dtype, poison: None) -> None:
    x = normal(*shape) + 1
    (exact,) = rounded(x, dtype=dtype)
    for layout in LAYOUTS:
        y = packed.average_pool(lay_out(x.to(dtype), layout), True)
        assert y.shape == (*shape[:2], 1, 1) and y.is_contiguous()
        assert torch.equal(packed.average_pool(lay_out(x.to(dtype), layout), False), y.flatten(1))
        assert shape[0] == 0 or relative_error(y, exact.mean((2, 3), keepdim=True)) < FORWARD_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators_keep_their_contracts(dtype: torch.dtype) -> None:
    args, x, _ = block("odd channels", dtype)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.mbconv_packed.default, (x.to(dtype), *args), test_utils=tests)
    bias, weight = torch.randn(5), torch.randn(5, x.shape[1])
    panels = packing.pack(weight.to(product_dtype(dtype)))
    torch.library.opcheck(OPS.pointwise_packed.default, (x.to(dtype), panels, bias, "relu"), test_utils=tests)
    dense = packing.pack_convolution(torch.randn(5, x.shape[1], 3, 3))
    convolution = (x.to(dtype), dense, bias, (3, 3), (2, 2), (), "none")
    torch.library.opcheck(OPS.convolution_packed.default, convolution, test_utils=tests)
    torch.library.opcheck(OPS.average_pool.default, (x.to(dtype), True), test_utils=tests)
    torch.library.opcheck(OPS.mbconv_sequence_packed.default, sequence("wide", dtype)[:3], test_utils=tests)


def test_gradients_are_the_references() -> None:
    args, x, _ = block("one image", torch.float64)
    x.requires_grad_()
    torch.autograd.gradcheck(lambda x: packed.mbconv(x[:, :, :6, :6], *args), x, fast_mode=True)
    torch.autograd.gradcheck(lambda x: packed.average_pool(x, False), x, fast_mode=True)
    x, tensors, numbers, _ = sequence("odd channels", torch.float64)
    x.requires_grad_()
    torch.autograd.gradcheck(lambda x: packed.mbconv_sequence(x, tensors, numbers), x, fast_mode=True)
    tensors[1].requires_grad_()
    assert packed.mbconv_sequence(x.detach(), tensors, numbers).requires_grad


@pytest.mark.parametrize(
    ("dtype", "weight", "message"),
    [
        (torch.float32, packing.pack(torch.randn(8, 5)), "not packed for 4 by 8"),
        (torch.float32, packing.pack(torch.randn(24, 4)), "not packed for 4 by 8"),
        (torch.bfloat16, packing.pack(torch.randn(8, 4)), "the dtype of x"),
    ],
)
def test_weights_packed_for_something_else(dtype: torch.dtype, weight: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        OPS.pointwise_packed(torch.randn(1, 4, 2, 2, dtype=dtype), weight, torch.randn(8), "none")


def silu_of(x: Tensor) -> Tensor:
    """x through the kernels: a product with 1 and the activation behind it."""
    image = x.view(1, 1, 1, -1)
    return packed.pointwise(image, packing.pack(torch.ones(1, 1)), torch.zeros(1), "silu").view(-1)


def test_silu_over_the_whole_range(isa: str) -> None:
    """Every 509th float: two units in the last place or 2e-7 of the result, which is zero below 3e-37."""
    bits = torch.arange(-(2**31), 2**31, 509, dtype=torch.int64)
    x = bits.to(torch.int32).view(torch.float32)
    x = torch.cat([x[x.isfinite()], torch.linspace(-90, 20, 2_000_003)])
    found = silu_of(x).double()
    exact = x.double() / (1 + torch.exp(-x.double()))
    error = (found - exact).abs()
    nearest = exact.float().abs()
    unit = torch.nextafter(nearest, torch.full_like(nearest, torch.inf)).double() - nearest.double()
    inside = x > -88.0
    bound = torch.maximum(2 * unit, 2e-7 * exact.abs())
    assert (error[inside] <= bound[inside]).all()
    assert (error[~inside] < 6e-37).all()
    special = silu_of(torch.tensor([torch.inf, torch.nan, -torch.inf, 0.0, -0.0]))
    assert (
        special[0] == torch.inf and special[1:3].isnan().all() and torch.equal(special[3:], torch.tensor([0.0, -0.0]))
    )
