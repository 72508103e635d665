#!/usr/bin/env bash
# torch 2.11.0's torch.compile gives zero gradients through an autograd.Function whose forward ends in y.to(x.dtype).
#
# Guess: a compiled autograd.Function gives the gradients of its backward, or an error. Many end in `.to(x.dtype)`,
# `.contiguous()` or `.float()`, which do nothing where there is nothing to do.
# Seen, the gradient of a function that doubles, eager and compiled with fullgraph=True: "plain 2 2, clone 2 2, to 2 0,
# float 2 0, contiguous 2 0", without a warning. Where such a call returns its own argument, the backward does not run. The
# value is right, so a custom normalisation or activation trains nothing in front of it. torch 2.14.1 gives 2 everywhere.
. "$(dirname "$0")/install" torch==2.11.0 numpy==2.4.6
"$python" -W ignore - <<'PYTHON'
import torch

ENDS = {
    "plain": lambda y: y,
    "clone": lambda y: y.clone(),
    "to": lambda y: y.to(torch.float32),
    "float": lambda y: y.float(),
    "contiguous": lambda y: y.contiguous(),
}


def doubling(end):
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return end(2.0 * x)

        @staticmethod
        def backward(ctx, grad):
            return 2.0 * grad

    return Double


found = {}
for name, end in ENDS.items():
    function = doubling(end)
    gradients = []
    for call in (function.apply, torch.compile(lambda x: function.apply(x), backend="eager", fullgraph=True)):
        x = torch.ones((), requires_grad=True)
        y = call(x)
        assert y == 2
        y.backward()
        gradients.append(int(x.grad))
    torch._dynamo.reset()
    found[name] = gradients
print(", ".join(f"{name} {eager} {compiled}" for name, (eager, compiled) in found.items()))
assert found == {"plain": [2, 2], "clone": [2, 2], "to": [2, 0], "float": [2, 0], "contiguous": [2, 0]}, found
PYTHON
