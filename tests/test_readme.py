"""The code in README.md runs as it stands, and each block on its own."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from effnet_ops import scaling

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize(
    "block", BLOCKS, ids=lambda block: next(line for line in reversed(block.splitlines()) if line)[:40]
)
def test_code_in_readme_runs_and_prints_what_it_says(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    for promised in re.findall(r"print\(.*\)  # (.*)", block):
        assert promised in printed


def test_readme_begins_with_the_commands_that_the_makefile_has() -> None:
    commands = re.findall(r"^ {4}make (\S+)", README, re.MULTILINE)
    assert commands == ["demo", "test"]
    for command in commands:
        subprocess.run(["make", "--dry-run", command], cwd=ROOT, check=True, capture_output=True)


def test_shares_of_depthwise_convolution_are_those_that_are_counted() -> None:
    count = scaling.count("efficientnet_b0")
    layers = [layer for layer in count.layers if layer.kind == "depthwise"]
    macs = sum(layer.macs for layer in layers) / count.macs
    moved = sum(layer.stock_bytes for layer in layers) / count.stock_bytes
    said = re.search(r"depthwise convolution is (\d+) % of B0's multiply-adds and (\d+) % of its\s+activation", README)
    assert said and said.groups() == (f"{100 * macs:.0f}", f"{100 * moved:.0f}")
