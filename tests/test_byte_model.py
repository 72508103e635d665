"""The bytes that each design moves, against the figures that were derived by hand before there was a kernel."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import byte_model

# MB an image in bf16, activations only, of B0 at 224 and B4 at 380, as first derived, to three digits.
DERIVED = {
    "eager": (93.9, 712),
    "pointwise ops fused, convolutions opaque": (59.0, 441),
    "activation and residual in epilogues": (41.5, 323),
    "prologues and epilogues (ours)": (27.7, 205),
    "expand and depthwise in one kernel": (14.1, 113),
    "whole block, two passes": (6.2, 40),
    "training: eager": (299, 2259),
    "training: pointwise ops fused": (203, 1514),
    "training: prologues and epilogues": (125, 928),
}


@pytest.mark.parametrize("design", DERIVED)
def test_derived_figures(design: str) -> None:
    """Inference agrees to the last digit; training to 2.5 %, which is stem, head and who recomputes a1."""
    for name, figure in zip(("b0", "b4"), DERIVED[design], strict=True):
        tolerance = 0.025 if design.startswith("training") else 0.005
        assert byte_model.moved(name, design) / 1e6 == pytest.approx(figure, rel=tolerance, abs=0.05)


def test_steps_add_up() -> None:
    """The launches of inference and training, with stem and head, are what the designs count."""
    for name in ("b0", "b7"):
        _, ends = byte_model.shapes(name)
        for title, design in (
            ("inference", "prologues and epilogues (ours)"),
            ("training", "training: and both gradients at once (ours)"),
        ):
            total = sum(value for step, value in byte_model.steps(name) if step.startswith(f"{title}:"))
            assert total + 2 * byte_model.DESIGNS[design].ends(ends) == byte_model.moved(name, design)


def test_both_gradients_at_once_save_a_reading() -> None:
    """B2 reads 2y + d less, B5 2A (its x is read once either way), in the blocks whose weights are small."""
    blocks, _ = byte_model.shapes("b0")
    saved = sum((2 * b.y + b.convolved) * b.project_both + 2 * b.expanded * b.expand_both for b in blocks)
    designs = ("training: prologues and epilogues", "training: and both gradients at once (ours)")
    apart, at_once = (byte_model.moved("b0", design) for design in designs)
    assert apart - at_once == 2 * saved > 0.1 * apart


def test_shapes_of_b0() -> None:
    blocks, ends = byte_model.shapes("b0")
    assert len(blocks) == 16
    assert blocks[0] == (32 * 112**2, 0, 32 * 112**2, 16 * 112**2, 0, False, True)
    assert blocks[2] == (24 * 56**2, 144 * 56**2, 144 * 56**2, 24 * 56**2, 24 * 56**2, True, True)
    assert ends == (3 * 224**2, 32 * 112**2, 320 * 49, 1280 * 49)


def test_table_of_the_docs() -> None:
    """docs/triton.md quotes every design of every network as the script prints it."""
    page = (Path(__file__).resolve().parent.parent / "docs" / "triton.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    quoted = {row[0]: row[1:] for row in rows if row[0] in byte_model.DESIGNS}
    networks = byte_model.RESOLUTIONS
    assert quoted == {
        design: [f"{byte_model.moved(name, design) / 1e6:.1f}" for name in networks] for design in byte_model.DESIGNS
    }
