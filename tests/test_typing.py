"""The types of the public surface, as the type checker of a user's program sees them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import effnet_ops

PROGRAM = """
import torch
from torch import Tensor, nn

import effnet_ops
from effnet_ops import deployment, layers, models, scaling

x = torch.randn(1, 8, 16, 16)
weight = torch.randn(8, 1, 3, 3)
y: Tensor = effnet_ops.depthwise_conv2d(x, weight, stride=2, padding="same", activation="silu")
y = effnet_ops.pointwise_conv2d(x, torch.randn(4, 8, 1, 1), None)
conv = effnet_ops.ConvNormParams(weight, None, None)
block: nn.Module = layers.MBConv(8, 8, 3, 1, activation="silu", device="cpu", dtype=torch.float32)
fields: int = scaling.receptive_field("efficientnet_b0").size
spec: models.ScaledSpec = scaling.CompoundScaling().spec(1.0)
flops: int = scaling.count(spec).flops
model: nn.Module = effnet_ops.create_model("efficientnet_b0")
report: effnet_ops.ReplacementReport = effnet_ops.replace_layers(model)
fast: nn.Module = effnet_ops.optimize_for_inference(model, dtype=torch.bfloat16)
with effnet_ops.use_backend("reference"):
    names: dict[str, str] = effnet_ops.available_backends()
program = deployment.export_program(model, x, dynamic=["batch"])
logits = deployment.load_package(deployment.export_package(model, x, "model.pt2"))(x)
"""


def test_types_are_installed() -> None:
    """The mark by which type checkers look into an installed package."""
    assert (Path(effnet_ops.__file__).parent / "py.typed").is_file()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="needs mypy")
def test_a_users_program_is_strictly_typed(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", tmp_path / "cache"]
    root = Path(effnet_ops.__file__).parent.parent
    result = subprocess.run(
        [*command, tmp_path / "program.py"], cwd=root, capture_output=True, text=True, check=False, timeout=600
    )
    assert result.returncode == 0, result.stdout
