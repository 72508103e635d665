"""What leaves Python: ONNX, OpenVINO, torch.export and TorchScript files of replaced, optimized and own models."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import timm
import torch
import torchvision
from networks import relative_difference, with_statistics
from torch import Tensor, nn

import effnet_ops
from effnet_ops.models import ArchitectureSpec, Convention, ScaledSpec, StageSpec

ROOT = Path(__file__).resolve().parent.parent
BOUND = 1e-4
"""Of logits: other runtimes round each of B0's layers otherwise, and ONNX Runtime's sigmoid is an approximation."""

SYMMETRIC = Convention()


def own(convention: Convention = SYMMETRIC, **rates: float) -> nn.Module:
    stages = StageSpec(1, 3, 1, 1, 16), StageSpec(2, 5, 2, 6, 24)
    spec = ScaledSpec(ArchitectureSpec(stages, 16, 64), 1.0, 1.0, 64, convention=convention)
    return effnet_ops.create_model(spec, num_classes=10, **rates)


def stock(**rates: float) -> nn.Module:
    return timm.create_model("test_efficientnet", num_classes=10, **rates)


def replaced(**rates: float) -> nn.Module:
    model = stock(**rates)
    assert effnet_ops.replace_layers(model).replaced
    return model


def optimized(dtype: torch.dtype | None = None) -> nn.Module:
    return effnet_ops.optimize_for_inference(with_statistics(timm.create_model("test_efficientnet")), dtype=dtype)


MODELS = {
    "own": lambda: with_statistics(own()),
    "own, TensorFlow's padding": lambda: with_statistics(own(Convention(1e-3, 0.01, "same"))),
    "replaced": lambda: with_statistics(replaced()),
    "optimized": optimized,
    "optimized own": lambda: effnet_ops.optimize_for_inference(with_statistics(own())),
}


def export(model: nn.Module, x: Tensor, path: Path, dynamo: bool) -> onnx.ModelProto:
    if dynamo:
        pytest.importorskip("onnxscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), path, dynamo=dynamo, input_names=["x"])
    return onnx.load(path)


def run(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize("dynamo", [False, True], ids=["TorchScript", "dynamo"])
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_onnx_file_computes_what_the_model_does(build: Callable[[], nn.Module], dynamo: bool, tmp_path: Path) -> None:
    """Also after calls that have left something in caches, and whatever backend is asked for."""
    model, x = build().eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad(), effnet_ops.use_backend("cpu"):
        expected = model(x)
        file = export(model, x, tmp_path / "model.onnx", dynamo)
        assert torch.equal(model(x), expected)
    assert {node.domain for node in file.graph.node} <= {""}
    assert relative_difference(run(tmp_path / "model.onnx", x), expected) < BOUND


@pytest.mark.parametrize("build", [own, replaced], ids=["own", "replaced"])
def test_onnx_file_of_a_model_in_training_mode_by_torchscript_is_evaluation(
    build: Callable[..., nn.Module], tmp_path: Path
) -> None:
    model, x = with_statistics(build(drop_rate=0.5, drop_path_rate=0.5)), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
    export(model.train(), x, tmp_path / "model.onnx", dynamo=False)
    assert model.training
    assert relative_difference(run(tmp_path / "model.onnx", x), expected) < BOUND


@pytest.mark.parametrize("build", [own, replaced], ids=["own", "replaced"])
def test_onnx_file_of_a_model_in_training_mode_by_dynamo_is_what_the_exporter_makes_of_stock_layers(
    build: Callable[..., nn.Module], tmp_path: Path
) -> None:
    """Normalisations are folded with running statistics; dropout and drop path stay random."""
    x = torch.randn(2, 3, 64, 64)
    model = with_statistics(build(drop_rate=0.0, drop_path_rate=0.0))
    with torch.no_grad():
        expected = model(x)
    export(model.train(), x, tmp_path / "steady.onnx", dynamo=True)
    assert relative_difference(run(tmp_path / "steady.onnx", x), expected) < BOUND
    model = build(drop_rate=0.5, drop_path_rate=0.5).train()
    statistics = {name: value.clone() for name, value in model.state_dict().items()}
    found = operators(export(model, x, tmp_path / "random.onnx", dynamo=True))
    assert found["Dropout"] == 1 and not found["BatchNormalization"]
    assert all(torch.equal(value, statistics[name]) for name, value in model.state_dict().items())
    if build is own:
        assert found["RandomUniformLike"] == 1
    else:
        like = stock(drop_rate=0.5, drop_path_rate=0.5).train()
        assert found == operators(export(like, x, tmp_path / "stock.onnx", dynamo=True))


def operators(file: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in file.graph.node)


@pytest.mark.parametrize("build", [own, replaced], ids=["own", "replaced"])
def test_program_exported_in_training_mode_trains(build: Callable[..., nn.Module]) -> None:
    """It normalises by the batch, and each call updates the running statistics, as the model does."""
    model, x = build(drop_rate=0.0, drop_path_rate=0.0).train(), torch.randn(4, 3, 64, 64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    program = torch.export.export(model, (x,)).module()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert relative_difference(program(x), model(x)) < BOUND
    for name, value in program.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name])
        assert "running" not in name or not torch.equal(value, before[name])


def test_optimized_copy_cannot_be_exported_in_training_mode() -> None:
    with pytest.raises(RuntimeError, match="this model cannot train"):
        optimized().train()


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_openvino_converts_what_the_reference_backend_records(build: Callable[[], nn.Module]) -> None:
    openvino = pytest.importorskip("openvino")
    model, x = build().eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        with effnet_ops.use_backend("reference"):
            converted = openvino.convert_model(model, example_input=x)
    configuration = {"INFERENCE_PRECISION_HINT": "f32"}
    result = openvino.compile_model(converted, "CPU", configuration)(x.numpy())[0]
    assert relative_difference(torch.from_numpy(result.copy()), expected) < BOUND


LOAD = """
import sys, torch
torch.ops.effnet_ops if sys.argv[1] == "used before" else None
import effnet_ops_autoload
effnet_ops_autoload.register()
assert "effnet_ops" not in sys.modules
program = torch.export.load(sys.argv[2])
assert "effnet_ops" in sys.modules and type(torch.ops.effnet_ops) is torch._ops._OpNamespace
x, expected = torch.load(sys.argv[3])
assert torch.allclose(program.module()(x), expected, atol=1e-5), (program.module()(x) - expected).abs().max()
import effnet_ops
compiled = torch.compile(lambda x: effnet_ops.pointwise_conv2d(x, x.new_ones(3, 3, 1, 1)), backend="eager")
compiled(x)
"""


def test_loading_a_program_imports_the_package(tmp_path: Path) -> None:
    """Its entry point is what `import torch` calls where the package is installed."""
    model, x = optimized(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
        torch.save((x, model(x)), tmp_path / "tensors.pt")
    command = [sys.executable, "-c", LOAD, "fresh", str(tmp_path / "model.pt2"), str(tmp_path / "tensors.pt")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_entry_point_is_one_that_import_torch_calls() -> None:
    import tomllib

    import effnet_ops_autoload

    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert points == {"torch.backends": {"effnet_ops": "effnet_ops_autoload:register"}}
    before = torch.ops.effnet_ops
    effnet_ops_autoload.register()
    assert torch.ops.effnet_ops is before


def test_what_goes_by_classes_works_on_restored_layers() -> None:
    """torch.ao's fuse_modules, with the line of the README in front of it and behind."""
    model, x = with_statistics(torchvision.models.mobilenet_v2()), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        effnet_ops.replace_layers(model)
        effnet_ops.restore_layers(model)
        fused = torch.ao.quantization.fuse_modules(model, [["features.0.0", "features.0.1"]])
        assert type(fused.features[0][1]) is nn.Identity
        effnet_ops.replace_layers(fused)
        assert relative_difference(fused(x), expected) < BOUND


SCRIPT = """
import sys, torch
if sys.argv[1]:
    import effnet_ops
try:
    torch.jit.load(sys.argv[2])(torch.ones(1, 8, 4, 4))
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize("line", ["", "import effnet_ops"])
def test_torchscript_file_needs_the_line_of_the_readme(line: str, tmp_path: Path) -> None:
    weight, path = torch.ones(8, 8, 1, 1), tmp_path / "traced.pt"
    traced = torch.jit.trace(lambda x: effnet_ops.pointwise_conv2d(x, weight), torch.ones(1, 8, 4, 4))
    traced.save(str(path))
    command = [sys.executable, "-c", SCRIPT, line, str(path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ("Unknown builtin op: effnet_ops::" in result.stdout) == (not line)
