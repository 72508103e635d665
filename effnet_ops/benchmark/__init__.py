"""Measures inference against other runtimes: peers in processes of their own, layers, and what the machine can do."""
