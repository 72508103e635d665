"""Every detector finds the bug that was planted for it, names the place, and says nothing of the right version."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch
from emulator import HERE, EmulationError, Machine
from torch import Tensor

SOURCE = (HERE / "samples" / "planted.cu").read_text()
N, BLOCKS, THREADS = 128, 2, 64

# What the report of each bug says, and a piece of the line of the source that it names.
BUGS = {
    "missing_barrier": ("race|before anything was written", "staged[threadIdx.x ^ 1];"),
    "reused_buffer": ("race: byte .* shared memory", "staged[threadIdx.x"),
    "two_writers": ("race: .* written at .* and written by thread", "staged[broken ?"),
    "two_halves": ("race: .* written at .* and written by thread", "staged"),
    "missing_warp_barrier": ("race|before anything was written", "staged[threadIdx.x ^ 1];"),
    "shuffle_for_barrier": ("race", "same * staged"),
    "warp_barrier_for_block": ("race|before anything was written", "other = staged"),
    "read_past_the_end": ("4 bytes are read .*: 0 bytes past the end of in, which has 512", "i + 1 : i ^ 1"),
    "read_before_the_beginning": ("4 bytes are read .*: 4 bytes before the beginning of in", "i - 1 : i ^ 1"),
    "write_past_the_end": ("4 bytes are written .*: [048] bytes past the end of out", "i + 3 : i"),
    "copy_past_the_end": ("513 bytes are read .* of in of 512", "memcpy(a.out"),
    "null_pointer": ("a null pointer", "2 * in[position"),
    "write_to_input": ("byte 28 of in, an input, is written", "const_cast"),
    "uninitialised_output": ("of out is read .* before anything was written", "a.out[i] +="),
    "past_shared_memory": ("4 bytes at byte 256 of shared memory are written .* has 256", "staged[threadIdx.x + "),
    "uninitialised_shared_memory": ("byte 20 of shared memory is read .* before", "a.out[position()] = staged"),
    "divergent_barrier": ("__syncthreads in divergent code:\n  thread 0 waits", "__syncthreads();"),
    "early_exit": ("threads have exited while others wait.*\n.*\n  thread 40 has exited", "__syncthreads();"),
    "absent_lanes": (r"wait for each other.*\n.*a shuffle\(0xffffffff\)", "__shfl_xor_sync"),
    "inactive_source_lane": ("lane .* shuffles a value from lane 16, which takes no part", "broken ? 16"),
    "copy_not_waited_for": ("before the asynchronous copy to it has landed: thread", "2 * staged[lane ^ 1]"),
    "copy_without_barrier": ("race|asynchronous|before anything was", "2 * staged[lane ^ 1]"),
    "matrix_load_without_barrier": ("race|before anything was written", "load_matrices"),
    "matrix_load_by_half_a_warp": ("a matrix load needs all 32 lanes; 0x0000ffff take part", None),
    "misaligned_matrix_row": ("misaligned: an access to .* multiple of 16", "load_matrices"),
    "copy_into_what_is_read": ("race: .* and read by thread|asynchronous", "a.out[position()] = staged|copy_async_16"),
    "copy_past_the_tensor": ("16 bytes are read .*: .* past the end of in", "copy_async_16(staged + 4 * threadIdx.x"),
    "bulk_copy_not_waited_for": ("before the asynchronous copy to it has landed|before anything was", "2 * bulk"),
    "bulk_copy_of_another_phase": ("before the asynchronous copy to it has landed|before anything was", "2 * bulk"),
    "bulk_copy_that_another_waits_for": ("before the asynchronous copy to it has|before anything was", "2 * bulk"),
    "bulk_copy_of_fewer_bytes": ("1 of 1 arrivals, and 256 bytes copied of 260 expected", "mbarrier_wait"),
    "bulk_copy_into_what_is_read": ("race: .* and read by|asynchronous|at an mbarrier", "sum +=|.ask|mbarrier_wait"),
    "bulk_copy_left_in_flight": ("ends while a bulk copy is in flight .* mbarrier at byte 256", None),
    "unknown_mbarrier": ("race|before anything was written", "mbarrier"),
    "unfenced_mbarrier": ("does not know the barrier: nobody has fenced it", "copy_tensor_async"),
    "overwritten_mbarrier": ("byte 256 of shared memory holds no mbarrier, or one that was overwritten", "mbarrier_"),
    "misaligned": ("misaligned: an access to .*float2.* multiple of 8", "float2 pair"),
    "local_array": (r"out of bounds: index 4 of 'float \[4\]'", "2 * kept["),
    "overflowing_offset": ("a product overflows", "* a.n;"),
    "blocks_write_the_same": ("race: byte 20 of out is written .* of block .* no order between blocks", "a.out["),
    "block_reads_what_another_wrote": ("race: byte 0 of out .* of block|before anything was", "a.out[0]"),
    "threads_write_the_same": ("race: .* of out is written .* no barrier", "position() & ~1"),
    "stale_read": ("of out is read through the read-only cache .* wrote it in this launch", "__ldg(a.out + i)"),
    "missing_grid_barrier": ("race|before anything was written", "a.out[next]"),
    "wrong_arrivals": ("grid barrier 2 of 2 blocks waits for 2 arrivals instead of 4", "broken ? 1 : 2"),
}  # fmt: skip

COOPERATIVE = ("missing_grid_barrier", "wrong_arrivals")
OTHER_RESULTS = ("two_halves", "warp_barrier_for_block", "copy_past_the_end", "reused_buffer", "local_array",
                 "copy_past_the_tensor", "missing_grid_barrier")  # fmt: skip


def pointer(tensor: Tensor | None) -> ctypes.c_void_p | None:
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def launch(
    machine: Machine,
    name: str,
    bug: bool,
    *,
    counter: int | None = None,
    shared: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Input and output of a planted kernel."""
    x = machine.upload("in", torch.arange(1.0, N + 1))
    out = machine.empty("out", (N,), torch.float32)
    if counter is None and name in COOPERATIVE:
        counter = 0
    count = (
        None if counter is None else machine.upload("counter", torch.tensor([counter], dtype=torch.int32), kind="inout")
    )
    if shared is None:
        shared = 4 * THREADS * (4 if name == "copy_past_the_tensor" else 1) + (
            8 if "bulk" in name or "mb" in name else 0
        )
    error = machine.call("planted", name.encode(), bug, pointer(x), pointer(out), pointer(count), N, BLOCKS, shared)
    assert error == 0
    return x, out


def test_all_planted_kernels_are_tested() -> None:
    assert set(re.findall(r"^ +PLANTED\((\w+)\)", SOURCE, re.M)) == set(BUGS)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", BUGS)
def test_right_version_passes(samples: Machine, name: str, seed: int) -> None:
    samples.reset(seed)
    x, out = launch(samples, name, False)
    if name not in OTHER_RESULTS:
        assert torch.equal(out, 2 * x.view(-1, 2).flip(1).flatten())


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", BUGS)
def test_bug_is_found(samples: Machine, name: str, seed: int) -> None:
    samples.reset(seed)
    with pytest.raises(EmulationError) as caught:
        launch(samples, name, True)
    report = str(caught.value)
    message, piece = BUGS[name]
    assert re.search(message, report), report
    where = "\n".join(report.splitlines()[1:])
    assert re.search(rf"{name}<true>.*, block \([01], 0, 0\)", where), report
    if piece is None:
        return
    named = {int(line) for line in re.findall(r"planted\.cu:(\d+)", report)}
    lines = {number for number, line in enumerate(SOURCE.splitlines(), 1) if any(p in line for p in piece.split("|"))}
    assert named & lines, report
    # Nothing runs on a machine that has reported, until it is reset.
    with pytest.raises(EmulationError, match=re.escape(report[:40])):
        samples.check()


def test_freed_tensor(samples: Machine) -> None:
    out = samples.empty("out", (N,), torch.float32)
    x = samples.upload("in", torch.ones(N))
    samples.free(x)
    arguments = (b"read_past_the_end", False, pointer(x), pointer(out), None, N, BLOCKS, 0)
    with pytest.raises(EmulationError, match=r"4 bytes of in are read at .*planted.cu:[0-9]+ after it was freed"):
        samples.call("planted", *arguments)


def test_memory_of_another_machine(samples: Machine) -> None:
    x, out = torch.ones(N), samples.empty("out", (N,), torch.float32)
    with pytest.raises(EmulationError, match=r"address 0x[0-9a-f]+, in no tensor"):
        samples.call("planted", b"read_past_the_end", False, pointer(x), pointer(out), None, N, BLOCKS, 0)


def test_counter_of_a_grid_barrier_must_be_zero(samples: Machine) -> None:
    with pytest.raises(EmulationError, match="the counter of grid barrier 1 was 3 and not zero"):
        launch(samples, "wrong_arrivals", False, counter=3)


def test_grid_barrier_needs_a_cooperative_launch(samples: Machine) -> None:
    out, x = samples.empty("out", (N,), torch.float32), samples.upload("in", torch.ones(N))
    with pytest.raises(EmulationError, match="a grid barrier in a launch that is not cooperative"):
        samples.call("planted", b"wrong_arrivals", False, pointer(x), pointer(out), None, N, BLOCKS, 0)


def test_cooperative_launch_must_be_resident(samples: Machine) -> None:
    samples.reset(multiprocessors=1, shared_limit=1024)
    with pytest.raises(EmulationError, match="2 blocks of a cooperative launch, of which 1 can be resident"):
        launch(samples, "wrong_arrivals", False, shared=1024)


def test_shared_memory_of_a_block_is_limited(samples: Machine) -> None:
    samples.reset(shared_limit=1000)
    with pytest.raises(EmulationError, match="1024 bytes of shared memory a block; the device has 1000"):
        launch(samples, "missing_barrier", False, shared=1024)


def test_sabotage(samples: Machine) -> None:
    """A barrier that is taken away, and copies that land late, are noticed in kernels that are right."""
    lines = SOURCE.splitlines()
    line = next(i for i, text in enumerate(lines, 1) if "if constexpr (!broken) __syncthreads();" in text)
    samples.sabotage("planted.cu", line)
    with pytest.raises(EmulationError, match=r"race|before anything was written"):
        launch(samples, "missing_barrier", False)
    samples.reset()
    samples.sabotage(late_groups=1)
    with pytest.raises(EmulationError, match="before the asynchronous copy to it has landed"):
        launch(samples, "copy_not_waited_for", False)
