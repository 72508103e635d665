"""The CUDA kernels of depthwise convolution of contiguous (N, C, H, W) on the emulated GPU, against fp64."""

from __future__ import annotations

import pytest
import torch
from cases import DepthwiseCase
from cuda_kernels import Kernels
from depthwise_problems import Fusion, Geometry, run_backward, run_forward
from helpers import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, names, relative_error
from test_emulation_depthwise import BACKWARD, COVERED, DEVICES, DTYPES, FORWARD, SMALL, check_backward, check_forward, ids

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
