"""A training step of one model through every way to run it: each in a process of its own, in turn."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effnet_ops
from effnet_ops.benchmark import models
from effnet_ops.benchmark.comparison import FLOOR, PATIENCE, Entrant, Process, Report, Settings, run_name, take_turns
from effnet_ops.benchmark.gate import gate, relative_error
from effnet_ops.benchmark.providers import LAYOUTS
from effnet_ops.benchmark.rows import Row
from effnet_ops.benchmark.worker import PeakMemory, Round, Turns, saved_bytes

CLASSES = 1000


@dataclass(frozen=True)
class Variant:
    """A way to run a training step: the layout of images and weights, ours or stock, compiled or not."""

    name: str
    layout: str
    replaced: bool = False
    compiled: str | None = None
    """The mode of torch.compile."""


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("eager", "contiguous"),
        Variant("eager_channels_last", "channels_last"),
        # Compiled from a contiguous model it is slower than eager channels_last, and no opponent.
        Variant("compile", "channels_last", compiled="default"),
        Variant("compile_max_autotune", "channels_last", compiled="max-autotune-no-cudagraphs"),
        Variant("effnet_ops_replace", "channels_last", replaced=True),
    )
}


class TrainingStep:
    """What a worker builds: a model with its optimizer, images and targets."""

    def __init__(self, variant: Variant, settings: Settings, folder: Path) -> None:
        torch.set_num_threads(settings.threads)
        self._dtype = settings.dtype
        stock = torch.load(folder / "model.pt", weights_only=False)
        self._model = stock.train().to(memory_format=LAYOUTS[variant.layout])
        if variant.replaced:
            effnet_ops.replace_layers(self._model)
        self._x = images(settings).contiguous(memory_format=LAYOUTS[variant.layout])
        self._target = torch.randint(CLASSES, (settings.batch,), generator=torch.Generator().manual_seed(1))
        self._run: Callable[[Tensor], Tensor] = self._model
        if variant.compiled:
            self._run = torch.compile(self._model, mode=variant.compiled, dynamic=False)
        self._first = self._forward().detach().float()
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=1e-4, momentum=0.9)
        self.step()
        self._turns = Turns()

    def _forward(self) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self._dtype == "bfloat16"):
            return self._run(self._x)

    def step(self) -> None:
        """Forward pass, backward pass and update."""
        self._optimizer.zero_grad()
        F.cross_entropy(self._forward().float(), self._target).backward()
        self._optimizer.step()

    def logits(self) -> Tensor:
        """Those of the first forward pass in training mode, before any step."""
        return self._first

    def round(self, seconds: float) -> Round:
        """Steps for about ``seconds``, at least two."""
        return self._turns.round(self.step, seconds, warm_up=1, least=2)

    def saved_bytes(self) -> int:
        """Bytes that autograd keeps between forward and backward."""
        return saved_bytes(lambda: F.cross_entropy(self._forward().float(), self._target), self._model)

    def peak_memory(self) -> int | None:
        """Bytes by which a step raises the process's resident memory at its peak; None where it is not Linux."""
        with PeakMemory() as memory:
            self.step()
        return memory.bytes


def images(settings: Settings) -> Tensor:
    """The batch that all variants train on, contiguous float32."""
    return torch.randn(settings.size, generator=torch.Generator().manual_seed(0))


def compare_training(
    settings: Settings, variants: Sequence[Variant], report: Report = lambda what, done, total: None
) -> list[Row]:
    """Measure a training step of each variant, on the same model and images.

    float32, or bfloat16 by autocast with float32 parameters. The logits of the first forward pass have to agree with
    fp64: to twice the error of the eager model in the same layout and dtype.

    Returns:
        A row for each variant: times, saved and peak memory, or the problem that it has.

    Raises:
        ValueError: the model is unknown.
    """
    model = models.build(settings.model)
    with tempfile.TemporaryDirectory(prefix="effnet-ops-bench-") as folder:
        torch.save(model, Path(folder, "model.pt"))
        report("reference in fp64", 0, 1)
        exact, allowed = _reference(model, settings)
        entrants = [Entrant(variant.name) for variant in variants]
        try:
            for done, (entrant, variant) in enumerate(zip(entrants, variants, strict=True)):
                report(f"loading {variant.name}", done, len(variants))
                _start(entrant, variant, settings, Path(folder), exact, allowed)
            take_turns(entrants, settings, report)
        finally:
            for entrant in entrants:
                entrant.close()
    run = run_name()
    return [entrant.row(settings, run, "step") for entrant in entrants]


def _reference(model: nn.Module, settings: Settings) -> tuple[Tensor, float]:
    """The logits in fp64, in training mode, and the error that is allowed."""
    x, stock = images(settings), model.train()
    with torch.no_grad(), effnet_ops.use_backend("reference"):
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.dtype == "bfloat16"):
            found = [stock(x.contiguous(memory_format=layout)) for layout in LAYOUTS.values()]
        exact = stock.double()(x.double())
    return exact, 2 * max(relative_error(y, exact) for y in found) + FLOOR[settings.dtype]


def _start(entrant: Entrant, variant: Variant, settings: Settings, folder: Path, exact: Tensor, allowed: float) -> None:
    entrant.process = Process(TrainingStep, (variant, settings, folder), folder / f"{variant.name}.log")
    with entrant.guarded():
        entrant.process.receive(PATIENCE)
        entrant.error = gate("the logits", relative_error(entrant.process.ask("logits"), exact), allowed)
        if variant.compiled is None:
            # A compiled step saves what its partitioner chooses, out of the hooks' sight.
            entrant.saved = entrant.process.ask("saved_bytes")
        entrant.memory = entrant.process.ask("peak_memory")
