"""Latency tables: what is measured and when, what a file keeps, and predictions; no test depends on a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import effnet_ops
from effnet_ops import layers, scaling
from effnet_ops.models import ScaledSpec, model_spec
from effnet_ops.scaling import ForeignFile, LatencyTable, Timing, latency
from effnet_ops.scaling.digits import TINY
from effnet_ops.scaling.latency import Step, default_path, measure_rounds, units

OTHER = ScaledSpec(TINY.architecture, width=1.5, depth=2.0, resolution=20, name="other")


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Measuring gives every layer a millisecond and a network what its layers sum up to plus a tenth; the calls."""
    measured: list[str] = []

    def rounds(steps, rounds, synchronize):
        for name, step in steps.items():
            measured.append(name)
            step.call(step.prepare())
        return {n: Timing(1e-3, 1e-3 if "network" not in n else 9e-3, 2e-3, rounds, rounds) for n in steps}

    monkeypatch.setattr(latency, "measure_rounds", rounds)
    return measured


@pytest.mark.parametrize("name", ["efficientnet_b0", "tf_efficientnet_b1", "efficientnet_lite0"])
def test_units_have_the_shapes_that_layers_see(name: str) -> None:
    spec = model_spec(name)
    with torch.device("meta"):
        model = effnet_ops.create_model(spec).eval()
    shapes: dict[str, tuple[int, ...]] = {}
    for path, module in model.named_modules():
        if isinstance(module, layers.MBConv):
            module.register_forward_hook(lambda _, args, out, p=path: shapes.update({p: tuple(args[0].shape[1:])}))
    model(torch.empty(1, 3, 97, 97, device="meta"))
    found = {unit.name: unit.in_shape for unit in units(spec, 97)}
    assert found.pop("stem") == (3, 97, 97)
    head = found.pop("head")
    assert found == shapes
    assert head[0] == spec.stages()[-1][-1].out_channels


def test_equal_layers_have_equal_keys_and_others_do_not() -> None:
    keys = [unit.key for unit in units("efficientnet_b0")]
    blocks = [block for stage in model_spec("efficientnet_b0").stages() for block in stage]
    same = {(a, b) for a in range(16) for b in range(16) if keys[a + 1] == keys[b + 1]}
    assert all(blocks[a] == blocks[b] for a, b in same)
    assert len(set(keys)) == 14
    assert not set(keys[1:]) & {unit.key for unit in units("efficientnet_lite0")[1:]}
    assert not set(keys[1:-1]) & {unit.key for unit in units("efficientnet_b0", 192)[1:-1]}


def test_a_prediction_sums_layers_and_measures_only_what_is_missing(fixed: list[str]) -> None:
    table = LatencyTable("fused")
    assert table.predict(TINY) == pytest.approx(1e-3 * len(units(TINY)))
    first = list(fixed)
    assert sorted(first) == sorted({unit.key for unit in units(TINY)})
    table.predict(TINY)
    assert fixed == first
    assert table.measure([TINY, OTHER]) == len({unit.key for unit in units(OTHER)} - set(first))
    assert [unit.name for unit, _ in table.layer_times(OTHER)][:2] == ["stem", "blocks.0.0"]


def test_validation_compares_with_whole_networks(fixed: list[str]) -> None:
    predictions = LatencyTable("fused").validate([TINY, OTHER])
    assert [p.name for p in predictions] == ["tiny", "other"]
    assert predictions[0].error == pytest.approx(len(units(TINY)) / 9 - 1)
    assert scaling.median_error(predictions) == pytest.approx(
        sum(abs(len(units(spec)) / 9 - 1) for spec in (TINY, OTHER)) / 2
    )


def test_times_are_kept_and_a_kill_costs_one_row_at_most(fixed: list[str], tmp_path: Path) -> None:
    path = tmp_path / "cache" / "table.jsonl"
    with LatencyTable("fused", path=path) as table:
        table.measure([TINY])
    path.write_bytes(path.read_bytes()[:-5])
    fixed.clear()
    with LatencyTable("fused", path=path) as table:
        assert table.measure([TINY]) == 1 == len(fixed)
    with LatencyTable("fused", path=path) as table:
        assert table.measure([TINY]) == 0


def test_disturbed_times_are_measured_again_next_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, quiet = tmp_path / "table.jsonl", [0]
    monkeypatch.setattr(latency, "measure_rounds", lambda steps, *_: dict.fromkeys(steps, Timing(1, 1, 1, 3, quiet[0])))
    for expected in (True, True, False):
        with LatencyTable("fused", path=path) as table:
            assert bool(table.measure([TINY])) == expected and not table.measure([TINY])
        quiet[0] += 1


def test_a_table_with_a_row_that_lacks_something_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    LatencyTable("fused", path=path).close()
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"key": "stem", "p20": 1.0}\n')
    with pytest.raises(ValueError, match=r"table\.jsonl is damaged: line 2 has no 'p50'"):
        LatencyTable("fused", path=path)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (dict(variant="stock"), "variant is 'fused', not 'stock'"),
        (dict(batch=2), "batch is 1, not 2"),
        (dict(dtype=torch.bfloat16), "dtype is 'float32', not 'bfloat16'"),
        (dict(backend="reference"), "backend is 'automatic', not 'reference'"),
    ],
)
def test_times_of_something_else_are_refused(tmp_path: Path, keywords: dict, message: str) -> None:
    path = tmp_path / "table.jsonl"
    LatencyTable("fused", path=path).close()
    with pytest.raises(ForeignFile, match=message):
        LatencyTable(**{"variant": "fused", **keywords}, path=path)


def test_another_build_or_machine_has_another_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = default_path(LatencyTable("fused"))
    assert before == default_path(LatencyTable("fused")) and before.is_relative_to(tmp_path)
    paths = {before, default_path(LatencyTable("optimized"))}
    monkeypatch.setattr(latency, "native_build", lambda: "another")
    paths.add(default_path(LatencyTable("fused")))
    monkeypatch.setattr(latency, "cpu_model", lambda: "another")
    paths.add(default_path(LatencyTable("fused")))
    assert len(paths) == 4


@pytest.mark.parametrize("variant", latency.VARIANTS)
def test_every_variant_computes_the_same_network(variant: str) -> None:
    table = LatencyTable(variant, rounds=1)
    x = torch.randn(2, 3, 20, 20)
    with table._running():
        expected = LatencyTable("fused").build(TINY)(x)
        out = table.build(TINY)(x)
    assert (out - expected).norm() / expected.norm() < 1e-5
    stock = [module for module in table.build(TINY).modules() if type(module) is torch.nn.Conv2d and module.groups > 1]
    assert len(stock) == (5 if variant == "stock" else 0)


def test_real_times_are_positive_and_ordered() -> None:
    table = LatencyTable("optimized", rounds=3)
    (prediction,) = table.validate([TINY])
    for timing in (prediction.measured, *table.entries.values()):
        assert 0 < timing.p20 <= timing.p50 <= timing.p80 and 1 <= timing.calls <= 3 and timing.quiet <= timing.calls
    assert prediction.predicted > 0
    peaks = scaling.machine_peaks(rounds=1)
    assert peaks.flops > 1e8 and peaks.bytes > 1e7 and peaks.ridge == peaks.flops / peaks.bytes


def test_rounds_mix_drop_the_first_and_repeat_what_was_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, waits = [0.0], [0.0]
    calls: list[str] = []

    def call(name: str) -> None:
        calls.append(name)
        # b waits for a processor in every second call, and then takes ten times as long.
        disturbed = name == "b" and calls.count("b") % 2 == 0
        clock[0] += 10.0 if disturbed else 1.0
        waits[0] += 9.0 if disturbed else 0.0

    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(latency, "_waited", lambda: waits[0])
    steps = {name: Step(lambda: None, lambda _, name=name: call(name)) for name in "abc"}
    found = measure_rounds(steps, 6, lambda: None)
    assert {timing.p50 for timing in found.values()} == {1.0}
    assert {timing.calls for timing in found.values()} == {timing.quiet for timing in found.values()} == {6}
    assert calls.count("a") == 7 and calls.count("b") == 13
    rounds = ["".join(calls[i : i + 3]) for i in range(0, 21, 3)]
    assert len(set(rounds)) > 1


def test_without_quiet_calls_the_least_disturbed_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, waits, share = [0.0], [0.0], iter([0.5, 0.9, 0.3, 0.7] * 20)

    def call(_: object) -> None:
        wait = next(share)
        clock[0] += 1.0 + wait
        waits[0] += wait

    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(latency, "_waited", lambda: waits[0])
    timing = measure_rounds({"a": Step(lambda: None, call)}, 6, lambda: None)["a"]
    assert (timing.calls, timing.quiet) == (2, 0)
    assert timing.p50 == pytest.approx(1.3)


def test_bad_arguments_are_named() -> None:
    for keywords, message in (
        (dict(variant="optimised"), "unknown variant 'optimised'; did you mean 'optimized'"),
        (dict(batch=0), "batch must be a whole number"),
        (dict(dtype=torch.int8), "dtype must be"),
        (dict(backend="cuda9"), "unknown backend 'cuda9'"),
        (dict(device="gpu"), "device 'gpu' cannot be used"),
        (dict(device=None), "device None cannot be used"),
        (dict(device=torch.device("meta")), "device 'meta' cannot be timed, only cpu and cuda can"),
    ):
        with pytest.raises(ValueError, match=message):
            LatencyTable(**keywords)
    with pytest.raises(ValueError, match="device 'meta' cannot be timed"):
        scaling.machine_peaks(device="meta")
