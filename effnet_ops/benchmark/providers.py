"""Who can run a model: eager PyTorch, torch.compile, runtimes of others, and ours. All are of equal standing.

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
from effnet_ops.deployment.onnx_file import with_squeeze

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SQUEEZES = ("ReduceMean", "GlobalAveragePool")
"""The ONNX operators for the average over an image: timm's models export as the first, torchvision's as the second."""


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
        remark: what is known of its precision, for the row of a wrong result.
        optional: whether it is left out without a word where it is not installed and nobody asked for it.
        heap: whether its memory comes from the C heap, so that a peak of it says what an inference needs.
    """

    name: str
    candidates: Callable[[Job], Iterator[Runner]]
    needs: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = tuple(DTYPES)
    ours: bool = False
    exports: bool = False
    remark: str = ""
    optional: bool = False
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
    """With the squeeze as either operator: for ReduceMean it leaves the layout that its convolutions want."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    for squeeze in SQUEEZES:
        model = with_squeeze(onnx.load(job.onnx), squeeze)
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        yield Runner(
            f"squeeze as {squeeze}",
            lambda x: {"x": x.numpy()},
            lambda feed, session=session: session.run(None, feed)[0],
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


def _zentorch(job: Job) -> Iterator[Runner]:
    import torch._inductor.config
    import zentorch  # noqa: F401 (it registers a backend of torch.compile)

    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        raise RuntimeError("zentorch optimizes on processors with AVX-512 only")
    torch._inductor.config.freezing = True
    for layout in LAYOUTS:
        compiled = torch.compile(_in_layout(job, layout), backend="zentorch", dynamic=False)
        yield _torch_runner(compiled, layout, DTYPES[job.dtype], layout)


def _ncnn(job: Job) -> Iterator[Runner]:
    """With weights and computation in float32: pnnx and ncnn both take 16 bits by default."""
    import ncnn
    import numpy
    import pnnx

    inputs = job.inputs()[0]
    script = job.folder / "ncnn.pt"
    torch.jit.trace(job.model(), inputs[:1]).save(script)
    pnnx.convert(str(script), inputs[:1], fp16=False)
    net = ncnn.Net()
    for option in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
        setattr(net.opt, option, False)
    net.opt.num_threads = job.threads
    net.load_param(str(script.with_suffix(".ncnn.param")))
    net.load_model(str(script.with_suffix(".ncnn.bin")))

    def infer(image: Any) -> Any:
        extractor = net.create_extractor()
        extractor.input("in0", image)
        return extractor.extract("out0")[1]

    yield Runner(
        "image by image" if len(inputs) > 1 else "",
        lambda x: [ncnn.Mat(image.numpy()).clone() for image in x],
        lambda images: [infer(image) for image in images],
        lambda outs: torch.from_numpy(numpy.stack([numpy.array(out) for out in outs])),
    )


def _mnn(job: Job) -> Iterator[Runner]:
    # The converter itself: the module MNN.tools installs a package and reports each conversion over the network.
    import _tools
    import MNN

    path = job.folder / "model.mnn"
    files = ("--modelFile", str(job.onnx), "--MNNModel", str(path))
    _tools.mnnconvert(["mnnconvert", "-f", "ONNX", *files, "--bizCode", "effnet_ops"])
    settings = {"backend": "CPU", "numThread": job.threads, "precision": "high"}
    runtime = MNN.nn.create_runtime_manager((settings,))
    net = MNN.nn.load_module_from_file(str(path), ["x"], ["y"], runtime_manager=runtime)
    yield Runner(
        "",
        lambda x: MNN.expr.const(x.numpy(), list(x.shape), MNN.expr.NCHW),
        # Reading is what makes it compute.
        lambda x: MNN.expr.convert(net.forward(x), MNN.expr.NCHW).read(),
        lambda out: torch.from_numpy(out.copy()),
    )


def _litert(job: Job) -> Iterator[Runner]:
    import litert_torch
    from ai_edge_litert.interpreter import Interpreter

    path = job.folder / "model.tflite"
    litert_torch.convert(job.model(), (job.inputs()[0],)).export(str(path))
    interpreter = Interpreter(str(path), num_threads=job.threads)
    interpreter.allocate_tensors()
    source, sink = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]

    def infer(image: Any) -> Any:
        interpreter.set_tensor(source, image)
        interpreter.invoke()
        return interpreter.get_tensor(sink)

    yield Runner("", lambda x: x.numpy(), infer, torch.from_numpy)


def _executorch(job: Job) -> Iterator[Runner]:
    """With XNNPACK's kernels, its backend for processors."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    _unsafe_reset_threadpool(job.threads)
    exported = torch.export.export(job.model(), (job.inputs()[0],))
    lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    program = Runtime.get().load_program(bytes(lowered.to_executorch().buffer))
    method = program.load_method("forward")
    yield Runner("", lambda x: [x], lambda feed: method.execute(feed)[0])


def _float32(name: str, candidates: Callable[[Job], Iterator[Runner]], *needs: str, **fields: Any) -> Provider:
    """An optional peer that computes in float32."""
    return Provider(name, candidates, needs, dtypes=("float32",), optional=True, heap=False, **fields)


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("eager", _eager),
        Provider("eager_channels_last", _eager_channels_last),
        Provider("compile", _compile),
        Provider("compile_freezing", _compile_freezing),
        Provider("compile_max_autotune", _compile_max_autotune),
        Provider(
            "onnxruntime",
            _onnxruntime,
            ("onnx", "onnxruntime"),
            dtypes=("float32",),
            exports=True,
            remark="its Sigmoid is off by up to 1.7e-7, which is all of the value below -16",
            heap=False,
        ),
        Provider("openvino", _openvino, ("onnx", "openvino"), exports=True, heap=False),
        Provider("zentorch", _zentorch, ("zentorch",), optional=True),
        _float32("ncnn", _ncnn, "ncnn", "pnnx"),
        _float32("mnn", _mnn, "onnx", "MNN", exports=True),
        _float32("litert", _litert, "ai_edge_litert", "litert_torch"),
        _float32("executorch", _executorch, "executorch"),
        Provider("replace_layers", _replace_layers, ours=True),
        Provider("optimize_for_inference", _optimize_for_inference, ours=True),
    )
}


def export_onnx(job: Job) -> None:
    """Write the job's model as ONNX, with its BatchNorms folded by the exporter, and SiLU as Sigmoid and Mul.

    ONNX Runtime runs these two as one, and Swish of opset 24 as four nodes.
    """
    with warnings.catch_warnings(), torch.inference_mode(), effnet_ops.use_backend("reference"):
        warnings.simplefilter("ignore")
        # By TorchScript: the exporter behind torch.export needs onnxscript beside onnx.
        torch.onnx.export(
            job.model(), (job.inputs()[0],), job.onnx, dynamo=False, input_names=["x"], output_names=["y"]
        )
