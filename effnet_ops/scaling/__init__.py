"""Compound scaling: its laws, what networks cost, see and take on this machine, and the search for coefficients.

Plots and reports are in `effnet_ops.scaling.plots` and `effnet_ops.scaling.report`, which need the extra ``plots``.
"""

from effnet_ops.scaling.budget import Budget
from effnet_ops.scaling.comparison import Comparison, Contender, Outcome, compare
from effnet_ops.scaling.counters import (
    ConvolutionCost,
    Count,
    LayerCount,
    StageCount,
    convolution_cost,
    count,
    count_block,
)
from effnet_ops.scaling.digits import DigitsTraining
from effnet_ops.scaling.grid import GridPoint, ScoredPoint, SearchResult, grid, search
from effnet_ops.scaling.latency import LatencyTable, Peaks, Prediction, Timing, machine_peaks, median_error
from effnet_ops.scaling.laws import (
    Axes,
    CompoundScaling,
    ScaledNetwork,
    implied_phi,
    realised_axes,
    scaled,
    single_axis,
)
from effnet_ops.scaling.marginal import MarginalGain, marginal_gains
from effnet_ops.scaling.objective import Objective, Score
from effnet_ops.scaling.pareto import pareto_front
from effnet_ops.scaling.proxy import AccuracyFit, accuracy_fit, published_accuracy
from effnet_ops.scaling.receptive_field import (
    EffectiveField,
    LayerReceptiveField,
    ReceptiveField,
    StageReceptiveField,
    effective_receptive_field,
    receptive_field,
)
from effnet_ops.scaling.rows import ForeignFile

__all__ = [
    "AccuracyFit",
    "Axes",
    "Budget",
    "Comparison",
    "CompoundScaling",
    "Contender",
    "ConvolutionCost",
    "Count",
    "DigitsTraining",
    "EffectiveField",
    "ForeignFile",
    "GridPoint",
    "LatencyTable",
    "LayerCount",
    "LayerReceptiveField",
    "MarginalGain",
    "Objective",
    "Outcome",
    "Peaks",
    "Prediction",
    "ReceptiveField",
    "ScaledNetwork",
    "Score",
    "ScoredPoint",
    "SearchResult",
    "StageCount",
    "StageReceptiveField",
    "Timing",
    "accuracy_fit",
    "compare",
    "convolution_cost",
    "count",
    "count_block",
    "effective_receptive_field",
    "grid",
    "implied_phi",
    "machine_peaks",
    "marginal_gains",
    "median_error",
    "pareto_front",
    "published_accuracy",
    "realised_axes",
    "receptive_field",
    "scaled",
    "search",
    "single_axis",
]
