"""The study on the digits that the documentation shows: a grid at equal cost, then one axis against all three.

    python -m effnet_ops.scaling.study FOLDER [WORKERS]

makes it again; results that FOLDER has already are not run again.
"""

from __future__ import annotations

import sys
from pathlib import Path

from effnet_ops.scaling.budget import Budget
from effnet_ops.scaling.comparison import Comparison, compare
from effnet_ops.scaling.counters import count
from effnet_ops.scaling.digits import TINY, DigitsTraining
from effnet_ops.scaling.grid import SearchResult, search
from effnet_ops.scaling.laws import CompoundScaling

SHIPPED = Path(__file__).parent / "data"
"""The rows of the run that the documentation shows; each names the machine and the versions that made it."""

GRID_FACTOR = 3.1
FACTORS = (2.2, 3.1, 5.3)
GRID_SEEDS = tuple(range(4))
SEEDS = tuple(range(100, 108))
"""Other seeds than the grid's: its best point was chosen by luck, too, and that must not count for it here."""

_STEPS = tuple(1.0 + 0.125 * i for i in range(10))


def grid_study(folder: Path, workers: int = 1, progress: bool = False) -> SearchResult:
    """The grid over the three coefficients at three times the unscaled network's multiply-adds."""
    return search(
        TINY,
        alphas=tuple(1.0 + 0.25 * i for i in range(10)),
        betas=_STEPS,
        gammas=_STEPS,
        budget=factor_budget(GRID_FACTOR),
        tolerance=0.12,
        objective=DigitsTraining(),
        seeds=GRID_SEEDS,
        results=folder / "digits_grid.jsonl",
        workers=workers,
        progress=progress,
    )


def axis_study(folder: Path, workers: int = 1, progress: bool = False) -> Comparison:
    """Depth, width and resolution alone, the paper's coefficients, and the grid's best, at three budgets."""
    best = grid_study(folder, workers, progress).best.point.law
    return compare(
        TINY,
        [factor_budget(factor) for factor in FACTORS],
        laws={"paper's compound": CompoundScaling(), "grid's best": best},
        objective=DigitsTraining(),
        seeds=SEEDS,
        results=folder / "digits_axes.jsonl",
        workers=workers,
        progress=progress,
    )


def factor_budget(factor: float) -> Budget:
    """``factor`` times the unscaled network's multiply-adds."""
    return Budget("macs", factor * count(TINY).macs)


if __name__ == "__main__":
    axis_study(Path(sys.argv[1]), workers=int(sys.argv[2]) if len(sys.argv) > 2 else 1, progress=True)
