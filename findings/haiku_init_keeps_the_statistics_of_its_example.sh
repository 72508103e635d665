#!/usr/bin/env bash
# dm-haiku 0.0.17: init of a BatchNorm keeps the statistics of the example that it was given.
#
# Guess: init looks at the shape of its example; the running mean is 0 and the variance 1 until the first step.
# Seen (jax 0.10.2): an example of constant 7 leaves "mean 7, variance 0", and evaluation multiplies what follows by
# 1/sqrt(eps), 316. After one step the average is that batch's alone, whatever the decay rate, since it is zero-debiased.
# Flax 0.12.8 leaves mean 0 and variance 1, and takes a tenth of the first batch.
. "$(dirname "$0")/install" jax==0.10.2 dm-haiku==0.0.17 flax==0.12.8 numpy==2.4.6
JAX_PLATFORMS=cpu "$python" -W ignore - <<'PYTHON'
import flax.linen
import haiku
import jax
import jax.numpy as jnp

example, batch = jnp.full((2, 4, 4, 1), 7.0), jax.random.normal(jax.random.key(0), (4, 8, 8, 1)) * 2 + 1
norm = haiku.transform_with_state(lambda x, training: haiku.BatchNorm(True, True, 0.9)(x, training))


def statistics(state: dict) -> list[float]:
    return [round(float(state[f"batch_norm/~/{kind}_ema"]["average"].squeeze()), 4) for kind in ("mean", "var")]


parameters, state = norm.init(None, example, True)
after_init = statistics(state)
evaluated, _ = norm.apply(parameters, state, None, example + 1, False)
gain = float(evaluated.mean())
_, state = norm.apply(parameters, state, None, batch, True)
after_step, exact = statistics(state), [round(float(batch.mean()), 4), round(float(batch.var()), 4)]
print("after init: mean, variance", after_init, "; 8 gives", round(gain), "; after a step", after_step, "of", exact)

stock = flax.linen.BatchNorm(use_running_average=False, momentum=0.9)
variables = stock.init(jax.random.key(0), example)["batch_stats"]
in_flax = [float(variables["mean"][0]), float(variables["var"][0])]
print("flax after init:", in_flax)
assert after_init == [7.0, 0.0] and round(gain) == 316 and in_flax == [0.0, 1.0], (after_init, gain, in_flax)
assert max(abs(a - b) for a, b in zip(after_step, exact)) < 1e-3, (after_step, exact)
PYTHON
