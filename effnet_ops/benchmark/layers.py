"""Where an optimized model spends its time, layer by layer, beside what each layer could reach on this machine.

Two views: every layer inside the running network (`Network`), and each part of its blocks alone, through the public
functions and with its data in cache (`Call`).
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import effnet_ops
from effnet_ops.benchmark import models
from effnet_ops.benchmark.calibration import Peaks, measure_peaks
from effnet_ops.benchmark.comparison import Process, Report, Settings, prepare, run_name
from effnet_ops.benchmark.gate import gate, relative_error
from effnet_ops.benchmark.providers import DTYPES, Job
from effnet_ops.benchmark.rows import Row
from effnet_ops.benchmark.timing import percentiles
from effnet_ops.benchmark.worker import LEAST, WARM_UP
from effnet_ops.params import ConvNormParams
from effnet_ops.surgery.folded import OBSERVES, Folded
from effnet_ops.surgery.folding import fold
from effnet_ops.surgery.fused import (
    AnyBlockPlan,
    BlockPlan,
    FusedBlockPlan,
    FusedLayer,
    NotFusable,
    conv_norm_params,
    describe,
)
from effnet_ops.surgery.replace import classify

NETWORK, FUNCTION = "optimize_for_inference", "function"
BOUNDS = {"float32": 2e-6, "bfloat16": 1e-2}
"""Of one operator's error against fp64; those of `effnet-ops check`."""
ROUNDS = 5


class Work(NamedTuple):
    """What a layer computes: name, kind, shape of its input and output, operations, and bytes moved at least once."""

    layer: str
    operation: str
    shape: str
    flops: int
    bytes: int


@dataclass
class Measurement:
    """Seconds of each call of a layer. ``error`` is against fp64; inside a network the logits have it."""

    work: Work
    provider: str
    seconds: list[float] = field(default_factory=list)
    error: float | None = None


@dataclass
class Call:
    """One public function on inputs of its own."""

    work: Work
    run: Callable[[], Tensor]
    error: float


class Layers:
    """What the worker holds: the optimized network, and the calls that its blocks consist of."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        stock = job.model()
        self._network = Network(stock, job)
        self._calls = list(_calls(stock, job.inputs()[0], DTYPES[job.dtype]))

    def logits(self) -> list[Tensor]:
        return self._network.logits()

    def network(self, seconds: float) -> list[Measurement]:
        return self._network.measure(seconds)

    def functions(self, seconds: float) -> list[Measurement]:
        return _measure_calls(self._calls, seconds)


class Network:
    """An optimized model that says how long each of its innermost modules takes, in the network as it runs."""

    def __init__(self, stock: nn.Module, job: Job) -> None:
        dtype = None if job.dtype == "float32" else DTYPES[job.dtype]
        self._inputs = [x.contiguous(memory_format=torch.channels_last) for x in job.inputs()]
        self._itemsize = DTYPES[job.dtype].itemsize
        self._stock = dict(stock.named_modules())
        self._stock_flops = _flops_by_module(stock, self._inputs[0])
        self._model = effnet_ops.optimize_for_inference(stock.to(memory_format=torch.channels_last), dtype=dtype)
        self._clock: Callable[[], float] = time.perf_counter
        self._leaves: list[tuple[str, float, Any, Any]] = []
        self._keep = True
        closed = [module for module in self._model.modules() if isinstance(module, Folded) and module.closed]
        inside = {inner for module in closed for inner in module.modules() if inner is not module}
        for name, module in self._model.named_modules():
            if module not in inside:
                # On the instance, and not as a hook: folded layers run their stock form where somebody hooks them.
                module.forward = self._timed(name, module.forward)
        self._works = self._works_of_one_pass()
        self._keep = False

    def logits(self) -> list[Tensor]:
        return [self._run(x).float().clone() for x in self._inputs]

    def measure(self, seconds: float) -> list[Measurement]:
        """Whole passes for about ``seconds``; the last two rows are the network, and what is outside its layers."""
        found = [Measurement(work, NETWORK) for work in self._works]
        ends = self._works[0].shape.split(" -> ")[0], self._works[-1].shape.split(" -> ")[-1]
        whole = Work("", "network", " -> ".join(ends), sum(work.flops for work in self._works), 0)
        total, outside = (
            Measurement(whole, NETWORK),
            Measurement(whole._replace(operation="dispatch", flops=0), NETWORK),
        )
        for _ in range(WARM_UP):
            self._run(self._inputs[0])
        end, passes = time.perf_counter() + seconds, 0
        while passes < LEAST or time.perf_counter() < end:
            start = time.perf_counter()
            self._run(self._inputs[passes % len(self._inputs)])
            total.seconds.append(time.perf_counter() - start)
            for measurement, (_, elapsed, _, _) in zip(found, self._leaves, strict=True):
                measurement.seconds.append(elapsed)
            outside.seconds.append(total.seconds[-1] - sum(elapsed for _, elapsed, _, _ in self._leaves))
            passes += 1
        return [*found, total, outside]

    @torch.inference_mode()
    def _run(self, x: Tensor) -> Tensor:
        self._leaves.clear()
        return self._model(x)

    def _timed(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            before, start = len(self._leaves), self._clock()
            y = forward(*args, **kwargs)
            elapsed = self._clock() - start
            if len(self._leaves) == before:
                self._leaves.append((name, elapsed, args, y) if self._keep else (name, elapsed, None, None))
            return y

        setattr(run, OBSERVES, True)
        return run

    def _works_of_one_pass(self) -> list[Work]:
        with FlopCounterMode(display=False) as counter:
            self._clock = counter.get_total_flops
            self._run(self._inputs[0])
        self._clock = time.perf_counter
        works = [self._work(*leaf) for leaf in self._leaves]
        self._leaves.clear()
        return works

    def _work(self, name: str, flops: float, args: tuple, y: Any) -> Work:
        module = self._stock.get(name)
        tensors = [value for value in (*args, y) if isinstance(value, Tensor)]
        sizes = [tuple(value.shape) for value in tensors]
        elements = sum(value.numel() for value in tensors)
        elements += sum(parameter.numel() for parameter in module.parameters()) if module else 0
        shape = f"{_size(sizes[0])} -> {_size(sizes[-1])}" if sizes else ""
        operations = int(flops) or self._stock_flops.get(name, 0)
        return Work(name, _kind(module), shape, operations, elements * self._itemsize)


def _kind(module: nn.Module | None) -> str:
    """The word for what a stock module computes."""
    if module is None:
        return "other"
    if found := classify(module):
        return {"block": "mbconv", "other": "other"}.get(found[0], found[0])
    if isinstance(module, nn.Conv2d):
        return "pointwise" if module.kernel_size == (1, 1) and module.groups == 1 else "convolution"
    if isinstance(module, nn.Linear):
        return "linear"
    return "pool" if "pool" in type(module).__name__.lower() else "other"


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _flops_by_module(model: nn.Module, x: Tensor) -> dict[str, int]:
    """Operations of each module with all that is in it, by name."""
    model, found = copy.deepcopy(model), {}
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        for name, module in model.named_modules():
            module.register_forward_pre_hook(
                lambda module, args, name=name: found.__setitem__(name, -counter.get_total_flops())
            )
            module.register_forward_hook(
                lambda module, args, y, name=name: found.__setitem__(name, found[name] + counter.get_total_flops())
            )
        model(x)
    return found


class _Part(NamedTuple):
    """One step of a block: a function of tensors, of which ``x`` and ``residual`` are activations."""

    name: str
    operation: str
    function: Callable[[dict[str, Tensor]], Tensor]
    tensors: dict[str, Tensor]


def _calls(stock: nn.Module, x: Tensor, dtype: torch.dtype) -> Iterator[Call]:
    """The distinct steps of the stock model's blocks as public functions, each checked against fp64."""
    seen: set[tuple[str, str]] = set()
    for name, plan, size in blocks_of(stock, x):
        for part in _parts(plan, torch.randn(size)):
            call = _call(f"{name}.{part.name}", part, dtype)
            if (key := (part.operation, call.work.shape)) not in seen:
                seen.add(key)
                yield call


def blocks_of(stock: nn.Module, x: Tensor) -> Iterator[tuple[str, AnyBlockPlan, tuple[int, ...]]]:
    """Name, plan and size of the input of each block that `replace_layers` would replace."""
    stock, sizes = copy.deepcopy(stock), {}
    layers: dict[str, type[FusedLayer]] = {}
    for name, module in stock.named_modules():
        found = classify(module)
        if found is not None and found[0] == "block" and not isinstance(found[1], str):
            layers[name] = found[1]
    blocks = {name: stock.get_submodule(name) for name in layers}
    handles = [
        block.register_forward_pre_hook(lambda module, args, name=name: sizes.update({name: tuple(args[0].shape)}))
        for name, block in blocks.items()
    ]
    with torch.inference_mode():
        stock(x)
    for handle in handles:
        handle.remove()
    for name, size in sizes.items():
        with contextlib.suppress(NotFusable):
            plan = describe(layers[name], blocks[name])
            if isinstance(plan, BlockPlan | FusedBlockPlan):
                yield name, plan, size


def _parts(plan: AnyBlockPlan, x: Tensor) -> Iterator[_Part]:
    """The steps of a block after folding, each on the output of the one before."""
    value = x
    for part in _steps(plan, x):
        part.tensors["x"] = value
        yield part
        value = part.function(part.tensors)


def _steps(plan: AnyBlockPlan, x: Tensor) -> Iterator[_Part]:
    padding = plan.padding(x) if callable(plan.padding) else plan.padding
    activation, window = plan.activation, {"stride": plan.stride, "padding": padding}

    def pointwise(t: dict[str, Tensor]) -> Tensor:
        return effnet_ops.pointwise_conv2d(t["x"], t["weight"], t["bias"], activation=activation)

    def depthwise(t: dict[str, Tensor]) -> Tensor:
        return effnet_ops.depthwise_conv2d(t["x"], t["weight"], t["bias"], **window, activation=activation)

    def dense(t: dict[str, Tensor]) -> Tensor:
        conv = ConvNormParams(t["weight"], t["bias"])
        residual = plan.residual and plan.project is None
        settings = {**window, "activation": activation, "residual": residual, "training": False}
        return effnet_ops.fused_mbconv(t["x"], conv, None, None, **settings)

    def squeeze_excite(t: dict[str, Tensor]) -> Tensor:
        names = ("reduce_weight", "reduce_bias", "expand_weight", "expand_bias")
        settings = {"activation": plan.squeeze_excite.activation, "gate": plan.squeeze_excite.gate}
        return effnet_ops.squeeze_excite(t["x"], *(t.get(name) for name in names), **settings)

    def project(t: dict[str, Tensor]) -> Tensor:
        return effnet_ops.pointwise_conv2d(
            t["x"], t["weight"], t["bias"], residual=t.get("residual"), activation=plan.after
        )

    if isinstance(plan, FusedBlockPlan):
        yield _Part("expand", "convolution", dense, _folded(fold(conv_norm_params(*plan.expand))))
    else:
        if plan.expand is not None:
            yield _Part("expand", "pointwise", pointwise, _folded(fold(conv_norm_params(*plan.expand))))
        yield _Part("depthwise", "depthwise", depthwise, _folded(fold(conv_norm_params(*plan.depthwise))))
    if plan.squeeze_excite is not None:
        tensors = {
            name: value.detach()
            for name, value in plan.squeeze_excite.params()._asdict().items()
            if isinstance(value, Tensor)
        }
        yield _Part("squeeze_excite", "squeeze_excite", squeeze_excite, tensors)
    if plan.project is None:
        return
    residual = {"residual": x} if plan.residual else {}
    yield _Part("project", "pointwise", project, {**_folded(fold(conv_norm_params(*plan.project))), **residual})


def _folded(conv: ConvNormParams) -> dict[str, Tensor]:
    return {"weight": conv.weight.detach(), "bias": conv.bias.detach()}


def _call(name: str, part: _Part, dtype: torch.dtype) -> Call:
    """Raises `Failed` where the function's result is not within its bound."""
    activations = ("x", "residual")
    tensors = {
        key: value.to(dtype).contiguous(memory_format=torch.channels_last) if key in activations else value
        for key, value in part.tensors.items()
    }
    exact_tensors = {key: value.double() for key, value in tensors.items()}
    with effnet_ops.use_backend("reference"), FlopCounterMode(display=False) as counter:
        exact = part.function(exact_tensors)
    run = torch.inference_mode()(lambda: part.function(tensors))
    error = gate(name, relative_error(run(), exact), BOUNDS[str(dtype).removeprefix("torch.")])
    elements = exact.numel() + sum(value.numel() for value in tensors.values())
    shape = f"{_size(tuple(tensors['x'].shape))} -> {_size(tuple(exact.shape))}"
    if part.operation in ("depthwise", "convolution"):
        shape += f", k{tensors['weight'].shape[-1]}"
    work = Work(name, part.operation, shape, counter.get_total_flops(), elements * dtype.itemsize)
    return Call(work, run, error)


def _measure_calls(calls: list[Call], seconds: float) -> list[Measurement]:
    """Each for its share of ``seconds``, in rounds, so that a slow moment does not hit one of them alone."""
    found = [Measurement(call.work, FUNCTION, error=call.error) for call in calls]
    share = seconds / max(ROUNDS * len(calls), 1)
    for _ in range(ROUNDS):
        for call, measurement in zip(calls, found, strict=True):
            for _ in range(WARM_UP):
                call.run()
            end = time.perf_counter() + share
            while True:
                start = time.perf_counter()
                call.run()
                measurement.seconds.append(time.perf_counter() - start)
                if time.perf_counter() > end:
                    break
    return found


def profile(
    settings: Settings,
    report: Report = lambda what, done, total: None,
    quiet: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> tuple[Peaks, list[Row]]:
    """Measure the layers of the optimized model and the peaks of the machine.

    Args:
        settings: what to measure; ``rounds`` x ``seconds`` is the time of each view.
        report, quiet: as in `effnet_ops.benchmark.comparison.compare`.

    Returns:
        The peaks, and a row for each layer of the network and each distinct function, with percentages of the peaks.

    Raises:
        Failed: a result is wrong.
        RuntimeError: the C++ part is missing.
        ValueError: the model is unknown.
    """
    model = models.build(settings.model)
    seconds = settings.rounds * settings.seconds
    with tempfile.TemporaryDirectory(prefix="effnet-ops-bench-") as folder:
        job = Job(Path(folder), settings.dtype, settings.threads)
        report("reference in fp64", 0, 4)
        reference = prepare(job, model, settings.size)
        report("loading the layers", 1, 4)
        process = Process(Layers, (job,), job.folder / "layers.log")
        try:
            process.receive()
            with quiet():
                report("peaks of the machine", 2, 4)
                peaks = measure_peaks(settings.threads)
                report("measuring the layers", 3, 4)
                measurements = [*process.ask("network", seconds), *process.ask("functions", seconds)]
            error = reference.check(process.ask("logits"))
        finally:
            process.close()
    run = run_name()
    return peaks, [_row(measurement, settings, peaks, error, run) for measurement in measurements]


def _row(measurement: Measurement, settings: Settings, peaks: Peaks, error: float, run: str) -> Row:
    work = measurement.work
    p20, p50, p80 = percentiles([1e3 * second for second in measurement.seconds])
    gflop_per_s, gb_per_s = work.flops / p50 / 1e6, work.bytes / p50 / 1e6
    return Row(
        operation=work.operation,
        layer=f"{settings.model} {work.layer}".strip(),
        provider=measurement.provider,
        shape=work.shape,
        dtype=settings.dtype,
        threads=settings.threads,
        run=run,
        p20=p20,
        p50=p50,
        p80=p80,
        repetitions=len(measurement.seconds),
        error=error if measurement.error is None else measurement.error,
        flops=work.flops,
        gflop_per_s=gflop_per_s,
        percent_of_fma_peak=100 * gflop_per_s / peaks.of(settings.dtype),
        bytes=work.bytes or None,
        gb_per_s=gb_per_s or None,
        percent_of_copy_peak=100 * gb_per_s / peaks.copy or None,
    )
