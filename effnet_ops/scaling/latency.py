"""Milliseconds instead of multiply-adds: a table of this machine's times by layer, and predictions from it.

A layer here is what users' models call as one module: the stem, a block, or the head. Each is timed in the interleaved
rounds of `measure_rounds`, on what the layer in front of it has just written: with caches and threads as a network
leaves them. Nothing in here knows which kernels run.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import json
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effnet_ops import _native, backends, layers
from effnet_ops.checks import FLOAT_DTYPES, unknown_name
from effnet_ops.models import EfficientNet, ScaledSpec, create_model
from effnet_ops.models.files import first_line
from effnet_ops.scaling.laws import base_spec
from effnet_ops.scaling.machine import cpu_model, version
from effnet_ops.scaling.network import conv_size
from effnet_ops.scaling.rows import Row, RowFile

VARIANTS = ("optimized", "fused", "stock")
DEVICES = ("cpu", "cuda")
FORMAT = "effnet_ops latency table"
QUIET = 0.02
"""A call counts as undisturbed while its threads waited for at most this share of its time."""

PATIENCE = 4
"""How often as many rounds as asked for are made until there are enough undisturbed calls."""


class Timing(NamedTuple):
    """Seconds of one call: the median of ``calls``, and the 20th and 80th percentiles around it.

    ``quiet`` of the calls never waited for a processor that others used.
    """

    p20: float
    p50: float
    p80: float
    calls: int
    quiet: int


class Unit(NamedTuple):
    """A layer of a network: ``key`` tells it from layers that cost something else, ``name`` is its place."""

    key: str
    name: str
    stage: str
    in_shape: tuple[int, int, int]


class Step(NamedTuple):
    """Something to time: ``call`` on what ``prepare`` gives, which is not counted."""

    prepare: Callable[[], Any]
    call: Callable[[Any], object]


@dataclass(frozen=True)
class Prediction:
    """A network's predicted and measured seconds. ``error`` is relative to the measured ones."""

    name: str
    predicted: float
    measured: Timing

    @property
    def error(self) -> float:
        """The predicted over the measured time, minus one."""
        return self.predicted / self.measured.p50 - 1.0


def units(spec: str | ScaledSpec, resolution: int | None = None) -> list[Unit]:
    """The layers of a network in order, for a square image of ``resolution`` pixels (None: the specification's)."""
    spec = base_spec(spec)
    side = spec.resolution if resolution is None else resolution
    size, act, pad = (side, side), spec.architecture.activation, spec.convention.padding
    found = [Unit(f"stem {spec.stem_channels} {act} {pad} {side}x{side}", "stem", "stem", (3, *size))]
    size = conv_size(size, 3, 2, pad)
    for stage, blocks in enumerate(spec.stages(), start=1):
        for index, block in enumerate(blocks):
            b = block
            key = f"{b.block} {b.in_channels}>{b.expanded_channels}>{b.out_channels} k{b.kernel_size} s{b.stride}"
            key += f" se{b.se_channels} {act} {spec.architecture.gate} {pad} {size[0]}x{size[1]}"
            found.append(Unit(key, f"blocks.{stage - 1}.{index}", f"stage {stage}", (b.in_channels, *size)))
            size = conv_size(size, b.kernel_size, b.stride, pad)
    key = f"head {blocks[-1].out_channels}>{spec.head_channels} {act} {size[0]}x{size[1]}"
    return [*found, Unit(key, "head", "head", (blocks[-1].out_channels, *size))]


class LatencyTable:
    """Times of this machine for one way to run networks, measured where they are asked for and kept in a file.

    Args:
        variant: "optimized" (`optimize_for_inference`), "fused" (as `create_model` and `replace_layers` run) or "stock"
            (PyTorch's own operations, one by one).
        dtype: of the activations. batch: images in a call. device: "cpu", "cuda", "cuda:1" ...
        backend: ask for one (`use_backend`); None leaves the choice, and stock takes the reference.
        path: a file that keeps the times, with their provenance; see `default_path`. None: in memory only.
        rounds: calls of each layer; the median counts. See `measure_rounds` for machines that others use, too.

    Raises:
        ValueError: an unknown variant or backend, a dtype or batch out of range, a device that is not there or that
            cannot be timed, a file that is damaged.
        ForeignFile: times of another machine, another build or another setting in the file.
    """

    def __init__(
        self,
        variant: str = "optimized",
        *,
        dtype: torch.dtype = torch.float32,
        batch: int = 1,
        device: str | torch.device = "cpu",
        backend: str | None = None,
        path: str | os.PathLike[str] | None = None,
        rounds: int = 15,
    ) -> None:
        if variant not in VARIANTS:
            raise unknown_name("variant", variant, VARIANTS)
        if dtype not in FLOAT_DTYPES:
            raise ValueError(f"dtype must be float32, float64, bfloat16 or float16, got {dtype!r}")
        for name, value in (("batch", batch), ("rounds", rounds)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if backend is not None and backend not in backends.BACKENDS:
            raise unknown_name("backend", backend, backends.BACKENDS)
        self.variant, self.dtype, self.batch, self.rounds = variant, dtype, batch, rounds
        self.device = _timed_device(device)
        self.backend = "reference" if variant == "stock" else backend
        self.entries: dict[str, Timing] = {}
        self._file = None if path is None else RowFile(path, self.provenance, fields=("key", *Timing._fields))
        for row in self._file.rows if self._file else ():
            if row["quiet"]:  # a time taken while others used the machine is good for one session
                self.entries[row["key"]] = Timing(*(row[field] for field in Timing._fields))

    def __enter__(self) -> LatencyTable:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the results file."""
        if self._file is not None:
            self._file.close()

    @property
    def provenance(self) -> Row:
        """Everything that the times depend on; it heads the file."""
        cuda = self.device.type == "cuda"
        return {
            "format": FORMAT,
            "variant": self.variant,
            "dtype": str(self.dtype).removeprefix("torch."),
            "batch": self.batch,
            "device": torch.cuda.get_device_name(self.device) if cuda else str(self.device),
            "backend": self.backend or "automatic",
            "cpu": cpu_model(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "effnet_ops": version(),
            "kernels": native_build(),
        }

    def predict(self, spec: str | ScaledSpec, resolution: int | None = None) -> float:
        """Seconds of a forward pass: the sum of its layers' medians. Layers that the table lacks are measured now."""
        self.measure([spec], resolution)
        return sum(self.entries[unit.key].p50 for unit in units(spec, resolution))

    def layer_times(self, spec: str | ScaledSpec, resolution: int | None = None) -> list[tuple[Unit, Timing]]:
        """Every layer of a network with its time, in order."""
        self.measure([spec], resolution)
        return [(unit, self.entries[unit.key]) for unit in units(spec, resolution)]

    def measure(self, specs: Iterable[str | ScaledSpec], resolution: int | None = None) -> int:
        """Measure what the table lacks of these networks' layers, all in the same rounds; how many those were."""
        return len(self._rounds(specs, resolution, networks=False))

    def validate(self, specs: Sequence[str | ScaledSpec], resolution: int | None = None) -> list[Prediction]:
        """Predicted against measured networks; layers that the table lacks share the networks' rounds."""
        timings = self._rounds(specs, resolution, networks=True)
        return [
            Prediction(base_spec(spec).name, self.predict(spec, resolution), timings[f"network {index}"])
            for index, spec in enumerate(specs)
        ]

    def _rounds(
        self, specs: Iterable[str | ScaledSpec], resolution: int | None, networks: bool
    ) -> Mapping[str, Timing]:
        steps: dict[str, Step] = {}
        for index, spec in enumerate(specs):
            path = units(spec, resolution)
            missing = {unit.key for unit in path} - self.entries.keys() - steps.keys()
            if not missing and not networks:
                continue
            model = self.build(spec)
            image = self._random(path[0].in_shape)
            if networks:
                steps[f"network {index}"] = Step(image.clone, model)
            prepare = image.clone
            for before, unit in zip([None, *path], path, strict=False):
                if before is not None:
                    prepare = functools.partial(_part(model, before.name), self._random(before.in_shape))
                if unit.key in missing:
                    missing.discard(unit.key)
                    steps[unit.key] = Step(prepare, _part(model, unit.name))
        with self._running():
            timings = measure_rounds(steps, self.rounds, self._synchronize)
        for key, timing in timings.items():
            if not key.startswith("network "):
                if self._file is not None:
                    self._file.append({"key": key, **timing._asdict()})
                self.entries[key] = timing
        return timings

    def build(self, spec: str | ScaledSpec) -> nn.Module:
        """A network with random weights, as the table's variant runs it."""
        from effnet_ops.surgery import optimize_for_inference

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = create_model(base_spec(spec)).eval().requires_grad_(False)
        if self.variant == "stock":
            _make_stock(model)
        model = model.to(self.device, memory_format=torch.channels_last)
        if self.variant == "optimized":
            return optimize_for_inference(model, dtype=None if self.dtype == torch.float32 else self.dtype)
        return model.to(self.dtype)

    def _random(self, shape: tuple[int, int, int]) -> Tensor:
        values = torch.randn(self.batch, *shape, device=self.device, dtype=self.dtype)
        return values.to(memory_format=torch.channels_last)

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        chosen = backends.use_backend(self.backend) if self.backend else contextlib.nullcontext()
        with chosen, torch.inference_mode():
            yield

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure_rounds(steps: Mapping[str, Step], rounds: int, synchronize: Callable[[], None]) -> dict[str, Timing]:
    """Call everything once a round, after one round that does not count, each round in an order of its own.

    Whatever slows the machine down for a while hits a few calls of everything instead of all calls of one, and the
    median drops them. Between two calls of one layer all others run, so its weights are as cold as in a network. Where
    Linux says that a call waited for a processor, it is repeated in a later round, up to `PATIENCE` times as many
    rounds; calls that waited count only for what has too few that did not.
    """
    quiet: dict[str, list[float]] = {name: [] for name in steps}
    disturbed: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    order = random.Random(0)
    for round_ in range(PATIENCE * rounds + 1):
        wanted = [name for name in steps if len(quiet[name]) < rounds]
        for name in order.sample(wanted, len(wanted)):
            seconds, share = _call(steps[name], synchronize)
            if round_ and share <= QUIET:
                quiet[name].append(seconds)
            elif round_:
                disturbed[name].append((share, seconds))
    return {name: _timing(quiet[name], disturbed[name], rounds) for name in steps}


def _call(step: Step, synchronize: Callable[[], None]) -> tuple[float, float]:
    """Seconds of one call, and how long threads waited for a processor since its preparation, relative to that."""
    waited = _waited()
    x = step.prepare()  # last before the call: threads that have slept since then would have to wake up in it
    synchronize()
    start = time.perf_counter()
    step.call(x)
    synchronize()
    seconds = time.perf_counter() - start
    return seconds, (_waited() - waited) / seconds


def _waited() -> float:
    """Seconds that this process's threads were ready to run and no processor was free; 0 where nobody knows."""
    nanoseconds = 0
    for file in glob.glob("/proc/self/task/*/schedstat"):
        with contextlib.suppress(OSError), open(file, encoding="ascii") as text:
            nanoseconds += int(text.read().split()[1])
    return nanoseconds * 1e-9


def _timing(quiet: list[float], disturbed: list[tuple[float, float]], rounds: int) -> Timing:
    least = [seconds for _, seconds in sorted(disturbed)[: max(0, -(-rounds // 3) - len(quiet))]]
    ordered = sorted(quiet + least)
    last = len(ordered) - 1
    return Timing(
        ordered[round(0.2 * last)], statistics.median(ordered), ordered[round(0.8 * last)], last + 1, len(quiet)
    )


def median_error(predictions: Iterable[Prediction]) -> float:
    """The median over networks of |predicted / measured - 1|."""
    return statistics.median(abs(prediction.error) for prediction in predictions)


def default_path(table: LatencyTable) -> Path:
    """Where a table of this provenance is cached: another machine, build or setting has another file."""
    folder = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    digest = hashlib.sha256(json.dumps(table.provenance, sort_keys=True).encode()).hexdigest()[:12]
    return Path(folder).expanduser() / "effnet_ops" / f"latency-{digest}.jsonl"


def native_build() -> str:
    """A fingerprint of the compiled kernels, since a rebuild changes times; "none" without them."""
    file = getattr(_native.module, "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12] if file else "none"


def _timed_device(device: str | torch.device) -> torch.device:
    """``device``, or ValueError where it is not there, or where nobody here knows when its work is done."""
    try:
        found = torch.device(device)
        if found.type in DEVICES:
            return torch.empty(0, device=found).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device {device!r} cannot be used: {first_line(error)}") from None
    raise ValueError(f"device {str(device)!r} cannot be timed, only {' and '.join(DEVICES)} can")


def _part(model: EfficientNet, name: str) -> Callable[[Tensor], Tensor]:
    if name == "stem":
        return model.forward_stem
    if name == "head":
        return lambda x: model.forward_head(model.forward_last(x))
    return model.get_submodule(name)


class _StockConv2d(nn.Conv2d):
    """PyTorch's convolution under a name that no fused block takes for its own."""


def _make_stock(model: nn.Module) -> None:
    """Give every block PyTorch's own convolution, with which it calls its children one by one."""
    for module in list(model.modules()):
        if isinstance(module, layers.FusedMBConv):
            conv = module.conv_exp if module.expands else module.conv
            if type(conv) is nn.Conv2d:
                conv.__class__ = _StockConv2d
        if isinstance(module, layers.MBConv):
            conv = module.conv_dw
            padding = conv.padding
            if isinstance(padding, str) or len(padding) != 2:
                continue  # SAME at stride 2 has no counterpart in nn.Conv2d; the reference backend pads it
            arguments = conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, padding
            stock = nn.Conv2d(*arguments, groups=conv.groups, bias=False)
            stock.weight = conv.weight
            module.conv_dw = stock.eval()


class Peaks(NamedTuple):
    """What a machine can do at most: FLOPs and bytes a second, measured with a product and a copy."""

    flops: float
    bytes: float

    @property
    def ridge(self) -> float:
        """FLOPs a byte from which arithmetic bounds, and no longer memory."""
        return self.flops / self.bytes


def machine_peaks(dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", rounds: int = 7) -> Peaks:
    """The best of several runs of a square matrix product and of a copy (bytes read and written) beyond the caches.

    Raises ValueError for a device that is not there or that cannot be timed.
    """
    device = _timed_device(device)
    side, elements = (1024, 2**25) if device.type == "cpu" else (8192, 2**29)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source, target = (torch.ones(elements, device=device) for _ in range(2))
    steps = {
        "product": Step(lambda: a, lambda a: torch.mm(a, b)),
        "copy": Step(lambda: source, target.copy_),
    }
    best = dict.fromkeys(steps, math.inf)

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(rounds):
        for name, timing in measure_rounds(steps, 1, synchronize).items():
            best[name] = min(best[name], timing.p20)
    return Peaks(2 * side**3 / best["product"], 2 * elements * source.itemsize / best["copy"])
