"""Runs a reduced table of our kernels under compute-sanitizer: memcheck, racecheck and synccheck, one row each.

python benchmarks/gpu/sanitize.py                  # at most 9 minutes; run it again to go on where it stopped
python benchmarks/gpu/sanitize.py --dry-run        # the kernels once, with the tool that COMPUTE_SANITIZER names

Inputs are made on the CPU, so that the tools watch few kernels but ours. A row with errors has failed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from baselines import FORMATS, Scale, run_parts
from ours import OURS, block_kernel, depthwise_kernel, gpu_backends
from rows import ROOT, Job, Work
from shapes import Block, Depthwise
from tools import sanitize
from torch import Tensor

import effnet_ops

TOOLS = ("memcheck", "racecheck", "synccheck")

SHAPES = (
    Depthwise(40, 3, 1, 15),
    Depthwise(24, 5, 2, 17),
    Depthwise(13, 7, 1, 9),
    Depthwise(144, 5, 1, 28),
    Depthwise(96, 3, 2, 30),
    Depthwise(8, 7, 2, 13),
)
"""Channels with and without whole 16-byte vectors, odd sides, both strides, all windows."""
BLOCKS = (
    Block(16, 96, 24, 3, 2, 15, 4),
    Block(24, 144, 24, 5, 1, 14, 6),
    Block(13, 37, 13, 3, 1, 9, 3),
    Block(40, 240, 80, 5, 2, 17, 10),
)
"""Every window, with and without a residual, and channels without whole 16-byte vectors."""
SQUEEZE_EXCITE = ((72, 9, 6), (13, 5, 3), (480, 14, 20))
DTYPES = (torch.bfloat16, torch.float32)


def _on(scale: Scale, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, generator=generator).to(scale.device, dtype)


def calls(scale: Scale, backend: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Everything once, by name: the public functions with their gradients, and the kernels with all they can carry."""
    few = scale._replace(batch=3)
    for dtype in DTYPES:
        for shape in SHAPES:
            for layout in FORMATS:
                yield (
                    f"depthwise {shape} {dtype} {layout}",
                    lambda s=shape, d=dtype, n=layout: _depthwise(few, s, d, n, backend),
                )
        for sizes in SQUEEZE_EXCITE:
            yield f"squeeze_excite {sizes} {dtype}", lambda s=sizes, d=dtype: _squeeze_excite(few, s, d, backend)
    if backend != "cpu":
        for shape in SHAPES:
            for mode in ("forward", "backward"):
                yield (
                    f"fused depthwise {shape} {mode}",
                    lambda s=shape, m=mode: depthwise_kernel(few, s, m, backend).run(),
                )

        for block in BLOCKS:
            yield f"mbconv {block}", lambda s=block: block_kernel(few, s, backend).run()


def _gradients(y: Tensor, leaves: list[Tensor]) -> None:
    torch.autograd.grad(y, leaves, torch.ones_like(y))


def _depthwise(scale: Scale, shape: Depthwise, dtype: torch.dtype, layout: str, backend: str) -> None:
    x = _on(scale, scale.batch, shape.channels, shape.size, shape.size, dtype=dtype)
    leaves = [x.contiguous(memory_format=FORMATS[layout]), _on(scale, shape.channels, 1, *(shape.kernel,) * 2)]
    leaves = [leaf.requires_grad_() for leaf in (*leaves, _on(scale, shape.channels))]
    with effnet_ops.use_backend(backend):
        y = effnet_ops.depthwise_conv2d(*leaves, stride=shape.stride, padding="same", activation="silu")
    _gradients(y, leaves)


def _squeeze_excite(scale: Scale, sizes: tuple[int, int, int], dtype: torch.dtype, backend: str) -> None:
    channels, side, reduced = sizes
    x = _on(scale, scale.batch, channels, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weights = ((reduced, channels, 1, 1), (reduced,), (channels, reduced, 1, 1), (channels,))
    leaves = [leaf.requires_grad_() for leaf in (x, *(_on(scale, *size) for size in weights))]
    with effnet_ops.use_backend(backend):
        y = effnet_ops.squeeze_excite(*leaves)
    _gradients(y, leaves)


def sanitizer(scale: Scale) -> Iterator[Job]:
    for backend in gpu_backends(scale) or ["cpu"]:
        for tool in TOOLS if scale.device == "cuda" else TOOLS[:1]:

            def prepare(backend: str = backend, tool: str = tool) -> Work:
                return Work(None, extra=lambda: _row(scale, backend, tool))

            yield Job("sanitizer", tool, f"{OURS} {backend}", "reduced table", "bf16 and fp32", "all", prepare)


def _row(scale: Scale, backend: str, tool: str) -> dict[str, int]:
    # The allocator would hide what lies beyond a tensor inside a larger block.
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    target = [sys.executable, str(Path(__file__).resolve()), "--table", backend]
    target += ["--dry-run"] if scale.device == "cpu" else []
    found = sanitize(target, tool, end=scale.end)
    count = len(list(calls(scale, backend)))
    if found.text.count("done: ") != count:
        raise RuntimeError(f"{tool} saw {found.text.count('done: ')} of {count} calls: {found.text[-500:]}")
    if found.errors:
        log = (scale.output.parent if scale.output else ROOT / "build") / f"{tool}_{backend}.log"
        log.parent.mkdir(exist_ok=True, parents=True)
        log.write_text(found.text, encoding="utf-8")
        raise RuntimeError(f"{tool} found {found.errors} errors in {backend}'s kernels, see {log.name} beside the rows")
    return {"errors": 0, "calls": count}


def run_table(scale: Scale, backend: str) -> int:
    """What the tools watch."""
    for name, call in calls(scale, backend):
        call()
        if scale.device == "cuda":
            torch.cuda.synchronize()
        print(f"done: {name}", flush=True)
    return 0


def main() -> int:
    if "--table" in sys.argv:
        from baselines import DRY, REAL

        return run_table(DRY if "--dry-run" in sys.argv else REAL, sys.argv[sys.argv.index("--table") + 1])
    return run_parts({"sanitizer": sanitizer}, __doc__)


if __name__ == "__main__":
    sys.exit(main())
