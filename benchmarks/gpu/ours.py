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

import fp64
import timm
import torch
import torch.nn.functional as F
from baselines import (
    DTYPES,
    FORMATS,
    TOLERANCE,
    Scale,
    in_double,
    kernel_times,
    memory_of,
    passes,
    profile_job,
    run_parts,
    step_of,
)
from rows import Job, Work, relative_error
from shapes import RESOLUTIONS, Block, Depthwise, Product, layers, whole_blocks
from torch import Tensor, nn

import effnet_ops

OURS = "effnet_ops"
KERNEL_TOLERANCE = TOLERANCE[torch.bfloat16]
CHECKED = 4
"""Images of a batch that are compared with fp64."""
WITH_BOTH = ("depthwise", "squeeze_excite")
Function = Callable[..., Tensor]


def nchw(x: Tensor) -> Tensor:
    """The (N, C, H, W) view of x (N, H, W, C): channels_last."""
    return x.permute(0, 3, 1, 2)


def gpu_backends(scale: Scale) -> list[str]:
    """Whose kernels can be measured: on the CPU only Triton's, interpreted."""
    if scale.device == "cpu":
        return ["triton"] if effnet_ops.backends.INTERPRETED else []
    available = effnet_ops.available_backends()
    return [name for name in ("cuda", "triton") if not available[name]]


def depthwise_shapes(scale: Scale) -> list[Depthwise]:
    """The distinct depthwise convolutions of B0 and B4."""
    names = ("efficientnet_b0", "efficientnet_b4")
    return list(dict.fromkeys(s for name in names for s in layers(name, scale.resolution[name]).depthwise))[
        : scale.most_layers
    ]


def kernels(scale: Scale) -> Iterator[Job]:
    """Single launches with all that a block fuses into them; bytes are those of docs/triton.md."""
    for backend in gpu_backends(scale):
        provider = f"{OURS} {backend}"
        for shape in depthwise_shapes(scale):
            for mode in ("forward", "backward"):
                yield _kernel_job(
                    scale,
                    "depthwise",
                    provider,
                    str(shape),
                    mode,
                    lambda s=shape, m=mode, b=backend: depthwise_kernel(scale, s, m, b),
                )
        # On the CPU, where they are interpreted, one is enough.
        most = 1 if scale.device == "cpu" else None
        for block in layers("efficientnet_b0", scale.resolution["efficientnet_b0"]).expanding[:most]:
            yield _kernel_job(
                scale, "mbconv", provider, str(block), "inference", lambda s=block, b=backend: block_kernel(scale, s, b)
            )
    if "triton" in gpu_backends(scale):
        products = layers("efficientnet_b0", scale.resolution["efficientnet_b0"]).products
        for shape in products[: scale.most_layers]:
            both = ("both gradients",) if _both_fit(scale, shape) else ()
            for mode in ("forward", "input gradient", "weight gradient", *both):
                yield _kernel_job(
                    scale,
                    "pointwise",
                    f"{OURS} triton",
                    str(shape),
                    mode,
                    lambda s=shape, m=mode: pointwise_kernel(scale, s, m),
                )


def _kernel_job(scale: Scale, operation: str, provider: str, shape: str, mode: str, prepare: Callable[[], Work]) -> Job:
    return Job("kernels", operation, provider, f"{scale.batch}x{shape}", "bf16", mode, prepare)


def _random(scale: Scale, *size: int) -> Tensor:
    return torch.randn(size, device=scale.device).bfloat16()


def _in_turn(scale: Scale, two: Tensor) -> Tensor:
    """A batch in which two images alternate: what is summed over it is known from these two."""
    return two[torch.arange(scale.batch, device=scale.device) % len(two)]


def _vectors(scale: Scale, rows: int, channels: int) -> Tensor:
    return torch.rand(rows, channels, device=scale.device) + 0.5


def depthwise_kernel(scale: Scale, shape: Depthwise, mode: str, backend: str) -> Work:
    """A block's depthwise kernel in training: F2, or B4 with all that goes before and behind it."""
    from effnet_ops.checks import output_size, resolve_padding
    from effnet_ops.kernels import depthwise

    batch, c, side = scale.batch, shape.channels, shape.size
    window = dict(stride=(shape.stride,) * 2, dilation=(1, 1))
    window["padding"] = resolve_padding((), (side, side), (shape.kernel,) * 2, *window.values())
    x, norm = _in_turn(scale, _random(scale, 2, side, side, c)), _vectors(scale, 3, c)
    weight = torch.randn(c, 1, shape.kernel, shape.kernel, device=scale.device)
    size = output_size((side, side), (shape.kernel,) * 2, window["stride"], window["padding"], (1, 1))
    pixels, flops = side * side + size[0] * size[1], 2 * batch * c * size[0] * size[1] * shape.kernel**2
    operators, place = torch.ops.effnet_ops, (shape.stride, window["padding"])
    if mode == "forward":

        def forward() -> object:
            if backend == "cuda":
                fused = (None, norm, None, None, None)
                return operators.cuda_depthwise_forward(nchw(x), weight, *fused, *place, "silu", "none", False, True)
            return depthwise.forward(x, weight, **window, norm=norm, activation="silu", statistics=True)

        def error() -> float:
            y, _, partials = forward()
            y = y.permute(0, 2, 3, 1) if backend == "cuda" else y
            expected = fp64.convolved(F.silu(fp64.norm(x[:2], norm)), weight, window)
            return fp64.error([y[:2], *fp64.merged(partials)], [expected, *fp64.moments(expected)])

        return Work(forward, bytes=2 * batch * c * pixels, flops=flops, error=error, allowed=KERNEL_TOLERANCE)
    grad, a = (_in_turn(scale, _random(scale, 2, *size, c)) for _ in range(2))
    gate, pooled = (_in_turn(scale, torch.rand(2, c, device=scale.device)) for _ in range(2))
    coefficients = _vectors(scale, 4, c)
    # One mean a channel: the coefficients repeat that of the normalisation whose backward they are.
    coefficients[0] = norm[0]

    def backward() -> object:
        if backend == "cuda":
            fused = (None, nchw(a), norm, coefficients, gate, pooled, norm, None)
            return operators.cuda_depthwise_backward(
                nchw(grad), nchw(x), weight, *fused, nchw(x), *place, "silu", "silu", [True, True, False]
            )
        return depthwise.backward(
            grad, x, weight, **window, coefficients=coefficients, a=a, a_norm=norm, a_activation="silu",
            gate=gate, pooled=pooled, norm=norm, activation="silu", size=(side, side), needs=(True, True, False),
        )  # fmt: skip

    def backward_error() -> float:
        dx, dw, _, sums = backward()
        dx = dx.permute(0, 2, 3, 1) if backend == "cuda" else dx
        gated = grad[:2] * fp64.of_image(gate[:2], a) + fp64.of_image(pooled[:2], a)
        g = fp64.norm_gradient(fp64.slope(a[:2], norm, gated), a[:2], coefficients)
        expected, *totals = fp64.convolution_gradients(g, x[:2], norm, weight, window)
        return fp64.error([dx[:2], dw, sums.sum(0)], [expected, *(batch / 2 * total for total in totals)])

    return Work(backward, bytes=4 * batch * c * pixels, flops=2 * flops, error=backward_error, allowed=KERNEL_TOLERANCE)


def _doubled(group: Any) -> Any:
    """A group of a block's parameters in fp64."""
    return group._make(value.double() if isinstance(value, Tensor) else value for value in group)


def block_kernel(scale: Scale, shape: Block, backend: str) -> Work:
    """A block in inference with its normalisations folded: all its launches. Bytes are those of two passes over u2."""
    c, side, out = shape.expanded, -(-shape.size // shape.stride), shape.channels_out
    x = _in_turn(scale, _random(scale, 2, shape.channels_in, shape.size, shape.size))
    x = x.contiguous(memory_format=torch.channels_last)

    def conv(*size: int) -> effnet_ops.ConvNormParams:
        weight = torch.randn(size, device=scale.device) / (size[1] * size[2] * size[3]) ** 0.5
        return effnet_ops.ConvNormParams(weight, torch.randn(size[0], device=scale.device) * 0.2)

    gate = ((shape.reduced, c, 1, 1), (shape.reduced,), (c, shape.reduced, 1, 1), (c,))
    groups = (
        conv(c, shape.channels_in, 1, 1),
        conv(c, 1, shape.kernel, shape.kernel),
        effnet_ops.SqueezeExciteParams(*(torch.randn(size, device=scale.device) / size[0] ** 0.5 for size in gate)),
        conv(out, c, 1, 1),
    )
    residual = shape.stride == 1 and shape.channels_in == out
    settings = dict(stride=shape.stride, padding="same", residual=residual, training=False)

    def run() -> Tensor:
        with torch.no_grad(), effnet_ops.use_backend(backend):
            return effnet_ops.mbconv(x, *groups, **settings)

    def error() -> float:
        with torch.no_grad(), effnet_ops.use_backend("reference"):
            exact = effnet_ops.mbconv(x[:2].double(), *map(_doubled, groups), **settings)
        return fp64.error([run()[:2]], [exact])

    pixels, made = shape.size**2, side**2
    moved = 2 * scale.batch * (pixels * shape.channels_in * (1 + residual) + made * (2 * c + out))
    flops = 2 * scale.batch * c * (pixels * shape.channels_in + made * (shape.kernel**2 + out))
    return Work(run, bytes=moved, flops=flops, error=error, allowed=KERNEL_TOLERANCE)


def plain(scale: Scale) -> Iterator[Job]:
    """Plain depthwise convolutions of B0 and B4, beside cuDNN's in the same part of the baselines."""
    backends_here = ["cpu"] if scale.device == "cpu" else gpu_backends(scale)
    for dtype in DTYPES:
        for backend in backends_here:
            for layout in ("channels_last", "contiguous"):
                for shape in depthwise_shapes(scale):
                    for mode in ("forward", "both gradients"):
                        yield _plain_job(scale, shape, dtype, layout, backend, mode)


def _plain_job(scale: Scale, shape: Depthwise, dtype: str, layout: str, backend: str, mode: str) -> Job:
    def prepare() -> Work:
        two = torch.randn(2, shape.channels, shape.size, shape.size, device=scale.device).to(DTYPES[dtype])
        x = _in_turn(scale, two).contiguous(memory_format=FORMATS[layout])
        weight = torch.randn(shape.channels, 1, shape.kernel, shape.kernel, device=scale.device)
        settings = dict(stride=shape.stride, padding=shape.kernel // 2)

        def forward(x: Tensor, weight: Tensor) -> Tensor:
            with effnet_ops.use_backend(backend):
                return effnet_ops.depthwise_conv2d(x, weight, **settings)

        leaves = [value.detach().requires_grad_() for value in (x, weight)]
        y = forward(*leaves)
        grad, both = _in_turn(scale, torch.randn_like(y[:2])), mode == "both gradients"
        grad = grad.contiguous(memory_format=FORMATS[layout])

        def error() -> float:
            exact = [value.detach().double().requires_grad_() for value in (two, weight)]
            with torch.backends.cudnn.flags(enabled=False):
                expected = F.conv2d(*exact, **settings, groups=shape.channels)
                if not both:
                    return relative_error(y[:2].detach(), expected.detach())
                dx, dw = torch.autograd.grad(expected, exact, grad[:2].to(expected))
            found = torch.autograd.grad(y, leaves, grad, retain_graph=True)
            return max(relative_error(found[0][:2], dx), relative_error(found[1], scale.batch / 2 * dw))

        moved = ((2 if both else 1) * x.numel() + y.numel()) * x.element_size()
        run = torch.no_grad()(lambda: forward(x, weight))
        if both:
            run = lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)  # noqa: E731
        flops = (1 + both) * 2 * y.numel() * shape.kernel**2
        return Work(run, bytes=moved, flops=flops, error=error, allowed=TOLERANCE[DTYPES[dtype]])

    return Job("depthwise", "depthwise", f"{OURS} {backend} {layout}", f"{scale.batch}x{shape}", dtype, mode, prepare)


def _both_fit(scale: Scale, shape: Product) -> bool:
    """Whether a block makes both gradients of the product in one launch."""
    from effnet_ops.kernels import pointwise

    number = torch.empty(1, dtype=torch.bfloat16, device=scale.device)
    grad, weight = number.expand(scale.batch, shape.size**2, shape.channels_out), number.expand(*shape[1::-1])
    projects = shape.channels_in > shape.channels_out
    return pointwise.both_fit(grad, weight, of_image=projects, per_image=projects, normalised=projects)


def pointwise_kernel(scale: Scale, shape: Product, mode: str) -> Work:
    """A block's product in training: an expansion if it widens, else a projection; they carry different neighbours."""
    from effnet_ops.kernels import pointwise

    c_in, c_out, pixels, batch = shape.channels_in, shape.channels_out, shape.size**2, scale.batch
    projects = c_in > c_out
    x, grad, a = (_in_turn(scale, _random(scale, 2, pixels, channels)) for channels in (c_in, c_out, c_out))
    weight = torch.randn(c_out, c_in, device=scale.device) / c_in**0.5
    gate = _in_turn(scale, torch.rand(2, c_in, device=scale.device))
    image_scale = _in_turn(scale, torch.rand(2, device=scale.device) + 0.5)
    norm, coefficients = _vectors(scale, 3, c_in), _vectors(scale, 4, c_out)
    before: dict[str, Any] = dict(norm=norm, activation="silu", gate=gate) if projects else {}
    behind: dict[str, Any] = dict(coefficients=coefficients, a=a)
    if projects:
        behind["image_scale"] = image_scale
    through = pointwise.Through(x, norm, "silu", True) if projects else None

    def forward() -> object:
        return pointwise.forward(x, weight, **before, statistics=True)

    def input_gradient() -> object:
        return pointwise.input_gradient(grad, weight, **behind, through=through)

    def weight_gradient() -> object:
        return pointwise.weight_gradient(grad, x, weight, **behind, **before)

    def both_gradients() -> object:
        if pointwise.both_fit(grad, weight, of_image=projects, per_image=projects, normalised=projects):
            return pointwise.both_gradients(grad, x, weight, **behind, **before)
        return input_gradient()[0], weight_gradient()[0]

    run, channels = {
        "forward": (forward, c_in + c_out),
        "input gradient": (input_gradient, 2 * c_out + (2 if projects else 1) * c_in),
        "weight gradient": (weight_gradient, 2 * c_out + c_in),
        "both gradients": (both_gradients, 2 * c_out + 2 * c_in),
    }[mode]

    def error() -> float:
        found, z, g = run(), x[:2].double(), grad[:2].double()
        if projects:
            z, g = F.silu(fp64.norm(z, norm)) * fp64.of_image(gate[:2], z), g * image_scale[:2, None, None].double()
        if mode == "forward":
            y = z @ weight.double().T
            return fp64.error([found[0][:2], *fp64.merged(found[1])], [y, *fp64.moments(y)])
        g = fp64.norm_gradient(g, a[:2], coefficients)
        dw = batch / 2 * torch.einsum("npo,npi->oi", g, z)
        if mode == "weight gradient":
            return fp64.error(found[:1], [dw])
        dx = g @ weight.double()
        expected, made = [dx], [found[0][:2]]
        if mode == "both gradients":
            expected, made = [*expected, dw], [*made, found[1]]
        if projects and found[-1].dim() == 4:
            expected, made = [*expected, fp64.gate_sums(dx, x[:2], norm)], [*made, found[-1][:2].sum(1)]
        return fp64.error(made, expected)

    products = 2 if mode == "both gradients" else 1
    flops = products * 2 * batch * pixels * c_in * c_out
    return Work(run, bytes=2 * batch * pixels * channels, flops=flops, error=error, allowed=KERNEL_TOLERANCE)


def operations(scale: Scale) -> Iterator[Job]:
    """The public functions on B0's layers, forward and with gradients, beside eager in both layouts and compiled."""
    found = layers("efficientnet_b0", scale.resolution["efficientnet_b0"])
    for s in depthwise_shapes(scale):
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
    # Our default is one of these two: both, so that the default can be chosen by what was measured.
    if operation in WITH_BOTH:
        for backend in gpu_backends(scale) if scale.device == "cuda" else []:
            providers.append((f"{OURS} {backend}", "channels_last", effnet_ops.use_backend(backend)(ours)))
    providers += [(f"{mode} channels_last", "channels_last", stock) for mode in scale.compile_modes]
    for provider, layout, function in providers:
        for mode in ("forward", "backward", "step"):

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
    y = run(*leaves)
    grad = torch.randn_like(y)
    if mode == "backward":
        return Work(lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True))
    return Work(lambda: torch.autograd.grad(run(*leaves), leaves, grad))


def blocks(scale: Scale) -> Iterator[Job]:
    """Whole MBConv blocks of B0 and Fused-MBConv blocks of V2-B0 after replace_layers."""
    for label, network, path, channels, side in whole_blocks(scale.resolution, scale.most_layers):
        for mode in ("forward", "step"):

            def prepare(
                network: str = network, path: str = path, channels: int = channels, side: int = side, mode: str = mode
            ) -> Work:
                torch.manual_seed(0)
                model = timm.create_model(network).to(scale.device, memory_format=torch.channels_last)
                stock = copy.deepcopy(model.train(mode == "step").get_submodule(path))
                effnet_ops.replace_layers(model)
                x = _random(scale, scale.batch, channels, side, side).contiguous(memory_format=torch.channels_last)
                block = model.get_submodule(path)
                work = step_of(block, x, mode, "eager", "bf16")
                # A copy of the block in fp64 would run on our kernels, too.
                return dataclasses.replace(work, error=(lambda: _error(block, stock, x)) if work.error else None)

            shape = f"{scale.batch}x{channels}x{side}x{side}"
            yield Job("blocks", label, f"{OURS} channels_last", shape, "bf16", mode, prepare)


def networks(scale: Scale) -> Iterator[Job]:
    """Networks after replace_layers, and in inference also after optimize_for_inference, with and without a graph."""
    for name in [n for n in RESOLUTIONS if n != "resnet50"]:
        for mode, batch in passes(scale):
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
            extra=lambda: memory_of(work.run, model if mode == "step" else None, x),
        )

    return Job("networks", name, f"{OURS} {provider}", f"{batch}x3x{side}x{side}", "bf16", mode, prepare, graph)


def _error(model: nn.Module, stock: nn.Module, x: Tensor) -> float:
    """Against the stock network in fp64, on the first images of the whole batch: fewer would run other kernels."""
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16):
        return relative_error(model(x)[:CHECKED], in_double(stock, x[:CHECKED]))


def _inference(model: nn.Module, stock: nn.Module, x: Tensor) -> Work:
    def error() -> float:
        with torch.no_grad():
            return relative_error(model(x)[:CHECKED], in_double(stock, x[:CHECKED]))

    run = torch.no_grad()(lambda: model(x))
    return Work(run, error=error, allowed=2 * TOLERANCE[DTYPES["bf16"]], extra=lambda: memory_of(run, None, x))


def profile(scale: Scale) -> Iterator[Job]:
    """Time a kernel of a training step of B0 after replace_layers, and of inference after optimize_for_inference."""
    yield profile_job(scale, f"{OURS} replace_layers", effnet_ops.replace_layers)
    batch, side = scale.inference_batches[0], scale.resolution["efficientnet_b0"]

    def prepare() -> Work:
        stock = timm.create_model("efficientnet_b0").to(scale.device, memory_format=torch.channels_last).eval()
        model = effnet_ops.optimize_for_inference(stock, dtype=torch.bfloat16)
        x = torch.randn(batch, 3, side, side, device=scale.device).contiguous(memory_format=torch.channels_last)
        run = torch.no_grad()(lambda: model(x))
        return Work(run, extra=lambda: kernel_times(run))

    fields = "efficientnet_b0", f"{OURS} optimize_for_inference", f"{batch}x3x{side}x{side}", "bf16", "forward"
    yield Job("profile", *fields, prepare)


PARTS = {
    "kernels": kernels,
    "depthwise": plain,
    "networks": networks,
    "blocks": blocks,
    "profile": profile,
    "operations": operations,
}


if __name__ == "__main__":
    sys.exit(run_parts(PARTS, __doc__))
