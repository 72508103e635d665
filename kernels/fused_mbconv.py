"""Fused-MBConv composed of the other words: inference, training forward and backward.

Activations are contiguous (N, H, W, C). The steps are those of docs/mbconv.md, "Fused-MBConv"; those behind the
k x k convolution are MBConv's (`mbconv.py`). Nothing waits for the device and every size follows from the arguments'.

Launches, inference: the convolution and the projection, one more that lays the convolution's weight out, one where
norms are running statistics, and with squeeze-and-excitation the pool and the gate. Without a projection (expansion 1)
the convolution stores the block's result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from effnet_ops.kernels import batch_norm, convolution, squeeze_excite
from effnet_ops.kernels.layout import flat
from effnet_ops.kernels.mbconv import (
    ConstantNorms,
    Convolution,
    Convolved,
    Found,
    TrainingNorms,
    normalised,
    project_gradients,
    project_inference,
    project_training,
)
from effnet_ops.kernels.squeeze_excite import Parameters


class Block(NamedTuple):
    """A block and its input (N, H, W, Cin), not empty. ``padding`` is (top, bottom, left, right).

    The weight of ``expand`` may have any strides. Without ``project`` there is no squeeze_excite.
    """

    x: Tensor
    expand: Convolution
    squeeze_excite: Parameters | None
    project: Convolution | None
    drop_path: Tensor | None
    stride: Sequence[int]
    padding: Sequence[int]
    residual: bool
    activation: str

    @property
    def convolutions(self) -> list[Convolution]:
        return [self.expand] if self.project is None else [self.expand, self.project]

    @property
    def window(self) -> dict[str, Sequence[int]]:
        return {"stride": self.stride, "padding": self.padding}


class Forward(NamedTuple):
    """What `training` makes: activations (N, H, W, C) before their normalisation, and vectors.

    ``statistics`` has, for expand and project, mean and biased variance where they are the batch's, else None.
    `backward` takes it without ``y``, and without ``convolved`` where that is to be formed again.
    """

    y: Tensor | None
    convolved: Tensor | None
    projected: Tensor | None
    statistics: list[tuple[Tensor, Tensor] | None]
    pooled: Tensor | None


class Gradients(NamedTuple):
    """Of the arguments of the same names; None where not asked for, or where there is no such argument."""

    x: Tensor | None = None
    expand_weight: Tensor | None = None
    expand_gamma: Tensor | None = None
    expand_beta: Tensor | None = None
    se_reduce_weight: Tensor | None = None
    se_reduce_bias: Tensor | None = None
    se_expand_weight: Tensor | None = None
    se_expand_bias: Tensor | None = None
    project_weight: Tensor | None = None
    project_gamma: Tensor | None = None
    project_beta: Tensor | None = None


def inference(block: Block) -> Tensor:
    """y (N, Ho, Wo, Cout) where every normalisation is a constant or absent."""
    norms = ConstantNorms(block.convolutions, block.x)
    settings = {**block.window, **norms.behind(block.expand), "out_activation": block.activation}
    if block.project is None:
        settings |= {"image_scale": block.drop_path, "residual": block.x if block.residual else None}
    h, _ = convolution.forward(block.x, block.expand.weight, **settings)
    if block.project is None:
        return h
    pool = None if block.squeeze_excite is None else squeeze_excite.pool(flat(h))
    return project_inference(block, h, pool, norms)


def training(block: Block) -> Forward:
    """Steps F2 to F5, with the batch's statistics where a normalisation has none of its own."""
    norms, x, expand = TrainingNorms(block.convolutions, block.x), block.x, block.expand
    convolved, partials = convolution.forward(x, expand.weight, **block.window, statistics=expand.uses_batch)
    norm = norms.behind(expand, partials)
    if block.project is not None:
        y, projected, pooled = project_training(block, convolved, norm, norms)
        return Forward(y, convolved, projected, norms.statistics, pooled)
    norms.skip()
    residual = flat(x) if block.residual else None
    y = batch_norm.apply(flat(convolved), norm, block.activation, block.drop_path, residual)
    return Forward(y.unflatten(1, convolved.shape[1:3]), convolved, None, norms.statistics, None)


def backward(grad: Tensor, block: Block, saved: Forward, needs: Sequence[bool]) -> Gradients:
    """Steps B1 to B4. ``needs`` has the order of `Gradients`."""
    wanted, found = Gradients(*needs), {}
    if saved.convolved is None:
        saved = saved._replace(convolved=convolution.forward(block.x, block.expand.weight, **block.window)[0])
    norms = normalised({"expand": block.expand, "project": block.project}, saved.statistics, block.x)
    expand, image_scale = norms["expand"], None
    if block.project is not None:
        convolved = project_gradients(grad, block, saved, expand, norms["project"], wanted, found)
    else:
        # The sums of (1) behind the activation and drop path.
        a2, image_scale = flat(saved.convolved), block.drop_path
        sums = batch_norm.gradient_sums(flat(grad), a2, expand.norm, image_scale, block.activation)
        coefficients = expand.gradients(sums, a2.shape[:2].numel(), wanted, found)
        convolved = Convolved(grad, coefficients, None, None)
    if wanted.x or wanted.expand_weight:
        _convolution_gradients(grad, block, saved.convolved, expand.norm, convolved, image_scale, wanted, found)
    return Gradients(**{name: value for name, value in found.items() if getattr(wanted, name)})


def _convolution_gradients(
    grad: Tensor,
    block: Block,
    a2: Tensor,
    norm: Tensor,
    convolved: Convolved,
    image_scale: Tensor | None,
    wanted: Gradients,
    found: Found,
) -> None:
    """Step B4, with the residual's gradient. ``image_scale`` is drop path's where the block has no projection.

    Each of the k x k taps reads ā2, so it is formed once and stored: what it costs to form is more than its bytes.
    """
    weight = block.expand.weight
    a2_grad = batch_norm.input_gradient(
        flat(convolved.grad),
        flat(a2),
        norm,
        convolved.coefficients,
        block.activation,
        gate=convolved.gate,
        pooled=convolved.pooled,
        image_scale=image_scale,
    ).view(a2.shape)
    if wanted.x:
        residual = grad if block.residual else None
        size = block.x.shape[1:3]
        found["x"] = convolution.input_gradient(a2_grad, weight, size=size, **block.window, residual=residual)
    if wanted.expand_weight:
        found["expand_weight"] = convolution.weight_gradient(a2_grad, block.x, weight, **block.window)
