"""The CUDA kernels of depthwise convolution on the emulated GPU, against fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import ACTIVATIONS, DEPTHWISE, DepthwiseCase
from cuda_kernels import Kernels
from depthwise_problems import (
    BackwardFusion,
    Fusion,
    Geometry,
    covered,
    exact_backward,
    exact_forward,
    run_backward,
    run_forward,
)
from helpers import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, names, relative_error
from torch import Tensor

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
# Two kinds a case and one precision each, in turn; all of them with `make test-all`.
MIXED_FORWARD = [
    (case, list(FORWARD)[(i + j) % 5], DTYPES[(i + j) % 3]) for i, case in enumerate(SMALL) for j in (0, 2)
]
MIXED_BACKWARD = [
    (case, list(BACKWARD)[(i + j) % 6], DTYPES[(i + i // 6 + j) % 3]) for i, case in enumerate(SMALL) for j in (0, 3)
]


def check_forward(
    kernels: Kernels, case: DepthwiseCase, fusion: Fusion, dtype: torch.dtype, channels_last: bool = True
) -> None:
    geometry = Geometry.of(case, channels_last)
    found = run_forward(kernels, geometry, fusion, dtype)
    exact = exact_forward(geometry, fusion, found)
    bound = FORWARD_TOLERANCE[dtype]
    y = geometry.images(found["y"])
    assert relative_error(y, exact) <= bound
    if fusion.pool:
        assert relative_error(found["pool"].double().sum(1), exact.sum((2, 3))) <= bound
    if fusion.statistics and geometry.batch > 0:
        check_statistics(found["statistics"], y)


def check_statistics(partials: Tensor, stored: Tensor) -> None:
    """Of the values as stored, so that their own rounding does not count.

    A thread's squares are around its first value. Where that is far from the mean they are a multiple of those around
    the mean, seldom of more than eight times: eight roundings of 2^-24, and those of the sum itself.
    """
    count, mean, squares = partials.double().unbind(1)
    variance, expected = torch.var_mean(stored, (0, 2, 3), correction=0)
    assert torch.equal(count.sum(0), torch.full_like(expected, stored[:, 0].numel()))
    total = (count * mean).sum(0) / count.sum(0)
    assert relative_error(total, expected, floor=variance.sqrt().norm().item()) <= 2e-6
    assert relative_error((squares + count * (mean - total) ** 2).sum(0) / count.sum(0), variance) <= 5e-6


def check_backward(
    kernels: Kernels, case: DepthwiseCase, fusion: BackwardFusion, dtype: torch.dtype, channels_last: bool = True
) -> None:
    geometry = Geometry.of(case, channels_last)
    given, found = run_backward(kernels, geometry, fusion, dtype)
    exact = exact_backward(geometry, fusion, given)
    errors = {}
    for name, value in found.items():
        value = geometry.images(value) if name == "dx" else value.double().sum(0) if name == "sums" else value
        errors[name] = relative_error(value, exact[name])
    assert all(error <= GRADIENT_TOLERANCE[dtype] for error in errors.values()), errors


def ids(problems: list[tuple]) -> list[str]:
    """From case, kind, dtype and, where it matters, the compute capability."""
    return [
        "-".join((case.name, kind, str(dtype).removeprefix("torch."), *(f"{major}0" for major in device)))
        for case, kind, dtype, *device in problems
    ]


def majors(case: DepthwiseCase) -> tuple[int, ...]:
    """The compute capabilities that may differ: where pixels begin at multiples of 16 bytes, rows come in two ways."""
    return (8, 9) if case.shape[1] % 4 == 0 else (9,)


def on_each(
    problems: list[tuple[DepthwiseCase, str, torch.dtype]], kinds: tuple[str, ...]
) -> list[tuple[DepthwiseCase, str, torch.dtype, int]]:
    """The problems, on an older device too where the kernel of their kind has another way for rows."""
    return [
        (*problem, major) for problem in problems for major in majors(problem[0]) if major == 9 or problem[1] in kinds
    ]


MIXED_FORWARD = on_each(MIXED_FORWARD, ("inference", "training"))
MIXED_BACKWARD = on_each(MIXED_BACKWARD, ("plain", "fused"))


@pytest.mark.parametrize(("case", "kind", "dtype", "major"), MIXED_FORWARD, ids=ids(MIXED_FORWARD))
def test_forward(kernels: Kernels, case: DepthwiseCase, kind: str, dtype: torch.dtype, major: int) -> None:
    kernels.reset(major=major)
    check_forward(kernels, case, FORWARD[kind], dtype)


@pytest.mark.parametrize(("case", "kind", "dtype", "major"), MIXED_BACKWARD, ids=ids(MIXED_BACKWARD))
def test_backward(kernels: Kernels, case: DepthwiseCase, kind: str, dtype: torch.dtype, major: int) -> None:
    kernels.reset(major=major)
    check_backward(kernels, case, BACKWARD[kind], dtype)


WINDOWS = [(kernel, stride) for kernel in (3, 5) for stride in (1, 2)]


@pytest.mark.parametrize(("kernel", "stride"), WINDOWS)
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "silu"])
def test_every_activation_takes_the_kernels_that_silu_takes(
    kernels: Kernels, activation: str, kernel: int, stride: int
) -> None:
    """What surrounds a convolution decides between the fast kernels and the general one, and no activation does."""
    case = DepthwiseCase("structure", (1, 16, 9, 11), kernel=(kernel, kernel), stride=stride, padding="same")
    dtype = DTYPES[(kernel + stride) % 3]

    def launched(name: str) -> list[str]:
        kernels.reset()
        check_forward(kernels, case, replace(PLAIN, out_activation=name), dtype)
        check_forward(kernels, case, replace(FORWARD["training"], activation=name), dtype)
        check_backward(kernels, case, replace(BACKWARD["fused"], a_activation=name, activation=name), dtype)
        return kernels.launched

    others, silu = launched(activation), launched("silu")
    assert sum("::Silu" in name for name in silu) == 3
    assert others == [name.replace("::Silu", "::AnyActivation") for name in silu]


@pytest.mark.parametrize(("kernel", "stride"), WINDOWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_come_in_two_ways_to_the_same_bits(kernels: Kernels, dtype: torch.dtype, stride: int, kernel: int) -> None:
    """By bulk copies, and by each thread's own on an older device or where the driver knows no tensor maps."""
    case = DepthwiseCase("both_ways", (2, 40, 9, 19), kernel=(kernel, kernel), stride=stride, padding="same")
    geometry, seed, results = Geometry.of(case), torch.seed(), []
    for major, without_maps in ((9, False), (9, True), (8, False)):
        kernels.reset(major=major)
        kernels.sabotage(without_tensor_maps=without_maps)
        torch.manual_seed(seed)
        found = [run_forward(kernels, geometry, FORWARD[kind], dtype) for kind in ("inference", "training")]
        found += [run_backward(kernels, geometry, BACKWARD[kind], dtype)[1] for kind in ("plain", "fused")]
        results.append([value.clone() for values in found for value in values.values()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# Multiprocessors and shared memory of a block, as sm_86, sm_80 and sm_90 have them.
DEVICES = {"few": (2, 99 * 1024), "many": (108, 163 * 1024), "one": (1, 227 * 1024)}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stride", [1, 2])
def test_devices(kernels: Kernels, device: str, stride: int) -> None:
    """However many blocks there are, and however little shared memory."""
    multiprocessors, shared_limit = DEVICES[device]
    case = DepthwiseCase("several_strips", (3, 20, 17, 33), kernel=(5, 5), stride=stride, padding="same")
    for check, kinds in ((check_forward, FORWARD), (check_backward, BACKWARD)):
        kernels.reset(multiprocessors=multiprocessors, shared_limit=shared_limit)
        check(kernels, case, kinds["everything"], torch.float32)


@pytest.mark.parametrize("kind", ["inference", "training", "everything"])
def test_order_of_blocks_and_threads_changes_no_bit(kernels: Kernels, kind: str) -> None:
    geometry = Geometry.of(DepthwiseCase("several_strips", (3, 20, 17, 33)))
    seed, results = torch.seed(), []
    for order in (0, 1, 2):
        kernels.reset(order)
        torch.manual_seed(seed)
        forward = run_forward(kernels, geometry, FORWARD[kind], torch.bfloat16)
        _, backward = run_backward(kernels, geometry, BACKWARD["everything"], torch.bfloat16)
        results.append([value.clone() for value in (*forward.values(), *backward.values())])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_statistics_do_not_cancel(kernels: Kernels) -> None:
    """A mean a thousand times the deviation. A stored mean has 24 bits, so it is off by 6e-5 of the deviation at most.

    The difference of mean square and squared mean would be off by 6e-2.
    """
    geometry = Geometry.of(DepthwiseCase("large_mean", (2, 16, 9, 9), padding=0))
    fusion = Fusion(statistics=True, norm=True, bias=True)
    found = run_forward(kernels, geometry, fusion, torch.float32, bias=1e4)
    stored = geometry.images(found["y"])
    count, mean, squares = found["statistics"].double().unbind(1)
    total = (count * mean).sum(0) / count.sum(0)
    variance = (squares + count * (mean - total) ** 2).sum(0) / count.sum(0)
    assert (stored.mean((0, 2, 3)) > 100 * stored.std((0, 2, 3))).all()
    assert relative_error(variance, stored.var((0, 2, 3), correction=0)) <= 6e-5


# kernels.h has no words for windows and strides that are not square, and for dilation: its callers refuse those.
REFUSED = [
    case
    for case in DEPTHWISE
    if not covered(case) and case.kernel[0] == case.kernel[1] and isinstance(case.stride, int) and case.dilation == 1
]


@pytest.mark.parametrize("case", REFUSED, ids=names(REFUSED))
def test_what_is_not_covered_has_a_reason(kernels: Kernels, case: DepthwiseCase) -> None:
    shape = Geometry.of(case).struct
    for name in ("DepthwiseForward", "DepthwiseBackward"):
        assert kernels.why_not(name, shape=shape, dtype=torch.float32, grad=1, x=1, weight=1)


def test_offsets_between_images_have_64_bits(kernels: Kernels) -> None:
    """The last block of a batch of more than 2**31 elements, on a GPU so large that it has that one strip only."""
    geometry = Geometry.of(DepthwiseCase("huge", (66, 8192, 64, 64)))
    settings = {"shape": geometry.struct, "dtype": torch.bfloat16}
    device = {"multiprocessors": 10**6}
    kernels.reset(**device)
    blocks = kernels.plan("DepthwiseForward", **settings, x=1, weight=1).blocks
    kernels.reset(**device, blocks=(blocks - 1, blocks))
    x = kernels.empty("x", geometry.x_shape, torch.bfloat16, kind="input", fill=False)
    try:
        y = kernels.empty("y", geometry.y_shape, torch.bfloat16, fill=False)
    except MemoryError:
        pytest.skip("this system does not lend address space that is not memory")
    assert x.numel() > 2**31
    x[-1, -8:, :, -8:] = torch.randn(8, 64, 8)
    weight = kernels.upload("weight", torch.randn(8192, 9))
    kernels.run("DepthwiseForward", **settings, x=x, weight=weight, y=y)
    last = Geometry.of(DepthwiseCase("last", (1, 8, 8, 64)))
    exact = last.convolve(last.images(x[-1:, -8:, :, -8:]), weight[-8:])
    assert (
        relative_error(last.images(y[-1:, -1:, -7:, -8:]), exact[:, :, -1:, -7:]) <= FORWARD_TOLERANCE[torch.bfloat16]
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", COVERED, ids=names(COVERED))
def test_in_every_way(kernels: Kernels, case: DepthwiseCase, dtype: torch.dtype, seed: int) -> None:
    for major in majors(case):
        for fusion in FORWARD.values():
            kernels.reset(seed, major=major)
            check_forward(kernels, case, fusion, dtype)
        for fusion in BACKWARD.values():
            kernels.reset(seed, major=major)
            check_backward(kernels, case, fusion, dtype)
