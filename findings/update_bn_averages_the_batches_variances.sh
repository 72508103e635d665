#!/usr/bin/env bash
# torch 2.14.1's update_bn, which gives averaged weights their BatchNorm statistics, takes the average of the batches'
# variances, counts a short last batch as a whole one, and runs with dropout on.
#
# Guess: after update_bn(loader, model) the statistics are those of the data, as a calibration in evaluation would find them,
# whatever the order of the images.
# Seen: for data in order of their class "variance 1.15 of 24.02", shuffled 25.62: what differs between batches is lost. For
# batches of 60 and 4 images "mean 10.14 of 7.09". A constant image behind Dropout(0.5) has "variance 1.00 of 0.00", since
# update_bn puts the whole model into training mode, drop path included.
. "$(dirname "$0")/install" torch==2.14.1
"$python" -W ignore - <<'PYTHON'
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

torch.manual_seed(0)
# Eight classes of eight images, two apart.
data = torch.randn(64, 1, 1, 1) + (torch.arange(64) // 8 * 2.0).view(-1, 1, 1, 1)


def statistics(batches: list[torch.Tensor], *layers: nn.Module) -> tuple[float, float]:
    norm = nn.BatchNorm2d(1)
    update_bn(batches, nn.Sequential(*layers, norm))
    return norm.running_mean.item(), norm.running_var.item()


mean, variance = data.mean().item(), data.var().item()
ordered = statistics(list(data.split(8)))
shuffled = statistics(list(data[torch.randperm(64)].split(8)))
uneven = statistics([data[:60], data[60:]])
dropped = statistics([torch.ones(64, 1, 8, 8)], nn.Dropout(0.5))
print(f"in order: variance {ordered[1]:.2f} of {variance:.2f}; shuffled: {shuffled[1]:.2f}")
print(f"batches of 60 and 4: mean {uneven[0]:.2f} of {mean:.2f}")
print(f"a constant behind dropout: variance {dropped[1]:.2f} of 0.00")
assert abs(ordered[0] - mean) < 1e-4 and ordered[1] < 0.1 * variance < variance < 1.2 * shuffled[1], (ordered, shuffled)
assert abs(uneven[0] - (data[:60].mean().item() + data[60:].mean().item()) / 2) < 1e-4 < abs(uneven[0] - mean), uneven
assert 0.9 < dropped[1] < 1.1, dropped
PYTHON
