"""`effnet-ops try`: models by name, factory and file, what is refused, and exit code 1 where something disagrees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import Result
from torch import Tensor, nn
from typer.testing import CliRunner

from effnet_ops.cli import app, try_parity
from effnet_ops.models import create_model
from effnet_ops.models.files import save_model


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["try", *map(str, arguments), "--seconds", "0", "--resolution", "40"])


def separable() -> nn.Module:
    """What the tests name as test_try:separable."""
    torch.manual_seed(0)
    block = nn.Sequential(
        *(nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4)),
    )
    return nn.Sequential(nn.Conv2d(3, 8, 3), block, nn.GELU())


def test_own_model_with_all_results(tmp_path: Path) -> None:
    data, page = tmp_path / "result.json", tmp_path / "result.html"
    result = run("test_try:separable", "--json", data, "--html", page)
    assert result.exit_code == 0, result.output
    assert "1 of 1 MBConv blocks replaced" in result.output
    found = json.loads(data.read_text())
    assert found["wrong"] == [] and found["restored"] and found["layers"] == [["1", "block", ""]]
    assert set(found["fp64"]) == {"evaluation", "optimized", "training", "gradients", "statistics"}
    assert found["measured"]["replaced"]["kept MB"] < found["measured"]["stock"]["kept MB"]
    assert "Everything agrees." in page.read_text()


def test_exit_code_where_something_disagrees(monkeypatch: pytest.MonkeyPatch) -> None:
    def replace_wrongly(model: nn.Module) -> object:
        report = replace(model)
        if next(model.parameters()).dtype is torch.float64:
            next(model.parameters()).data.mul_(1.001)
        return report

    replace = try_parity.replace_layers
    monkeypatch.setattr(try_parity, "replace_layers", replace_wrongly)
    result = run("test_try:separable")
    assert result.exit_code == 1 and "in fp64" in result.output


class Runs:
    """An object whose unpickling runs code."""

    def __reduce__(self) -> tuple[object, ...]:
        return print, ("code of the file ran",)


def test_files(tmp_path: Path) -> None:
    own, whole, state, code = (tmp_path / name for name in ("own.pt", "whole.pt", "state.pt", "code.pt"))
    save_model(create_model("efficientnet_lite0", num_classes=4), own)
    torch.save(separable(), whole)
    torch.save(separable().state_dict(), state)
    torch.save({"state_dict": Runs()}, code)
    assert run(own).exit_code == 0
    for path, reason in ((whole, "--trust"), (state, "--weights"), (code, "--trust"), ("missing.pt", "no file")):
        result = run(path)
        assert result.exit_code == 2 and reason in result.output and "code of the file" not in result.output
    assert run(whole, "--trust").exit_code == 0
    assert run("test_try:separable", "--weights", state).exit_code == 0
    result = run("test_try:separable", "--weights", code)
    assert result.exit_code == 2 and "more than weights" in result.output and "ran" not in result.output


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("efficientnet_b", "did you mean"),
        ("no_such_module:factory", "No module named"),
        ("test_try:separable.no", "gives no model"),
        ("test_try:Tensor", "not a torch.nn.Module"),
        ("torch.nn:Identity", "no convolution"),
    ],
)
def test_bad_names(name: str, reason: str) -> None:
    result = run(name)
    assert result.exit_code == 2 and reason in result.output and "Traceback" not in result.output


def test_outputs_of_any_nest() -> None:
    a, b = torch.ones(2), torch.zeros(3)
    assert [id(t) for t in try_parity.tensors_in({"x": [a, (b, torch.ones(1, dtype=torch.int64))]})] == [id(a), id(b)]
    assert try_parity.difference([a], [b]) == float("inf")
    assert isinstance(a, Tensor) and try_parity.difference([a * 2], [a]) == 1.0
