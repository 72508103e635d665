"""Every barrier of csrc/cuda is needed: without it a detector speaks. So the cases reach them, and none is in vain."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from cases import DepthwiseCase, SqueezeExciteCase
from cuda_kernels import Kernels
from depthwise_problems import BackwardFusion, Fusion, Geometry, run_backward, run_forward
from emulator import CUDA, EmulationError
from mbconv_problems import Expand, Project
from squeeze_excite_problems import (
    backward_from_partials,
    backward_from_tensor,
    forward_from_partials,
    forward_from_tensor,
)


def barriers() -> dict[str, tuple[str, int]]:
    """File and line of every barrier, waits for bulk copies too, by "file: function #number". A grid barrier is one."""
    found: dict[str, tuple[str, int]] = {}
    for path in sorted(CUDA.glob("*.cuh")):
        function, number = "", 0
        for i, line in enumerate(path.read_text().splitlines(), 1):
            code = line.split("//")[0]
            if definition := re.search(r"\b(?:void|inline) (\w+)\(", code):
                function, number = definition[1], 0
            if path.name not in ("ptx.cuh", "launch.cuh") and re.search(
                r"\b(__syncthreads|__syncwarp|grid_barrier|mbarrier_wait)\(", code
            ):
                number += 1
                found[f"{path.name}: {function} #{number}"] = (path.name, i)
    return found


BARRIERS = barriers()
# Not needed, for a reason that is less sure than the barrier is cheap, or not yet removed.
KEPT = {
    "squeeze_excite.cuh: expand_backward #2": "where there is another turn, threads read what they wrote themselves",
    "squeeze_excite.cuh: gate_backward #6": "nobody reads any more what the next call writes before its first barrier",
    "depthwise.cuh: depthwise_forward_kernel #5": "the next strip's steps have one before the sums are written again",
}
# Of two, one is enough.
EITHER = {
    "squeeze_excite.cuh: meet #1": "squeeze_excite.cuh: gate_forward #4",
    "squeeze_excite.cuh: gate_forward #4": "squeeze_excite.cuh: meet #1",
}
# Several strips for each of few blocks, and groups of columns that share their channels.
DEPTHWISE = [
    Geometry.of(DepthwiseCase("several_groups", (3, 16, 12, 28))),
    Geometry.of(DepthwiseCase("odd_channels", (3, 13, 12, 30), stride=2)),
]
SQUEEZE_EXCITE = [
    SqueezeExciteCase("large_images", (2, 48, 21, 20), 4),
    SqueezeExciteCase("many_images", (9, 20, 4, 4), 40),
    SqueezeExciteCase("wide", (5, 13, 3, 3), 300),
]
FORWARD = Fusion(norm=True, activation="silu", bias=True, gate=True, pool=True, statistics=True)
INFERENCE = Fusion(bias=True, out_activation="silu")
BACKWARD = BackwardFusion(after=True, statistics=True, norm=True, wanted=("dx", "dw", "db", "sums"))


# Several items for each of few blocks, and several threads for each plane; the last with so few pixels for each thread
# that the sums of all take the place of results.
PLANES = [
    Geometry.of(DepthwiseCase("several_planes", (3, 8, 12, 28)), channels_last=False),
    Geometry.of(DepthwiseCase("several_strips", (2, 3, 60, 121), stride=2), channels_last=False),
    Geometry.of(DepthwiseCase("one_column", (3, 128, 4, 1)), channels_last=False),
]


def depthwise_problems(geometries: list[Geometry]) -> list[Callable[[Kernels], object]]:
    return [
        *(lambda k, g=g: run_forward(k, g, FORWARD, torch.float32) for g in geometries),
        *(lambda k, g=g: run_backward(k, g, BACKWARD, torch.float32) for g in geometries),
        lambda k: run_forward(k, geometries[0], INFERENCE, torch.float32),
    ]


def squeeze_excite_problems() -> list[Callable[[Kernels], object]]:
    problems: list[Callable[[Kernels], object]] = []
    for case in SQUEEZE_EXCITE:
        problems += [
            lambda k, c=case: forward_from_tensor(k, c, torch.float32, None),
            lambda k, c=case: backward_from_tensor(k, c, torch.float32),
            lambda k, c=case: forward_from_partials(k, c, 2),
            lambda k, c=case: backward_from_partials(k, c, 2, 5),
        ]
    return problems


# Several slabs of channels for each tile, and a product in several steps, by warps that share its depth and by others.
BLOCKS = [
    Expand(Geometry.of(DepthwiseCase("several_slabs", (2, 96, 9, 8))), 16),
    Project(2, 20, 300, 24),
    Project(16, 56 * 56, 96, 16),
]


def block_problems() -> list[Callable[[Kernels], object]]:
    return [lambda k, p=problem: p.run(k, p.operands(torch.bfloat16), torch.bfloat16) for problem in BLOCKS]


def problems_for(file: str) -> list[Callable[[Kernels], object]]:
    if file.startswith("squeeze_excite"):
        return squeeze_excite_problems()
    if file.startswith("depthwise_planes"):
        return depthwise_problems(PLANES)
    if file.startswith(("depthwise", "reduction")):
        return depthwise_problems(DEPTHWISE)
    if file.startswith(("mbconv", "pointwise")):
        return block_problems()
    raise ValueError(f"no problems that exercise the barriers of {file}")


def report_without(kernels: Kernels, *names: str) -> str | None:
    """What the first problem reports that notices that these barriers are gone."""
    for multiprocessors in (1, 4):
        for problem in problems_for(names[0]):
            # The first blocks show what all do.
            few = {"blocks": (0, 4)} if names[0].startswith("pointwise") else {}
            kernels.reset(multiprocessors=multiprocessors, **few)
            for name in names:
                kernels.sabotage(*BARRIERS[name])
            try:
                problem(kernels)
            except EmulationError as report:
                return str(report)
    return None


@pytest.mark.parametrize("name", BARRIERS)
def test_barrier_is_needed(kernels: Kernels, name: str) -> None:
    if name in KEPT:
        assert report_without(kernels, name) is None, f"{name} is needed, though {KEPT[name]}"
    elif EITHER.get(name) in BARRIERS:
        assert report_without(kernels, name, EITHER[name]), f"nothing is reported without {name} and {EITHER[name]}"
    else:
        assert report_without(kernels, name), f"nothing is reported without {name}, line {BARRIERS[name][1]}"


@pytest.mark.parametrize("geometries", [DEPTHWISE, PLANES], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_copies_are_waited_for(kernels: Kernels, backward: bool, geometries: list[Geometry]) -> None:
    kernels.sabotage(late_groups=1)
    with pytest.raises(EmulationError, match="before the asynchronous copy to it has landed"):
        depthwise_problems(geometries)[len(geometries) if backward else 0](kernels)


def test_copies_of_a_block_are_waited_for(kernels: Kernels) -> None:
    kernels.sabotage(late_groups=1)
    with pytest.raises(EmulationError, match="before the asynchronous copy to it has landed"):
        block_problems()[0](kernels)
