"""How csrc/cuda divides the blocks of EfficientNets, and the bytes that docs/cuda.md says they move. Nothing runs."""

from __future__ import annotations

import emulator
import pytest
import torch
from cuda_kernels import Kernels

from effnet_ops.checks import output_size, resolve_padding
from effnet_ops.models import model_spec
from effnet_ops.models.spec import BlockSpec

RESOLUTIONS = {"b0": 224, "b1": 240, "b2": 260, "b3": 300, "b4": 380, "b5": 456, "b6": 528, "b7": 600}
NETWORKS = [*RESOLUTIONS, "lite0", "lite4"]
# Multiprocessors and shared memory of a block: A100, RTX 4090, H100.
DEVICES = {"sm_80": (8, 108, 163 * 1024), "sm_89": (8, 128, 99 * 1024), "sm_90": (9, 132, 227 * 1024)}
BYTES = 2


def blocks(name: str) -> list[tuple[BlockSpec, int]]:
    """All blocks of a network in order, with the sides of their input."""
    side, found = (RESOLUTIONS.get(name, 224) + 1) // 2, []
    for stage in model_spec(f"efficientnet_{name}").stages():
        for block in stage:
            found.append((block, side))
            side = -(-side // block.stride)
    return found


def first_half(block: BlockSpec, side: int, batch: int) -> dict[str, object]:
    kernel, stride = (block.kernel_size,) * 2, (block.stride,) * 2
    sides = resolve_padding((), (side, side), kernel, stride, (1, 1))
    out = output_size((side, side), kernel, stride, sides, (1, 1))
    shape = {
        "batch": batch, "channels": block.expanded_channels, "height": side, "width": side, "out_height": out[0],
        "out_width": out[1], "kernel": block.kernel_size, "stride": block.stride, "pad_top": sides[0],
        "pad_left": sides[2], "channels_last": True,
    }  # fmt: skip
    return {"shape": shape, "in_channels": block.in_channels, "pool": 1}


def moved(kernels: Kernels, block: BlockSpec, side: int) -> tuple[float, float, float]:
    """Elements an image: by Triton's three launches, at least, and by these kernels."""
    out, wide, batch = -(-side // block.stride), block.expanded_channels, 64
    x, a, d, o = side**2 * block.in_channels, side**2 * wide, out**2 * wide, out**2 * block.out_channels
    residual = x if block.residual else 0
    behind = d + d + o + residual
    if not block.expands:
        return (a + behind,) * 3
    plan = kernels.plan("ExpandDepthwise", **first_half(block, side, batch), dtype=torch.bfloat16)
    return x + 2 * a + behind, x + behind, plan.read_bytes / batch / BYTES + behind


def test_documented_bytes(kernels: Kernels) -> None:
    kernels.multiprocessors = 132
    text = (emulator.ROOT / "docs" / "cuda.md").read_text(encoding="utf-8")
    for name, side in RESOLUTIONS.items():
        found = blocks(name)
        columns = zip(*(moved(kernels, *b) for b in found), strict=True)
        triton, least, ours = (BYTES * sum(column) / 1e6 for column in columns)
        numbers = f"{len(found)} | {triton:.1f} | {least:.1f} | {ours:.1f} | {triton / ours:.2f}"
        assert f"| {name.upper()} at {side} | {numbers} |" in text, numbers


@pytest.mark.parametrize("device", DEVICES)
def test_every_block_has_a_tile(kernels: Kernels, device: str) -> None:
    """Of the usual networks on the usual devices, in every precision, within the limits of a launch."""
    major, multiprocessors, shared = DEVICES[device]
    kernels.reset(major=major, multiprocessors=multiprocessors, shared_limit=shared)
    seen = {(block, side) for name in NETWORKS for block, side in blocks(name) if block.expands}
    for block, side in seen:
        for dtype in (torch.bfloat16, torch.float32):
            plan = kernels.plan("ExpandDepthwise", **first_half(block, side, 1), dtype=dtype)
            assert plan.why_not is None or dtype == torch.float32, (block, side)
            assert plan.shared_bytes <= shared and plan.threads in (0, 256)


def test_one_image_is_shared_by_many_blocks(kernels: Kernels) -> None:
    """With one tile an image, blocks share its channels; with many images each takes all of them."""
    kernels.multiprocessors = 132
    block, side = next((b, s) for b, s in blocks("b0") if b.expanded_channels == 1152)
    one, many = (
        kernels.plan("ExpandDepthwise", **first_half(block, side, batch), dtype=torch.bfloat16) for batch in (1, 256)
    )
    assert one.blocks >= 32 and many.blocks == 256


def test_tiles_of_a_wide_image_are_read_with_little_halo(kernels: Kernels) -> None:
    kernels.multiprocessors = 132
    found = [(b, s) for b, s in blocks("b4") if b.expands]
    once = sum(s**2 * b.in_channels for b, s in found)
    plans = [kernels.plan("ExpandDepthwise", **first_half(b, s, 256), dtype=torch.bfloat16) for b, s in found]
    assert sum(plan.read_bytes for plan in plans) <= 1.5 * once * 256 * BYTES
