"""The build's decisions: what is left out is said, and what was asked for and cannot be had is an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`setup.py build_ext` into a folder of its own, with only these EFFNET_OPS_BUILD, CXX and FORCE_CUDA."""
    kept = {k: v for k, v in os.environ.items() if k not in ("EFFNET_OPS_BUILD", "CXX", "FORCE_CUDA")}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)]
    return subprocess.run(command, cwd=ROOT, env=kept | environment, capture_output=True, text=True, check=False)


def test_without_a_compiler_the_install_goes_on(tmp_path: Path) -> None:
    result = build(tmp_path, CXX="no-such-compiler")
    assert result.returncode == 0, result.stderr
    assert "C++ left out: no C++ compiler was found" in result.stdout
    assert not list(tmp_path.rglob("*.so"))


def test_a_broken_compiler_is_named(tmp_path: Path) -> None:
    result = build(tmp_path, CXX="false")
    assert result.returncode == 0, result.stderr
    assert "C++ left out: the C++ compiler false does not work" in result.stdout


def test_an_explicit_choice_that_cannot_be_built_is_an_error(tmp_path: Path) -> None:
    result = build(tmp_path, CXX="no-such-compiler", EFFNET_OPS_BUILD="cpu")
    assert result.returncode != 0
    assert "EFFNET_OPS_BUILD=cpu, but no C++ compiler was found" in result.stderr


def test_none_builds_nothing(tmp_path: Path) -> None:
    result = build(tmp_path, EFFNET_OPS_BUILD="none")
    assert result.returncode == 0, result.stderr
    assert "EFFNET_OPS_BUILD=none" in result.stdout
    assert not list(tmp_path.rglob("*.so"))


def test_an_unknown_choice_names_the_known_ones(tmp_path: Path) -> None:
    result = build(tmp_path, EFFNET_OPS_BUILD="gpu")
    assert result.returncode != 0
    assert "auto, cpu, cuda, none" in result.stderr and "'gpu'" in result.stderr


@pytest.mark.parametrize("asked", [{"EFFNET_OPS_BUILD": "cuda"}, {"FORCE_CUDA": "1"}], ids=["choice", "force"])
def test_cuda_that_does_not_exist_is_an_error_when_asked_for(tmp_path: Path, asked: dict[str, str]) -> None:
    result = build(tmp_path, **asked)
    assert result.returncode != 0
    assert "this version has no CUDA kernels" in result.stderr
