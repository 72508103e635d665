"""Search, comparison and their results files: constraints, order, resumption after a kill, processes, seeds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from effnet_ops import scaling
from effnet_ops.models import ScaledSpec
from effnet_ops.scaling import Budget, CompoundScaling, DigitsTraining, ForeignFile, Score, count
from effnet_ops.scaling.digits import TINY
from effnet_ops.scaling.rows import RowFile, read_rows
from effnet_ops.scaling.study import SHIPPED, axis_study, grid_study

SMALL_GRID = dict(alphas=(1.0, 1.5, 2.0), betas=(1.0, 1.25, 1.5), gammas=(1.0, 1.25, 1.5))
QUICK = DigitsTraining(train=50, test=100, epochs=1)


@dataclass(frozen=True)
class Logged:
    """An objective that writes down each call, and fails at one of them; picklable."""

    log: str
    fail_at: int = -1

    def __call__(self, spec: ScaledSpec, seed: int) -> Score:
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(f"{spec.name}, {seed}\n")
        with open(self.log, encoding="utf-8") as log:
            if len(log.readlines()) == self.fail_at:
                raise RuntimeError("out of luck")
        return Score(spec.width + 0.01 * seed, {"seed": seed})


def run(log: Path, results: Path | None = None, fail_at: int = -1) -> scaling.SearchResult:
    objective = Logged(str(log), fail_at)
    return scaling.search(
        TINY, **SMALL_GRID, target=3.0, tolerance=0.3, objective=objective, seeds=(0, 1), results=results
    )


def test_nominal_constraint_holds_for_every_point() -> None:
    points = scaling.grid("efficientnet_b0", target=2.0, tolerance=0.05)
    assert len(points) > 20
    assert all(abs(point.law.growth - 2.0) <= 0.1 + 1e-9 and point.cost == point.law.growth for point in points)
    stages = {(point.spec.stages(), point.spec.resolution) for point in points}
    assert len(stages) == len(points)


@pytest.mark.parametrize("budget", ["1GMACs", "10Mparams", "60MB"])
def test_real_constraints_hold_for_every_point(budget: str) -> None:
    wanted = Budget.parse(budget)
    points = scaling.grid(budget=budget, tolerance=0.1)
    attribute = {"macs": "macs", "parameters": "parameters", "memory": "fused_saved_bytes"}[wanted.kind]
    for point in points:
        cost = getattr(count(point.spec), attribute)
        assert 0.9 * wanted.amount <= cost == point.cost <= wanted.amount
        assert point.spec == replace(point.law.spec(1.0), name=point.spec.name)


def test_a_measured_cost_constrains_too() -> None:
    points = scaling.grid(budget="10ms", cost=lambda spec: count(spec).macs * 1e-11, tolerance=0.1)
    assert points and all(0.009 <= point.cost <= 0.010 for point in points)


def test_constraints_that_nothing_meets_say_what_the_grid_has() -> None:
    with pytest.raises(ValueError, match=r"no point of the grid takes 900 kMACs to 1 MMACs; its points take 385\.8 MM"):
        scaling.grid(budget="1MMACs")
    with pytest.raises(ValueError, match=r"has alpha beta\^2 gamma\^2 of 90 to 110; its points have 1 to "):
        scaling.grid(target=100.0)
    for keywords, message in (
        (dict(alphas=(0.9,)), "alpha must be a number of at least 1"),
        (dict(alphas=()), "the grid is empty"),
        (dict(tolerance=1.5), "tolerance must lie in"),
        (dict(target=1.0), "target must be larger than 1"),
    ):
        with pytest.raises(ValueError, match=message):
            scaling.grid(**keywords)


def test_the_default_objective_ranks_and_needs_nothing() -> None:
    result = scaling.search(target=2.0)
    scores = [point.score for point in result.points]
    assert scores == sorted(scores, reverse=True) and result.best is result.points[0]
    assert result.best.score == scaling.published_accuracy(result.best.point.spec)


def test_search_resumes_and_scores_each_run_once(tmp_path: Path) -> None:
    log, results = tmp_path / "log", tmp_path / "folder" / "results.jsonl"
    with pytest.raises(RuntimeError, match="out of luck"):
        run(log, results, fail_at=4)
    # The failing objective is another one to the file: its fields differ.
    with pytest.raises(ForeignFile, match=r"objective is .*'fail_at': 4.*, not .*'fail_at': -1"):
        run(log, results)
    log.write_text("")
    again = tmp_path / "again.jsonl"
    first = run(log, again)
    calls = log.read_text().splitlines()
    assert len(calls) == len(set(calls)) == first.new == 2 * len(first.points)
    second = run(log, again)
    assert second.new == 0 and log.read_text().splitlines() == calls
    assert second.points == first.points
    assert read_rows(again)[1][0]["tags"].keys() == {"alpha", "beta", "gamma"}


def test_what_was_done_before_a_failure_is_kept(tmp_path: Path) -> None:
    log, results = tmp_path / "log", tmp_path / "results.jsonl"
    with pytest.raises(RuntimeError):
        run(log, results, fail_at=4)
    assert len(read_rows(results)[1]) == 3
    log.write_text("\n" * 10)
    assert run(log, results, fail_at=4).new == 2 * len(run(log, results, fail_at=4).points) - 3


@pytest.mark.slow
def test_processes_do_not_change_the_results(tmp_path: Path) -> None:
    alone, together = (
        scaling.search(TINY, **SMALL_GRID, target=3.0, objective=QUICK, seeds=(3,), workers=workers)
        for workers in (1, 2)
    )
    assert alone.points == together.points and len(alone.points) > 1


def test_a_seed_decides_everything() -> None:
    a, b, c = (QUICK(TINY, seed) for seed in (1, 1, 2))
    assert a == b != c
    assert 0.0 <= a.value <= 1.0 and len(a.details["curve"]) == QUICK.epochs


def test_the_digits_can_be_learnt() -> None:
    assert DigitsTraining(train=1000, test=500, epochs=3, batch=20, noise=0.0)(TINY, 0).value > 0.85


KILLED = """
import sys, time
from effnet_ops.scaling import search, Score
from effnet_ops.scaling.digits import TINY
def slow(spec, seed):
    time.sleep(0.15)
    return float(spec.resolution)
result = search(TINY, target=2.0, objective=slow, results=sys.argv[1])
print(result.new, len(result.points))
"""


def test_a_killed_search_loses_nothing(tmp_path: Path) -> None:
    results, program = tmp_path / "results.jsonl", tmp_path / "program.py"
    program.write_text(KILLED)
    command = [sys.executable, str(program), str(results)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while not results.exists() or results.read_bytes().count(b"\n") < 4:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.kill()
    done = len(read_rows(results)[1])
    assert done >= 3
    with open(results, "ab") as file:
        file.write(b'{"key": "cut sho')
    out = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ}).stdout
    new, points = map(int, out.split())
    assert new + done == points == len(read_rows(results)[1])


HEADER = {"format": "test", "settings": {"a": [1, 2]}}


def test_rows_come_back_and_a_cut_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with RowFile(path, HEADER) as file:
        file.append({"x": 1})
        file.append({"x": 2.5, "y": [None, "z"]})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"x": 3')
    assert read_rows(path) == (HEADER, [{"x": 1}, {"x": 2.5, "y": [None, "z"]}])
    with RowFile(path, HEADER) as file:
        assert file.dropped == '{"x": 3'
        file.append({"x": 4})
    assert [row["x"] for row in read_rows(path)[1]] == [1, 2.5, 4]


@pytest.mark.parametrize("keep", range(0, len(json.dumps(HEADER)) + 1, 7))
def test_a_header_that_was_cut_short_is_written_again(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(HEADER)[:keep])
    with RowFile(path, HEADER) as file:
        file.append({"x": 1})
    assert read_rows(path) == (HEADER, [{"x": 1}])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"format": "test", "settings": {"a": [1, 3]}}\n', r"settings is \{'a': \[1, 3\]\}, not \{'a': \[1, 2\]\}"),
        (b"a,b\n1,2\n", "line 1 is no JSON object"),
        (b'{"format": "test", "settings": {"a": [1, 2]}}\n{"x": \xff\n{"x": 1}\n', "line 2 is no JSON object"),
        (b"notes of mine", "its only line is incomplete"),
        (b'[1]\n{"x": 1}\n', "line 1 is no JSON object"),
    ],
)
def test_foreign_and_damaged_files_are_refused_and_left_alone(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        RowFile(path, HEADER)
    assert str(path) in str(error.value)
    assert path.read_bytes() == content


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="file locks are POSIX's")
    path = tmp_path / "rows.jsonl"
    with RowFile(path, HEADER), pytest.raises(ValueError, match="in use by another process"):
        RowFile(path, HEADER)
    RowFile(path, HEADER).close()
    with pytest.raises(ValueError, match="is empty"):
        (tmp_path / "empty").touch()
        read_rows(tmp_path / "empty")


def test_objectives_must_return_numbers_and_workers_be_counted() -> None:
    for result in (None, float("nan"), "0.9", True):
        with pytest.raises(TypeError, match="the objective must return a number or a Score"):
            scaling.search(TINY, **SMALL_GRID, objective=lambda spec, seed, result=result: result)
    with pytest.raises(ValueError, match="workers must be a whole number"):
        scaling.search(TINY, **SMALL_GRID, objective=QUICK, workers=0)
    for seeds in ((), (1, 1)):
        with pytest.raises(ValueError, match="seeds must be different"):
            scaling.search(TINY, **SMALL_GRID, objective=QUICK, seeds=seeds)


def test_comparison_is_paired_and_at_equal_budgets(tmp_path: Path) -> None:
    budget = Budget("macs", 3.1 * count(TINY).macs)
    result = scaling.compare(TINY, [budget], objective=Logged(str(tmp_path / "log")), seeds=(0, 5))
    ways = [outcome.contender.way for outcome in result.outcomes]
    assert ways == ["unscaled", "depth only", "width only", "resolution only", "compound"]
    assert all(2.6 < outcome.contender.factor <= 3.1 for outcome in result.outcomes[1:])
    width = result.outcomes[2]
    gain, error = width.gain(result.base)
    assert gain == pytest.approx(width.contender.spec.width - 1.0) and error == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ValueError, match="cannot be paired"):
        width.gain(replace(result.base, seeds=(1, 2)))
    with pytest.raises(ValueError, match="infeasible"):
        scaling.compare(TINY, ["1kMACs"], objective=QUICK)


def test_the_shipped_study_is_complete_and_reproducible_here() -> None:
    grid, axes = grid_study(SHIPPED), axis_study(SHIPPED)
    assert (grid.new, axes.new) == (0, 0)
    assert {len(point.scores) for point in grid.points} == {4}
    assert {len(outcome.seeds) for outcome in axes.outcomes} == {8} and len(axes.outcomes) == 16
    for file in SHIPPED.glob("*.jsonl"):
        assert all(row["origin"] and 0 < row["score"] < 1 for row in read_rows(file)[1])
    assert axes.outcomes[4].contender.spec == replace(
        CompoundScaling(base=TINY).spec(CompoundScaling(base=TINY).phi_for(scaling.study.factor_budget(2.2))),
        name=axes.outcomes[4].contender.spec.name,
    )
