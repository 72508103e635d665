"""This package's kernels, operators, blocks and networks on a GPU, beside eager PyTorch and torch.compile.

python benchmarks/gpu/ours.py                      # at most 9 minutes; run it again to go on where it stopped
python benchmarks/gpu/ours.py --part kernels
python benchmarks/gpu/ours.py --dry-run            # tiny shapes on the CPU, no rows
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import timm
import torch
import torch.nn.functional as F
from baselines import DTYPES, FORMATS, TOLERANCE, Scale, memory_of, run_parts, step_of
from rows import Job, Work, relative_error
from shapes import RESOLUTIONS, layers
from torch import Tensor, nn

import effnet_ops

OURS = "effnet_ops"
Function = Callable[..., Tensor]


def kernels(scale: Scale) -> Iterator[Job]:
    """Single launches with all that a block fuses into them; bytes are those of docs/triton.md."""
    if scale.device == "cuda" or effnet_ops.backends.INTERPRETED:
        found = layers("efficientnet_b0", scale.resolution["efficientnet_b0"])
        for shape in found.depthwise[: scale.most_layers]:
            for mode in ("forward", "backward"):
                yield _kernel_job(scale, "depthwise", str(shape), mode, lambda s=shape, m=mode: _depthwise(scale, s, m))
        for shape in found.products[: scale.most_layers]:
            for mode in ("forward", "input gradient", "weight gradient"):
                yield _kernel_job(scale, "pointwise", str(shape), mode, lambda s=shape, m=mode: _pointwise(scale, s, m))


def _kernel_job(scale: Scale, operation: str, shape: str, mode: str, prepare: Callable[[], Work]) -> Job:
    return Job("kernels", operation, OURS, f"{scale.batch}x{shape}", "bf16", mode, prepare)


def _random(scale: Scale, *size: int) -> Tensor:
    return torch.randn(size, device=scale.device).bfloat16()


def _vectors(scale: Scale, rows: int, channels: int) -> Tensor:
    return torch.rand(rows, channels, device=scale.device) + 0.5


def _depthwise(scale: Scale, shape: Any, mode: str) -> Work:
    from effnet_ops.checks import output_size, resolve_padding
    from effnet_ops.kernels import depthwise

    batch, c, side = scale.batch, shape.channels, shape.size
    window = dict(stride=(shape.stride,) * 2, dilation=(1, 1))
    window["padding"] = resolve_padding((), (side, side), (shape.kernel,) * 2, *window.values())
    x, norm = _random(scale, batch, side, side, c), _vectors(scale, 3, c)
    weight = torch.randn(c, 1, shape.kernel, shape.kernel, device=scale.device)
    size = output_size((side, side), (shape.kernel,) * 2, window["stride"], window["padding"], (1, 1))
    if mode == "forward":

        def forward() -> object:
            return depthwise.forward(x, weight, **window, norm=norm, activation="silu", statistics=True)

        pixels = side * side + size[0] * size[1]
        return Work(forward, bytes=2 * batch * c * pixels, flops=2 * batch * c * size[0] * size[1] * shape.kernel**2)
    grad, a = (_random(scale, batch, *size, c) for _ in range(2))
    gate, pooled = (torch.rand(batch, c, device=scale.device) for _ in range(2))
    coefficients = _vectors(scale, 4, c)

    def backward() -> object:
        return depthwise.backward(
            grad, x, weight, **window, coefficients=coefficients, a=a, a_norm=norm, a_activation="silu",
            gate=gate, pooled=pooled, norm=norm, activation="silu", size=(side, side), needs=(True, True, False),
        )  # fmt: skip

    return Work(backward, bytes=4 * batch * c * (side * side + size[0] * size[1]))


def _pointwise(scale: Scale, shape: Any, mode: str) -> Work:
    """An expansion if the product widens, else a projection: they carry different neighbours."""
    from effnet_ops.kernels import pointwise

    c_in, c_out, pixels, batch = shape.channels_in, shape.channels_out, shape.size**2, scale.batch
    projects = c_in > c_out
    x, grad, a = _random(scale, batch, pixels, c_in), *(_random(scale, batch, pixels, c_out) for _ in range(2))
    weight = torch.randn(c_out, c_in, device=scale.device) / c_in**0.5
    gate, image_scale = torch.rand(batch, c_in, device=scale.device), torch.ones(batch, device=scale.device)
    norm, coefficients = _vectors(scale, 3, c_in), _vectors(scale, 4, c_out)
    before = dict(norm=norm, activation="silu", gate=gate) if projects else {}
    behind: dict[str, Any] = dict(coefficients=coefficients, a=a)
    if projects:
        behind["image_scale"] = image_scale
    elements = batch * pixels
    work = {"flops": 2 * elements * c_in * c_out}
    if mode == "forward":
        return Work(
            lambda: pointwise.forward(x, weight, **before, statistics=True), bytes=2 * elements * (c_in + c_out), **work
        )
    if mode == "weight gradient":
        return Work(
            lambda: pointwise.weight_gradient(grad, x, weight, **behind, **before),
            bytes=2 * elements * (c_in + 2 * c_out),
            **work,
        )
    through = pointwise.Through(x, norm, "silu", True) if projects else None
    return Work(
        lambda: pointwise.input_gradient(grad, weight, **behind, through=through),
        bytes=2 * elements * (2 * c_out + (2 if projects else 1) * c_in),
        **work,
    )


def operations(scale: Scale) -> Iterator[Job]:
    """The public functions on B0's layers, forward and with gradients, beside eager in both layouts and compiled."""
    found = layers("efficientnet_b0", scale.resolution["efficientnet_b0"])
    for s in found.depthwise[: scale.most_layers]:
        weights = ((s.channels, 1, s.kernel, s.kernel), (s.channels,))
        settings = dict(stride=s.stride, padding=s.kernel // 2)

        def ours(x: Tensor, w: Tensor, b: Tensor, settings: dict[str, int] = settings) -> Tensor:
            return effnet_ops.depthwise_conv2d(x, w, b, **settings, activation="silu")

        def stock(x: Tensor, w: Tensor, b: Tensor, settings: dict[str, int] = settings) -> Tensor:
            return F.silu(F.conv2d(x, w.to(x.dtype), b.to(x.dtype), **settings, groups=x.shape[1]))

        yield from _operation_jobs(scale, "depthwise", str(s), (s.channels, s.size), weights, ours, stock)
    for p in found.products[: scale.most_layers]:
        weights = ((p.channels_out, p.channels_in, 1, 1), (p.channels_out,))
        yield from _operation_jobs(
            scale, "pointwise", str(p), (p.channels_in, p.size), weights,
            lambda x, w, b: effnet_ops.pointwise_conv2d(x, w, b, activation="silu"),
            lambda x, w, b: F.silu(F.conv2d(x, w.to(x.dtype), b.to(x.dtype))),
        )  # fmt: skip
    for channels, side, reduced in ((96, 56, 4), (144, 56, 6), (480, 14, 20), (1152, 7, 48)):
        side = min(side, 4) if scale.device == "cpu" else side
        weights = ((reduced, channels, 1, 1), (reduced,), (channels, reduced, 1, 1), (channels,))
        shape = f"{channels}x{side}x{side} r{reduced}"
        yield from _operation_jobs(
            scale, "squeeze_excite", shape, (channels, side), weights, effnet_ops.squeeze_excite, _stock_squeeze_excite
        )


def _stock_squeeze_excite(x: Tensor, rw: Tensor, rb: Tensor, ew: Tensor, eb: Tensor) -> Tensor:
    rw, rb, ew, eb = (p.to(x.dtype) for p in (rw, rb, ew, eb))
    hidden = F.silu(F.conv2d(x.mean((2, 3), keepdim=True), rw, rb))
    return x * torch.sigmoid(F.conv2d(hidden, ew, eb))


def _operation_jobs(
    scale: Scale, operation: str, shape: str, size: tuple[int, int], weights: tuple[tuple[int, ...], ...],
    ours: Function, stock: Function,
) -> Iterator[Job]:  # fmt: skip
    providers = [(OURS, "channels_last", ours), *((f"eager {layout}", layout, stock) for layout in FORMATS)]
    providers += [(f"{mode} channels_last", "channels_last", stock) for mode in scale.compile_modes]
    for provider, layout, function in providers:
        for mode in ("forward", "step"):

            def prepare(
                provider: str = provider, layout: str = layout, function: Function = function, mode: str = mode
            ) -> Work:
                return _operation(scale, size, weights, function, stock, provider, layout, mode)

            yield Job("operations", operation, provider, f"{scale.batch}x{shape}", "bf16", mode, prepare)


def _operation(
    scale: Scale, size: tuple[int, int], weights: tuple[tuple[int, ...], ...], function: Function, stock: Function,
    provider: str, layout: str, mode: str,
) -> Work:  # fmt: skip
    torch.manual_seed(0)
    channels, side = size
    x = _random(scale, scale.batch, channels, side, side).contiguous(memory_format=FORMATS[layout])
    parameters = [torch.randn(w, device=scale.device) / max(1, w[-3] if len(w) > 1 else 1) ** 0.5 for w in weights]
    run = function
    if provider.startswith(scale.compile_modes or ("-",)):
        torch._dynamo.reset()
        mode_name = "max-autotune-no-cudagraphs" if provider.startswith("max-autotune") else None
        run = torch.compile(function, mode=mode_name)

    def error() -> float:
        with torch.no_grad():
            return relative_error(run(x, *parameters), stock(x.float(), *parameters))

    if mode == "forward":
        y = torch.no_grad()(run)(x, *parameters)
        moved = (x.numel() + y.numel()) * x.element_size()
        return Work(
            torch.no_grad()(lambda: run(x, *parameters)), bytes=moved, error=error, allowed=TOLERANCE[torch.bfloat16]
        )
    leaves = [value.detach().requires_grad_() for value in (x, *parameters)]
    grad = torch.randn_like(run(*leaves))
    return Work(lambda: torch.autograd.grad(run(*leaves), leaves, grad))


def blocks(scale: Scale) -> Iterator[Job]:
    """Whole MBConv blocks of B0 after replace_layers."""
    for path, channels, side in layers("efficientnet_b0", scale.resolution["efficientnet_b0"]).blocks[
        : scale.most_layers
    ]:
        for mode in ("forward", "step"):

            def prepare(path: str = path, channels: int = channels, side: int = side, mode: str = mode) -> Work:
                torch.manual_seed(0)
                model = timm.create_model("efficientnet_b0").to(scale.device, memory_format=torch.channels_last)
                effnet_ops.replace_layers(model)
                x = _random(scale, scale.batch, channels, side, side).contiguous(memory_format=torch.channels_last)
                return step_of(model.train(mode == "step").get_submodule(path), x, mode, "eager", "bf16")

            shape = f"{scale.batch}x{channels}x{side}x{side}"
            yield Job("blocks", f"block {path}", f"{OURS} channels_last", shape, "bf16", mode, prepare)


def networks(scale: Scale) -> Iterator[Job]:
    """Networks after replace_layers, and in inference also after optimize_for_inference, with and without a graph."""
    for name in [n for n in RESOLUTIONS if n.startswith("efficientnet")]:
        for mode, batches in (("forward", scale.inference_batches), ("step", scale.training_batches)):
            for batch in batches:
                for provider in ("replace_layers", *(["optimize_for_inference"] if mode == "forward" else [])):
                    for graph in (False, True) if scale.device == "cuda" else (False,):
                        yield _network_job(scale, name, mode, batch, provider, graph)


def _network_job(scale: Scale, name: str, mode: str, batch: int, provider: str, graph: bool) -> Job:
    side = scale.resolution[name]

    def prepare() -> Work:
        torch.manual_seed(0)
        stock = timm.create_model(name).to(scale.device, memory_format=torch.channels_last).train(mode == "step")
        x = torch.randn(batch, 3, side, side, device=scale.device).contiguous(memory_format=torch.channels_last)
        model = copy.deepcopy(stock)
        if provider == "optimize_for_inference":
            model = effnet_ops.optimize_for_inference(model, dtype=torch.bfloat16)
            return _inference(model, stock, x)
        effnet_ops.replace_layers(model)
        work = step_of(model, x, mode, "eager", "bf16")
        return dataclasses.replace(
            work,
            error=(lambda: _error(model, stock, x)) if mode == "forward" else None,
            extra=lambda: memory_of(work.run, model, x, mode),
        )

    return Job("networks", name, f"{OURS} {provider}", f"{batch}x3x{side}x{side}", "bf16", mode, prepare, graph)


def _error(model: nn.Module, stock: nn.Module, x: Tensor) -> float:
    """Against the stock network in fp64, on the first images."""
    small = x[: min(len(x), 4)]
    with torch.no_grad():
        exact = copy.deepcopy(stock).double()(small.double())
        with torch.autocast(x.device.type, torch.bfloat16):
            return relative_error(model(small), exact)


def _inference(model: nn.Module, stock: nn.Module, x: Tensor) -> Work:
    def error() -> float:
        small = x[: min(len(x), 4)]
        with torch.no_grad():
            return relative_error(model(small), copy.deepcopy(stock).double()(small.double()))

    return Work(torch.no_grad()(lambda: model(x)), error=error, allowed=2 * TOLERANCE[DTYPES["bf16"]])


PARTS = {"kernels": kernels, "networks": networks, "blocks": blocks, "operations": operations}


if __name__ == "__main__":
    sys.exit(run_parts(PARTS, __doc__))
