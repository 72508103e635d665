#!/usr/bin/env bash
# AveragedModel(use_buffers=True) of torch 2.14.1 averages BatchNorm's counter as an integer.
#
# Guess: after 20 updates num_batches_tracked is 20, or an average such as 10.5; without use_buffers the copy keeps the
# statistics that it was made with.
# Seen: "equal weights 1 of 20", since each step of the running mean is rounded towards zero; "exponential 10 of 20".
# Without use_buffers the counter is 20 and the statistics are the model's own, as they are, not averaged.
# It matters for BatchNorm(momentum=None), whose weight of a new batch is 1 over this counter.
. "$(dirname "$0")/install" torch==2.14.1
"$python" -W ignore - <<'PYTHON'
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

torch.manual_seed(0)
found = {}
kinds = {
    "equal weights": {"use_buffers": True},
    "exponential": {"use_buffers": True, "multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "default": {},
}
for name, arguments in kinds.items():
    norm = nn.BatchNorm2d(4)
    averaged = AveragedModel(norm, **arguments)
    for _ in range(20):
        norm(torch.randn(4, 4, 8, 8) * 3 + 1)
        averaged.update_parameters(norm)
    same = torch.equal(averaged.module.running_var, norm.running_var)
    found[name] = int(averaged.module.num_batches_tracked), same
    print(name, found[name][0], "of", int(norm.num_batches_tracked), "; statistics are the model's own:", same)
assert found == {"equal weights": (1, False), "exponential": (10, False), "default": (20, True)}, found
PYTHON
