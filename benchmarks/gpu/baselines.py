"""What PyTorch does on this GPU: limits of the machine, layers, blocks and networks, eager and compiled.

python benchmarks/gpu/baselines.py                 # at most 9 minutes; run it again to go on where it stopped
python benchmarks/gpu/baselines.py --part networks
python benchmarks/gpu/baselines.py --dry-run       # tiny shapes on the CPU, no rows

Needs torch, triton, torchvision and timm only, so that it can run before anything of this package does.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from rows import PART_SECONDS, Job, Session, Work, once, output_path, relative_error
from shapes import RESOLUTIONS, Depthwise, layers, whole_blocks
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 2e-3}
"""Against fp64; cuDNN may use TF32 for fp32, as it does by default."""


class Scale(NamedTuple):
    """How large the problems are: real ones, or those of a dry run."""

    device: str
    batch: int
    inference_batches: tuple[int, ...]
    training_batches: tuple[int, ...]
    resolution: dict[str, int]
    copy_bytes: int
    matrix: int
    compile_modes: tuple[str, ...]
    most_layers: int
    output: Path | None = None
    end: float = math.inf
    """When the time is up, by time.monotonic()."""


REAL = Scale("cuda", 256, (256, 1, 32), (128, 256), RESOLUTIONS, 1 << 30, 8192, ("default", "max-autotune"), 1000)
DRY = Scale("cpu", 2, (1,), (2,), dict.fromkeys(RESOLUTIONS, 32), 1 << 10, 16, (), 2)


def machine(scale: Scale) -> Iterator[Job]:
    """Bandwidth of a copy and the rates of matrix products: the limits that the other rows are measured against."""

    def copy_work() -> Work:
        source = torch.ones(scale.copy_bytes, dtype=torch.uint8, device=scale.device)
        target = torch.empty_like(source)
        return Work(lambda: target.copy_(source), bytes=2 * scale.copy_bytes)

    yield Job("machine", "copy", "torch", f"{scale.copy_bytes} bytes", "uint8", "forward", copy_work)
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("tf32", torch.float32, True),
        ("fp32", torch.float32, False),
    ):
        n = scale.matrix

        def product(dtype: torch.dtype = dtype, tf32: bool = tf32, n: int = n) -> Work:
            a, b = (torch.randn(n, n, device=scale.device).to(dtype) for _ in range(2))

            def run() -> Tensor:
                torch.backends.cuda.matmul.allow_tf32 = tf32
                result = a @ b
                torch.backends.cuda.matmul.allow_tf32 = False
                return result

            return Work(run, flops=2 * n**3)

        yield Job("machine", "matmul", "torch", f"{n}x{n}x{n}", name, "forward", product)


def depthwise(scale: Scale) -> Iterator[Job]:
    """Every distinct depthwise convolution of B0 and B4, forward and both gradients, by cuDNN and by PyTorch itself."""
    shapes = dict.fromkeys(
        s for name in ("efficientnet_b0", "efficientnet_b4") for s in layers(name, scale.resolution[name]).depthwise
    )
    # What other rows are compared with comes first, should the time end.
    for dtype in DTYPES:
        for layout in reversed(FORMATS):
            for modes in (("forward", "both gradients"), ("input gradient", "weight gradient")):
                for path in ("cudnn", "native"):
                    for shape in list(shapes)[: scale.most_layers]:
                        for mode in modes:
                            yield _depthwise_job(scale, shape, dtype, layout, path, mode)


def _depthwise_job(scale: Scale, shape: Depthwise, dtype: str, layout: str, path: str, mode: str) -> Job:
    def prepare() -> Work:
        x = torch.randn(scale.batch, shape.channels, shape.size, shape.size, device=scale.device)
        x = x.to(DTYPES[dtype]).contiguous(memory_format=FORMATS[layout])
        weight = torch.randn(shape.channels, 1, shape.kernel, shape.kernel, device=scale.device).to(x.dtype)
        settings = ((shape.stride,) * 2, (shape.kernel // 2,) * 2, (1, 1), False, (0, 0), shape.channels)
        y = F.conv2d(x, weight, None, shape.stride, shape.kernel // 2, 1, shape.channels)
        grad = torch.randn_like(y)
        wanted = [mode != "weight gradient", mode != "input gradient", False]

        def run() -> object:
            with torch.backends.cudnn.flags(enabled=path == "cudnn", benchmark=True, allow_tf32=True):
                if mode == "forward":
                    return F.conv2d(x, weight, None, shape.stride, shape.kernel // 2, 1, shape.channels)
                return torch.ops.aten.convolution_backward(grad, x, weight, None, *settings, wanted)

        both = mode == "both gradients"
        moved = ((2 if both else 1) * x.numel() + y.numel()) * x.element_size()
        return Work(run, bytes=moved, flops=(1 + both) * 2 * y.numel() * shape.kernel**2)

    return Job("depthwise", "depthwise", f"{path} {layout}", f"{scale.batch}x{shape}", dtype, mode, prepare)


class Activated(nn.Module):
    """Batch normalisation and SiLU, as they follow each convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(x))


def elementwise(scale: Scale) -> Iterator[Job]:
    """Normalisation with SiLU and squeeze-and-excitation, as eager PyTorch and the compiler make them."""
    for channels, side, reduced in ((96, 112, 4), (144, 56, 6), (480, 14, 20), (1152, 7, 48)):
        side = min(side, 4) if scale.device == "cpu" else side
        for operation, make in (
            ("batch_norm_silu", lambda channels=channels: Activated(channels)),
            (
                "squeeze_excite",
                lambda channels=channels, reduced=reduced: SqueezeExcite(
                    channels, rd_channels=reduced, act_layer=nn.SiLU
                ),
            ),
        ):
            shape = f"{scale.batch}x{channels}x{side}x{side}"
            yield from _module_jobs(scale, "elementwise", operation, shape, make, (channels, side), ("bf16",))


def blocks(scale: Scale) -> Iterator[Job]:
    """Whole MBConv blocks of B0 and Fused-MBConv blocks of V2-B0."""
    for label, network, path, channels, side in whole_blocks(scale.resolution, scale.most_layers):

        def make(network: str = network, path: str = path) -> nn.Module:
            return timm.create_model(network).get_submodule(path)

        shape = f"{scale.batch}x{channels}x{side}x{side}"
        yield from _module_jobs(scale, "blocks", label, shape, make, (channels, side), ("bf16",))


def _module_jobs(
    scale: Scale, part: str, operation: str, shape: str, make: Callable[[], nn.Module], size: tuple[int, int],
    dtypes: tuple[str, ...],
) -> Iterator[Job]:  # fmt: skip
    channels, side = size
    providers = [("eager", layout) for layout in FORMATS] + [(mode, "channels_last") for mode in scale.compile_modes]
    for dtype in dtypes:
        for provider, layout in providers:
            for mode in ("forward", "step"):

                def prepare(
                    provider: str = provider, layout: str = layout, dtype: str = dtype, mode: str = mode
                ) -> Work:
                    torch.manual_seed(0)
                    module = make().to(scale.device, memory_format=FORMATS[layout]).train(mode == "step")
                    x = torch.randn(scale.batch, channels, side, side, device=scale.device, dtype=DTYPES[dtype])
                    x = x.contiguous(memory_format=FORMATS[layout])
                    return step_of(module, x, mode, provider, dtype)

                yield Job(part, operation, f"{provider} {layout}", shape, dtype, mode, prepare)


def compiled(module: nn.Module, provider: str) -> nn.Module:
    if provider == "eager":
        return module
    torch._dynamo.reset()
    # CUDA graphs are ours to capture, the same for every provider.
    return torch.compile(module, mode="max-autotune-no-cudagraphs" if provider == "max-autotune" else None)


def step_of(module: nn.Module, x: Tensor, mode: str, provider: str, dtype: str) -> Work:
    """One forward pass in evaluation, or one forward and backward pass in training, under autocast."""
    runner = compiled(module, provider)
    # A dry run tries out the code: many processors take seconds for one convolution in half precision.
    x = x if x.is_cuda else x.float()
    autocast = torch.autocast(x.device.type, DTYPES[dtype], enabled=dtype != "fp32" and x.is_cuda)
    if mode == "forward":

        def forward() -> Tensor:
            with torch.no_grad(), autocast:
                return runner(x)

        def error() -> float:
            with torch.no_grad(), autocast:
                return relative_error(module(x)[:4], in_double(module, x[:4]))

        return Work(forward, error=error, allowed=TOLERANCE[DTYPES[dtype]] * 2)
    leaf = x.detach().requires_grad_(x.is_floating_point())

    def step() -> object:
        with autocast:
            y = runner(leaf)
        loss = y.float().square().mean()
        module.zero_grad(set_to_none=True)
        return loss.backward()

    return Work(step)


def in_double(module: nn.Module, x: Tensor) -> Tensor:
    """What a copy of the module makes of x in fp64; cuDNN would try out each of its algorithms for seconds."""
    with torch.autocast(x.device.type, enabled=False), torch.backends.cudnn.flags(enabled=False):
        return copy.deepcopy(module).double()(x.double())


def passes(scale: Scale) -> list[tuple[str, int]]:
    """The (mode, batch) of networks, those first that the targets are about."""
    forward = [("forward", batch) for batch in scale.inference_batches]
    return [*forward[:1], *(("step", batch) for batch in scale.training_batches), *forward[1:]]


def networks(scale: Scale) -> Iterator[Job]:
    """Inference and training of whole networks, in bf16 under autocast; each also as the replay of a CUDA graph.

    max-autotune takes minutes to compile, so but for the first pass of the first network it comes last.
    """
    quick = [("eager", "channels_last"), *((m, "channels_last") for m in scale.compile_modes if m != "max-autotune")]
    quick.append(("eager", "contiguous"))
    slow = [(m, "channels_last") for m in scale.compile_modes if m == "max-autotune"]
    first, *others = RESOLUTIONS
    all_passes = passes(scale)
    for names, providers, chosen in (
        ([first], quick, all_passes),
        ([first], slow, all_passes[:1]),
        (others, quick, all_passes),
        ([first], slow, all_passes[1:]),
        (others, slow, all_passes),
    ):
        for name in names:
            for mode, batch in chosen:
                for provider, layout in providers:
                    for graph in (False, True):
                        if graph and (scale.device == "cpu" or (mode == "step" and provider != "eager")):
                            continue
                        yield _network_job(scale, name, scale.resolution[name], mode, batch, provider, layout, graph)


def _network_job(
    scale: Scale, name: str, side: int, mode: str, batch: int, provider: str, layout: str, graph: bool
) -> Job:
    def prepare() -> Work:
        torch.manual_seed(0)
        model = timm.create_model(name).to(scale.device, memory_format=FORMATS[layout]).train(mode == "step")
        x = torch.randn(batch, 3, side, side, device=scale.device).contiguous(memory_format=FORMATS[layout])
        work = step_of(model, x, mode, provider, "bf16")
        # What autograd keeps of a compiled model is the compiler's choice: its peak tells.
        saved = mode == "step" and provider == "eager"
        return dataclasses.replace(work, extra=lambda: memory_of(work.run, model if saved else None, x))

    return Job("networks", name, f"{provider} {layout}", f"{batch}x3x{side}x{side}", "bf16", mode, prepare, graph)


def memory_of(run: Callable[[], object], saving: nn.Module | None, x: Tensor) -> dict[str, Any]:
    """Bytes at the peak of one call beyond those held before it, and what autograd keeps in a step of ``saving``."""
    found: dict[str, Any] = {}
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        found["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    if saving is not None:
        found["saved_bytes"] = saved_bytes(saving, x)
    return found


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of the distinct storages that autograd keeps for backward, parameters and buffers apart."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast(x.device.type, torch.bfloat16):
        y = model(x)
    total = sum(sizes.values())
    del y
    return total


CLASSES = {
    "compiled": ("triton_",),
    "depthwise": ("depthwise", "dwconv", "dgrad2d_grouped", "wgrad2d_grouped", "conv2d_grouped"),
    "squeeze and excite": ("squeeze_excite", "pool_kernel", "scale_kernel", "gate_fwd", "gate_bwd"),
    "batch norm": ("batch_norm", "bn_fw", "bn_bw", "batchnorm", "finalize", "apply_kernel", "gradient_sums"),
    "product or convolution": ("pointwise", "gemm", "cutlass", "conv", "xmma", "cudnn", "nvjet", "wgmma"),
    "reduction": ("reduce", "sum_partials"),
    "optimizer": ("multi_tensor", "foreach"),
}


def kernel_class(name: str) -> str:
    """What a kernel does, by its name; elementwise unless the name says more."""
    lower = name.lower()
    return next((label for label, words in CLASSES.items() if any(word in lower for word in words)), "elementwise")


def profile(scale: Scale) -> Iterator[Job]:
    """Time a kernel class of one training step of B0, eager and compiled."""
    for provider in ("eager", *scale.compile_modes[:1]):
        yield profile_job(scale, f"{provider} channels_last", lambda model: model, provider)


def profile_job(scale: Scale, label: str, change: Callable[[nn.Module], object], provider: str = "eager") -> Job:
    """The job of `profile` for B0 after ``change(model)``."""
    batch, side = scale.training_batches[0], scale.resolution["efficientnet_b0"]

    def prepare() -> Work:
        model = timm.create_model("efficientnet_b0").to(scale.device, memory_format=torch.channels_last).train()
        change(model)
        x = torch.randn(batch, 3, side, side, device=scale.device).contiguous(memory_format=torch.channels_last)
        work = step_of(model, x, "step", provider, "bf16")
        return dataclasses.replace(work, extra=lambda: kernel_times(work.run))

    return Job("profile", "efficientnet_b0", label, f"{batch}x3x{side}x{side}", "bf16", "step", prepare)


LONGEST = 24


def kernel_times(run: Callable[[], object]) -> dict[str, Any]:
    """Milliseconds on the device in one call, by kernel class; and those of the kernels that take longest, by name."""
    run()
    with torch.profiler.profile(acc_events=True) as profiler:
        run()
    totals: dict[str, float] = {}
    kernels: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            label, milliseconds = kernel_class(event.name), event.device_time / 1e3
            totals[label] = totals.get(label, 0.0) + milliseconds
            kernels.setdefault(event.name[:80], []).append(milliseconds)
    longest = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:LONGEST]
    return {"kernel_ms": totals, "longest": {name: [len(times), sum(times)] for name, times in longest}}


PARTS = {
    "machine": machine,
    "networks": networks,
    "blocks": blocks,
    "elementwise": elementwise,
    "profile": profile,
    "depthwise": depthwise,
}


def chosen(jobs: Iterator[Job], only: re.Pattern[str] | None) -> Iterator[Job]:
    """The jobs whose key has a match of ``only``."""
    return jobs if only is None else (job for job in jobs if only.search(job.key))


def run_parts(parts: dict[str, Callable[[Scale], Iterator[Job]]], description: str | None) -> int:
    """The command line that all benchmarks here share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=parts, action="append", help="only this part; may be repeated")
    parser.add_argument("--only", type=re.compile, metavar="REGEX", help="only rows whose key has a match")
    parser.add_argument("--seconds", type=float, default=PART_SECONDS, help="stop after this time, to be run again")
    parser.add_argument("--output", type=Path, help="a .jsonl file; by default one named after the GPU")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, once")
    parser.add_argument("--once", metavar="KEY", help="run one row's call in a profiler's range; no row is written")
    parser.add_argument("--warm", action="store_true", help="run each call once, to fill compilers' caches; no rows")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        print("no GPU here: nothing is measured (--dry-run exercises everything on the CPU)", file=sys.stderr)
        return 3
    scale = DRY if options.dry_run else REAL
    torch.backends.cudnn.benchmark = True
    if options.once:
        return once((job for name in options.part or parts for job in parts[name](scale)), options.once, scale.device)
    if options.warm:
        for job in (job for name in options.part or parts for job in chosen(parts[name](scale), options.only)):
            job.prepare().run()
        return 0
    output = options.output if options.dry_run else options.output or output_path(scale.device)
    session = Session(scale.device, output, options.seconds)
    scale = scale._replace(output=output, end=session.end)
    for name in options.part or parts:
        if not session.run(chosen(parts[name](scale), options.only)):
            print(f"{session.stopped}, in part {name!r}: run the same command again to go on")
            return 2
    print(f"complete; {session.failures} failed")
    return 1 if session.failures else 0


if __name__ == "__main__":
    sys.exit(run_parts(PARTS, __doc__))
