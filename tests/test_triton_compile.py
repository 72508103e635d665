"""Every Triton kernel compiled, as the operators would launch it, for three architectures, without a GPU.

Gates: no register is spilled, shared memory fits, at least four warps are resident on a multiprocessor, activations
are read and written in vectors, products run on tensor cores, and no 32-bit offset overflows at sizes where activations
have more than 2^31 elements.
"""

from __future__ import annotations

import pytest
import torch
from ahead_of_time import Launch, accesses, compile_launch, distinct, recorded
from overflow import overflows
from torch import Tensor

from effnet_ops.kernels import tuning
from effnet_ops.models import model_spec
from effnet_ops.models.spec import BlockSpec
from effnet_ops.ops.mbconv import Block, Config
from effnet_ops.ops.triton import implementation

ARCHITECTURES = tuple(tuning.ARCHITECTURES)
REGISTERS, SHARED_SLACK = 65536, 1024
RESOLUTION = {"b0": 224, "b4": 380, "b7": 600}


def meta(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    last = torch.channels_last if len(size) == 4 else torch.contiguous_format
    return torch.empty(size, dtype=dtype, device="meta", memory_format=last)


def blocks(name: str) -> list[tuple[BlockSpec, int]]:
    """The distinct blocks of a network with the sides of their input, TensorFlow's padding."""
    side, found = (RESOLUTION[name] + 1) // 2, {}
    for block in (block for stage in model_spec(f"efficientnet_{name}").stages() for block in stage):
        found[block, side] = None
        side = -(-side // block.stride)
    return list(found)


def arguments(block: BlockSpec, batch: int, side: int, dtype: torch.dtype, batch_statistics: bool) -> list[object]:
    wide, se = block.expanded_channels, block.se_channels

    def convolution(*weight: int) -> list[Tensor | None]:
        vectors = [meta(weight[0]) for _ in range(4)]
        return [meta(*weight), *vectors[:2], *([None, None] if batch_statistics else vectors[2:])]

    x = meta(batch, block.in_channels, side, side, dtype=dtype)
    expand = convolution(wide, block.in_channels, 1, 1) if block.expands else [None] * 5
    squeeze = [meta(se, wide, 1, 1), meta(se), meta(wide, se, 1, 1), meta(wide)] if se else [None] * 4
    depthwise = convolution(wide, 1, block.kernel_size, block.kernel_size)
    residual = block.stride == 1 and block.in_channels == block.out_channels
    drop_path = meta(batch) if residual and batch_statistics else None
    tensors = Block(x, *expand, *depthwise, *squeeze, *convolution(block.out_channels, wide, 1, 1), drop_path)
    config = Config((1e-3,) * 3, (block.stride,) * 2, (), residual, "silu", "silu", "sigmoid")
    return [*tensors, *config]


def inference(block: BlockSpec, batch: int, side: int, dtype: torch.dtype, architecture: str) -> list[Launch]:
    with recorded(architecture) as launches:
        implementation("mbconv_inference")(*arguments(block, batch, side, dtype, False))
    return launches


def training(block: BlockSpec, batch: int, side: int, dtype: torch.dtype, architecture: str) -> list[Launch]:
    """A step with batch statistics, forward and backward."""
    given = arguments(block, batch, side, dtype, True)
    with recorded(architecture) as launches:
        y, *saved = implementation("mbconv_training")(*given, False)
        implementation("mbconv_backward")(y, *given, *saved, [True] * 14)
    return launches


def check(launches: list[Launch], architecture: str) -> None:
    limit = tuning.ARCHITECTURES[architecture].shared_bytes
    wrong = []
    for launch in distinct(launches):
        usage = compile_launch(launch, architecture)
        threads = 32 * launch.num_warps
        resident = min(REGISTERS // (usage.registers * threads), (limit + SHARED_SLACK) // max(usage.shared_bytes, 1))
        if usage.stack_bytes or usage.shared_bytes > limit or resident * launch.num_warps < 4:
            wrong.append(f"{launch}: {usage[:3]}")
    assert not wrong, "\n".join(wrong)


STAGE_3 = blocks("b0")[3]
"""24 -> 144 -> 40 with 5x5 and stride 2 at 56 x 56."""
LAST = blocks("b0")[-1]
EARLY = blocks("b0")[1]
"""16 -> 96 -> 24 with 3x3 and stride 2 at 112 x 112: it moves more bytes than any other."""

STREAMING = {
    "pointwise_fwd_kernel": True,
    "pointwise_bwd_kernel_input": True,
    "pointwise_bwd_kernel_both": True,
    "pointwise_bwd_kernel_weight": False,
    "pool_kernel": False,
    "gradient_sums_kernel": False,
    "apply_kernel": True,
}
"""Kernels that go through activations pixel by pixel, and whether they store some, too."""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_block(architecture: str) -> None:
    check(training(STAGE_3[0], 256, STAGE_3[1], torch.bfloat16, architecture), architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_inference_block(architecture: str) -> None:
    check(inference(LAST[0], 1, LAST[1], torch.bfloat16, architecture), architecture)


@pytest.mark.parametrize("block", [EARLY, STAGE_3], ids=["96 channels", "144 channels"])
def test_activations_move_in_vectors(block: tuple[BlockSpec, int]) -> None:
    """16 bytes a thread where each pixel is met once; in depthwise kernels two channels, so that a warp has a line."""
    launches = training(block[0], 256, block[1], torch.bfloat16, "sm_90") + inference(
        block[0], 256, block[1], torch.bfloat16, "sm_90"
    )
    wrong = []
    for launch in distinct(launches):
        name, ptx = launch.kernel.__name__, compile_launch(launch, "sm_90").ptx
        found = accesses(ptx)
        sizes = {kind: {size for other, size in found if other == kind} for kind in ("load", "copy", "store")}
        narrow = min(size for _, size in found) < 4
        if name in STREAMING:
            narrow |= sizes["copy"] - {16} != set() or 16 not in sizes["copy"] | sizes["load"]
        if STREAMING.get(name):
            narrow |= 16 not in sizes["store"]
        products = name.startswith("pointwise") and not ("wgmma.mma_async" in ptx or "mma.sync" in ptx)
        if narrow or products:
            wrong.append(f"{launch}: {sorted(found)}")
    assert not wrong, "\n".join(wrong)


def test_accesses_are_read_from_ptx() -> None:
    ptx = """
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    mov.u16 %rs1, %rs3; ld.global.L1::evict_last.b16 { %rs1 }, [ %rd1 + 0 ];
    cp.async.cg.shared.global [ %r5 + 0 ], [ %rd2 + 0 ], 0x10, %r6;
    st.global.v2.b32 [ %rd3 + 0 ], { %r7, %r8 };
    """
    assert accesses(ptx) == {("load", 16), ("load", 2), ("copy", 16), ("store", 8)}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_block_of_b0(architecture: str, dtype: torch.dtype) -> None:
    launches = []
    for block, side in blocks("b0"):
        launches += inference(block, 1, side, dtype, architecture)
        launches += inference(block, 256, side, dtype, architecture)
        launches += training(block, 256, side, dtype, architecture)
    check(launches, architecture)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["b4", "b7"])
def test_large_networks(name: str) -> None:
    launches = []
    for block, side in blocks(name):
        launches += inference(block, 32, side, torch.bfloat16, "sm_90")
        launches += training(block, 32, side, torch.bfloat16, "sm_90")
    check(launches, "sm_90")


def test_offsets_do_not_overflow() -> None:
    """Batch 1024 of B7 at 600 x 600: a1 of the second stage has 1.8e10 elements."""
    block, side = next((block, side) for block, side in blocks("b7") if block.expands)
    launches = training(block, 1024, side, torch.bfloat16, "sm_90")
    launches += inference(block, 1024, side, torch.bfloat16, "sm_90")
    wrong = []
    for launch in distinct(launches):
        ttir = compile_launch(launch, "sm_90").ttir
        wrong += [f"{launch}: {found}" for found in overflows(ttir, dict(launch.values), launch.programs)]
    assert not wrong, "\n".join(wrong)


def test_overflow_analysis_finds_one() -> None:
    """A product of two 32-bit numbers that is used as an offset."""
    ttir = """
    %i = tt.get_program_id x : i32
    %o = arith.muli %i, %channels : i32
    %p = tt.addptr %p_x, %o : !tt.ptr<bf16>, i32
    """
    assert overflows(ttir, {"channels": 96}, 10**6) == []
    (found,) = overflows(ttir, {"channels": 96}, 10**8)
    assert "9599999904" in found
    assert overflows("%p = tt.addptr %p_x, %u : !tt.ptr<bf16>, i32", {}, 1) == [
        "unknown offset: %p = tt.addptr %p_x, %u : !tt.ptr<bf16>, i32"
    ]
    wide = ttir.replace("i32", "i64").replace("x : i64", "x : i32")
    assert overflows(wide, {"channels": 96}, 10**8) == []


def test_overflow_analysis_follows_a_loop() -> None:
    """A row that every turn moves down by two is at most 2 x 30 further at the end."""
    ttir = """
    %z = arith.constant 0 : i32
    %one = arith.constant 1 : i32
    %two = arith.constant 2 : i32
    %n = arith.constant 30 : i32
    %r:2 = scf.for %i = %z to %n step %one iter_args(%h = %z, %other = %z) -> (i32, i32)  : i32 {
      %next = arith.addi %h, %two : i32
      %o = arith.muli %next, %width : i32
      %p = tt.addptr %p_x, %o : !tt.ptr<bf16>, i32
      scf.yield %next, %p : i32, i32
    }
    """
    assert overflows(ttir, {"width": 2**31 // 64}, 1) == []
    (found,) = overflows(ttir, {"width": 2**31 // 60}, 1)
    assert "%o = arith.muli" in found
