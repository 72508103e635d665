"""Triton kernels, installed as `effnet_ops.kernels`: one file a word."""
