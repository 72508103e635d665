"""What FLOP counters say of EfficientNet-B0 at 224x224: the table of docs/counters.md.

Measures with the counters that are installed; all of them:

    pip install thop ptflops torchinfo fvcore torchprofile calflops accelerate transformers
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import logging
import warnings
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import effnet_ops

Counter = Callable[[nn.Module, Tensor], float]
KINDS = ("stock", "replaced", "optimized", "ours")


def flop_counter(model: nn.Module, x: Tensor) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() / 2


def training_step(model: nn.Module, x: Tensor) -> float:
    with FlopCounterMode(display=False) as counter:
        model.train()(x).sum().backward()
    return counter.get_total_flops() / 2


def thop(model: nn.Module, x: Tensor) -> float:
    return importlib.import_module("thop").profile(model, (x,), verbose=False)[0]


def ptflops(backend: str) -> Counter:
    def count(model: nn.Module, x: Tensor) -> float:
        function = importlib.import_module("ptflops").get_model_complexity_info
        size = tuple(x.shape[1:])
        return function(model, size, as_strings=False, print_per_layer_stat=False, backend=backend)[0]

    return count


def torchinfo(model: nn.Module, x: Tensor) -> float:
    return importlib.import_module("torchinfo").summary(model, input_data=x, verbose=0).total_mult_adds


def fvcore(model: nn.Module, x: Tensor) -> float:
    return importlib.import_module("fvcore.nn").FlopCountAnalysis(model, x).total()


def torchprofile(model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return importlib.import_module("torchprofile").profile_macs(model, x)


def calflops(model: nn.Module, x: Tensor) -> float:
    function = importlib.import_module("calflops").calculate_flops
    return function(model, input_shape=tuple(x.shape), print_results=False, output_as_string=False)[1]


COUNTERS: dict[str, tuple[str, Counter]] = {
    "torch.utils.flop_counter": ("torch", flop_counter),
    "the same, training step": ("torch", training_step),
    "thop": ("thop", thop),
    "ptflops, backend pytorch": ("ptflops", ptflops("pytorch")),
    "ptflops, backend aten": ("ptflops", ptflops("aten")),
    "torchinfo": ("torchinfo", torchinfo),
    "fvcore": ("fvcore", fvcore),
    "torchprofile": ("torchprofile", torchprofile),
    "calflops": ("calflops", calflops),
}


def build(name: str, kind: str) -> nn.Module:
    if kind == "ours":
        return effnet_ops.create_model(name).eval()
    model = timm.create_model(name).eval()
    if kind == "replaced":
        effnet_ops.replace_layers(model)
    return effnet_ops.optimize_for_inference(model) if kind == "optimized" else model


def say(package: str, counter: Counter, name: str, kind: str, backend: str | None) -> str:
    """Millions of multiply-adds, or what is raised."""
    on_backend = effnet_ops.use_backend(backend) if backend else contextlib.nullcontext()
    silence = io.StringIO()
    try:
        importlib.metadata.version(package)
        with on_backend, contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            found = counter(build(name, kind), torch.randn(1, 3, 224, 224))
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    except Exception as error:  # whatever a counter raises is what the table says of it
        return type(error).__name__
    return f"{found / 1e6:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", help="run on this one, such as reference; by default the automatic choice")
    parser.add_argument("--models", default="efficientnet_b0,tf_efficientnet_b0")
    parser.add_argument("--counters", help="only those whose name has this in it", default="")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    for name in arguments.models.split(","):
        print(f"\n| {name} | {' | '.join(KINDS)} |\n|---|{'---|' * len(KINDS)}")
        for title, (package, counter) in COUNTERS.items():
            if arguments.counters in title:
                cells = [say(package, counter, name, kind, arguments.backend) for kind in KINDS]
                print(f"| {title} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
