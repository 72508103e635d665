"""Who can run a model: eager PyTorch, torch.compile, ONNX Runtime, OpenVINO, and ours. All are of equal standing.

Each is built inside its own process (`worker.py`) and given its best standard settings. Where a choice remains, such as
the memory layout, both are built and the faster one is kept.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import effnet_ops

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Job:
    """What a process has to load: files that the parent wrote, and the settings that all providers share."""

    folder: Path
    dtype: str
    threads: int

    def model(self) -> nn.Module:
        return torch.load(self.folder / "model.pt", weights_only=False)

    def inputs(self) -> list[Tensor]:
        """The images, each (N, 3, H, W) in float32, contiguous."""
        return torch.load(self.folder / "inputs.pt")

    @property
    def onnx(self) -> Path:
        return self.folder / "model.onnx"


class Runner(NamedTuple):
    """A model that is ready to run.

    Attributes:
        choice: what distinguishes it from the provider's other candidates, for the row.
        prepare: from float32 images to what ``run`` takes; not timed.
        run: one inference; timed.
        logits: from what ``run`` gives to a tensor.
    """

    choice: str
    prepare: Callable[[Tensor], Any]
    run: Callable[[Any], Any]
    logits: Callable[[Any], Tensor] = lambda out: out


@dataclass(frozen=True)
class Provider:
    """A runtime with its settings.

    Attributes:
        candidates: builds the ways to run the job's model; the fastest is measured.
        needs: the packages without which it cannot run.
        dtypes: those that it computes in.
        ours: whether it is this package's.
        exports: whether it takes the model as an ONNX file.
        heap: whether its memory comes from the C heap, so that a peak of it says what an inference needs.
    """

    name: str
    candidates: Callable[[Job], Iterator[Runner]]
    needs: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = tuple(DTYPES)
    ours: bool = False
    exports: bool = False
    heap: bool = True

    def missing(self) -> list[str]:
        """The needed packages that are not installed."""
        return [package for package in self.needs if importlib.util.find_spec(package) is None]


def _torch_runner(module: Callable[[Tensor], Tensor], layout: str, dtype: torch.dtype, choice: str) -> Runner:
    def prepare(x: Tensor) -> Tensor:
        return x.to(dtype).contiguous(memory_format=LAYOUTS[layout])

    return Runner(choice, prepare, torch.inference_mode()(module.__call__))


def _in_layout(job: Job, layout: str) -> nn.Module:
    return job.model().to(DTYPES[job.dtype], memory_format=LAYOUTS[layout])


def _eager(job: Job) -> Iterator[Runner]:
    yield _torch_runner(_in_layout(job, "contiguous"), "contiguous", DTYPES[job.dtype], "")


def _eager_channels_last(job: Job) -> Iterator[Runner]:
    yield _torch_runner(_in_layout(job, "channels_last"), "channels_last", DTYPES[job.dtype], "")


def _compile(job: Job, freezing: bool = False, mode: str | None = None) -> Iterator[Runner]:
    import torch._inductor.config

    torch._inductor.config.freezing = freezing
    for layout in LAYOUTS:
        # Else the second layout would make the strides of both symbolic.
        compiled = torch.compile(_in_layout(job, layout), mode=mode, dynamic=False)
        yield _torch_runner(compiled, layout, DTYPES[job.dtype], layout)


def _compile_freezing(job: Job) -> Iterator[Runner]:
    return _compile(job, freezing=True)


def _compile_max_autotune(job: Job) -> Iterator[Runner]:
    # On a CPU the tuned products need constant weights.
    return _compile(job, freezing=True, mode="max-autotune")


def _replace_layers(job: Job) -> Iterator[Runner]:
    for layout in LAYOUTS:
        model = _in_layout(job, layout)
        effnet_ops.replace_layers(model)
        yield _torch_runner(model, layout, DTYPES[job.dtype], layout)


def _optimize_for_inference(job: Job) -> Iterator[Runner]:
    dtype = None if job.dtype == "float32" else DTYPES[job.dtype]
    for layout in LAYOUTS:
        model = effnet_ops.optimize_for_inference(job.model().to(memory_format=LAYOUTS[layout]), dtype=dtype)
        yield _torch_runner(model, layout, torch.float32, layout)


def _onnxruntime(job: Job) -> Iterator[Runner]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(str(job.onnx), options, providers=["CPUExecutionProvider"])
    yield Runner(
        "",
        lambda x: {"x": x.numpy()},
        lambda feed: session.run(None, feed)[0],
        lambda out: torch.from_numpy(out.copy()),
    )


def _openvino(job: Job) -> Iterator[Runner]:
    import openvino

    core = openvino.Core()
    configuration = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": job.threads,
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[job.dtype],
    }
    request = core.compile_model(core.read_model(job.onnx), "CPU", configuration).create_infer_request()
    yield Runner(
        "",
        lambda x: [x.numpy()],
        lambda feed: request.infer(feed, share_inputs=True, share_outputs=True)[0],
        lambda out: torch.from_numpy(out.copy()),
    )


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("eager", _eager),
        Provider("eager_channels_last", _eager_channels_last),
        Provider("compile", _compile),
        Provider("compile_freezing", _compile_freezing),
        Provider("compile_max_autotune", _compile_max_autotune),
        Provider("onnxruntime", _onnxruntime, ("onnx", "onnxruntime"), dtypes=("float32",), exports=True, heap=False),
        Provider("openvino", _openvino, ("onnx", "openvino"), exports=True, heap=False),
        Provider("replace_layers", _replace_layers, ours=True),
        Provider("optimize_for_inference", _optimize_for_inference, ours=True),
    )
}


def export_onnx(job: Job) -> None:
    """Write the job's model as ONNX, with its BatchNorms folded by the exporter."""
    with warnings.catch_warnings(), torch.inference_mode(), effnet_ops.use_backend("reference"):
        warnings.simplefilter("ignore")
        # By TorchScript: the exporter behind torch.export needs onnxscript beside onnx.
        torch.onnx.export(
            job.model(), (job.inputs()[0],), job.onnx, dynamo=False, input_names=["x"], output_names=["y"]
        )
