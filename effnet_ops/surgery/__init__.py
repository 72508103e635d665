"""Slips the fused operators under other people's models, and takes them out again."""
