"""The build's decisions: what is left out is said, and what was asked for and cannot be had is an error."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import setup_cuda
from effnet_ops import _native

ROOT = setup_cuda.ROOT
VARIABLES = ("EFFNET_OPS_BUILD", "EFFNET_OPS_ISAS", "CXX", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST")


def build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`setup.py build_ext` into a folder of its own, with only these of the variables that choose what is built."""
    kept = {k: v for k, v in os.environ.items() if k not in VARIABLES}
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


def test_package_has_its_data(tmp_path: Path) -> None:
    """Every file of the source tree that is no Python source is in what is installed."""
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    folders = {"effnet_ops": ROOT / "effnet_ops", "effnet_ops/kernels": ROOT / "kernels"}
    wanted = [
        f"{name}/{path.relative_to(folder)}"
        for name, folder in folders.items()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so")
    ]
    assert wanted and [name for name in wanted if not (tmp_path / name).exists()] == []


def source_distribution(folder: Path) -> tuple[Path, str]:
    """The archive, and what making it said."""
    command = [sys.executable, "setup.py", "egg_info", "--egg-base", folder, "sdist", "--dist-dir", folder]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (archive,) = folder.glob("*.tar.gz")
    return archive, result.stdout + result.stderr


def test_source_distribution_is_whole_and_made_without_a_warning(tmp_path: Path) -> None:
    archive, said = source_distribution(tmp_path)
    assert "warning" not in said.lower()
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    folders = ("effnet_ops", "csrc", "kernels", "tests", "docs", "benchmarks", "findings")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    wanted = {str(path.relative_to(ROOT)) for path in files if path.suffix not in (".pyc", ".so")}
    assert {name for name in wanted if not Path(name).name.startswith(".")} <= names
    assert not [name for name in names if name.endswith((".pyc", ".so"))]


@pytest.mark.slow
@pytest.mark.parametrize("isolation", [False, True])
def test_source_distribution_installs_without_a_warning(isolation: bool, tmp_path: Path) -> None:
    """With isolation, pip fetches the newest setuptools, and a PyTorch of some gigabytes, for the build alone."""
    archive, _ = source_distribution(tmp_path)
    command = [sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--target", tmp_path / "installed", archive]
    command += [] if isolation else ["--no-build-isolation"]
    environment = {**os.environ, "EFFNET_OPS_BUILD": "none"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert not re.search(r"[a-z]Warning\b|deprecated", result.stdout + result.stderr)
    assert (tmp_path / "installed" / "effnet_ops" / "py.typed").is_file()


@pytest.fixture
def other_kernels(tmp_path: Path) -> Path:
    """A folder with a stand-in for Hugging Face's `kernels`, which registers kernels.locking with setuptools."""
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text("THEIRS = True\n")
    writer = 'def write_egg_lockfile(command, basename, filename):\n    print("their writer was asked for", basename)\n'
    (site / "kernels" / "locking.py").write_text(writer)
    information = site / "kernels-0.17.2.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.2\n")
    (information / "RECORD").write_text("")
    entry = "[egg_info.writers]\nkernels.lock = kernels.locking:write_egg_lockfile\n"
    (information / "entry_points.txt").write_text(entry)
    return site


@pytest.mark.parametrize("how", ["pip", "setup.py"])
def test_build_beside_a_package_named_kernels(how: str, other_kernels: Path, tmp_path: Path) -> None:
    """setuptools loads what packages register for all builds, with the project's folder first on the path."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "effnet_ops", source / "effnet_ops", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(ROOT / "kernels", source / "kernels")
    for name in ("setup.py", "setup_cuda.py", "effnet_ops_autoload.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    commands = {
        "pip": ["-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), "."],
        "setup.py": ["setup.py", "egg_info"],
    }
    environment = {**os.environ, "EFFNET_OPS_BUILD": "none", "PYTHONPATH": str(other_kernels)}
    command = [sys.executable, *commands[how]]
    result = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "their writer was asked for kernels.lock" in result.stdout + result.stderr


def test_tests_of_a_checkout_do_not_hide_a_package_named_kernels(other_kernels: Path) -> None:
    code = "import conftest, kernels, effnet_ops.kernels; assert kernels.THEIRS and not effnet_ops.kernels is kernels"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(other_kernels)])
    environment = {**os.environ, "PYTHONPATH": paths}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_none_builds_nothing(tmp_path: Path) -> None:
    result = build(tmp_path, EFFNET_OPS_BUILD="none")
    assert result.returncode == 0, result.stderr
    assert "EFFNET_OPS_BUILD=none" in result.stdout
    assert not list(tmp_path.rglob("*.so"))


def test_an_unknown_choice_names_the_known_ones(tmp_path: Path) -> None:
    result = build(tmp_path, EFFNET_OPS_BUILD="gpu")
    assert result.returncode != 0
    assert "auto, cpu, cuda, none" in result.stderr and "'gpu'" in result.stderr
    result = build(tmp_path, EFFNET_OPS_ISAS="avx9")
    assert result.returncode != 0 and "EFFNET_OPS_ISAS must be one of all, native, got 'avx9'" in result.stderr


@functools.cache
def instruction_sets() -> dict[str, tuple[list[str], bool]]:
    """The flags of each, and whether this processor has it."""
    code = """
import json, setuptools
setuptools.setup = lambda **_: None
from setup import ISA_FLAGS, accepts, find_compiler
compiler = find_compiler()
known = {name: flags for name, flags in ISA_FLAGS.items() if accepts(compiler, flags)}
print(json.dumps({name: (flags, not flags or accepts(compiler, flags, native=True)) for name, flags in known.items()}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_native_is_what_the_processor_has() -> None:
    if _native.module is None:
        pytest.skip("the C++ part was not built")
    assert [name for name, (_, here) in instruction_sets().items() if here] == _native.module.available_isas()


@pytest.mark.parametrize("source", sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), ids=lambda path: path.stem)
def test_instruction_sets_of_other_processors_compile(source: Path) -> None:
    """`make test` builds for its own processor; what else a wheel holds must pass the compiler's front end at least."""
    sets = instruction_sets()
    for name, (flags, here) in sets.items():
        if not here:
            define = f"-DEFFNET_ISA_{name.upper()}"
            command = ["g++", "-std=c++17", "-fsyntax-only", "-Wno-psabi", *flags, define, str(source)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("asked", [{"EFFNET_OPS_BUILD": "cuda"}, {"FORCE_CUDA": "1"}], ids=["choice", "force"])
def test_cuda_that_cannot_be_built_is_an_error_when_asked_for(tmp_path: Path, asked: dict[str, str]) -> None:
    result = build(tmp_path, **asked, CUDA_HOME=str(tmp_path))
    assert result.returncode != 0
    assert "asks for CUDA, but" in result.stderr
    if torch.version.cuda:
        assert f"CUDA_HOME={tmp_path} has no include/cuda_runtime.h" in result.stderr


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toolkit of version 13.4 that knows sm_80 and sm_90, and compiles nothing; PATH and the variables are clean."""
    home = tmp_path / "toolkit"
    for file in ("include/cuda_runtime.h", "lib64/libcudart.so"):
        (home / file).parent.mkdir(parents=True)
        (home / file).touch()
    executable(
        home / "bin" / "nvcc",
        "case $1 in\n--version) echo 'Cuda compilation tools, release 13.4, V13.4.1';;\n"
        f"--list-gpu-arch) echo compute_75; echo compute_80; echo compute_90;;\n--dryrun) echo '#$ TOP={home}';;\nesac",
    )
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    return home


def executable(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_toolkit_by_its_name(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    found = setup_cuda.Toolkit.find()
    assert (found.home, found.nvcc, found.version) == (toolkit, toolkit / "bin" / "nvcc", (13, 4))
    assert found.runtime.name == "libcudart.so" and found.supported() == {75, 80, 90}


def test_toolkit_behind_a_link(toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to(toolkit / "bin" / "nvcc")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert setup_cuda.Toolkit.find().home == toolkit


def test_toolkit_behind_a_script(toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executable(tmp_path / "bin" / "nvcc", f'exec {toolkit}/bin/nvcc "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert setup_cuda.Toolkit.find().home == toolkit


def test_no_toolkit(toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(setup_cuda.NotHere, match="nvcc is not on PATH"):
        setup_cuda.Toolkit.find()
    executable(tmp_path / "nvcc", "exit 1")
    with pytest.raises(setup_cuda.NotHere, match=r"the nvcc on PATH has no include/cuda_runtime.h"):
        setup_cuda.Toolkit.find()


def test_nvcc_that_does_not_run(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executable(toolkit / "bin" / "nvcc", "exit 1")
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    with pytest.raises(setup_cuda.NotHere, match="nvcc does not run"):
        setup_cuda.Toolkit.find()


def architectures(toolkit: Path, listed: str) -> tuple[list[str], list[str]]:
    found, left_out = setup_cuda.architectures(setup_cuda.Toolkit(toolkit, toolkit / "bin" / "nvcc", (13, 4)), listed)
    return [str(arch) for arch in found], left_out


def test_default_architectures_are_those_that_nvcc_knows(toolkit: Path) -> None:
    found, left_out = architectures(toolkit, "")
    assert found == ["sm_80 with PTX", "sm_90a"]
    assert [text.partition(" ")[0] for text in left_out] == ["sm_86", "sm_89", "sm_100"]


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("8.0;9.0a", ["sm_80", "sm_90a"]),
        ("9.0+PTX 8.0", ["sm_90 with PTX", "sm_80"]),
        ("Hopper", ["sm_90 with PTX"]),
    ],
)
def test_listed_architectures(toolkit: Path, listed: str, expected: list[str]) -> None:
    assert architectures(toolkit, listed) == (expected, [])


def test_listed_architectures_that_are_too_old_are_left_out(toolkit: Path) -> None:
    assert architectures(toolkit, "7.5 8.0 9.0+PTX") == (["sm_80", "sm_90 with PTX"], ["sm_75 (the kernels need 8.0)"])


@pytest.mark.parametrize(
    ("listed", "reason"),
    [
        ("7.0 7.5", r"no architecture is left: sm_70 \(the kernels need 8.0\), sm_75"),
        ("sm_90", "'sm_90' is no architecture"),
        ("8.0 10.0", "nvcc 13.4 does not know 10.0"),
    ],
)
def test_architectures_that_cannot_be_built(toolkit: Path, listed: str, reason: str) -> None:
    with pytest.raises(setup_cuda.NotHere, match=reason):
        architectures(toolkit, listed)


@pytest.fixture
def cuda_torch(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The toolkit, named by CUDA_HOME, beside a PyTorch for CUDA 13.0 on a machine without a GPU."""
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    return toolkit


def test_nothing_is_built_without_a_gpu_and_without_being_asked(cuda_torch: Path) -> None:
    with pytest.raises(setup_cuda.NotHere, match="no GPU is visible here"):
        setup_cuda.Plan.make(required=False)
    assert str(setup_cuda.Plan.make(required=True)).startswith("CUDA 13.4 for sm_80 with PTX, sm_90a; left out: sm_86")


def test_a_list_asks_for_cuda(cuda_torch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    plan = setup_cuda.Plan.make(required=False)
    assert plan.flags == ["-gencode=arch=compute_80,code=sm_80"]


def test_a_gpu_is_built_for_alone(cuda_torch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: ((9, 0), (7, 5))[i])
    assert str(setup_cuda.Plan.make(required=False)) == "CUDA 13.4 for sm_90a"


@pytest.mark.parametrize(
    ("version", "reason"),
    [("12.8", "the toolkit is CUDA 13.4, and torch .* is built for 12.8"), (None, "built without CUDA")],
)
def test_torch_that_does_not_agree(
    cuda_torch: Path, monkeypatch: pytest.MonkeyPatch, version: str | None, reason: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", version)
    with pytest.raises(setup_cuda.NotHere, match=reason):
        setup_cuda.Plan.make(required=True)
