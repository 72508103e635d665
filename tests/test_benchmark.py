"""The benchmark: what it measures, what it refuses to measure, what it keeps, and the command in front of it."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_providers import FAKES, HUNGER
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner, Result

from effnet_ops import _native
from effnet_ops.benchmark import calibration, comparison, models, steps
from effnet_ops.benchmark.calibration import Peaks, measure_peaks
from effnet_ops.benchmark.comparison import Settings, compare, prepare
from effnet_ops.benchmark.gate import Failed, gate
from effnet_ops.benchmark.layers import FUNCTION, NETWORK, Layers
from effnet_ops.benchmark.providers import PROVIDERS, SQUEEZES, Job, export_onnx, with_squeeze
from effnet_ops.benchmark.rows import Results, Row, environment
from effnet_ops.benchmark.timing import percentiles, ratio
from effnet_ops.benchmark.training import VARIANTS, Variant, compare_training
from effnet_ops.benchmark.worker import receive, send, serve
from effnet_ops.cli import MOST_THREADS, app, bench
from effnet_ops.cli.console import console

TINY = Settings("test_efficientnet", batch=1, threads=1, resolution=32, rounds=2, seconds=0.0)
HERE = {"commit": "a", "uncommitted_changes": False, "cpu": "c", "cores": 1, "isa": "i", "versions": {}, "date": "d"}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "width", 250)


def row(**fields: Any) -> Row:
    return Row(**{"operation": "m", "provider": "p", "shape": "1x3x32x32", "dtype": "float32", "threads": 1, **fields})


def test_a_wrong_result_is_an_error_and_never_a_number() -> None:
    """A fake that is wrong, one that becomes wrong, and one that dies, beside one that is right but wants memory."""
    names = ("hungry", "wrong", "later_wrong", "dying")
    told = []
    settings = replace(TINY, model="effnet_ops:efficientnet_lite0")
    rows = {r.provider: r for r in compare(settings, [FAKES[name] for name in names], lambda *args: told.append(args))}
    assert list(rows) == list(names)
    right = rows["hungry"]
    assert right.problem is None and 0 < right.p20 <= right.p50 <= right.p80 and right.error < 1e-5
    assert len(right.round_medians) == TINY.rounds and right.repetitions == 5 * TINY.rounds
    assert right.shape == "1x3x32x32" and right.threads == 1 and right.idle_load >= 0
    problems = {
        "wrong": "wrong result of the logits: error 1.0e-03",
        "later_wrong": "wrong result of the logits: error nan",
        "dying": "its process ended with exit code 3: out of luck",
    }
    for name, problem in problems.items():
        assert rows[name].problem.startswith(problem), rows[name].problem
        assert rows[name].p50 is None and rows[name].round_medians is None and rows[name].peak_rss_bytes is None
    if sys.platform == "linux":
        assert 4 * HUNGER < right.peak_rss_bytes < 4 * HUNGER + 20e6
    assert ("measuring", TINY.rounds, TINY.rounds) in told


def test_a_provider_that_is_never_ready_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "PATIENCE", 1.0)
    (row,) = compare(replace(TINY, model="effnet_ops:efficientnet_lite0"), [FAKES["slow"]])
    assert row.problem == "not ready within 1 seconds" and row.p50 is None


def test_a_worker_answers_until_it_raises_and_then_says_why_in_one_line() -> None:
    ours, theirs = multiprocessing.Pipe()
    for message in ((list, ([1, 2],)), ("index", (2,)), ("index", (3,))):
        send(ours, message)
    serve(theirs)
    assert [receive(ours) for _ in range(3)] == [(True, None), (True, 1), (False, "ValueError: 3 is not in list")]
    send(ours, (_raise, ()))
    serve(theirs)
    assert receive(ours) == (False, "LookupError: no such kernel")


def _raise() -> None:
    raise LookupError("no such kernel\nand a second line")


def test_gate_takes_nan_for_wrong() -> None:
    assert gate("x", 1e-7, 1e-6) == 1e-7
    for error in (2e-6, float("nan"), float("inf")):
        with pytest.raises(Failed, match="wrong result of x"):
            gate("x", error, 1e-6)


def test_gate_says_what_is_known_of_a_peer() -> None:
    with pytest.raises(Failed, match=r"is allowed \(its Sigmoid is off by up to 1.7e-7, .*\)"):
        gate("x", 1.0, 1e-6, PROVIDERS["onnxruntime"].remark)


def test_onnxruntime_gets_both_squeezes_and_no_swish(tmp_path: Path) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    job = Job(tmp_path, "float32", 1)
    for library, model in ("timm", "efficientnet_b0"), ("torchvision", "efficientnet_b0"):
        reference = prepare(job, models.build(f"{library}:{model}"), (1, 3, 64, 64))
        export_onnx(job)
        x = job.inputs()[0]
        for squeeze in SQUEEZES:
            graph = with_squeeze(onnx.load(job.onnx), squeeze)
            onnx.checker.check_model(graph)
            found = Counter(node.op_type for node in graph.graph.node)
            assert found["ReduceMean"] + found["GlobalAveragePool"] == found[squeeze] == 17
            assert found["Swish"] == 0 and found["Sigmoid"] == 65
            session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
            out = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
            assert (out - reference.logits[0]).norm() / reference.logits[0].norm() < 1e-4
        choices = {runner.choice for runner in PROVIDERS["onnxruntime"].candidates(job)}
        assert choices == {f"squeeze as {squeeze}" for squeeze in SQUEEZES}


@pytest.mark.parametrize("opset", [13, 18])
def test_squeeze_that_is_no_average_over_the_image_stays(opset: int) -> None:
    onnx = pytest.importorskip("onnx")
    import onnx.helper as build

    def reduce(name: str, axes: list[int], keepdims: int) -> list[Any]:
        if opset < 18:
            return [build.make_node("ReduceMean", ["x"], [name], axes=axes, keepdims=keepdims)]
        constant = build.make_tensor("", onnx.TensorProto.INT64, [len(axes)], axes)
        constant = build.make_node("Constant", [], [f"{name} axes"], value=constant)
        return [constant, build.make_node("ReduceMean", ["x", f"{name} axes"], [name], keepdims=keepdims)]

    nodes = [*reduce("image", [-1, -2], 1), *reduce("no axes kept", [2, 3], 0), *reduce("channels", [1], 1)]
    value = build.make_tensor_value_info
    names = ("image", "no axes kept", "channels")
    outputs = [value(name, onnx.TensorProto.FLOAT, None) for name in names]
    graph = build.make_graph(nodes, "g", [value("x", onnx.TensorProto.FLOAT, [1, 2, 3, 4])], outputs)
    model = build.make_model(graph, opset_imports=[build.make_opsetid("", opset)])
    found = {node.output[0]: node.op_type for node in with_squeeze(model, "GlobalAveragePool").graph.node}
    assert [found[name] for name in names] == ["GlobalAveragePool", "ReduceMean", "ReduceMean"]


def test_ratios_are_of_the_same_rounds() -> None:
    assert percentiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == pytest.approx((2.0, 3.5, 5.0))
    # In the second round the machine was ten times slower, for both.
    assert ratio([2.0, 30.0, 4.0], [1.0, 10.0, 1.0]) == pytest.approx((2.4, 3.0, 3.6))
    with pytest.raises(ValueError, match="zip"):
        ratio([1.0, 2.0], [1.0])


def test_results_keep_the_newest_row_of_a_key_and_its_origin(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "rows.json"
    results = Results(path)
    results.add([row(p50=1.0), row(provider="q", p50=2.0)], HERE)
    later = {**HERE, "commit": "b"}
    results.add([row(p50=3.0), row(threads=2, p50=4.0)], later)
    again = Results(path)
    assert [(r.provider, r.threads, r.p50) for r in again.rows] == [("p", 1, 3.0), ("q", 1, 2.0), ("p", 2, 4.0)]
    assert [r.p50 for r in again.fresh(later)] == [3.0, 4.0]
    assert [r.p50 for r in again.fresh({**HERE, "date": "another"})] == [2.0]
    assert again.fresh({**later, "uncommitted_changes": True}) == []
    of_any = again.fresh({**later, "commit": "c", "uncommitted_changes": True}, any_commit=True)
    assert [r.p50 for r in of_any] == [3.0, 2.0, 4.0]
    assert again.fresh({**later, "cpu": "another"}, any_commit=True) == []
    content = json.loads(path.read_text())
    assert content["environments"] == [HERE, later]
    assert content["rows"][0] == {
        **{"operation": "m", "provider": "p", "shape": "1x3x32x32", "dtype": "float32", "device": "cpu"},
        **{"mode": "forward", "threads": 1, "p50": 3.0, "environment": 1},
    }
    again.add([row(provider="q", p50=5.0)], later)
    assert json.loads(path.read_text())["environments"] == [later]


@pytest.mark.parametrize("text", ["", "[]", '{"rows": []}', '{"environments": [], "rows": [{"environment": 0}]}'])
def test_a_file_of_something_else_is_refused_and_left_alone(text: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    result = run("--json", path)
    assert result.exit_code == 2
    assert "is not a file of benchmark rows" in result.stderr
    assert path.read_text() == text


def test_environment_names_machine_versions_and_commit() -> None:
    here = environment()
    assert here["versions"]["torch"] and here["cpu"] and here["cores"] >= 1
    assert here["commit"] is None or len(here["commit"]) == 40


def test_default_resolutions_are_the_published_ones() -> None:
    names = ("efficientnet_b4", "torchvision:efficientnet_b4", "effnet_ops:tf_efficientnet_b4", "mobilenetv2_100")
    assert [models.default_resolution(name) for name in names] == [380, 380, 380, 224]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "eficientnet_b0"), "did you mean 'efficientnet_b0'"),
        (("--model", "torchvision:eficientnet_b0"), "did you mean 'efficientnet_b0'"),
        (("--model", "effnet_ops:eficientnet_b0"), "did you mean 'efficientnet_b0'"),
        (("--model", "tim:efficientnet_b0"), "did you mean 'timm'"),
        (("--peers", "eager,openvin"), "did you mean 'openvino'"),
        (("--dtype", "bfloat"), "did you mean 'bfloat16'"),
    ],
)
def test_unknown_names_are_one_line_with_the_closest_match(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("--json", "folder", "cannot write {path}: Is a directory"),
        ("--json", "file/rows.json", "cannot write {path}: "),
        ("--plot", "file", "cannot write into the folder {path}: File exists"),
        ("--plot", "file/plots", "cannot write into the folder {path}: "),
    ],
)
def test_an_output_is_refused_before_the_work(
    option: str, name: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(bench, "compare", lambda *args: pytest.fail("it has begun"))
    path = tmp_path / name
    result = run("--model", "test_efficientnet", option, path)
    assert result.exit_code == 2
    assert message.format(path=path) in result.stderr and len(result.stderr.splitlines()) == 1


def test_what_cannot_be_written_or_measured_is_no_wrong_output(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bench, "compare", lambda settings, providers, report: [row(p20=1.0, p50=1.0, p80=1.0)])
    monkeypatch.setattr(Results, "add", full)
    result = run("--model", "test_efficientnet", "--json", tmp_path / "rows.json")
    assert result.exit_code == 2 and result.stderr == "effnet-ops: [Errno 28] No space left on device\n"
    monkeypatch.undo()
    result = run("--model", "effnet_ops:efficientnet_b0", "--resolution", 2**31, "--peers", "eager")
    assert result.exit_code == 2 and "cannot be measured: " in result.stderr and len(result.stderr.splitlines()) == 1


def test_threads_have_an_end() -> None:
    result = run("--threads", MOST_THREADS + 1)
    assert result.exit_code == 2
    assert "--threads" in result.stderr and str(MOST_THREADS) in result.stderr


@pytest.mark.parametrize("width", [1, 60, 80, 120])
def test_a_narrow_terminal_cuts_no_number(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def words() -> list[str]:
        with console.capture() as captured:
            bench.show_providers(replace(TINY, threads=1), rows)
        assert "1 thread of" in " ".join(captured.get().split())
        return captured.get().translate(str.maketrans("│┃", "  ")).split()

    times = dict(p20=8.123, p50=8.456, p80=1234.5, round_medians=[8.1, 8.2], error=3.2e-7, peak_rss_bytes=12345678)
    rows = [row(provider=name, **times) for name in ("optimize_for_inference", "replace_layers", "openvino")]
    monkeypatch.setattr(console, "width", width)
    narrow = words()
    for figure in ("8.46", "(8.12", "1234.50)", "1.00x", "(1.00", "12.3", "3.2e-07"):
        assert narrow.count(figure) >= 3, figure
    assert {"optimize", "inference", "replace", "layers"} <= set(narrow)


def test_a_missing_peer_is_named_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else find(name))
    names = [provider.name for provider in bench.chosen(["eager", "openvino"])]
    assert names == ["eager", "replace_layers", "optimize_for_inference"]
    assert "openvino is left out: pip install openvino" in capsys.readouterr().out


def test_an_optional_peer_is_named_only_where_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("ncnn", "pnnx") else find(name))
    assert "ncnn" not in [provider.name for provider in bench.chosen(None)]
    assert "ncnn" not in capsys.readouterr().out
    bench.chosen(["ncnn"])
    assert "ncnn is left out: pip install ncnn pnnx" in capsys.readouterr().out


def test_optional_peers_are_asked_for_their_dtype_alone() -> None:
    optional = [provider for provider in PROVIDERS.values() if provider.optional]
    assert [provider.name for provider in optional] == ["zentorch", "ncnn", "mnn", "litert", "executorch"]
    (task,) = bench.tasks_of([replace(TINY, dtype="bfloat16")], optional, layers=False)
    assert [provider.name for provider in task.providers] == ["zentorch"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zentorch", "ncnn", "mnn", "litert", "executorch"])
def test_optional_peer_is_right(name: str) -> None:
    """Two images, since ncnn takes them one by one; half precision would be a thousand times what is allowed."""
    if missing := PROVIDERS[name].missing():
        pytest.skip(f"not installed: {', '.join(missing)}")
    (measured,) = compare(replace(TINY, batch=2), [PROVIDERS[name]])
    if name == "zentorch" and "AVX512" not in torch.backends.cpu.get_cpu_capability():
        assert "AVX-512" in measured.problem
    else:
        assert measured.problem is None and measured.error < 1e-4


@pytest.mark.slow
def test_every_run_measures_the_same_network() -> None:
    state = torch.get_rng_state()
    one, other = (models.build("test_efficientnet").state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["test_efficientnet", "efficientnet_lite0"])
def test_steps_of_training_have_their_costs(name: str) -> None:
    costs, whole = steps.step_costs(Settings(name, 2, "float32", 1, 32), 1)
    assert set(costs) == {"F1", "F2", "F3, F4", "F5", "B1, B2", "B3", "B4", "B5"}
    assert 0 < sum(cost.seconds for cost in costs.values()) < whole
    stock, counted = models.build(name), []
    for module_name, module in stock.named_modules():
        if module_name.endswith("conv_pwl") or (name == "efficientnet_lite0" and module_name == "blocks.0.0.conv_pw"):
            module.register_forward_hook(lambda conv, _, y: counted.append(2 * y.numel() * conv.in_channels))
    with torch.no_grad():
        stock(torch.randn(2, 3, 32, 32))
    projects = sum(counted)
    assert (costs["F3, F4"].flops, costs["B1, B2"].flops) == (projects, 2 * projects)
    assert costs["B4"].flops > costs["F2"].flops > 0 and costs["B5"].bytes > costs["F1"].bytes > 0


def test_steps_of_training_are_measured_in_float32_alone() -> None:
    with pytest.raises(ValueError, match="measured in float32, not in bfloat16"):
        steps.step_costs(Settings("test_efficientnet", 2, "bfloat16", 1, 32))


def test_training_steps_are_measured_side_by_side() -> None:
    """Ours beside eager PyTorch, right, with less memory; a variant that cannot be built has its reason."""
    broken = Variant("broken", "no_such_layout")
    settings = Settings("test_efficientnet", 2, "float32", 1, 32, rounds=1, seconds=0)
    stock, ours, failed = compare_training(
        settings, [VARIANTS["eager_channels_last"], VARIANTS["effnet_ops_replace"], broken]
    )
    for row in (stock, ours):
        assert row.problem is None and row.mode == "step" and row.p50 > 0 and row.error < 1e-4
    assert 0 < ours.saved_bytes < stock.saved_bytes
    assert failed.p50 is None and "no_such_layout" in failed.problem


@pytest.mark.parametrize("peers", ["onnxruntime", pytest.param("onnxruntime,openvino", marks=pytest.mark.slow)])
def test_the_command_measures_keeps_and_does_not_repeat(
    peers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real runtimes and the layers at a tiny size; then the same again, from the file."""
    monkeypatch.setattr(bench, "environment", lambda: HERE)
    path, plots = tmp_path / "rows.json", tmp_path / "plots"
    tiny = ("--model", "test_efficientnet", "--resolution", 32, "--rounds", 1, "--seconds", 0, "--threads", 1)
    files = ("--json", path, "--plot", plots)
    result = run(*tiny, *files, "--peers", peers, "--layers")
    assert result.exit_code == 0, result.output
    rows = Results(path).rows
    whole = {r.provider: r for r in rows if r.layer is None and r.operation == "test_efficientnet"}
    installed = [name for name in peers.split(",") if not PROVIDERS[name].missing()]
    assert list(whole) == [*installed, "replace_layers", "optimize_for_inference"]
    for name, measured in whole.items():
        assert measured.problem is None and measured.p50 > 0 and measured.error < 1e-4
        assert name in result.output
    assert {r.operation for r in rows} >= {"network", "mbconv", "pointwise", "depthwise", "multiply_add", "copy"}
    assert {path.name for path in plots.iterdir()} >= {"end_to_end_test_efficientnet.svg"}
    assert any(path.name.startswith("roofline_test_efficientnet") for path in plots.iterdir())

    def never(*args: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(bench, "compare", never)
    monkeypatch.setattr(bench, "profile", never)
    again = run(*tiny, "--json", path, "--peers", peers, "--layers")
    assert again.exit_code == 0, again.output
    assert again.output.count(f"already in {path}") == 2
    repeated = run(*tiny, "--json", path, "--peers", "onnxruntime", "--fresh")
    assert isinstance(repeated.exception, AssertionError)


def test_the_command_fails_where_a_row_has_no_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "compare", lambda settings, providers, report: [row(problem="wrong [result]")])
    monkeypatch.setattr(bench, "environment", lambda: HERE)
    path = tmp_path / "rows.json"
    for _ in range(2):
        result = run("--model", "test_efficientnet", "--json", path)
        assert result.exit_code == 1
        assert "wrong [result]" in result.output and "already in" not in result.output
    assert [r.problem for r in Results(path).rows] == ["wrong [result]"]


@pytest.mark.slow
def test_our_own_models_are_plain_pytorch_for_the_peers() -> None:
    providers = [PROVIDERS[name] for name in ["onnxruntime"] if not PROVIDERS[name].missing()]
    rows = compare(replace(TINY, model="effnet_ops:efficientnet_lite0"), [*providers, FAKES["backend"]])
    assert [r.problem for r in rows[:-1]] == [None] * len(providers)
    assert rows[-1].problem == "LookupError: reference"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_are_all_there_with_the_work_of_the_stock_model(dtype: str, tmp_path: Path) -> None:
    stock = models.build("test_efficientnet")
    job = Job(tmp_path, dtype, 1)
    reference = prepare(job, stock, (1, 3, 64, 64))
    layers = Layers(job)
    reference.check(layers.logits())
    network, functions = layers.network(0.0), layers.functions(0.0)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        stock(torch.randn(1, 3, 64, 64))
    works = {m.work.layer: m.work for m in network[:-2]}
    total, outside = network[-2:]
    assert total.work.operation == "network" and total.work.flops == counter.get_total_flops()
    assert total.work.shape == "1x3x64x64 -> 1x1000"
    assert {m.work.operation for m in network} >= {"convolution", "mbconv", "pointwise", "linear", "pool"}
    assert works["classifier"].bytes == (256 + 1000 + 256 * 1000 + 1000) * (4 if dtype == "float32" else 2)
    for measurement in network:
        assert measurement.provider == NETWORK and len(measurement.seconds) == len(total.seconds) >= 5
    parts = [sum(m.seconds[i] for m in network[:-2]) + outside.seconds[i] for i in range(len(total.seconds))]
    assert parts == pytest.approx(total.seconds)
    assert {m.work.operation for m in functions} == {"convolution", "pointwise", "depthwise", "squeeze_excite"}
    assert all(m.provider == FUNCTION and m.seconds and m.error is not None and m.work.flops for m in functions)
    assert len({(m.work.operation, m.work.shape) for m in functions}) == len(functions)


def test_a_wrong_function_has_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import effnet_ops

    depthwise = effnet_ops.depthwise_conv2d

    def slightly_wrong(x: torch.Tensor, *args: torch.Tensor, **keywords: object) -> torch.Tensor:
        return depthwise(x, *args, **keywords) * (1 if x.dtype == torch.float64 else 1 + 1e-4)

    monkeypatch.setattr(effnet_ops, "depthwise_conv2d", slightly_wrong)
    job = Job(tmp_path, "float32", 1)
    prepare(job, models.build("test_efficientnet"), (1, 3, 32, 32))
    with pytest.raises(Failed, match=r"wrong result of .*depthwise"):
        Layers(job)


def test_peaks_are_measured_on_every_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "COPIED", 1 << 20)
    peaks = measure_peaks(2, seconds=0.001, repetitions=2)
    native = _native.module
    assert {isa for isa, _ in peaks.multiply_adds} == set(native.available_isas())
    assert all(0.1 < peak < 1e5 for peak in peaks.multiply_adds.values()) and 0.01 < peaks.copy < 1e5
    assert ("avx512_bf16", "bfloat16") in peaks.multiply_adds or "avx512_bf16" not in native.available_isas()
    rows = peaks.rows()
    assert len({r.key for r in rows}) == len(rows) == len(peaks.multiply_adds) + 1


def test_the_peak_of_a_dtype_is_the_best_that_there_is() -> None:
    peaks = Peaks(1, {("avx2", "float32"): 3.0, ("avx512", "float32"): 2.0}, 1.0)
    assert (peaks.of("float32"), peaks.of("float32", "avx512"), peaks.of("bfloat16")) == (3.0, 2.0, 3.0)
    peaks.multiply_adds["avx512_bf16", "bfloat16"] = 5.0
    assert (peaks.of("bfloat16"), peaks.of("float32"), peaks.of("bfloat16", "avx2")) == (5.0, 3.0, 3.0)


def test_calibration_loops_count_and_check() -> None:
    native = _native.module
    for isa in native.available_isas():
        once = native.multiply_adds(isa, False, 1)
        assert once > 0 and native.multiply_adds(isa, False, 1000) == 1000 * once
    with pytest.raises(ValueError, match="'mmx' cannot run here"):
        native.multiply_adds("mmx", False, 1)
    source, destination = bytearray(range(256)), bytearray(256)
    native.copy(destination, source)
    assert destination == source
    with pytest.raises(ValueError, match="destination has 255 bytes, source has 256"):
        native.copy(bytearray(255), source)
    with pytest.raises((BufferError, ValueError)):
        native.copy(bytes(256), source)


def test_plots_are_the_same_for_the_same_rows_and_leave_out_what_failed(tmp_path: Path) -> None:
    from effnet_ops.benchmark.plots import draw

    times = {"eager": 4.0, "openvino": 2.0, "optimize_for_inference": 1.0}
    rows = [
        row(operation=model, provider=name, shape=f"{batch}x3x32x32", threads=threads, p20=t, p50=t, p80=2 * t)
        for model in ("one", "torchvision:two")
        for name, t in times.items()
        for batch in (1, 2)
        for threads in (1, 2)
    ]
    rows.append(row(operation="one", provider="failing", threads=2, problem="wrong"))
    paths = draw(rows, tmp_path / "a")
    assert {path.stem for path in paths} == {
        *("end_to_end_one", "batch_scaling_one_float32", "thread_scaling_one_float32", "models"),
        *("end_to_end_torchvision_two", "batch_scaling_torchvision_two_float32"),
        "thread_scaling_torchvision_two_float32",
    }
    for first, second in zip(paths, draw(rows, tmp_path / "b"), strict=True):
        text = first.read_text()
        assert text == second.read_text()
        assert "openvino" in text and "failing" not in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compile", "compile_freezing", "compile_max_autotune"])
def test_torch_compile_is_right(name: str) -> None:
    (measured,) = compare(TINY, [PROVIDERS[name]])
    assert measured.problem is None and measured.choice in ("contiguous", "channels_last")
