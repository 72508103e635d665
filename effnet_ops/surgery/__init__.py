"""Slips the fused operators under other people's models, and takes them out again."""

from effnet_ops.surgery.replace import ReplacementReport, replace_layers, restore_layers

__all__ = ["ReplacementReport", "replace_layers", "restore_layers"]
