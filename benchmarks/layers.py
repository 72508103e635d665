"""Every distinct layer of EfficientNet-B0, ours and eager PyTorch in both memory layouts.

python benchmarks/layers.py                      # writes benchmarks/results/layers.json
python benchmarks/layers.py --seconds 0.2 --operation depthwise --output build/layers.json
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import timm
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timm.layers import SqueezeExcite
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from timm.models._efficientnet_blocks import SqueezeExcite as BlockSqueezeExcite
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import effnet_ops
from effnet_ops.benchmark.gate import Failed, gate, relative_error
from effnet_ops.benchmark.rows import Results, Row, environment
from effnet_ops.benchmark.timing import interleave

RESULTS = Path(__file__).resolve().parent / "results"
OURS, CONTIGUOUS, CHANNELS_LAST = "effnet_ops", "eager contiguous", "eager channels_last"
FORWARD_BOUND, GRADIENT_BOUND = 2e-6, 2e-5
MODES = ("forward", "forward+backward")


class Layer(NamedTuple):
    """A module of the stock model with the size of its input; ``shape`` describes both."""

    operation: str
    shape: str
    module: nn.Module
    size: tuple[int, ...]


class Pointwise(nn.Module):
    """A bare 1x1 convolution through our operator: `replace_layers` takes them as parts of a block only."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return effnet_ops.pointwise_conv2d(x, self.conv.weight, self.conv.bias)


def b0_layers(batch: int) -> list[Layer]:
    """The distinct convolutions, squeeze-and-excitations and blocks of timm's efficientnet_b0 but its stem."""
    model = timm.create_model("efficientnet_b0").eval()
    found: dict[tuple[str, str], Layer] = {}

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        operation, size = _operation(module, inputs[0]), tuple(inputs[0].shape)
        if operation:
            shape = f"{size[1]}x{size[2]}x{size[3]} {_describe(module)}"
            found.setdefault((operation, shape), Layer(operation, shape, copy.deepcopy(module), (batch, *size[1:])))

    handles = [module.register_forward_pre_hook(record) for module in model.modules()]
    with torch.inference_mode():
        model(torch.randn(1, 3, 224, 224))
    for handle in handles:
        handle.remove()
    for layer in found.values():
        for module in layer.module.modules():
            module._forward_pre_hooks.clear()
    return sorted(found.values(), key=lambda layer: layer.operation)


def _operation(module: nn.Module, x: Tensor) -> str:
    if isinstance(module, InvertedResidual | DepthwiseSeparableConv):
        return "mbconv"
    if isinstance(module, SqueezeExcite | BlockSqueezeExcite):
        return "squeeze_excite"
    if isinstance(module, nn.Conv2d) and x.shape[2] > 1:
        if module.groups == module.in_channels > 1:
            return "depthwise"
        if module.kernel_size == (1, 1):
            return "pointwise"
    return ""


def _describe(module: nn.Module) -> str:
    conv = next(m for m in module.modules() if isinstance(m, nn.Conv2d))
    if isinstance(module, nn.Conv2d):
        return f"-> {conv.out_channels}, k{conv.kernel_size[0]} s{conv.stride[0]}"
    if isinstance(module, SqueezeExcite | BlockSqueezeExcite):
        return f"reduced to {conv.out_channels}"
    depthwise, last = module.conv_dw, [m for m in module.modules() if isinstance(m, nn.Conv2d)][-1]
    return f"-> {depthwise.in_channels} -> {last.out_channels}, k{depthwise.kernel_size[0]} s{depthwise.stride[0]}"


def providers(layer: Layer, x: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, tuple[nn.Module, Tensor]]:
    """Each provider's own copy of the layer, and its input in the provider's layout."""
    ours = copy.deepcopy(layer.module)
    if layer.operation == "pointwise":
        ours = Pointwise(ours)
    elif not effnet_ops.replace_layers(ours).replaced:
        raise Failed(f"{layer.operation} {layer.shape}: replace_layers left it as it was")
    copies = {OURS: ours, CONTIGUOUS: copy.deepcopy(layer.module), CHANNELS_LAST: copy.deepcopy(layer.module)}
    formats = {name: torch.contiguous_format if name == CONTIGUOUS else torch.channels_last for name in copies}
    return {
        name: (module.to(dtype, memory_format=formats[name]), x.to(dtype).contiguous(memory_format=formats[name]))
        for name, module in copies.items()
    }


def call(module: nn.Module, x: Tensor, mode: str) -> Callable[[], list[Tensor]]:
    """A function that runs the layer once and returns its output, with gradients after it where the mode has them."""
    if mode == "forward":
        module.eval()
        return torch.inference_mode()(lambda: [module(x)])
    module.train()
    parameters = list(module.parameters())
    grad: list[Tensor] = []

    def step() -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        y = module(leaf)
        if not grad:
            generator = torch.Generator().manual_seed(1)
            grad.append(torch.empty_like(y).copy_(torch.randn(y.shape, generator=generator)))
        return [y.detach(), *torch.autograd.grad(y, [leaf, *parameters], grad[0])]

    return step


def check(layer: Layer, functions: dict[str, Callable[[], list[Tensor]]], exact: list[Tensor]) -> dict[str, float]:
    """Each provider's worst error; ours has to be within the bound, or within twice eager's where that is larger."""
    errors = {
        name: [relative_error(o, e) for o, e in zip(run(), exact, strict=True)] for name, run in functions.items()
    }
    for index, error in enumerate(errors[OURS]):
        bound = FORWARD_BOUND if index == 0 else GRADIENT_BOUND
        gate(f"{layer.operation} {layer.shape}, result {index}", error, max(bound, 2 * errors[CHANNELS_LAST][index]))
    return {name: max(values) for name, values in errors.items()}


def measure(layer: Layer, mode: str, seconds: float) -> Iterator[Row]:
    x = torch.randn(layer.size)
    exact_module, exact_x = copy.deepcopy(layer.module).double(), x.double()
    exact = call(exact_module, exact_x, mode)()
    functions = {name: call(module, value, mode) for name, (module, value) in providers(layer, x).items()}
    errors = check(layer, functions, exact)
    flops, moved = _work(layer, x, exact[0], mode)
    for name, timing in interleave(functions, seconds).items():
        milliseconds = [t * 1e3 for t in (timing.p20, timing.p50, timing.p80)]
        yield Row(
            operation=layer.operation,
            provider=name,
            shape=f"{layer.size[0]}x{layer.shape}",
            dtype="float32",
            mode=mode,
            threads=torch.get_num_threads(),
            p20=milliseconds[0],
            p50=milliseconds[1],
            p80=milliseconds[2],
            repetitions=timing.repetitions,
            error=errors[name],
            bytes=moved,
            gb_per_s=moved / timing.p50 / 1e9,
            flops=flops,
            gflop_per_s=flops / timing.p50 / 1e9,
        )


def _work(layer: Layer, x: Tensor, y: Tensor, mode: str) -> tuple[int, int]:
    """FLOPs, and the bytes of input, output and parameters, each moved once (and once for each gradient)."""
    module = copy.deepcopy(layer.module).eval()
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        module(x)
    parameters = sum(p.numel() for p in module.parameters())
    if mode == "forward":
        return counter.get_total_flops(), 4 * (x.numel() + y.numel() + parameters)
    return 3 * counter.get_total_flops(), 4 * (3 * x.numel() + 2 * y.numel() + 3 * parameters)


def show(rows: list[Row]) -> None:
    table = Table(title="B0's layers: ms (20th to 80th percentile); ratio: the faster eager layout over ours")
    for heading in ("operation", "shape", "mode", OURS, CHANNELS_LAST, CONTIGUOUS, "ratio"):
        table.add_column(heading)
    for group in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        by_provider = {row.provider: row for row in group}
        cells = [_time(by_provider[name]) for name in (OURS, CHANNELS_LAST, CONTIGUOUS)]
        ratio = min(by_provider[CHANNELS_LAST].p50, by_provider[CONTIGUOUS].p50) / by_provider[OURS].p50
        style = "red" if ratio < 1 else ""
        table.add_row(group[0].operation, group[0].shape, group[0].mode, *cells, f"{ratio:.2f}x", style=style)
    Console(width=150).print(table)


def _time(row: Row) -> str:
    return f"{row.p50:.3f} ({row.p20:.3f} to {row.p80:.3f})"


def main(
    batch: int = 8,
    seconds: Annotated[float, typer.Option(help="Time for each layer and mode.")] = 1.0,
    operation: Annotated[str | None, typer.Option(help="depthwise, pointwise, squeeze_excite or mbconv only.")] = None,
    output: Path = RESULTS / "layers.json",
) -> None:
    """Time every distinct layer of EfficientNet-B0; exit code 1 if a result is wrong."""
    torch.manual_seed(0)
    layers = [layer for layer in b0_layers(batch) if operation in (None, layer.operation)]
    jobs = [(layer, mode) for layer in layers for mode in MODES]
    rows: list[Row] = []
    try:
        for layer, mode in track(jobs, "layers"):
            rows += measure(layer, mode, seconds)
    except Failed as error:
        sys.exit(str(error))
    show(rows)
    Results(output).add(rows, environment())


if __name__ == "__main__":
    typer.run(main)
