"""The CUDA kernels of a whole block on the emulated GPU, against fp64."""

from __future__ import annotations

import pytest
import torch
from cases import MBCONV, MBConvCase
from cuda_kernels import Kernels
from depthwise_problems import Geometry
from helpers import FORWARD_TOLERANCE, names, relative_error
from mbconv_problems import Expand, Project

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [case for case in MBCONV if case.expanded and case.shape[0] and case.dilation == 1]
MIXED = [(case, DTYPES[i % 3]) for i, case in enumerate(CASES)]
PROJECTS = [
    Project(2, 20, 96, 24),
    Project(3, 35, 37, 13),
    Project(5, 1, 48, 16, norm="bias"),
    Project(2, 63, 144, 40, gates=False, drop_path=False),
    Project(2, 9, 300, 72, norm="none", residual=False, drop_path=False),
]
# Of products that fill a GPU, only some blocks run: each kernel once, and one with rows of no multiple of 16 bytes.
LARGE = {
    "tall": (Project(16, 56 * 56, 32, 16), (2, 4), "8, 1, 1"),
    "square": (Project(256, 14 * 14, 240, 64), (5, 7), "4, 2, 1"),
    "wide": (Project(256, 7 * 7, 200, 192), (4, 6), "2, 4, 1"),
    "wide, odd": (Project(256, 7 * 7, 199, 191), (4, 6), "2, 4, 1"),
}


def check_expand(kernels: Kernels, problem: Expand, dtype: torch.dtype) -> None:
    given = problem.operands(dtype)
    found, exact = problem.run(kernels, given, dtype), problem.exact(given)
    assert relative_error(found["y"], exact) <= FORWARD_TOLERANCE[dtype]
    if problem.pool:
        assert relative_error(found["pool"].sum(1), exact.sum((1, 2))) <= FORWARD_TOLERANCE[dtype]


@pytest.mark.parametrize(("case", "dtype"), MIXED, ids=names(CASES))
@pytest.mark.parametrize("wide", [False, True], ids=["weight", "wide weight"])
def test_expand(kernels: Kernels, case: MBConvCase, dtype: torch.dtype, wide: bool) -> None:
    check_expand(kernels, Expand.of(case, wide), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=names(CASES))
def test_expand_in_any_order(kernels: Kernels, case: MBConvCase, dtype: torch.dtype, seed: int) -> None:
    problem = Expand.of(case)
    given = problem.operands(dtype)
    results = []
    for order in (0, seed):
        kernels.reset(seed=order)
        results.append({name: value.clone() for name, value in problem.run(kernels, given, dtype).items()})
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())
    assert relative_error(results[0]["y"], problem.exact(given)) <= FORWARD_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_wider_than_a_tile(kernels: Kernels, dtype: torch.dtype) -> None:
    """Some tiles see no pixel of the image, and some no more than one."""
    geometry = Geometry(1, 24, (2, 3), (14, 15), 3, 1, (7, 7, 7, 7))
    check_expand(kernels, Expand(geometry, 10), dtype)


@pytest.mark.parametrize("i", range(len(PROJECTS)))
@pytest.mark.parametrize("wide", [False, True], ids=["weight", "wide weight"])
def test_project(kernels: Kernels, i: int, wide: bool) -> None:
    problem, dtype = PROJECTS[i], DTYPES[i % 3]
    problem = Project(**{**problem.__dict__, "wide": wide})
    given = problem.operands(dtype)
    assert relative_error(problem.run(kernels, given, dtype), problem.exact(given)) <= FORWARD_TOLERANCE[dtype]


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, *(pytest.param(d, marks=pytest.mark.slow) for d in DTYPES[::2])], ids=str
)
def test_some_blocks_of_a_large_product(kernels: Kernels, name: str, dtype: torch.dtype) -> None:
    problem, blocks, warps = LARGE[name]
    kernels.reset(blocks=blocks)
    given = problem.operands(dtype)
    found = problem.run(kernels, given, dtype)
    assert dtype == torch.float32 or f", {warps}>" in kernels.launched[0]
    made = ~found.isnan()
    assert made.any() and relative_error(found[made], problem.exact(given)[made]) <= FORWARD_TOLERANCE[dtype]


def test_what_is_refused(kernels: Kernels) -> None:
    def refused(**changed: object) -> str | None:
        shape = Geometry(1, 24, (8, 8), (8, 8), 3, 1, (1, 1, 1, 1)).struct | changed
        return kernels.why_not("ExpandDepthwise", shape=shape, in_channels=8, dtype=torch.float32)

    assert refused() is None
    assert refused(kernel=7) == "kernels are 3x3 or 5x5"
    assert refused(stride=3) == "strides are 1 or 2"
    assert refused(height=2**14, width=2**14, out_height=2**14, out_width=2**14).startswith("an image has 2^31")
    shape = Geometry(1, 24, (8, 8), (8, 8), 3, 1, (1, 1, 1, 1)).struct
    found = kernels.why_not("ExpandDepthwise", shape=shape, in_channels=10**4, dtype=torch.float32)
    assert found == "x has too many channels for a tile in shared memory"
    sizes = {"images": 2**15, "pixels": 2**15, "channels": 8, "out_channels": 8}
    assert kernels.why_not("GatedProject", **sizes, dtype=torch.float32).startswith("the batch has 2^30")


def test_an_empty_batch_launches_nothing(kernels: Kernels) -> None:
    shape = Geometry(0, 24, (8, 8), (8, 8), 3, 1, (1, 1, 1, 1)).struct
    kernels.run("ExpandDepthwise", shape=shape, in_channels=8, dtype=torch.float32)
    kernels.run("GatedProject", images=0, pixels=9, channels=8, out_channels=8, dtype=torch.float32)
    assert kernels.launches == 0
