"""Compiles into Triton's disk cache, on all cores at once, what the other benchmarks here would compile one by one.

python benchmarks/gpu/precompile.py --part networks   # for this GPU; what is in the cache already is only looked up
python benchmarks/gpu/precompile.py --target 90       # for another, or without any; --dry-run: tiny shapes

Host code runs on meta tensors as it does on a GPU's, through Triton's own `JITFunction.run`, which compiles and does
not launch. A meta tensor's address is 0, so it is as aligned as those that PyTorch allocates. The processes that
compile are told which GPU it is, and do not open it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import ours
import sanitize
import timm
import torch
from baselines import DRY, REAL, Scale, passes
from shapes import layers
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import effnet_ops
from effnet_ops import backends
from effnet_ops.kernels import tuning
from effnet_ops.ops import triton as operators


class Gpu(NamedTuple):
    """What is compiled for. Without ``launchers``, the C functions that call a kernel are left to its first launch."""

    architecture: tuning.Architecture
    launchers: bool

    @property
    def target(self) -> GPUTarget:
        return GPUTarget("cuda", int(self.architecture.name.removeprefix("sm_")), 32)


class Driver:
    """What `JITFunction.run` asks a driver for, without a GPU behind it."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@contextlib.contextmanager
def compiling(gpu: Gpu) -> Iterator[Counter[str]]:
    """Launches compile for ``gpu`` instead; how many kernels were "compiled", "found" in the cache, or failed, by name.

    The public functions take meta tensors, too, with ``use_backend("triton")``.
    """
    counts: Counter[str] = Counter()
    run = JITFunction.run

    def compile_only(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **settings: Any) -> None:
        try:
            made = run(kernel, *args, grid=grid, warmup=True, **settings)
            if gpu.launchers:
                _make_launcher(made)
        except Exception as problem:
            counts[f"{kernel.__name__}: {type(problem).__name__}: {str(problem)[:200]}"] += 1

    def listen(*, cache_hit: bool, **_: Any) -> None:
        counts["found" if cache_hit else "compiled"] += 1

    anywhere = backends.BACKENDS["triton"]._replace(refuses=lambda x: "")
    with (
        mock.patch.object(driver, "_active", Driver(gpu.target)),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(knobs.compilation, "listener", listen),
        mock.patch.object(tuning, "architecture", lambda device: gpu.architecture),
        mock.patch.dict(backends.BACKENDS, triton=anywhere),
        mock.patch.dict(backends._reasons, triton=""),
    ):
        yield counts


@functools.cache
def _register_on_meta() -> torch.library.Library:
    """From here on, this process has the Triton kernels where meta tensors had the shapes of results."""
    library = torch.library.Library("effnet_ops", "IMPL")
    for name in operators.WORDS:
        library.impl(name, operators.implementation(name), "Meta", allow_override=True)
    return library


@functools.cache
def _made_launchers() -> set[str]:
    return set()


def _make_launcher(kernel: Any) -> None:
    """What the first launch of a kernel makes with a C compiler, one for each list of argument types."""
    from triton.backends.nvidia.driver import CudaLauncher

    if kernel is not None and kernel.hash not in _made_launchers():
        _made_launchers().add(kernel.hash)
        CudaLauncher(kernel.src, kernel.metadata)


def _rows(part: Callable[[Scale], Iterator[Any]], scale: Scale) -> Iterator[Callable[[], object]]:
    """The rows of a part of ours.py that run on Triton kernels."""
    for job in part(scale):
        if job.provider in (ours.OURS, f"{ours.OURS} triton") or job.provider.startswith(f"{ours.OURS} triton "):
            yield lambda job=job: job.prepare().run()


def networks(scale: Scale) -> Iterator[Callable[[], object]]:
    """The blocks of the networks, and the networks after `optimize_for_inference`."""
    for name in ("efficientnet_b0", "efficientnet_b4", "efficientnet_b2"):
        side = scale.resolution[name]
        for mode, batch in passes(scale):
            for path, channels, size in layers(name, side).blocks[: scale.most_layers]:
                yield functools.partial(_block, name, path, mode, (batch, channels, size, size))
            if mode == "forward":
                yield functools.partial(_optimized, name, (batch, 3, side, side))


def _model(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        return timm.create_model(name).to(memory_format=torch.channels_last)


def _images(size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta", memory_format=torch.channels_last)


def _block(name: str, path: str, mode: str, size: tuple[int, ...]) -> None:
    """A block with parameters in fp32 and activations in bf16, as under autocast."""
    model = _model(name).train(mode == "step")
    effnet_ops.replace_layers(model)
    block, x = model.get_submodule(path), _images(size, torch.bfloat16)
    with torch.set_grad_enabled(mode == "step"):
        y = block(x.requires_grad_(mode == "step"))
    if mode == "step":
        torch.autograd.grad(y, [x, *block.parameters()], torch.empty_like(y))


def _optimized(name: str, size: tuple[int, ...]) -> None:
    model = effnet_ops.optimize_for_inference(_model(name), dtype=torch.bfloat16)
    with torch.no_grad():
        model(_images(size, torch.float32))


PARTS: dict[str, Callable[[Scale], Iterator[Callable[[], object]]]] = {
    "networks": networks,
    "kernels": functools.partial(_rows, ours.kernels),
    "depthwise": functools.partial(_rows, ours.plain),
    "operations": functools.partial(_rows, ours.operations),
    "sanitizer": lambda scale: (call for _, call in sanitize.calls(scale, "triton")),
}


def on_meta(scale: Scale) -> Scale:
    return scale._replace(device="meta", compile_modes=())


@functools.cache
def calls(part: str, dry: bool, gpu: Gpu) -> list[Callable[[], object]]:
    """What a part runs, in order."""
    with (
        mock.patch.object(ours, "gpu_backends", lambda scale: ["triton"]),
        mock.patch.object(tuning, "architecture", lambda device: gpu.architecture),
    ):
        return list(PARTS[part](on_meta(DRY if dry else REAL)))


def compile_call(part: str, index: int, dry: bool, gpu: Gpu) -> Counter[str]:
    """Compile what one call of a part launches."""
    _register_on_meta()
    with compiling(gpu) as counts, effnet_ops.use_backend("triton"):
        try:
            calls(part, dry, gpu)[index]()
        except Exception as problem:
            counts[f"call {index} of {part}: {type(problem).__name__}: {str(problem)[:200]}"] += 1
    return counts


def _compile_task(task: tuple[str, int, bool, Gpu]) -> Counter[str]:
    return compile_call(*task)


def this_gpu(target: int | None) -> Gpu:
    if target is not None:
        return Gpu(tuning.ARCHITECTURES[f"sm_{target}"], launchers=False)
    return Gpu(tuning.architecture(torch.device("cuda", 0)), launchers=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be repeated")
    parser.add_argument("--seconds", type=float, default=120.0, help="stop after this time")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--target", type=int, choices=[int(name[3:]) for name in tuning.ARCHITECTURES])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes")
    options = parser.parse_args()
    if options.target is None and not torch.cuda.is_available():
        print("no GPU here: --target says what to compile for", file=sys.stderr)
        return 3
    start = time.monotonic()
    gpu, dry = this_gpu(options.target), options.dry_run
    tasks = [(part, i, dry, gpu) for part in options.part or PARTS for i in range(len(calls(part, dry, gpu)))]
    counts: Counter[str] = Counter()
    # Each process compiles on one core, and none of them may hold memory of the GPU.
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        results = pool.imap_unordered(_compile_task, tasks)
        try:
            for _ in tasks:
                counts += results.next(timeout=max(options.seconds + start - time.monotonic(), 0.0))
        except multiprocessing.TimeoutError:
            print("out of time: the rest is compiled by who needs it")
    compiled, found = counts.pop("compiled", 0), counts.pop("found", 0)
    for failure, times in counts.most_common(20):
        print(f"FAILED {times} times: {failure}")
    print(f"{compiled} kernels compiled, {found} found, {len(counts)} failed; {time.monotonic() - start:.0f} s")
    return 1 if counts else 0


if __name__ == "__main__":
    sys.exit(main())
