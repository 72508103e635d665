#!/usr/bin/env bash
# ema-pytorch 0.8.3 averages BatchNorm's statistics, never copies its counter, and leaves its copy in training mode.
#
# Guess: buffers that are integers are copied, and the copy, which is for evaluation, is in evaluation mode.
# Seen: "counter 0 of 20, copy in training mode: True" (torch 2.14.1). Calling the copy without eval() changes the
# averaged statistics: "called once, the copy's statistics are its own: False".
. "$(dirname "$0")/install" torch==2.14.1 ema-pytorch==0.8.3 numpy==2.4.6
"$python" -W ignore - <<'PYTHON'
import torch
from ema_pytorch import EMA
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
ema = EMA(model, beta=0.9, update_every=1, update_after_step=0)
for _ in range(20):
    model(torch.randn(4, 3, 8, 8))
    ema.update()
norm, training = ema.ema_model[1], ema.ema_model.training
counter, before = int(norm.num_batches_tracked), norm.running_var.clone()
print("counter", counter, "of", int(model[1].num_batches_tracked), ", copy in training mode:", training)
with torch.no_grad():
    ema(torch.randn(4, 3, 8, 8))
same = torch.equal(norm.running_var, before)
print("called once, the copy's statistics are its own:", same)
assert (counter, training, same) == (0, True, False)
PYTHON
