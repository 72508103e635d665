"""Providers for benchmarks/deployment.py: each kind of model, stock to own, in each way that it can run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import effnet_ops
from effnet_ops import deployment
from effnet_ops.benchmark.models import split
from effnet_ops.benchmark.providers import Job, Provider, Runner
from effnet_ops.deployment.program import own_operators

KINDS = ("stock", "replaced", "optimized", "own")
WAYS = ("eager", "compile", "export", "AOTInductor", "ONNX Runtime", "OpenVINO")
NO_OWN = "no own model"
"""Of kinds that are not there: `effnet_ops.create_model` builds EfficientNets alone."""
NEEDS = {"ONNX Runtime": ("onnx", "onnxscript", "onnxruntime"), "OpenVINO": ("onnx", "onnxscript", "openvino")}


def provider(way: str, kind: str, name: str) -> Provider:
    """The model called ``name`` as one of `KINDS`, in one of `WAYS`."""
    return Provider(kind, partial(_candidates, way, kind, name), NEEDS.get(way, ()), ("float32",), ours=True)


def kinds_of(name: str) -> tuple[str, ...]:
    """The kinds of a model that there are: of timm's EfficientNets alone there are own ones."""
    return KINDS if split(name)[1] in effnet_ops.list_models() else KINDS[:3]


def _model(kind: str, name: str, job: Job) -> nn.Module:
    model = job.model().eval()
    if kind == "replaced":
        effnet_ops.replace_layers(model)
    elif kind == "optimized":
        model = effnet_ops.optimize_for_inference(model)
    elif kind == "own":
        library, stock = split(name)
        own = effnet_ops.create_model(stock)
        state = effnet_ops.convert_state_dict(model.state_dict(), source=library, target="effnet_ops")
        own.load_state_dict(state)
        model = own.eval()
    return model


def _candidates(way: str, kind: str, name: str, job: Job) -> Iterator[Runner]:
    model, x = _model(kind, name, job), job.inputs()[0]
    called = len(own_operators(deployment.export_program(model, x, dynamic=())))
    if way in NEEDS:
        # Of ONNX Runtime, as many threads as PyTorch has.
        yield (_onnxruntime if way == "ONNX Runtime" else _openvino)(model, x, job)
        return
    run: Callable[[Tensor], Tensor] = model
    if way == "compile":
        run = torch.compile(model, dynamic=False)
    elif way == "export":
        run = deployment.export_program(model, x, dynamic=()).module()
    elif way == "AOTInductor":
        with tempfile.TemporaryDirectory() as folder:
            run = deployment.load_package(deployment.export_package(model, x, Path(folder, "model.pt2"), dynamic=()))
    yield Runner(f"{called} operators of ours", lambda x: x, torch.inference_mode()(run.__call__))


def _onnx_file(model: nn.Module, x: Tensor, job: Job) -> Path:
    with tempfile.NamedTemporaryFile(dir=job.folder, suffix=".onnx", delete=False) as file:
        return deployment.export_onnx(model, x, file.name, dynamic=())


def _onnxruntime(model: nn.Module, x: Tensor, job: Job) -> Runner:
    import onnx
    import onnxruntime

    path, options = _onnx_file(model, x, job), onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = job.threads, 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Runner(
        f"{len(onnx.load(path).graph.node)} nodes",
        lambda x: {"x": x.numpy()},
        lambda feed: session.run(None, feed)[0],
        lambda out: torch.from_numpy(out.copy()),
    )


def _openvino(model: nn.Module, x: Tensor, job: Job) -> Runner:
    import onnx
    import openvino

    path, core = _onnx_file(model, x, job), openvino.Core()
    configuration = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": job.threads,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = core.compile_model(core.read_model(path), "CPU", configuration).create_infer_request()
    return Runner(
        f"{len(onnx.load(path).graph.node)} nodes",
        lambda x: [x.numpy()],
        lambda feed: request.infer(feed, share_inputs=True, share_outputs=True)[0],
        lambda out: torch.from_numpy(out.copy()),
    )
