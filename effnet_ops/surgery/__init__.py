"""Slips the fused operators under other people's models, takes them out again, and folds models for inference."""

from effnet_ops.surgery.optimize import OptimizationReport, optimize_for_inference
from effnet_ops.surgery.recognise import register_block
from effnet_ops.surgery.replace import ReplacementReport, replace_layers, restore_layers

__all__ = [
    "OptimizationReport",
    "ReplacementReport",
    "optimize_for_inference",
    "register_block",
    "replace_layers",
    "restore_layers",
]
