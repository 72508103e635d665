"""A program in C++ loads our library and a package without Python (tests/cpp)."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy
import pytest
import torch
from efficientnet_pytorch import EfficientNet
from networks import relative_difference, with_statistics

import effnet_ops
from effnet_ops import _native, deployment
from effnet_ops.ops._library import OPERATORS

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = Path(effnet_ops.__file__).parent / "libeffnet_ops.so"


def test_schemas_of_the_library_are_those_of_python() -> None:
    """Of all operators that the CPU has a kernel for."""
    sources = ROOT / "csrc"
    defined = re.findall(r'm\.def\(\s*"(\w+)(\(.*)"\);', (sources / "schemas.cpp").read_text())
    implemented = re.findall(r'm\.impl\("(\w+)"', (sources / "bindings.cpp").read_text())
    assert [name for name, _ in defined] == implemented
    for name, arguments in defined:
        assert str(OPERATORS[name].overload._schema) == f"effnet_ops::{name}{arguments}"


def call(*command: str | Path, cwd: Path) -> None:
    result = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.skipif(_native.module is None, reason="the package was built without its C++ part")
@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake, which builds the program, is not installed")
def test_cpp_program_runs_a_package(tmp_path: Path) -> None:
    assert LIBRARY.is_file(), "the C++ part was built, and its library for programs without Python was not"
    # Not timm's: that needs torchvision, which not every build of PyTorch has (tests/wheel_matrix.sh).
    model = with_statistics(EfficientNet.from_name("efficientnet-b0")).eval()
    assert len(effnet_ops.replace_layers(model).replaced) >= 16
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
    deployment.export_package(model, x, tmp_path / "model.pt2")
    x.numpy().tofile(tmp_path / "x.bin")
    torch_root = Path(torch.__file__).parent
    call("cmake", "-S", ROOT / "tests" / "cpp", "-B", "build", f"-DTORCH_ROOT={torch_root}", cwd=tmp_path)
    call("cmake", "--build", "build", cwd=tmp_path)
    call("build/run_package", LIBRARY, "model.pt2", "x.bin", "y.bin", "3", "64", "64", cwd=tmp_path)
    y = torch.from_numpy(numpy.fromfile(tmp_path / "y.bin", numpy.float32)).view_as(expected)
    assert relative_difference(y, deployment.load_package(tmp_path / "model.pt2")(x)) < 1e-6
    # The compiler rounds the layers around the blocks otherwise, and 81 layers follow one another.
    assert relative_difference(y, expected) < 1e-4
