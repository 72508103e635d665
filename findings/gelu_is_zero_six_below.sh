#!/usr/bin/env bash
# The exact GELU of torch 2.14.1 on a CPU has no correct digit below -6 in float32 and below -8.3 in float64; JAX's has all of them.
#
# Guess: F.gelu (approximate="none") is x times the normal distribution function to rounding, as sigmoid and SiLU are: their
# relative error is below 1e-6 over the whole line. In float64 it can serve as the reference for a float32 kernel.
# Seen, relative error at -5, -6, -8, -9: float32 4e-02, 1, 1, 1; float64 4e-11, 1e-10, 2e-02, 1. It computes
# 0.5 x (1 + erf(x / sqrt 2)), a sum that cancels. jax 0.10.2's gelu(approximate=False), by erfc, is within 2e-06 in float32.
# Absolute errors stay below 1e-7, so networks do not mind; a test of a kernel by relative error against float64 F.gelu does.
. "$(dirname "$0")/install" torch==2.14.1 numpy==2.4.6 jax==0.10.2 mpmath==1.3.0
"$python" -W ignore - <<'PYTHON'
import jax
import mpmath
import numpy
import torch

jax.config.update("jax_platforms", "cpu")
POINTS = (-5.0, -6.0, -8.0, -9.0)
EXACT = [float(mpmath.mpf(x) * mpmath.ncdf(x)) for x in POINTS]


def errors(values: list[float]) -> list[float]:
    return [abs(value / exact - 1) for value, exact in zip(values, EXACT)]


def shown(found: list[float]) -> str:
    return " ".join(f"{error:.0e}" for error in found)


single, double = (
    errors(torch.nn.functional.gelu(torch.tensor(POINTS, dtype=dtype)).tolist()) for dtype in (torch.float32, torch.float64)
)
other = errors(jax.nn.gelu(numpy.array(POINTS, numpy.float32), approximate=False).tolist())
silu = torch.tensor(POINTS)
print("torch float32", shown(single), "| torch float64", shown(double), "| jax float32", shown(other))
assert single[0] > 1e-2 and min(single[1:]) == 1.0
assert double[0] < 1e-9 and double[2] > 1e-2 and double[3] == 1.0
assert max(other) < 1e-5
exact = [x * float(1 / (1 + mpmath.exp(-mpmath.mpf(x)))) for x in POINTS]
assert max(abs(y / e - 1) for y, e in zip(torch.nn.functional.silu(silu).tolist(), exact)) < 1e-6
PYTHON
