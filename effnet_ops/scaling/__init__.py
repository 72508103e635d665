"""Compound scaling: its laws, what networks cost and see, and the search for better coefficients."""

from effnet_ops.scaling.budget import Budget
from effnet_ops.scaling.counters import (
    ConvolutionCost,
    Count,
    LayerCount,
    StageCount,
    convolution_cost,
    count,
    count_block,
)
from effnet_ops.scaling.laws import (
    Axes,
    CompoundScaling,
    ScaledNetwork,
    implied_phi,
    realised_axes,
    scaled,
    single_axis,
)
from effnet_ops.scaling.receptive_field import ReceptiveField, StageReceptiveField, receptive_field
