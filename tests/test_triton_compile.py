"""Every Triton kernel compiled, as the operators would launch it, for three architectures, without a GPU.

Gates: no register is spilled, shared memory fits, at least four warps are resident on a multiprocessor, activations
are read and written in vectors, products run on tensor cores, nothing is added up by atomics, and no 32-bit offset
overflows at sizes where activations have more than 2^31 elements.
"""

from __future__ import annotations

import re

import pytest
import torch
from ahead_of_time import Launch, accesses, compile_launch, copies, distinct, intermediate
from launches import all_kernels, blocks, fused_blocks, fused_step, inference, single_layers, training, windows
from overflow import overflows

from effnet_ops.kernels import tuning
from effnet_ops.models.spec import BlockSpec

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
REGISTERS, SHARED_SLACK = 65536, 1024
ATOMIC = re.compile(r"\b(atom|red)\.")


def check(launches: list[Launch], architecture: str, stack_bytes: int = 0) -> None:
    limit = tuning.ARCHITECTURES[architecture].shared_bytes
    wrong = []
    for launch in distinct(launches):
        usage = compile_launch(launch, architecture)
        threads = 32 * launch.num_warps
        resident = min(REGISTERS // (usage.registers * threads), (limit + SHARED_SLACK) // max(usage.shared_bytes, 1))
        if usage.stack_bytes > stack_bytes or usage.shared_bytes > limit or resident * launch.num_warps < 4:
            wrong.append(f"{launch}: {usage[:3]}")
        if ATOMIC.search(usage.ptx):
            wrong.append(f"{launch}: the order of its sums is not fixed")
    assert not wrong, "\n".join(wrong)


STAGE_3 = blocks("b0")[3]
"""24 -> 144 -> 40 with 5x5 and stride 2 at 56 x 56."""
LAST = blocks("b0")[-1]
EARLY = blocks("b0")[1]
"""16 -> 96 -> 24 with 3x3 and stride 2 at 112 x 112: it moves more bytes than any other."""

FUSED = fused_blocks("efficientnetv2_s", 300)
"""24 -> 24 without a projection, then 24 -> 96 -> 48 with stride 2, and three more."""

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


def test_single_layers() -> None:
    check(single_layers(STAGE_3[0], 256, STAGE_3[1], torch.bfloat16, "sm_90"), "sm_90")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_inference_block(architecture: str) -> None:
    check(inference(LAST[0], 1, LAST[1], torch.bfloat16, architecture), architecture)


@pytest.mark.parametrize("block", [EARLY, STAGE_3], ids=["96 channels", "144 channels"])
def test_activations_move_in_vectors(block: tuple[BlockSpec, int]) -> None:
    """16 bytes a thread where each pixel is met once; in depthwise kernels two channels, so that a warp has a line.

    Vectors of channels, such as a mean, may be copied with one fp32 a thread, as Triton 3.9 does: that takes one copy,
    where a tile of activations would take several.
    """
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
            narrow |= any({*group} - {16} and group != [4] for group in copies(ptx))
            narrow |= 16 not in sizes["copy"] | sizes["load"]
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
    copy = "cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, %r2;"
    assert copies(f"{copy} {copy} cp.async.commit_group; {copy} cp.async.commit_group;") == [[4, 4], [4], []]


def test_sums_are_of_wide_numbers() -> None:
    """Triton's interpreter adds bfloat16 as integers and gives 0, so a kernel that did could not be tested."""
    launches = training(STAGE_3[0], 256, STAGE_3[1], torch.bfloat16, "sm_90")
    ttir = "".join(intermediate(launch, "sm_90") for launch in distinct(launches))
    assert {*re.findall(r"\}\) : \(tensor<[\dx]+x(\w+)", ttir)} == {"f32", "f64"}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_block_of_b0(architecture: str, dtype: torch.dtype) -> None:
    """And the gradients of the largest with frozen normalisations."""
    launches = training(EARLY[0], 256, EARLY[1], dtype, architecture, batch_statistics=False)
    for block, side in blocks("b0"):
        launches += inference(block, 1, side, dtype, architecture)
        launches += inference(block, 256, side, dtype, architecture)
        launches += training(block, 256, side, dtype, architecture)
    check(launches, architecture)


@pytest.mark.slow
def test_small_shared_memory() -> None:
    """GPUs for workstations have 99 KB, where the others have 163 and more."""
    for block, side in (EARLY, STAGE_3, LAST):
        for launch in distinct(training(block, 256, side, torch.bfloat16, "sm_89")):
            assert compile_launch(launch, "sm_89").shared_bytes <= tuning.ARCHITECTURES["sm_89"].shared_bytes, launch


@pytest.mark.slow
@pytest.mark.parametrize("name", ["b4", "b7"])
def test_large_networks(name: str) -> None:
    launches = []
    for block, side in blocks(name):
        launches += inference(block, 32, side, torch.bfloat16, "sm_90")
        launches += training(block, 32, side, torch.bfloat16, "sm_90")
    check(launches, "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_single_layers_of_b0(architecture: str, dtype: torch.dtype) -> None:
    check([x for b, side in (EARLY, LAST) for x in single_layers(b, 256, side, dtype, architecture)], architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"),
    [((7, 7), 1, 1), ((7, 7), 2, 1), ((3, 5), 1, 1), ((5, 3), 2, 1), ((3, 3), 1, 2), ((5, 5), 1, 2)],
)
def test_other_windows(
    kernel: tuple[int, int], stride: int, dilation: int, dtype: torch.dtype, architecture: str
) -> None:
    """Depthwise convolutions that EfficientNets do not have, alone and with all that a block fuses into them.

    The fused gradient of 7x7 at stride 1 has the filter, its gradient and seven open rows of seven in each thread: on
    sm_100 six numbers of fp32 more than there are registers.
    """
    too_many = kernel == (7, 7) and stride == 1 and dtype == torch.float32 and architecture == "sm_100"
    check(windows(kernel, stride, dilation, dtype, architecture), architecture, 24 if too_many else 0)


def overflowing(launches: list[Launch], architecture: str) -> list[str]:
    """Every launch, since those of the same code differ in their sizes."""
    ttir = {launch.compiled_key: intermediate(launch, architecture) for launch in distinct(launches)}
    wrong = []
    for launch in launches:
        found = overflows(ttir[launch.compiled_key], dict(launch.values), launch.programs)
        wrong += [f"{launch}: {line}" for line in found]
    return wrong


def test_offsets_do_not_overflow() -> None:
    """Every kernel, at batch 1024 of B7 at 600 x 600: a1 of the second stage has 1.8e10 elements."""
    first, expanding = blocks("b7")[0], next((block, side) for block, side in blocks("b7") if block.expands)
    launches = []
    for block, side in (first, expanding):
        launches += training(block, 1024, side, torch.bfloat16, "sm_90")
        launches += inference(block, 1024, side, torch.bfloat16, "sm_90")
    launches += single_layers(expanding[0], 1024, expanding[1], torch.bfloat16, "sm_90")
    for block, side in (FUSED[0], FUSED[1]):
        launches += fused_step(block, 1024, 4 * side, torch.bfloat16, "sm_90")
    assert {launch.kernel.__name__ for launch in launches} == all_kernels()
    assert not (wrong := overflowing(launches, "sm_90")), "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_offsets_of_every_block_do_not_overflow(dtype: torch.dtype) -> None:
    wrong = []
    for block, side in blocks("b7"):
        for made in (training, inference, single_layers):
            wrong += overflowing(made(block, 1024, side, dtype, "sm_90"), "sm_90")
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
    late = """
    %o = arith.muli %unknown, %channels : i32
    %w = arith.extsi %o : i32 to i64
    %p = tt.addptr %p_x, %w : !tt.ptr<bf16>, i64
    """
    assert overflows(late, {"channels": 96}, 1) == ["unknown number: %o = arith.muli %unknown, %channels : i32"]


def test_overflow_analysis_follows_a_loop() -> None:
    """A row that every turn moves down by two is at most 2 x 30 further at the end. Triton 3.9 has dots in names."""
    ttir = """
    %z = arith.constant 0 : i32
    %one = arith.constant 1 : i32
    %two = arith.constant 2 : i32
    %n = arith.constant 30 : i32
    %r:2 = scf.for %i = %z to %n step %one iter_args(%h.0 = %z, %other = %z) -> (i32, i32)  : i32 {
      %next = arith.addi %h.0, %two : i32
      %o = arith.muli %next, %width : i32
      %p = tt.addptr %p_x, %o : !tt.ptr<bf16>, i32
      scf.yield %next, %p : i32, i32
    }
    """
    assert overflows(ttir, {"width": 2**31 // 64}, 1) == []
    (found,) = overflows(ttir, {"width": 2**31 // 60}, 1)
    assert "%o = arith.muli" in found


def narrow_convolutions(launches: list[Launch], architecture: str) -> list[str]:
    """Dense convolutions whose windows are not loaded 16 bytes at a time, or that run on no tensor cores."""
    wrong = []
    for launch in distinct(launches):
        name, ptx = launch.kernel.__name__, compile_launch(launch, architecture).ptx
        if name.startswith("convolution"):
            found = accesses(ptx)
            products = re.search(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", ptx)
            if not products or ("copy", 16) not in found or min(size for _, size in found) < 4:
                wrong.append(f"{launch}: {sorted(found)}")
    return wrong


def test_fused_block() -> None:
    """What a training step has that MBConv's has not, with stride 2."""
    launches = fused_step(FUSED[1][0], 128, FUSED[1][1], torch.bfloat16, "sm_90")
    launches = [x for x in launches if x.kernel.__name__.startswith(("convolution", "input_gradient"))]
    check(launches, "sm_90")
    assert not (wrong := narrow_convolutions(launches, "sm_90")), "\n".join(wrong)


def test_input_gradient_of_a_fused_block_in_float32() -> None:
    """A tile of 32 x 32 in four warps: without a limit of registers ptxas spilled four of them on sm_100."""
    launches = fused_step(FUSED[1][0], 128, FUSED[1][1], torch.float32, "sm_100")
    launches = [x for x in launches if x.kernel.__name__ == "convolution_bwd_kernel_input"]
    assert launches
    check(launches, "sm_100")


FUSED_NETWORKS = [("efficientnetv2_s", 300, 128), ("tf_efficientnetv2_b0", 192, 256), ("efficientnetv2_xl", 384, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_fused_block(architecture: str, dtype: torch.dtype) -> None:
    """Of V2-S and V2-B0 with many images, and of V2-XL with one."""
    launches = []
    for name, side, batch in FUSED_NETWORKS:
        for block, size in fused_blocks(name, side):
            launches += fused_step(block, batch, size, dtype, architecture)
    check(launches, architecture)
    if dtype != torch.float32:
        assert not (wrong := narrow_convolutions(launches, architecture)), "\n".join(wrong)
