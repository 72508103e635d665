"""The CUDA kernels of depthwise convolution of contiguous (N, C, H, W) on the emulated GPU, against fp64."""

from __future__ import annotations

import json

import pytest
import torch
from cases import DepthwiseCase
from cuda_kernels import Kernels
from depthwise_problems import Fusion, Geometry, run_backward, run_forward
from emulator import CUDA, ROOT
from helpers import FORWARD_TOLERANCE, names, relative_error
from test_emulation_depthwise import (
    BACKWARD,
    COVERED,
    DEVICES,
    DTYPES,
    FORWARD,
    SMALL,
    check_backward,
    check_forward,
    ids,
)

from effnet_ops.scaling.network import network, walk

BUDGETS = {name: of["shared_bytes"] for name, of in json.loads((CUDA / "budgets.json").read_text())["kernels"].items()}
# What the operator itself asks for, and what its gradient does where there is an activation.
BARE = {"bare": Fusion(bias=True, out_activation="silu"), "slope": Fusion(bias=True, out_activation="silu", grad=True)}
ALL_FORWARD = {**BARE, **FORWARD}
# Planes of which a block takes many, one and a part, whose first ones begin at no multiple of 16 bytes.
SHAPES = [
    DepthwiseCase("many_planes", (3, 37, 7, 7), kernel=(5, 5), padding=2),
    DepthwiseCase("several_rows_a_thread", (2, 11, 14, 14), stride=2, padding="same"),
    DepthwiseCase("several_segments", (1, 3, 29, 31), kernel=(5, 5), stride=2, padding="same"),
    DepthwiseCase("strips", (2, 3, 60, 121), kernel=(3, 3)),
]
CASES = [*SMALL, *SHAPES]
MIXED_FORWARD = [(case, list(ALL_FORWARD)[i % 7], DTYPES[i % 3]) for i, case in enumerate(CASES)]
MIXED_BACKWARD = [(case, list(BACKWARD)[i % 6], DTYPES[(i + i // 6) % 3]) for i, case in enumerate(CASES)]


@pytest.mark.parametrize(("case", "kind", "dtype"), MIXED_FORWARD, ids=ids(MIXED_FORWARD))
def test_forward(kernels: Kernels, case: DepthwiseCase, kind: str, dtype: torch.dtype) -> None:
    check_forward(kernels, case, ALL_FORWARD[kind], dtype, channels_last=False)


@pytest.mark.parametrize(("case", "kind", "dtype"), MIXED_BACKWARD, ids=ids(MIXED_BACKWARD))
def test_backward(kernels: Kernels, case: DepthwiseCase, kind: str, dtype: torch.dtype) -> None:
    check_backward(kernels, case, BACKWARD[kind], dtype, channels_last=False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stride", [1, 2])
def test_devices(kernels: Kernels, device: str, stride: int) -> None:
    """However many blocks there are, and however little shared memory: in strips, too."""
    multiprocessors, shared_limit = DEVICES[device]
    case = DepthwiseCase("several_strips", (2, 5, 41, 97), kernel=(5, 5), stride=stride, padding="same")
    for check, kinds in ((check_forward, FORWARD), (check_backward, BACKWARD)):
        kernels.reset(multiprocessors=multiprocessors, shared_limit=shared_limit)
        check(kernels, case, kinds["everything"], torch.float32, channels_last=False)


@pytest.mark.parametrize("kind", ["inference", "everything"])
def test_order_of_blocks_and_threads_changes_no_bit(kernels: Kernels, kind: str) -> None:
    geometry = Geometry.of(DepthwiseCase("several_strips", (3, 9, 17, 33)), channels_last=False)
    seed, results = torch.seed(), []
    for order in (0, 1, 2):
        kernels.reset(order)
        torch.manual_seed(seed)
        forward = run_forward(kernels, geometry, FORWARD[kind], torch.bfloat16)
        _, backward = run_backward(kernels, geometry, BACKWARD["everything"], torch.bfloat16)
        results.append([value.clone() for value in (*forward.values(), *backward.values())])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_offsets_between_planes_have_64_bits(kernels: Kernels, backward: bool) -> None:
    """The last block of a batch of more than 2**31 elements, on a GPU so large that it has that one item only."""
    geometry = Geometry.of(DepthwiseCase("huge", (66, 8192, 64, 64)), channels_last=False)
    name = "DepthwiseBackward" if backward else "DepthwiseForward"
    settings = {"shape": geometry.struct, "dtype": torch.bfloat16}
    wanted = {"grad": 1, "dx": 1} if backward else {"x": 1}
    device = {"multiprocessors": 10**6}
    kernels.reset(**device)
    blocks = kernels.plan(name, **settings, **wanted, weight=1).blocks
    kernels.reset(**device, blocks=(blocks - 1, blocks))
    given = kernels.empty("given", geometry.x_shape, torch.bfloat16, kind="input", fill=False)
    try:
        made = kernels.empty("made", geometry.y_shape, torch.bfloat16, fill=False)
    except MemoryError:
        pytest.skip("this system does not lend address space that is not memory")
    assert given.numel() > 2**31
    given[-1, -1] = torch.randn(64, 64)
    weight = kernels.upload("weight", torch.randn(8192, 9))
    tensors = {"grad": given, "dx": made} if backward else {"x": given, "y": made}
    kernels.run(name, **settings, **tensors, weight=weight)
    last = Geometry.of(DepthwiseCase("last", (1, 1, 64, 64)), channels_last=False)
    # The gradient of a convolution with a filter is a convolution with the filter turned round.
    exact = last.convolve(given[-1:, -1:].double(), weight[-1:].flip(1) if backward else weight[-1:])
    assert relative_error(made[-1:, -1:, -4:], exact[:, :, -4:]) <= FORWARD_TOLERANCE[torch.bfloat16]


def test_statistics_do_not_cancel(kernels: Kernels) -> None:
    """As for channels_last: a mean a thousand times the deviation, in several segments."""
    geometry = Geometry.of(DepthwiseCase("large_mean", (2, 2, 29, 29), padding=0), channels_last=False)
    found = run_forward(kernels, geometry, Fusion(statistics=True, norm=True, bias=True), torch.float32, bias=1e4)
    stored = geometry.images(found["y"])
    count, mean, squares = found["statistics"].double().unbind(1)
    total = (count * mean).sum(0) / count.sum(0)
    variance = (squares + count * (mean - total) ** 2).sum(0) / count.sum(0)
    assert (stored.mean((0, 2, 3)) > 100 * stored.std((0, 2, 3))).all()
    assert relative_error(variance, stored.var((0, 2, 3), correction=0)) <= 6e-5


WINDOWS = list(
    dict.fromkeys(
        DepthwiseCase("", (256, layer.in_channels, *layer.in_size), (layer.kernel_size,) * 2, layer.stride, "same")
        for layer in walk(network("efficientnet_b0"), 224)
        if layer.kind == "depthwise"
    )
)
PLAIN_BACKWARD = dict.fromkeys(("grad", "x", "dx", "dw", "weight"), 1)


def bytes_of(case: DepthwiseCase) -> tuple[int, int]:
    """Of x and of y in bf16."""
    geometry = Geometry.of(case)
    return tuple(2 * torch.Size(shape).numel() for shape in (geometry.x_shape, geometry.y_shape))


@pytest.mark.parametrize("case", WINDOWS, ids=lambda case: f"{case.shape[1]}x{case.shape[2]} k{case.kernel[0]}")
def test_layers_are_read_once(kernels: Kernels, case: DepthwiseCase) -> None:
    """B0's, on a GPU like an H200: no more than a few rows between strips are read twice, and nothing is copied."""
    kernels.reset(multiprocessors=132)
    x, y = bytes_of(case)
    settings = {"shape": Geometry.of(case, channels_last=False).struct, "dtype": torch.bfloat16}
    for name, given, least in (
        ("DepthwiseForward", {"x": 1, "weight": 1}, x),
        ("DepthwiseBackward", PLAIN_BACKWARD, x + y),
    ):
        plan = kernels.plan(name, **settings, **given)
        assert least <= plan.read_bytes <= 1.05 * least
        assert plan.shared_bytes <= BUDGETS[f"depthwise_planes_{name.removeprefix('Depthwise').lower()}_kernel"]
        assert plan.blocks >= 132 and plan.threads >= 64
        assert not kernels.wants_copies(name, **settings, **given)


@pytest.mark.parametrize(
    ("width", "kernel", "shared_kilobytes", "copies"),
    [(300, 5, 99, False), (880, 3, 227, False), (880, 7, 227, False), (800, 7, 99, True), (900, 3, 227, True)],
    ids=["of B7", "wide", "strips of six rows", "strips of one row", "no kernel"],
)
def test_choice_between_planes_and_copies(
    kernels: Kernels, width: int, kernel: int, shared_kilobytes: int, copies: bool
) -> None:
    """Copies cost two more times all activations; strips of few rows read each row several times."""
    kernels.reset(multiprocessors=132, shared_limit=1024 * shared_kilobytes)
    case = DepthwiseCase("", (8, 4, 400, width), kernel=(kernel,) * 2, padding="same")
    settings = {"shape": Geometry.of(case, channels_last=False).struct, "dtype": torch.float32, "weight": 1, "x": 1}
    x, y = (2 * size for size in bytes_of(case))
    assert kernels.wants_copies("DepthwiseForward", **settings) == copies
    covered = kernels.why_not("DepthwiseForward", **settings) is None
    assert covered == (width <= 7 * 128)
    assert not covered or (kernels.plan("DepthwiseForward", **settings).read_bytes > 3 * x + 2 * y) == copies


def test_rows_that_are_too_wide_have_a_reason(kernels: Kernels) -> None:
    shape = Geometry.of(DepthwiseCase("", (1, 2, 3, 5000)), channels_last=False).struct
    for name, given in (("DepthwiseForward", {"x": 1}), ("DepthwiseBackward", PLAIN_BACKWARD)):
        assert "too wide" in kernels.why_not(name, **{"shape": shape, "dtype": torch.float32, **given})
        assert kernels.wants_copies(name, **{"shape": shape, "dtype": torch.float32, **given})


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*COVERED, *SHAPES], ids=names([*COVERED, *SHAPES]))
def test_in_every_way(kernels: Kernels, case: DepthwiseCase, dtype: torch.dtype, seed: int) -> None:
    for fusion in ALL_FORWARD.values():
        kernels.reset(seed)
        check_forward(kernels, case, fusion, dtype, channels_last=False)
    for fusion in BACKWARD.values():
        kernels.reset(seed)
        check_backward(kernels, case, fusion, dtype, channels_last=False)


def documented_row(kernels: Kernels, case: DepthwiseCase) -> str:
    """A line of the table in docs/layouts.md."""
    x, y = bytes_of(case)
    cells = [f"{case.shape[1]}x{case.shape[2]}x{case.shape[3]} k{case.kernel[0]} s{case.stride}"]
    for name, given, result, all_of_them in (
        ("DepthwiseForward", {"x": 1, "weight": 1}, y, x + y),
        ("DepthwiseBackward", PLAIN_BACKWARD, x, 2 * x + y),
    ):
        cells.append(f"{all_of_them / 1e6:.0f}")
        for channels_last in (False, True):
            shape = Geometry.of(case, channels_last).struct
            plan = kernels.plan(name, shape=shape, dtype=torch.bfloat16, **given)
            moved = plan.read_bytes + result + 2 * plan.workspace_bytes + 2 * all_of_them * channels_last
            cells.append(f"{moved / 1e6:.0f}")
    return f"| {' | '.join(cells)} |"


def test_documented_bytes_are_the_plans(kernels: Kernels) -> None:
    kernels.reset(multiprocessors=132)
    lines = (ROOT / "docs" / "layouts.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("| ") and " k" in line] == [
        documented_row(kernels, case) for case in WINDOWS
    ]
