"""`effnet-ops info`: what this installation is and what it can do here."""

from __future__ import annotations

import importlib.metadata
import platform
from collections import Counter

import torch
from rich.table import Table

import effnet_ops
from effnet_ops import _native
from effnet_ops.cli.console import console, counted
from effnet_ops.ops import gpu
from effnet_ops.scaling.machine import cpu_model

PACKAGES = (
    "triton",
    "timm",
    "torchvision",
    "efficientnet_pytorch",
    "efficientnet_lite_pytorch",
    "geffnet",
    "numpy",
)


def run() -> None:
    console.print(_table("versions", _versions()))
    console.print(_table("machine", _machine()))
    console.print(_table("built", _built()))
    backends = {name: reason or "[green]can run[/green]" for name, reason in effnet_ops.available_backends().items()}
    console.print(_table("backends", backends))
    console.print(_table("of cuda and triton, by default", _gpu_choice()))


def _table(title: str, rows: dict[str, object]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, min_width=40)
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def _versions() -> dict[str, object]:
    rows = {"effnet_ops": effnet_ops.__version__, "Python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        try:
            rows[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            rows[package] = "not installed"
    return rows


def _machine() -> dict[str, object]:
    rows: dict[str, object] = {
        "system": f"{platform.system()} {platform.machine()}",
        "CPU": cpu_model(),
        "CPU capability of PyTorch": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            memory = f"{properties.total_memory / 2**30:.0f} GiB"
            rows[f"GPU {i}"] = f"{properties.name}, {memory}, compute capability {properties.major}.{properties.minor}"
    else:
        rows["GPU"] = "none that PyTorch can use"
    return rows


def _built() -> dict[str, object]:
    native = _native.module
    if native is None:
        rows: dict[str, object] = {"C++": _native.why_missing}
    else:
        rows = {key.replace("_", " "): value for key, value in native.build_info().items()}
        rows["instruction set in use"] = native.isa()
        rows["CPU features"] = [name for name, present in native.cpu_features().items() if present]
    if missing := _native.load_cuda():
        rows["CUDA"] = missing
    else:
        rows |= {f"CUDA {key}": value for key, value in _native.cuda_build_info().items()}
    return {key: ", ".join(value) if isinstance(value, list) else value for key, value in rows.items()}


def _gpu_choice() -> dict[str, object]:
    """How many shapes of each operator the table gives to which backend, and where it is from."""
    rows: dict[str, object] = {}
    for operator, entry in gpu.table().items():
        counts = Counter((found["backend"], found["origin"]) for found in entry["shapes"].values())
        shapes = "".join(f"; {backend} at {counted(n, 'shape')} ({origin})" for (backend, origin), n in counts.items())
        rows[operator] = f"{entry['default']} ({entry['origin']}){shapes}"
    return rows
