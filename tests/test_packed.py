"""Packed weights and the operators on them, on every instruction set of this machine, against the fp64 reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from helpers import FORWARD_TOLERANCE, LAYOUTS, expected_strides, lay_out, normal, relative_error
from torch import Tensor

from effnet_ops import _native, packing, reference, use_backend
from effnet_ops.checks import resolve_padding
from effnet_ops.ops import packed
from effnet_ops.ops._library import OPERATORS
from effnet_ops.ops.calls import PackedConv
from effnet_ops.ops.packed import PackedBlockCall, PackedConvolutionCall, PackedPointwiseCall
from effnet_ops.ops.prepared import Prepared, record
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
        y = packed.pointwise(PackedPointwiseCall(given, panels, bias.to(reference.compute_dtype(dtype)), "silu"))
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
    sides = resolve_padding(padding, size, kernel, stride, (1, 1))
    exact = reference.convolution(*rounded(x, dtype=dtype), weight, bias, stride, sides, "silu")
    for layout in LAYOUTS:
        given = lay_out(x.to(dtype), layout)
        call = PackedConvolutionCall(given, panels, bias.to(panels.dtype), kernel, stride, padding, "silu")
        y = packed.convolution(call)
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
    "dilated": (2, 24, 144, 24, 6, (15, 18), (3, 3), (1, 1), (2, 2, 4, 4), "silu"),
    "dilated, strided, no gate": (1, 12, 40, 24, 0, (33, 20), (5, 5), (2, 1), (), "relu"),
}
DILATIONS = {"dilated": (2, 4), "dilated, strided, no gate": (3, 2)}


def block(name: str, dtype: torch.dtype) -> tuple[PackedBlockCall, Tensor, Tensor]:
    """A call without x, x in fp64, and the exact result for weights as they were rounded."""
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
    dilation = DILATIONS.get(name, (1, 1))
    sides = resolve_padding(padding, size, kernel, stride, dilation)
    squeeze_excite = None
    if reduced:
        parts = (exact_reduce, reduce_bias.double(), exact_excite, excite_bias.double())
        squeeze_excite = SqueezeExciteParams(*parts, "relu")
    stages = reference.mbconv(
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
        dilation=dilation,
    )
    call = PackedBlockCall(
        None,
        PackedConv(expand, expand_bias) if expands else None,
        PackedConv(packing.pack_depthwise(filters), depthwise_bias),
        PackedConv(reduce, reduce_bias) if reduced else None,
        PackedConv(excite, excite_bias) if reduced else None,
        PackedConv(project, project_bias),
        stride,
        padding,
        dilation,
        residual,
        activation,
        "relu",
        "sigmoid",
    )
    return call, x, stages.y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_mbconv(isa: str, name: str, dtype: torch.dtype, poison: None) -> None:
    call, x, exact = block(name, dtype)
    for layout in LAYOUTS:
        given = lay_out(x.to(dtype), layout)
        y = packed.mbconv(call._replace(x=given))
        assert y.stride() == expected_strides(given, y.shape)
        assert relative_error(y, exact) < FORWARD_TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["wide", "small images", "no gate", "no gate, large", "no gate, narrow"])
def test_threads_change_no_bit(name: str) -> None:
    call, x, _ = block(name, torch.float32)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append([packed.mbconv(call._replace(x=x[:n].float())) for n in range(x.shape[0] + 1)])
    torch.set_num_threads(1)
    for one, other in zip(results[0] * 2, results[1] + results[2], strict=True):
        assert torch.equal(one, other)


def prepare(x: Tensor, function: Callable[[Tensor], Tensor], tensors: Sequence[Tensor] = ()) -> Prepared | None:
    with torch.inference_mode():
        return record(x, function, tensors)[1]


def sequence(name: str, dtype: torch.dtype) -> tuple[Tensor, Callable[[Tensor], Tensor], int]:
    """x, several blocks one after the other, the last with neither expansion nor gate, and how many."""
    first, x, _ = block(name, dtype)
    out, compute = first.project.bias.shape[0], first.depthwise.bias
    project = packing.pack((normal(3, out) / out**0.5).to(product_dtype(dtype)))
    last = PackedBlockCall(
        None,
        None,
        PackedConv(compute.new_ones(3, 1, out) / 3, compute.new_ones(out) / 8),
        None,
        None,
        PackedConv(project, compute.new_ones(3) / 8),
        (2, 1),
        (),
        (1, 1),
        False,
        "hardswish",
        "none",
        "hard_sigmoid",
    )
    blocks = [first, first, last] if out == x.shape[1] else [first, last]

    def run(x: Tensor) -> Tensor:
        for call in blocks:
            x = packed.mbconv(call._replace(x=x))
        return x

    return x.to(dtype), run, len(blocks)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["wide", "odd channels", "one image", "no gate, large", "one pixel"])
def test_prepared_blocks_are_the_blocks(name: str, dtype: torch.dtype, isa: str, poison: None) -> None:
    x, run, count = sequence(name, dtype)
    x, other = (lay_out(value, "channels_last") for value in (x, -x))
    prepared = prepare(x, run)
    assert prepared is not None and len(prepared) == count
    with torch.inference_mode():
        for given in (x, other):
            found, expected = prepared.run(given), run(given)
            assert torch.equal(found, expected) and found.stride() == expected.stride() and found.dtype is dtype


def test_prepared_blocks_do_not_hold() -> None:
    x, run, _ = sequence("wide", torch.float32)
    x, held = lay_out(x, "channels_last"), torch.ones(3)
    prepared = prepare(x, run, [held])
    assert prepared is not None and prepare(x.contiguous(), run) is None
    with torch.inference_mode(False), torch.no_grad():
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
        held.share_memory_()
        assert not prepared.holds(x)


def pool(x: Tensor) -> Tensor:
    return packed.average_pool(packed.AveragePoolCall(x, True))


def test_only_operators_that_follow_one_another_are_prepared() -> None:
    """Where something else runs between them, or a tensor was copied for one, there is nothing to run again."""
    x, run, _ = sequence("wide", torch.float32)
    x = lay_out(x, "channels_last")
    assert prepare(x, run) is not None
    assert prepare(x, lambda x: run(x + 1)) is None
    assert prepare(x, lambda x: run(x) + 1) is None
    assert prepare(x, lambda x: run(x.clone())) is None
    assert prepare(x, lambda x: pool(pool(x))) is not None
    assert prepare(x, lambda x: pool(pool(x) * 1)) is None
    double = torch.randn(24, 24).double()
    call = PackedPointwiseCall(x, packing.pack(torch.randn(24, 24)), double[0], "none")
    assert prepare(x, lambda x: packed.pointwise(call._replace(x=x))) is None
    assert prepare(x, lambda x: x) is None


def test_a_recording_ends_with_an_error() -> None:
    x, run, _ = sequence("wide", torch.float32)
    x = lay_out(x, "channels_last")

    def fails(x: Tensor) -> Tensor:
        run(x)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), torch.inference_mode():
        record(x, fails, ())
    assert prepare(x, run) is not None


def test_recordings_nest() -> None:
    x, run, count = sequence("wide", torch.float32)
    x, kept = lay_out(x, "channels_last"), []

    def outer(x: Tensor) -> Tensor:
        y, inner = record(x, run, ())
        kept.append(inner)
        return packed.average_pool(packed.AveragePoolCall(y, True))

    prepared = prepare(x, outer)
    assert len(kept[0]) == count and len(prepared) == count + 1
    with torch.inference_mode():
        assert torch.equal(prepared.run(x), packed.average_pool(packed.AveragePoolCall(kept[0].run(x), True)))


def test_a_prepared_call_without_memory_is_an_error() -> None:
    x, run, _ = sequence("wide", torch.float32)
    x = x.contiguous(memory_format=torch.channels_last)
    prepared = prepare(x, run)
    x.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="storage was freed"), torch.inference_mode():
        prepared.run(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prepared_layers(dtype: torch.dtype, isa: str, poison: None) -> None:
    x, bias = normal(2, 24, 9, 7).to(dtype), normal(40).to(reference.compute_dtype(dtype))
    product = packing.pack(normal(40, 24).to(product_dtype(dtype)))
    dense = packing.pack_convolution(normal(40, 24, 3, 5).to(bias.dtype))
    image = x.contiguous(memory_format=torch.channels_last)
    pixel = x[:, :, :1, :1].contiguous()
    for given, operator, call in (
        (image, packed.pointwise, PackedPointwiseCall(None, product, bias, "silu")),
        (pixel, packed.pointwise, PackedPointwiseCall(None, product, bias, "none")),
        (x, packed.convolution, PackedConvolutionCall(None, dense, bias, (3, 5), (2, 1), (), "relu")),
        (image, packed.convolution, PackedConvolutionCall(None, dense, bias, (3, 5), (1, 2), (1, 0, 2, 2), "none")),
        (image, packed.average_pool, packed.AveragePoolCall(None, False)),
        (image, packed.average_pool, packed.AveragePoolCall(None, True)),
    ):

        def run(x: Tensor, operator: Any = operator, call: Any = call) -> Tensor:
            return operator(call._replace(x=x))

        prepared = prepare(given, run)
        with torch.inference_mode():
            found, expected = prepared.run(given), run(given)
        assert prepared.holds(given) is False and torch.equal(found, expected)
        assert found.stride() == expected.stride() and found.dtype is dtype
    other = torch.float32 if dtype is torch.bfloat16 else torch.bfloat16
    call = PackedPointwiseCall(None, product, bias, "none")
    assert prepare(image.to(other), lambda x: packed.pointwise(call._replace(x=x))) is None
    assert prepare(x, lambda x: packed.pointwise(call._replace(x=x))) is None
    assert prepare(x, lambda x: packed.average_pool(packed.AveragePoolCall(x, True))) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1280, 7, 7), (3, 19, 5, 4), (2, 40, 90, 100), (2, 8, 1, 1), (0, 8, 3, 3)], ids=str
)
def test_average_pool(isa: str, shape: tuple[int, ...], dtype: torch.dtype, poison: None) -> None:
    x = normal(*shape) + 1
    (exact,) = rounded(x, dtype=dtype)
    for layout in LAYOUTS:
        y = packed.average_pool(packed.AveragePoolCall(lay_out(x.to(dtype), layout), True))
        assert y.shape == (*shape[:2], 1, 1) and y.is_contiguous()
        flat = packed.average_pool(packed.AveragePoolCall(lay_out(x.to(dtype), layout), False))
        assert torch.equal(flat, y.flatten(1))
        assert shape[0] == 0 or relative_error(y, exact.mean((2, 3), keepdim=True)) < FORWARD_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators_keep_their_contracts(dtype: torch.dtype) -> None:
    call, x, _ = block("odd channels", dtype)
    tests = ("test_schema", "test_faketensor")
    args = OPERATORS["mbconv_packed"].signature.flatten(call._replace(x=x.to(dtype)))
    torch.library.opcheck(OPS.mbconv_packed.default, tuple(args), test_utils=tests)
    bias, weight = torch.randn(5), torch.randn(5, x.shape[1])
    panels = packing.pack(weight.to(product_dtype(dtype)))
    torch.library.opcheck(OPS.pointwise_packed.default, (x.to(dtype), panels, bias, "relu"), test_utils=tests)
    dense = packing.pack_convolution(torch.randn(5, x.shape[1], 3, 3))
    convolution = (x.to(dtype), dense, bias, (3, 3), (2, 2), (), "none")
    torch.library.opcheck(OPS.convolution_packed.default, convolution, test_utils=tests)
    torch.library.opcheck(OPS.average_pool.default, (x.to(dtype), True), test_utils=tests)


def test_gradients_are_the_references() -> None:
    call, x, _ = block("one image", torch.float64)
    x.requires_grad_()
    torch.autograd.gradcheck(lambda x: packed.mbconv(call._replace(x=x[:, :, :6, :6])), x, fast_mode=True)
    torch.autograd.gradcheck(lambda x: packed.average_pool(packed.AveragePoolCall(x, False)), x, fast_mode=True)
    x, run, _ = sequence("odd channels", torch.float64)
    torch.autograd.gradcheck(run, x.requires_grad_(), fast_mode=True)
    call.expand.bias.requires_grad_()
    assert packed.mbconv(call._replace(x=torch.randn(1, 16, 4, 4, dtype=torch.float64))).requires_grad


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
    call = PackedPointwiseCall(image, packing.pack(torch.ones(1, 1)), torch.zeros(1), "silu")
    return packed.pointwise(call).view(-1)


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
