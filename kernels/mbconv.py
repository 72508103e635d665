"""MBConv composed of the other words: inference, training forward and backward.

Activations are contiguous (N, H, W, C). The steps are those of docs/mbconv.md. Nothing waits for the device and every
size follows from the arguments' sizes, so a CUDA graph can hold any of these.

The depthwise convolution may be another's: functions that do what those of `kernels/depthwise.py` do.

Launches, inference: expand, depthwise with the pool, gate, project, and one more where norms are running statistics,
which it turns into scales and shifts: 4 or 5, one less without expansion, one less without squeeze-and-excitation.
In 16 bits each product casts its weight first where that is large and many tiles read it: at most 2 launches more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from effnet_ops.kernels import batch_norm, depthwise, pointwise, squeeze_excite
from effnet_ops.kernels.batch_norm import ConstantNorm
from effnet_ops.kernels.layout import flat
from effnet_ops.kernels.pointwise import Through
from effnet_ops.kernels.squeeze_excite import Parameters


class Convolution(NamedTuple):
    """A contiguous weight and what follows it, as the operators take it.

    Without gamma there is no normalisation and beta is a bias. With gamma, statistics are those of the batch where mean
    and var are None.
    """

    weight: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    eps: float

    @property
    def uses_batch(self) -> bool:
        return self.gamma is not None and self.mean is None

    def constant_norm(self, mean: Tensor | None, var: Tensor | None) -> ConstantNorm:
        """The normalisation with these statistics, or the bias."""
        if self.gamma is None:
            mean, var = None, None
        return ConstantNorm(self.weight.shape[0], self.gamma, self.beta, mean, var, self.eps)


Found = dict[str, Tensor | None]
"""Gradients by the names of their arguments."""


class AnyBlock(Protocol):
    """What the steps behind the k x k convolution read of a block."""

    x: Tensor
    squeeze_excite: Parameters | None
    project: Convolution
    drop_path: Tensor | None
    residual: bool
    activation: str


class Saved(Protocol):
    """What the same steps read of what training saved."""

    convolved: Tensor
    projected: Tensor
    pooled: Tensor | None


class Block(NamedTuple):
    """A block and its input (N, H, W, Cin), not empty. ``padding`` is (top, bottom, left, right)."""

    x: Tensor
    expand: Convolution | None
    depthwise: Convolution
    squeeze_excite: Parameters | None
    project: Convolution
    drop_path: Tensor | None
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    residual: bool
    activation: str

    @property
    def convolutions(self) -> list[Convolution]:
        return [conv for conv in (self.expand, self.depthwise, self.project) if conv is not None]

    @property
    def window(self) -> dict[str, Sequence[int]]:
        window = {"stride": self.stride, "padding": self.padding}
        # The functions on CUDA C++ kernels take none, and are not chosen for any.
        return window if max(self.dilation) == 1 else {**window, "dilation": self.dilation}


class Depthwise(NamedTuple):
    """Who convolves: functions with the arguments and the results of those in `kernels/depthwise.py`."""

    forward: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]
    backward: Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]]


TRITON = Depthwise(depthwise.forward, depthwise.backward)


class Forward(NamedTuple):
    """What `training` makes: activations (N, H, W, C) before their normalisation, and vectors.

    ``statistics`` has, for each convolution in order, mean and biased variance where they are the batch's, else None.
    `backward` takes it without ``y``, and without ``expanded`` where that is to be formed again.
    """

    y: Tensor | None
    expanded: Tensor | None
    convolved: Tensor
    projected: Tensor
    statistics: list[tuple[Tensor, Tensor] | None]
    pooled: Tensor | None


class Gradients(NamedTuple):
    """Of the arguments of the same names; None where not asked for, or where there is no such argument."""

    x: Tensor | None = None
    expand_weight: Tensor | None = None
    expand_gamma: Tensor | None = None
    expand_beta: Tensor | None = None
    depthwise_weight: Tensor | None = None
    depthwise_gamma: Tensor | None = None
    depthwise_beta: Tensor | None = None
    se_reduce_weight: Tensor | None = None
    se_reduce_bias: Tensor | None = None
    se_expand_weight: Tensor | None = None
    se_expand_bias: Tensor | None = None
    project_weight: Tensor | None = None
    project_gamma: Tensor | None = None
    project_beta: Tensor | None = None


class ConstantNorms:
    """The normalisations of an inference; made in one launch."""

    def __init__(self, convolutions: Sequence[Convolution], x: Tensor) -> None:
        normalised = [conv for conv in convolutions if conv.gamma is not None]
        made = _constant_norms(normalised, x) if normalised else []
        self._norms = {id(conv): norm for conv, norm in zip(normalised, made, strict=True)}

    def behind(self, conv: Convolution) -> dict[str, Tensor | None]:
        """What follows a convolution, as a product takes it."""
        norm = self._norms.get(id(conv))
        return {"out_norm": norm, "bias": conv.beta if norm is None else None}


def _constant_norms(convolutions: Sequence[Convolution], x: Tensor) -> list[Tensor]:
    return batch_norm.constant_norms([conv.constant_norm(conv.mean, conv.var) for conv in convolutions], x)


def inference(block: Block, depthwise_kernels: Depthwise = TRITON) -> Tensor:
    """y (N, Ho, Wo, Cout) where every normalisation is a constant or absent."""
    norms, h = ConstantNorms(block.convolutions, block.x), block.x
    if block.expand is not None:
        behind = norms.behind(block.expand)
        h, _ = pointwise.forward(flat(h), block.expand.weight, **behind, out_activation=block.activation)
        h = h.unflatten(1, block.x.shape[1:3])
    h, pool, _ = depthwise_kernels.forward(
        h,
        block.depthwise.weight,
        **block.window,
        **norms.behind(block.depthwise),
        out_activation=block.activation,
        pool=block.squeeze_excite is not None,
    )
    return project_inference(block, h, pool, norms)


def project_inference(block: AnyBlock, h: Tensor, pool: Tensor | None, norms: ConstantNorms) -> Tensor:
    """y from h, the activation behind the k x k convolution; ``pool`` has its sums where there is a gate."""
    size, gate = h.shape[1:3], None
    if block.squeeze_excite is not None:
        _, gate = squeeze_excite.gate_forward(pool, size.numel(), block.squeeze_excite)
    y, _ = pointwise.forward(
        flat(h),
        block.project.weight,
        gate=gate,
        **norms.behind(block.project),
        image_scale=block.drop_path,
        residual=flat(block.x) if block.residual else None,
    )
    return y.unflatten(1, size)


class TrainingNorms:
    """The normalisations of a training step, one after the other, and the statistics of those that use the batch's."""

    def __init__(self, convolutions: Sequence[Convolution], x: Tensor) -> None:
        constants = [conv for conv in convolutions if not conv.uses_batch]
        made = _constant_norms(constants, x) if constants else []
        self._norms = {id(conv): norm for conv, norm in zip(constants, made, strict=True)}
        self.statistics: list[tuple[Tensor, Tensor] | None] = []

    def skip(self) -> None:
        """For a convolution that the block does not have."""
        self.statistics.append(None)

    def behind(self, conv: Convolution, partials: Tensor | None) -> Tensor:
        if not conv.uses_batch:
            self.statistics.append(None)
            return self._norms[id(conv)]
        found = batch_norm.finalize(partials, conv.gamma, conv.beta, conv.eps)
        self.statistics.append((found.mean, found.var))
        return found.norm


def training(block: Block, depthwise_kernels: Depthwise = TRITON) -> Forward:
    """Steps F1 to F5, with the batch's statistics where a normalisation has none of its own."""
    norms = TrainingNorms(block.convolutions, block.x)
    x, expanded, norm, activation = block.x, None, None, "none"
    if block.expand is not None:
        expanded, partials = pointwise.forward(flat(x), block.expand.weight, statistics=block.expand.uses_batch)
        expanded = expanded.unflatten(1, x.shape[1:3])
        norm, activation = norms.behind(block.expand, partials), block.activation
    else:
        norms.skip()
    convolved, _, partials = depthwise_kernels.forward(
        x if expanded is None else expanded,
        block.depthwise.weight,
        **block.window,
        norm=norm,
        activation=activation,
        statistics=block.depthwise.uses_batch,
    )
    norm = norms.behind(block.depthwise, partials)
    y, projected, pooled = project_training(block, convolved, norm, norms)
    return Forward(y, expanded, convolved, projected, norms.statistics, pooled)


def project_training(
    block: AnyBlock, convolved: Tensor, norm: Tensor, norms: TrainingNorms
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Steps F3 to F5 behind a2 and its normalisation: y, a3 and the pooled values."""
    size, a2, pooled, gate = convolved.shape[1:3], flat(convolved), None, None
    if block.squeeze_excite is not None:
        pool = squeeze_excite.pool(a2, norm, block.activation)
        pooled, gate = squeeze_excite.gate_forward(pool, size.numel(), block.squeeze_excite)
    projected, partials = pointwise.forward(
        a2, block.project.weight, norm=norm, activation=block.activation, gate=gate, statistics=block.project.uses_batch
    )
    norm = norms.behind(block.project, partials)
    residual = flat(block.x) if block.residual else None
    y = batch_norm.apply(projected, norm, image_scale=block.drop_path, residual=residual)
    return y.unflatten(1, size), projected.unflatten(1, size), pooled


class Normalised(NamedTuple):
    """A convolution with the vectors (3, C) and the variance that its result was normalised with."""

    name: str
    conv: Convolution
    norm: Tensor
    var: Tensor | None

    def gradients(self, partials: Tensor, count: int, wanted: Any, found: Found) -> Tensor:
        """The coefficients of its input's gradient; adds its parameters' gradients to what was ``found``.

        ``partials`` are the sums of `batch_norm.finalize_backward`, over ``count`` values a channel.
        """
        conv, gamma, beta = self.conv, f"{self.name}_gamma", f"{self.name}_beta"
        result = batch_norm.finalize_backward(
            partials,
            self.norm,
            None if conv.gamma is None else self.var,
            conv.eps,
            count,
            constant=not conv.uses_batch,
            gamma_dtype=conv.gamma.dtype if conv.gamma is not None and getattr(wanted, gamma) else None,
            beta_dtype=conv.beta.dtype if conv.beta is not None and getattr(wanted, beta) else None,
        )
        found[gamma], found[beta] = result.gamma, result.beta
        return result.coefficients


def normalised(
    convolutions: Mapping[str, Convolution | None],
    statistics: Sequence[tuple[Tensor, Tensor] | None],
    x: Tensor,
) -> dict[str, Normalised]:
    """Each convolution that there is with what its result was normalised with, by name."""
    used = {
        name: (conv, *(of_batch or (conv.mean, conv.var)))
        for (name, conv), of_batch in zip(convolutions.items(), statistics, strict=True)
        if conv is not None
    }
    norms = batch_norm.constant_norms([conv.constant_norm(mean, var) for conv, mean, var in used.values()], x)
    return {
        name: Normalised(name, conv, norm, var)
        for (name, (conv, _, var)), norm in zip(used.items(), norms, strict=True)
    }


def _expanded(block: Block, saved: Forward) -> Tensor:
    """What the depthwise convolution read, formed again where it was not saved."""
    if block.expand is None:
        return block.x
    if saved.expanded is not None:
        return saved.expanded
    return pointwise.forward(flat(block.x), block.expand.weight)[0].unflatten(1, block.x.shape[1:3])


class Convolved(NamedTuple):
    """What step B4 forms ā2 from: z̄ (N, Ho, Wo, C), the vectors of (2), and of the gate; see `batch_norm`.

    None what nothing was asked for that needs it.
    """

    grad: Tensor | None
    coefficients: Tensor | None
    gate: Tensor | None
    pooled: Tensor | None


def project_gradients(
    grad: Tensor,
    block: AnyBlock,
    saved: Saved,
    convolution: Normalised,
    project: Normalised,
    wanted: Any,
    found: Found,
) -> Convolved:
    """Steps B1 to B3. ``convolution`` is the k x k one; ``found`` gets the gradients of what comes behind it."""
    before_project = any(wanted[: wanted._fields.index("project_weight")])
    before_gate = any(wanted[: wanted._fields.index("se_reduce_weight")])
    g, a2, a3 = flat(grad), flat(saved.convolved), flat(saved.projected)
    count, weight, se = a2.shape[:2].numel(), block.project.weight, block.squeeze_excite
    sums = batch_norm.gradient_sums(g, a3, project.norm, block.drop_path)
    behind = {"a": a3, "image_scale": block.drop_path}
    behind["coefficients"] = project.gradients(sums, count, wanted, found)
    front = {"norm": convolution.norm, "activation": block.activation}

    gate, pooled, partials, z_grad = None, None, None, None
    kind = {"of_image": block.drop_path is not None, "per_image": se is not None, "normalised": True}
    both = before_project and wanted.project_weight and pointwise.both_fit(g, weight, **kind)
    if se is not None and (both or not before_project):
        _, gate = squeeze_excite.gate_forward(saved.pooled.unsqueeze(1), 1, se)
    if before_project:
        if both:
            z_grad, found["project_weight"], partials = pointwise.both_gradients(
                g, a2, weight, **behind, **front, gate=gate
            )
        else:
            through = Through(a2, **front, per_image=se is not None)
            z_grad, partials = pointwise.input_gradient(g, weight, **behind, through=through)
        if se is not None:
            result = squeeze_excite.gate_backward(partials, a2.shape[1], saved.pooled, se)
            found |= {f"se_{name}": value for name, value in zip(result._fields[:4], result[:4], strict=True)}
            gate, pooled, partials = result.gate, result.pooled, result.partials
    if wanted.project_weight and not both:
        found["project_weight"], _ = pointwise.weight_gradient(g, a2, weight, **behind, **front, gate=gate)
    coefficients = convolution.gradients(partials, count, wanted, found) if before_gate else None
    return Convolved(None if z_grad is None else z_grad.unflatten(1, grad.shape[1:3]), coefficients, gate, pooled)


def backward(
    grad: Tensor, block: Block, saved: Forward, needs: Sequence[bool], depthwise_kernels: Depthwise = TRITON
) -> Gradients:
    """Steps B1 to B5. ``needs`` has the order of `Gradients`."""
    wanted, before_depthwise = Gradients(*needs), any(needs[:4])
    convolutions = {"expand": block.expand, "depthwise": block.depthwise, "project": block.project}
    norms = normalised(convolutions, saved.statistics, block.x)
    found: Found = {}
    convolved = project_gradients(grad, block, saved, norms["depthwise"], norms["project"], wanted, found)
    if before_depthwise or wanted.depthwise_weight:
        expanded, expand = _expanded(block, saved), norms.get("expand")
        n_grad, found["depthwise_weight"], _, partials = depthwise_kernels.backward(
            convolved.grad,
            expanded,
            block.depthwise.weight,
            size=block.x.shape[1:3],
            **block.window,
            a=saved.convolved,
            a_norm=norms["depthwise"].norm,
            a_activation=block.activation,
            coefficients=convolved.coefficients,
            gate=convolved.gate,
            pooled=convolved.pooled,
            norm=None if expand is None else expand.norm,
            activation="none" if expand is None else block.activation,
            residual=grad if expand is None and block.residual else None,
            needs=(before_depthwise, wanted.depthwise_weight, False),
        )
        found["x"] = n_grad
        if expand is not None and before_depthwise:
            coefficients = expand.gradients(partials, block.x.shape[:3].numel(), wanted, found)
            behind = {"coefficients": coefficients, "a": flat(expanded)}
            found |= _expand_gradients(flat(n_grad), flat(grad), block, behind, wanted)
    return Gradients(**{name: value for name, value in found.items() if getattr(wanted, name)})


def _expand_gradients(
    n_grad: Tensor, grad: Tensor, block: Block, behind: dict[str, Tensor], wanted: Gradients
) -> dict[str, Tensor | None]:
    """Step B5, with the residual's gradient."""
    found: dict[str, Tensor | None] = {}
    weight, x, residual = block.expand.weight, flat(block.x), grad if block.residual else None
    kind = {"of_image": False, "per_image": False, "normalised": False}
    if wanted.x and wanted.expand_weight and pointwise.both_fit(n_grad, weight, **kind):
        dx, found["expand_weight"], _ = pointwise.both_gradients(n_grad, x, weight, **behind, residual=residual)
        found["x"] = dx.unflatten(1, block.x.shape[1:3])
        return found
    if wanted.x:
        dx, _ = pointwise.input_gradient(n_grad, weight, **behind, residual=residual)
        found["x"] = dx.unflatten(1, block.x.shape[1:3])
    if wanted.expand_weight:
        found["expand_weight"], _ = pointwise.weight_gradient(n_grad, x, weight, **behind)
    return found
