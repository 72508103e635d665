#!/usr/bin/env bash
# Keras 3.15.1 on the backend torch: EfficientNetB0 is a torch.nn.Module whose train() and eval() change nothing, and whose
# running statistics are parameters.
#
# Guess: a torch.nn.Module follows train() and eval(), and has running statistics as its buffers.
# Seen (torch 2.14.1): "train(): statistics changed False, two calls equal True; eval() with training=True: statistics changed
# True"; "0 buffers, 324 parameters, 5330591 elements, 5288548 of them with gradients". What goes through parameters()
# (clipping, counting, an EMA) goes through statistics, too.
. "$(dirname "$0")/install" torch==2.14.1 keras==3.15.1 numpy==2.4.6
KERAS_BACKEND=torch "$python" -W ignore - <<'PYTHON'
import keras
import torch

model = keras.applications.EfficientNetB0(weights=None, input_shape=(64, 64, 3))
norm = next(layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization))
x = torch.rand(4, 64, 64, 3) * 255


def statistics() -> torch.Tensor:
    return norm.moving_variance.value.detach().clone()


before = statistics()
model.train()
equal = torch.equal(model(x), model(x))
by_train = not torch.equal(statistics(), before)
model.eval()
model(x, training=True)
by_argument = not torch.equal(statistics(), before)
print("train(): statistics changed", by_train, ", two calls equal", equal)
print("eval() with training=True: statistics changed", by_argument)
parameters = list(model.parameters())
elements = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
buffers = len(list(model.buffers()))
print(buffers, "buffers,", len(parameters), "parameters,", elements[0], "elements,", elements[1], "of them with gradients")
assert isinstance(model, torch.nn.Module) and (by_train, equal, by_argument) == (False, True, True)
assert (buffers, len(parameters), elements) == (0, 324, (5330591, 5288548))
PYTHON
