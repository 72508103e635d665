"""What replace_layers and optimize_for_inference do to a model, and whether its results stay: `examine`.

Right or wrong is decided in fp64, where a step that is left out or done twice cannot hide behind rounding; errors in
fp32 are given beside the stock model's own.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from effnet_ops.surgery import optimize_for_inference, replace_layers, restore_layers

MOST_DIFFERENCE = 1e-6
"""Allowed in fp64, relative to the norm; the slope of PyTorch's hard sigmoid is rounded to fp32 there, too."""
Report = Callable[[str], object]


@dataclass
class Examination:
    """What was found: numbers of layers by kind, reasons, and errors as ||y - y64|| / ||y64||.

    ``fp64`` are differences of the replaced from the stock model, both in fp64; ``ours`` and ``stock`` errors in fp32.
    """

    found: dict[str, int] = field(default_factory=dict)
    replaced: dict[str, int] = field(default_factory=dict)
    layers: list[tuple[str, str, str]] = field(default_factory=list)
    """Name, kind, and the reason why it was left, "" if it was replaced."""
    optimized: str = ""
    fp64: dict[str, float] = field(default_factory=dict)
    ours: dict[str, float] = field(default_factory=dict)
    stock: dict[str, float] = field(default_factory=dict)
    restored: bool = False

    def reasons(self) -> dict[str, int]:
        """How many layers were left for each reason."""
        counts: dict[str, int] = {}
        for _, _, reason in self.layers:
            if reason:
                counts[reason] = counts.get(reason, 0) + 1
        return counts

    def wrong(self) -> list[str]:
        """What disagrees; empty if nothing does."""
        wrong = [f"{key}: {value:.1e} in fp64" for key, value in self.fp64.items() if not value <= MOST_DIFFERENCE]
        return wrong + ([] if self.restored else ["restore_layers does not give the model back bit for bit"])


def examine(model: nn.Module, x: Tensor, report: Report = lambda what: None) -> Examination:
    """Compare ``model``, on the CPU in fp32, with itself after the replacement, on the images x."""
    found = Examination()
    model = model.eval()
    report("replacing")
    ours, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    _note_layers(found, replace_layers(ours))
    report("evaluating")
    ours64 = copy.deepcopy(exact)
    replace_layers(ours64)
    truth, y, stock = _evaluate(exact, x.double()), _evaluate(ours, x), _evaluate(model, x)
    found.ours["evaluation"], found.stock["evaluation"] = difference(y, truth), difference(stock, truth)
    found.fp64["evaluation"] = difference(_evaluate(ours64, x.double()), truth)
    report("optimizing")
    optimized = optimize_for_inference(exact)
    found.optimized = str(optimized.optimization_report).splitlines()[0]
    found.fp64["optimized"] = difference(_evaluate(optimized, x.double()), truth)
    del optimized
    report("training")
    steps = {name: _step(m, x.to(t)) for name, m, t in _twins(model, ours, exact, ours64)}
    for key in ("training", "gradients", "statistics"):
        truth = steps["exact"][key]
        found.fp64[key] = difference(steps["ours64"][key], truth)
        found.ours[key], found.stock[key] = (
            difference(steps["ours"][key], truth),
            difference(steps["stock"][key], truth),
        )
    report("restoring")
    restore_layers(ours)
    ours.load_state_dict(model.state_dict())
    same = [type(m) for m in ours.modules()] == [type(m) for m in model.modules()]
    pairs = zip(_evaluate(ours, x), _evaluate(model, x), strict=True)
    found.restored = same and all(torch.equal(a, b) for a, b in pairs)
    return found


def _twins(*models: nn.Module) -> Iterator[tuple[str, nn.Module, torch.dtype]]:
    for i, (name, model) in enumerate(zip(("stock", "ours", "exact", "ours64"), models, strict=True)):
        yield name, model if i else copy.deepcopy(model), torch.float64 if i > 1 else torch.float32


def _note_layers(found: Examination, report: Any) -> None:
    for name, kind in report.kinds.items():
        reason = report.skipped.get(name, "")
        found.layers.append((name, kind, reason))
        found.found[kind] = found.found.get(kind, 0) + 1
        found.replaced[kind] = found.replaced.get(kind, 0) + (not reason)


def _evaluate(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(tensors_in(model.eval()(x)))


def _step(model: nn.Module, x: Tensor) -> dict[str, list[Tensor]]:
    """What a training step makes: outputs, gradients, running statistics; dropout draws the same in each model.

    A normalisation of a single pixel cannot train: then the batch is one image more.
    """
    state = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(0)
    model.train().zero_grad(set_to_none=True)
    outputs = list(tensors_in(model(x)))
    sum((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() for y in outputs).backward()
    gradients = [p.grad.detach().clone() for p in model.parameters() if p.grad is not None]
    statistics = [b.detach().clone() for b in model.buffers() if b.is_floating_point()]
    model.zero_grad(set_to_none=True)
    model.load_state_dict(state)
    model.eval()
    return {"training": [y.detach() for y in outputs], "gradients": gradients, "statistics": statistics}


def difference(found: list[Tensor], truth: list[Tensor]) -> float:
    """||found - truth|| / ||truth|| over all tensors; infinite where their number or a shape differs."""
    if [y.shape for y in found] != [y.shape for y in truth]:
        return float("inf")
    apart = sum((a.double() - b.double()).square().sum().item() for a, b in zip(found, truth, strict=True))
    return (apart / max(sum(b.double().square().sum().item() for b in truth), 1e-300)) ** 0.5


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in a model's output, whatever nest it is."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value):
        for entry in dataclasses.fields(value):
            yield from tensors_in(getattr(value, entry.name))
