"""Is it right at all? Every operator, dtype, direction and backend against fp64 on this GPU, in a few seconds.

python benchmarks/gpu/smoke.py                     # rows of errors; what is wrong has failed, and the rest goes on
python benchmarks/gpu/smoke.py --dry-run           # on the CPU

The public functions run on the cases of `effnet-ops check`, in both layouts. The kernels with all that a block fuses
into them run on small problems of their own. A replaced network has to be as right as the stock one.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator

import timm
import torch
from baselines import DTYPES, FORMATS, Scale, run_parts
from ours import KERNEL_TOLERANCE, OURS, block_kernel, depthwise_kernel, gpu_backends, pointwise_kernel
from rows import Job, Work, relative_error
from sanitize import BLOCKS, SHAPES
from shapes import Product
from torch import Tensor, nn

import effnet_ops
from effnet_ops import backends
from effnet_ops.cli import check
from effnet_ops.cli.cases import Case, all_cases

PRODUCTS = (Product(16, 96, 15), Product(96, 24, 15), Product(240, 40, 7), Product(13, 37, 9))
"""Expansions and projections, with and without whole 16-byte vectors."""
DIRECTIONS = ("forward", "gradients")
IMAGES = 4
BLOCK_ROUNDINGS = 3


def backends_here(scale: Scale) -> list[str]:
    return gpu_backends(scale) or ["cpu"]


def functions(scale: Scale) -> Iterator[tuple[Job, Callable[[], object]]]:
    """The public functions: each row, and the call of it that only launches."""
    for backend in backends_here(scale):
        lacks = backends.BACKENDS[backend].lacks
        cases = [case for case in all_cases(seed=0) if not lacks(case.word.partition(",")[0], None)]
        for dtype in DTYPES:
            for number, case in enumerate(cases):
                for layout in FORMATS:
                    for direction in DIRECTIONS:
                        yield _function(scale, case, number, backend, dtype, layout, direction)


def _function(
    scale: Scale, case: Case, number: int, backend: str, dtype: str, layout: str, direction: str
) -> tuple[Job, Callable[[], object]]:
    def given() -> dict[str, Tensor]:
        cast = check.cast
        return {n: cast(v, n, scale.device, DTYPES[dtype], FORMATS[layout]) for n, v in case.inputs.items()}

    def results(inputs: dict[str, Tensor], backend: str) -> list[Tensor]:
        with effnet_ops.use_backend(backend):
            if direction == "forward":
                return [case.function(inputs).detach()]
            with torch.enable_grad():
                return check.differentiate(case.function, inputs, DTYPES[dtype])[1:]

    def error() -> float:
        inputs = given()
        exact = results({name: value.double() for name, value in inputs.items()}, "reference")
        # The first call is recorded, and the second launches that.
        results(given(), backend)
        return max(relative_error(*pair) for pair in zip(results(inputs, backend), exact, strict=True))

    bound = check.BOUNDS[DTYPES[dtype]]
    allowed = bound.forward if direction == "forward" else bound.gradient
    if "mbconv" in case.word and dtype != "fp32":
        # A block rounds three results and three gradients on its way (tests/helpers.py: mbconv_bounds).
        allowed *= BLOCK_ROUNDINGS
    shape = f"case {number} {layout}"
    work = Work(None, error=error, allowed=allowed)
    job = Job("smoke", case.word, f"{OURS} {backend}", shape, dtype, direction, lambda: work)
    return job, lambda: results(given(), backend)


def kernels(scale: Scale) -> Iterator[tuple[Job, Callable[[], object]]]:
    """The kernels with their prologues and epilogues, checked as the rows of their times are."""
    few = scale._replace(batch=IMAGES)
    for backend in gpu_backends(scale):
        for shape in SHAPES:
            for mode in ("forward", "backward"):
                yield _kernel("depthwise", backend, str(shape), mode, depthwise_kernel, (few, shape, mode, backend))
        for block in BLOCKS:
            yield _kernel("mbconv", backend, str(block), "inference", block_kernel, (few, block, backend))
    if "triton" in gpu_backends(scale):
        for product in PRODUCTS:
            for mode in ("forward", "input gradient", "weight gradient", "both gradients"):
                yield _kernel("pointwise", "triton", str(product), mode, pointwise_kernel, (few, product, mode))


def _kernel(
    operation: str, backend: str, shape: str, mode: str, make: Callable[..., Work], arguments: tuple[object, ...]
) -> tuple[Job, Callable[[], object]]:
    def prepare() -> Work:
        return Work(None, error=make(*arguments).error, allowed=KERNEL_TOLERANCE)

    job = Job("smoke", f"fused {operation}", f"{OURS} {backend}", f"{IMAGES}x{shape}", "bf16", mode, prepare)
    return job, lambda: make(*arguments).run()


def network(scale: Scale) -> Iterator[Job]:
    """B0 in fp32 after `replace_layers`: its errors over the stock network's, which may be 2 at most."""
    for mode in ("forward", "step"):

        def prepare(mode: str = mode) -> Work:
            return Work(None, error=lambda: _times_stocks_error(scale, mode), allowed=2.0)

        yield Job("smoke", "efficientnet_b0", f"{OURS} replace_layers", "4x3x96x96", "fp32", mode, prepare)


def _stock(device: str, mode: str) -> tuple[nn.Module, Tensor]:
    """B0 as timm builds it, and images."""
    torch.manual_seed(0)
    model = timm.create_model("efficientnet_b0", drop_rate=0.0).to(device, memory_format=torch.channels_last)
    x = torch.randn(IMAGES, 3, 96, 96, device=device).contiguous(memory_format=torch.channels_last)
    return model.train(mode == "step"), x


def _times_stocks_error(scale: Scale, mode: str) -> float:
    stock, x = _stock(scale.device, mode)
    ours, exact = copy.deepcopy(stock), copy.deepcopy(stock).double()
    effnet_ops.replace_layers(ours)
    # The first call of ours is recorded, and the second launches that.
    reference, theirs, _, found = (_outcome(model, x, mode) for model in (exact, stock, ours, ours))
    floor = 2e-6 if mode == "forward" else 2e-5
    return relative_error(found, reference) / max(relative_error(theirs, reference), floor)


def _outcome(model: nn.Module, x: Tensor, mode: str) -> Tensor:
    """The logits, or all gradients of a training step."""
    dtype = next(model.parameters()).dtype
    # In fp64 cuDNN would try out each of its algorithms for seconds.
    cudnn = torch.backends.cudnn.flags(enabled=dtype is not torch.float64, allow_tf32=False)
    with torch.set_grad_enabled(mode == "step"), cudnn:
        y = model(x.to(dtype))
        if mode == "forward":
            return y
        gradients = torch.autograd.grad(y.square().mean(), list(model.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


def smoke(scale: Scale) -> Iterator[Job]:
    yield from (job for job, _ in kernels(scale))
    yield from (job for job, _ in functions(scale))
    yield from network(scale)


def launches(scale: Scale) -> Iterator[tuple[str, Callable[[], object]]]:
    """What `smoke` launches on Triton kernels, by the keys of the rows: for `precompile.py`."""
    for job, call in (*kernels(scale), *functions(scale)):
        if job.provider == f"{OURS} triton":
            yield job.key, call
    for mode in ("forward", "step"):
        yield f"network {mode}", lambda mode=mode: _launch_network(scale, mode)


def _launch_network(scale: Scale, mode: str) -> None:
    model, x = _stock(scale.device, mode)
    effnet_ops.replace_layers(model)
    _outcome(model, x, mode)


if __name__ == "__main__":
    sys.exit(run_parts({"smoke": smoke}, __doc__))
