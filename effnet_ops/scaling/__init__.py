"""What a network costs and sees, from its specification."""

from effnet_ops.scaling.counters import Count, LayerCount, StageCount, count
from effnet_ops.scaling.receptive_field import ReceptiveField, StageReceptiveField, receptive_field

__all__ = [
    "Count",
    "LayerCount",
    "ReceptiveField",
    "StageCount",
    "StageReceptiveField",
    "count",
    "receptive_field",
]
