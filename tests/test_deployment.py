"""Models as files that run elsewhere: ONNX, programs of torch.export, AOTInductor packages (docs/deployment.md)."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import timm
import torch
from networks import relative_difference, with_statistics
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import effnet_ops
from effnet_ops import deployment
from effnet_ops.deployment.onnx_file import OPSETS, for_runtimes
from effnet_ops.deployment.program import own_operators
from effnet_ops.models import ArchitectureSpec, Convention, ScaledSpec, StageSpec

BOUND = 1e-4
"""Of logits: other runtimes round each layer otherwise, and ONNX Runtime's sigmoid is an approximation."""
SLOW = pytest.mark.slow
ALL = ("batch", "height", "width")
SIZES = ((1, 3, 64, 64), (3, 3, 97, 71), (2, 3, 66, 128))
STAGES = StageSpec(1, 3, 1, 1, 16), StageSpec(1, 5, 2, 6, 24)


def stock(name: str = "test_efficientnet") -> nn.Module:
    torch.manual_seed(0)
    return with_statistics(timm.create_model(name, num_classes=10)).eval()


def same() -> nn.Module:
    """timm's `tf_` networks, small: TensorFlow's SAME padding, whose pixels depend on the image's size."""
    torch.manual_seed(0)
    stages = [["ds_r1_k3_s1_e1_c16_se0.25"], ["ir_r1_k5_s2_e4_c24_se0.25"], ["ir_r2_k3_s2_e4_c32_se0.25"]]
    definition = timm.models._efficientnet_builder.decode_arch_def(stages)
    make = timm.models.efficientnet.EfficientNet
    return with_statistics(make(definition, num_classes=10, stem_size=16, num_features=64, pad_type="same")).eval()


def own(padding: str = "symmetric") -> nn.Module:
    convention = Convention(padding=padding)
    spec = ScaledSpec(ArchitectureSpec(STAGES, 16, 64), 1.0, 1.0, 64, convention=convention)
    return with_statistics(effnet_ops.create_model(spec, num_classes=10)).eval()


def replaced(model: nn.Module) -> nn.Module:
    assert effnet_ops.replace_layers(model).replaced
    return model


def own_b0(model: nn.Module) -> nn.Module:
    """The own model in place of timm's, with its weights."""
    made = effnet_ops.create_model("efficientnet_b0", num_classes=10)
    made.load_state_dict(effnet_ops.convert_state_dict(model.state_dict(), source="timm", target="effnet_ops"))
    return made.eval()


KINDS = {"replaced": replaced, "optimized": effnet_ops.optimize_for_inference, "own": own_b0}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "stock": stock,
    "replaced": lambda: replaced(stock()),
    "optimized": lambda: effnet_ops.optimize_for_inference(stock()),
    "own": own,
    "replaced, SAME": lambda: replaced(same()),
    "optimized, SAME": lambda: effnet_ops.optimize_for_inference(same()),
    "own, SAME": lambda: own("same"),
}


def each_model(*quick: str) -> list[Any]:
    """All models for parametrize; those that are not ``quick`` ones are for `make test-all`."""
    return [pytest.param(build, id=name, marks=() if name in quick else SLOW) for name, build in MODELS.items()]


def images(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))


def check(run: Callable[[Tensor], Tensor], model: nn.Module, *sizes: tuple[int, ...]) -> None:
    for size in sizes:
        x = images(*size)
        with torch.no_grad():
            expected = model(x)
        assert relative_difference(run(x), expected) < BOUND, size


def session(path: Path) -> Callable[[Tensor], Tensor]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 2
    made = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(made.run(None, {"x": x.numpy()})[0])


def nodes(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("build", each_model("optimized, SAME"))
def test_onnx_file_has_open_sizes_and_standard_operators_alone(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    model, path = build(), tmp_path / "model.onnx"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert deployment.export_onnx(model, images(1, 3, 64, 64), path, dynamic=ALL) == path
    file = onnx.load(path)
    onnx.checker.check_model(file)
    assert {node.domain for node in file.graph.node} == {""}
    found = nodes(path)
    assert not {"BatchNormalization", "ReduceMean", "Swish", "Ceil"} & set(found)
    assert [size.dim_param for size in file.graph.input[0].type.tensor_type.shape.dim] == [
        "batch",
        "",
        "height",
        "width",
    ]
    check(session(path), model, *SIZES)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert list(tmp_path.iterdir()) == [path]


@SLOW
@pytest.mark.parametrize("kind", ["replaced", "optimized", "own"])
def test_onnx_file_has_no_more_nodes_than_pytorchs_best_of_the_stock_model(kind: str, tmp_path: Path) -> None:
    """Of each convolution, activation, gate and addition one node, and the squeeze as runtimes run it best."""
    path, x, best = tmp_path / "model.onnx", images(2, 3, 64, 64), []
    for opset in (18, 24):
        torch.onnx.export(stock("efficientnet_b0"), (x,), path, dynamo=True, opset_version=opset, verbose=False)
        best.append(nodes(path))
    deployment.export_onnx(KINDS[kind](stock("efficientnet_b0")), x, path, dynamic=())
    found = nodes(path)
    assert found.total() <= min(each.total() for each in best)
    assert found["GlobalAveragePool"] == 17 and not found["ReduceMean"] and not found["Swish"]


@pytest.mark.parametrize("opset", [*(pytest.param(opset, marks=SLOW) for opset in OPSETS[:-1]), OPSETS[-1]])
def test_onnx_file_in_each_opset(opset: int, tmp_path: Path) -> None:
    model, path = MODELS["replaced"](), tmp_path / "model.onnx"
    deployment.export_onnx(model, images(2, 3, 64, 64), path, opset=opset)
    assert [entry.version for entry in onnx.load(path).opset_import if entry.domain == ""] == [opset]
    assert not nodes(path)["Swish"]
    check(session(path), model, (1, 3, 64, 64), (5, 3, 64, 64))


def test_swish_of_a_file_becomes_two_nodes_with_the_same_values() -> None:
    value = onnx.helper.make_tensor_value_info
    kind = onnx.TensorProto.FLOAT
    swish = onnx.helper.make_node("Swish", ["x"], ["y"], "act")
    graph = onnx.helper.make_graph([swish], "g", [value("x", kind, [8])], [value("y", kind, [8])])
    file = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)], ir_version=10)
    for_runtimes(file)
    assert [node.op_type for node in file.graph.node] == ["Sigmoid", "Mul"]
    onnx.checker.check_model(file)
    x = images(8)
    result = onnx.reference.ReferenceEvaluator(file).run(None, {"x": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(result), nn.functional.silu(x))


@SLOW
@pytest.mark.parametrize("name", ["replaced, SAME", "own"])
def test_openvino_reads_the_onnx_file(name: str, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    model, path = MODELS[name](), tmp_path / "model.onnx"
    deployment.export_onnx(model, images(1, 3, 64, 64), path, dynamic=ALL)
    compiled = openvino.compile_model(openvino.Core().read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    check(lambda x: torch.from_numpy(compiled(x.numpy())[0].copy()), model, *SIZES[:2])


def tiny() -> nn.Module:
    """For refusals, which need no network."""
    return nn.Sequential(effnet_ops.layers.MBConv(3, 3), nn.Dropout(0.5)).eval()


def _with_training_dropout() -> nn.Module:
    model = tiny()
    model[1].train()
    return model


BAD = {
    "training": (lambda: tiny().train(), {}, "the model .* is in training mode"),
    "one in training": (_with_training_dropout, {}, r"1 \(Dropout\) is in training mode"),
    "opset": (tiny, {"opset": 17}, "opset must be from 18 to 24, got 17"),
    "opset above": (tiny, {"opset": 25}, "opset must be from 18 to 24, got 25"),
    "opset True": (tiny, {"opset": True}, "opset must be from 18 to 24, got True"),
    "opset's type": (tiny, {"opset": "20"}, "opset must be from 18 to 24, got '20'"),
    "channels": (tiny, {"dynamic": ["channels"]}, "channels cannot be dynamic"),
    "axis": (tiny, {"dynamic": ["hight"]}, "unknown dynamic axis 'hight'; did you mean 'height'"),
    "folder": (tiny, {"path": "nowhere/model.onnx"}, "there is no folder"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_what_cannot_be_exported_is_refused_before_anything_is_written(
    case: tuple[Callable[[], nn.Module], dict[str, object], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, keywords, message = case
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.export, "export", None)
    with pytest.raises(ValueError, match=message):
        deployment.export_onnx(build(), images(1, 3, 64, 64), **{"path": "model.onnx", **keywords})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("export", ["export_program", "export_package"])
@pytest.mark.parametrize("case", [BAD[name] for name in ("training", "one in training", "channels", "axis")])
def test_programs_and_packages_refuse_the_same(
    export: str,
    case: tuple[Callable[[], nn.Module], dict[str, object], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build, keywords, message = case
    monkeypatch.setattr(torch.export, "export", None)
    path = () if export == "export_program" else (tmp_path / "model.pt2",)
    with pytest.raises(ValueError, match=message):
        getattr(deployment, export)(build(), images(1, 3, 64, 64), *path, **keywords)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("example", [torch.zeros(3, 64, 64), torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "x"])
def test_an_example_must_be_images(example: object, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="example must be a batch of images"):
        deployment.export_onnx(tiny(), example, tmp_path / "model.onnx")


class Inverse(nn.Module):
    """What ONNX has no operator for."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(x)


def test_a_failed_export_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("old")
    with pytest.raises(Exception, match="eigh"):
        deployment.export_onnx(Inverse().eval(), images(1, 3, 8, 8), path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def fails(*arguments: object) -> None:
    raise OSError("the disk is full")


def writes_half(program: object, path: str, settings: object) -> None:
    Path(path).write_text("half")
    fails()


@pytest.mark.parametrize(
    ("where", "instead"),
    [
        ("effnet_ops.internals.compile_package", writes_half),
        ("effnet_ops.deployment.package.export_program", fails),
        ("os.replace", fails),
    ],
    ids=["compiler", "export", "move"],
)
def test_a_package_that_fails_half_way_leaves_the_file_that_was_there(
    where: str, instead: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pt2"
    path.write_text("old")
    monkeypatch.setattr("effnet_ops.deployment.package.export_program", lambda *args, **settings: None)
    monkeypatch.setattr("effnet_ops.internals.compile_package", lambda program, path, settings: path)
    monkeypatch.setattr(where, lambda *arguments, **settings: instead(*arguments))
    with pytest.raises(OSError, match="disk is full"):
        deployment.export_package(tiny(), images(1, 3, 64, 64), path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("method", ["write_bytes", "replace"])
def test_a_failed_write_of_an_onnx_file_leaves_the_file_that_was_there(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class File:
        def ByteSize(self) -> int:
            return 3

        def SerializeToString(self) -> bytes:
            return b"new"

    path = tmp_path / "model.onnx"
    path.write_text("old")
    monkeypatch.setattr("effnet_ops.deployment.onnx_file._as_onnx", lambda *arguments: File())
    monkeypatch.setattr(Path, method, fails)
    with pytest.raises(OSError, match="disk is full"):
        deployment.export_onnx(tiny(), images(1, 3, 64, 64), path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_no_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_text("no package")
    with pytest.raises(ValueError, match=r"model\.pt2 is not an AOTInductor package"):
        deployment.load_package(tmp_path / "model.pt2")


@pytest.mark.parametrize("build", each_model("replaced, SAME"))
def test_program_with_open_sizes_can_be_saved_and_loaded(build: Callable[[], nn.Module]) -> None:
    model, file = build(), io.BytesIO()
    program = deployment.export_program(model, images(1, 3, 64, 64), dynamic=ALL)
    assert bool(own_operators(program)) == (build is not stock)
    assert "ceil" not in str(program.graph)
    torch.export.save(program, file)
    file.seek(0)
    check(torch.export.load(file).module(), model, *SIZES)


@SLOW
@pytest.mark.parametrize("name", ["replaced, SAME", "own, SAME"])
def test_torch_export_itself_leaves_no_rounded_fraction_in_the_graph(name: str) -> None:
    """A `ceil` of a fraction cannot be serialised."""
    model, file = MODELS[name](), io.BytesIO()
    shapes = ({axis: torch.export.Dim.DYNAMIC for axis in (0, 2, 3)},)
    with torch.no_grad():
        torch.export.save(torch.export.export(model, (images(2, 3, 64, 64),), dynamic_shapes=shapes), file)
    file.seek(0)
    check(torch.export.load(file).module(), model, (3, 3, 97, 71))


def test_weights_of_a_copy_are_packed_once() -> None:
    """The program has the operators, and nothing that is computed from parameters at each call."""
    program = deployment.export_program(MODELS["optimized"](), images(2, 3, 64, 64), dynamic=())
    called = [node for node in program.graph.nodes if node.op == "call_function"]
    constants = {node for node in program.graph.nodes if node.op == "placeholder" and node.name != "x"}
    assert not [node for node in called if node.all_input_nodes and set(node.all_input_nodes) <= constants]
    assert len(own_operators(program)) == 5  # three Fused-MBConv blocks, two MBConv blocks

    assert len(program.state_dict) == len(constants) == len({id(value) for value in program.state_dict.values()})


@SLOW
@pytest.mark.parametrize("name", ["replaced, SAME", "optimized", "own"])
def test_decomposed_program_runs_without_our_operators(name: str) -> None:
    model = MODELS[name]()
    program = deployment.export_program(model, images(2, 3, 64, 64), dynamic=ALL, decompose=True)
    assert not own_operators(program)
    check(program.module(), model, *SIZES)


@SLOW
@pytest.mark.parametrize("name", ["replaced", "own"])
def test_program_of_torch_export_goes_to_onnx_by_the_table(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    model, x = MODELS[name](), images(2, 3, 64, 64)
    with torch.no_grad():
        program = torch.export.export(model, (x,)).run_decompositions(deployment.decompositions())
        torch.onnx.export(program, f=tmp_path / "model.onnx", dynamo=True, input_names=["x"], verbose=False)
    assert not nodes(tmp_path / "model.onnx")["BatchNormalization"]
    check(session(tmp_path / "model.onnx"), model, (2, 3, 64, 64))


@pytest.mark.parametrize("name", ["replaced, SAME", pytest.param("own, SAME", marks=SLOW)])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_compiled_whole_with_open_sizes_once(name: str, training: bool) -> None:
    """One graph without a break, for every batch and size, in evaluation and in training."""
    torch._dynamo.reset()
    model, counter = MODELS[name]().train(training), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    # Height and width that are equal at first are one number to the compiler, until they are not.
    for size in ((6, 3, 64, 96), (3, 3, 97, 71), (4, 3, 66, 128), (5, 3, 80, 80)):
        y = compiled(images(*size))
        if training:
            y.sum().backward()
    assert counter.frame_count == 1
    torch._dynamo.reset()


@SLOW
@pytest.mark.parametrize("name", ["replaced, SAME", "optimized", "own"])
def test_package_checks_its_images(name: str, tmp_path: Path) -> None:
    model, path = MODELS[name](), tmp_path / "model.pt2"
    deployment.export_package(model, images(2, 3, 64, 64), path, dynamic=ALL)
    assert list(tmp_path.iterdir()) == [path]
    run = deployment.load_package(path)
    check(run, model, *SIZES)
    x = images(2, 3, 64, 64)
    for wrong in (x.double(), x.contiguous(memory_format=torch.channels_last), x[:, :1].expand(2, 3, 64, 64)):
        with pytest.raises((RuntimeError, ValueError), match=r"run|strides"):
            run(wrong)


def test_package_has_the_suffix_and_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end with \.pt2, got model\.so"):
        deployment.export_package(tiny(), images(1, 3, 64, 64), tmp_path / "model.so")
    with pytest.raises(ValueError, match="there is no folder"):
        deployment.export_package(tiny(), images(1, 3, 64, 64), tmp_path / "no" / "model.pt2")
    with pytest.raises(FileNotFoundError, match="there is no package"):
        deployment.load_package(tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


@SLOW
@pytest.mark.parametrize("way", ["program", "package"])
@pytest.mark.parametrize("kind", ["optimized", "replaced"])
def test_bfloat16_leaves_as_a_program_and_a_package(kind: str, way: str, tmp_path: Path) -> None:
    """A copy takes images in float32; a replaced model in bfloat16, with its parameters."""
    model, x = stock(), images(2, 3, 64, 64)
    if kind == "optimized":
        model = effnet_ops.optimize_for_inference(model, dtype=torch.bfloat16)
    else:
        model, x = replaced(model.bfloat16()), x.bfloat16()
    if way == "program":
        file = io.BytesIO()
        torch.export.save(deployment.export_program(model, x, dynamic=ALL), file)
        file.seek(0)
        run = torch.export.load(file).module()
    else:
        run = deployment.load_package(deployment.export_package(model, x, tmp_path / "model.pt2", dynamic=ALL))
    with torch.no_grad():
        expected = model(x)
    y = run(x)
    assert y.dtype is expected.dtype is x.dtype
    assert relative_difference(y.float(), expected.float()) < 2e-2
