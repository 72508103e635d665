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
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import ours
import sanitize
import smoke
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


Call = tuple[str, Callable[[], object]]


def _rows(part: Callable[[Scale], Iterator[Any]], scale: Scale) -> Iterator[Call]:
    """The rows of a part of ours.py that run on Triton kernels, by their keys."""
    for job in part(scale):
        if job.provider in (ours.OURS, f"{ours.OURS} triton") or job.provider.startswith(f"{ours.OURS} triton "):
            yield job.key, lambda job=job: job.prepare().run()


def networks(scale: Scale) -> Iterator[Call]:
    """The blocks of the networks, and the networks after `optimize_for_inference`: "efficientnet_b0 256 forward .."."""
    for name in ("efficientnet_b0", "efficientnet_b4", "efficientnet_b2"):
        side = scale.resolution[name]
        for mode, batch in passes(scale):
            key = f"{name} {batch} {mode}"
            for path, channels, size in layers(name, side).blocks[: scale.most_layers]:
                yield f"{key} {path}", functools.partial(_block, name, path, mode, (batch, channels, size, size))
            if mode == "forward":
                yield f"{key} optimized", functools.partial(_optimized, name, (batch, 3, side, side))


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


PARTS: dict[str, Callable[[Scale], Iterator[Call]]] = {
    "smoke": smoke.launches,
    "networks": networks,
    "kernels": functools.partial(_rows, ours.kernels),
    "depthwise": functools.partial(_rows, ours.plain),
    "operations": functools.partial(_rows, ours.operations),
    "sanitizer": lambda scale: sanitize.calls(scale, "triton"),
}


class Wanted(NamedTuple):
    """A part's calls whose name has a match of the pattern ``only``."""

    part: str
    only: str = ""


def on_meta(scale: Scale) -> Scale:
    return scale._replace(device="meta", compile_modes=())


@functools.cache
def calls(part: str, dry: bool, gpu: Gpu) -> list[Call]:
    """What a part runs, in order, with names."""
    with (
        mock.patch.object(ours, "gpu_backends", lambda scale: ["triton"]),
        mock.patch.object(smoke, "gpu_backends", lambda scale: ["triton"]),
        mock.patch.object(tuning, "architecture", lambda device: gpu.architecture),
    ):
        return list(PARTS[part](on_meta(DRY if dry else REAL)))


def compile_call(part: str, index: int, dry: bool, gpu: Gpu) -> Counter[str]:
    """Compile what one call of a part launches."""
    _register_on_meta()
    name, call = calls(part, dry, gpu)[index]
    with compiling(gpu) as counts, effnet_ops.use_backend("triton"):
        try:
            call()
        except Exception as problem:
            counts[f"call {name!r} of {part}: {type(problem).__name__}: {str(problem)[:200]}"] += 1
    return counts


def _compile_task(task: tuple[int, str, int, bool, Gpu]) -> tuple[int, Counter[str]]:
    return task[0], compile_call(*task[1:])


def fill(
    wanted: Sequence[Wanted], gpu: Gpu, *, dry: bool = False, seconds: float, workers: int | None = None,
    method: str = "spawn", finished: Callable[[Wanted], object] = lambda one: None,
) -> Counter[str]:  # fmt: skip
    """Compile what is wanted, in that order, in processes started by ``method``; what was counted, failures by name.

    ``finished`` is told each time that all of one are done. Raises `multiprocessing.TimeoutError` after ``seconds``.
    """
    end = time.monotonic() + seconds
    tasks = []
    for which, (part, only) in enumerate(wanted):
        chosen = (i for i, (name, _) in enumerate(calls(part, dry, gpu)) if re.search(only, name))
        tasks += [(which, part, i, dry, gpu) for i in chosen]
    left = Counter(which for which, *_ in tasks)
    counts: Counter[str] = Counter()
    # Each process compiles on one core, and none of them may hold memory of the GPU.
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for which, one in enumerate(wanted):
        if not left[which]:
            finished(one)
    with multiprocessing.get_context(method).Pool(workers or os.cpu_count()) as pool:
        results = pool.imap_unordered(_compile_task, tasks)
        for _ in tasks:
            which, found = results.next(timeout=max(end - time.monotonic(), 0.0))
            counts += found
            left[which] -= 1
            if not left[which]:
                finished(wanted[which])
    return counts


def this_gpu(target: int | None) -> Gpu:
    if target is not None:
        return Gpu(tuning.ARCHITECTURES[f"sm_{target}"], launchers=False)
    return Gpu(tuning.architecture(torch.device("cuda", 0)), launchers=True)


def say(counts: Counter[str], seconds: float) -> int:
    """Print what `fill` counted; the exit code."""
    compiled, found = counts.pop("compiled", 0), counts.pop("found", 0)
    for failure, times in counts.most_common(20):
        print(f"FAILED {times} times: {failure}")
    print(f"{compiled} kernels compiled, {found} found, {len(counts)} failed; {seconds:.0f} s", flush=True)
    return 1 if counts else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be repeated")
    parser.add_argument("--only", default="", metavar="REGEX", help="only calls whose name has a match")
    parser.add_argument("--seconds", type=float, default=120.0, help="stop after this time")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--target", type=int, choices=[int(name[3:]) for name in tuning.ARCHITECTURES])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes")
    options = parser.parse_args()
    if options.target is None and not torch.cuda.is_available():
        print("no GPU here: --target says what to compile for", file=sys.stderr)
        return 3
    start = time.monotonic()
    wanted = [Wanted(part, options.only) for part in options.part or PARTS]
    settings = {"dry": options.dry_run, "seconds": options.seconds, "workers": options.workers}
    try:
        counts = fill(wanted, this_gpu(options.target), **settings)
    except multiprocessing.TimeoutError:
        print("out of time: the rest is compiled by who needs it")
        return 0
    return say(counts, time.monotonic() - start)


if __name__ == "__main__":
    sys.exit(main())
