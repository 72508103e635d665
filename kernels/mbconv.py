"""MBConv composed of the other words: inference, training forward and backward.

Activations are contiguous (N, H, W, C). The steps are those of docs/mbconv.md. Nothing waits for the device and every
size follows from the arguments' sizes, so a CUDA graph can hold any of these.

The depthwise convolution may be another's: functions that do what those of `kernels/depthwise.py` do.

Launches, inference: expand, depthwise with the pool, gate, project, and one more where norms are running statistics,
which it turns into scales and shifts: 4 or 5, one less without expansion, one less without squeeze-and-excitation.
In 16 bits each product casts its weight first where that is large and many tiles read it: at most 2 launches more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from effnet_ops.kernels import batch_norm, depthwise, pointwise, squeeze_excite
from effnet_ops.kernels.batch_norm import ConstantNorm
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
    residual: bool
    activation: str

    @property
    def convolutions(self) -> list[Convolution]:
        return [conv for conv in (self.expand, self.depthwise, self.project) if conv is not None]

    @property
    def window(self) -> dict[str, Sequence[int]]:
        return {"stride": self.stride, "padding": self.padding}


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


def _pixels(x: Tensor) -> Tensor:
    return x.flatten(1, 2)


def inference(block: Block, depthwise_kernels: Depthwise = TRITON) -> Tensor:
    """y (N, Ho, Wo, Cout) where every normalisation is a constant or absent."""
    normalised = [conv for conv in block.convolutions if conv.gamma is not None]
    norms: dict[int, Tensor] = {}
    if normalised:
        made = batch_norm.constant_norms([conv.constant_norm(conv.mean, conv.var) for conv in normalised], block.x)
        norms = {id(conv): norm for conv, norm in zip(normalised, made, strict=True)}

    def behind(conv: Convolution) -> dict[str, Tensor | None]:
        norm = norms.get(id(conv))
        return {"out_norm": norm, "bias": conv.beta if norm is None else None}

    h = block.x
    if block.expand is not None:
        expand, size = block.expand, h.shape[1:3]
        h, _ = pointwise.forward(_pixels(h), expand.weight, **behind(expand), out_activation=block.activation)
        h = h.unflatten(1, size)
    h, pool, _ = depthwise_kernels.forward(
        h,
        block.depthwise.weight,
        **block.window,
        **behind(block.depthwise),
        out_activation=block.activation,
        pool=block.squeeze_excite is not None,
    )
    size, gate = h.shape[1:3], None
    if block.squeeze_excite is not None:
        _, gate = squeeze_excite.gate_forward(pool, size.numel(), block.squeeze_excite)
    y, _ = pointwise.forward(
        _pixels(h),
        block.project.weight,
        gate=gate,
        **behind(block.project),
        image_scale=block.drop_path,
        residual=_pixels(block.x) if block.residual else None,
    )
    return y.unflatten(1, size)


def training(block: Block, depthwise_kernels: Depthwise = TRITON) -> Forward:
    """Steps F1 to F5, with the batch's statistics where a normalisation has none of its own."""
    constants = [conv for conv in block.convolutions if not conv.uses_batch]
    norms: dict[int, Tensor] = {}
    if constants:
        made = batch_norm.constant_norms([conv.constant_norm(conv.mean, conv.var) for conv in constants], block.x)
        norms = {id(conv): norm for conv, norm in zip(constants, made, strict=True)}
    statistics: list[tuple[Tensor, Tensor] | None] = []

    def normalise(conv: Convolution, partials: Tensor | None) -> Tensor:
        if not conv.uses_batch:
            statistics.append(None)
            return norms[id(conv)]
        found = batch_norm.finalize(partials, conv.gamma, conv.beta, conv.eps)
        statistics.append((found.mean, found.var))
        return found.norm

    x, expanded, norm, activation, pooled, gate = block.x, None, None, "none", None, None
    if block.expand is not None:
        expanded, partials = pointwise.forward(_pixels(x), block.expand.weight, statistics=block.expand.uses_batch)
        expanded = expanded.unflatten(1, x.shape[1:3])
        norm, activation = normalise(block.expand, partials), block.activation
    else:
        statistics.append(None)
    convolved, _, partials = depthwise_kernels.forward(
        x if expanded is None else expanded,
        block.depthwise.weight,
        **block.window,
        norm=norm,
        activation=activation,
        statistics=block.depthwise.uses_batch,
    )
    size, a2 = convolved.shape[1:3], _pixels(convolved)
    norm = normalise(block.depthwise, partials)
    if block.squeeze_excite is not None:
        pool = squeeze_excite.pool(a2, norm, block.activation)
        pooled, gate = squeeze_excite.gate_forward(pool, size.numel(), block.squeeze_excite)
    projected, partials = pointwise.forward(
        a2, block.project.weight, norm=norm, activation=block.activation, gate=gate, statistics=block.project.uses_batch
    )
    norm = normalise(block.project, partials)
    residual = _pixels(x) if block.residual else None
    y = batch_norm.apply(projected, norm, image_scale=block.drop_path, residual=residual)
    return Forward(y.unflatten(1, size), expanded, convolved, projected.unflatten(1, size), statistics, pooled)


def _used_norms(
    block: Block, saved: Forward
) -> tuple[list[tuple[Tensor | None, Tensor | None]], tuple[Tensor | None, Tensor, Tensor]]:
    """The mean and the variance that each convolution's result was normalised with, and the three normalisations."""
    statistics = [
        used or (conv.mean, conv.var)
        for conv, used in zip((block.expand, block.depthwise, block.project), saved.statistics, strict=True)
        if conv is not None
    ]
    constants = [conv.constant_norm(*used) for conv, used in zip(block.convolutions, statistics, strict=True)]
    *expand, depthwise, project = batch_norm.constant_norms(constants, block.x)
    return statistics, (expand[0] if expand else None, depthwise, project)


def _expanded(block: Block, saved: Forward) -> Tensor:
    """What the depthwise convolution read, formed again where it was not saved."""
    if block.expand is None:
        return block.x
    if saved.expanded is not None:
        return saved.expanded
    return pointwise.forward(_pixels(block.x), block.expand.weight)[0].unflatten(1, block.x.shape[1:3])


def backward(
    grad: Tensor, block: Block, saved: Forward, needs: Sequence[bool], depthwise_kernels: Depthwise = TRITON
) -> Gradients:
    """Steps B1 to B5. ``needs`` has the order of `Gradients`."""
    wanted = Gradients(*needs)
    before_project, before_gate, before_depthwise = any(needs[:11]), any(needs[:7]), any(needs[:4])
    found: dict[str, Tensor | None] = {}
    statistics, (norm1, norm2, norm3) = _used_norms(block, saved)

    def normalisation(name: str, conv: Convolution, norm: Tensor, partials: Tensor, var: Tensor | None) -> Tensor:
        """Gradients of a normalisation's parameters from sums; the coefficients of its input's gradient."""
        pixels = block.x if name == "expand" else saved.convolved
        result = batch_norm.finalize_backward(
            partials,
            norm,
            None if conv.gamma is None else var,
            conv.eps,
            pixels.shape[:3].numel(),
            constant=not conv.uses_batch,
            gamma_dtype=conv.gamma.dtype if conv.gamma is not None and getattr(wanted, f"{name}_gamma") else None,
            beta_dtype=conv.beta.dtype if conv.beta is not None and getattr(wanted, f"{name}_beta") else None,
        )
        found[f"{name}_gamma"], found[f"{name}_beta"] = result.gamma, result.beta
        return result.coefficients

    g, a2, a3 = _pixels(grad), _pixels(saved.convolved), _pixels(saved.projected)
    sums = batch_norm.gradient_sums(g, a3, norm3, block.drop_path)
    coefficients = normalisation("project", block.project, norm3, sums, statistics[-1][1])
    behind = {"coefficients": coefficients, "a": a3, "image_scale": block.drop_path}

    gate, pooled, partials, z_grad, se = None, None, None, None, block.squeeze_excite
    kind = {"of_image": block.drop_path is not None, "per_image": se is not None, "normalised": True}
    both = before_project and wanted.project_weight and pointwise.both_fit(g, block.project.weight, **kind)
    if se is not None and (both or not before_project):
        _, gate = squeeze_excite.gate_forward(saved.pooled.unsqueeze(1), 1, se)
    if before_project:
        if both:
            z_grad, found["project_weight"], partials = pointwise.both_gradients(
                g, a2, block.project.weight, **behind, norm=norm2, activation=block.activation, gate=gate
            )
        else:
            through = Through(a2, norm2, block.activation, se is not None)
            z_grad, partials = pointwise.input_gradient(g, block.project.weight, **behind, through=through)
        if se is not None:
            result = squeeze_excite.gate_backward(partials, a2.shape[1], saved.pooled, se)
            names = ("se_reduce_weight", "se_reduce_bias", "se_expand_weight", "se_expand_bias")
            found |= dict(zip(names, result[:4], strict=True))
            gate, pooled, partials = result.gate, result.pooled, result.partials
    if wanted.project_weight and not both:
        found["project_weight"], _ = pointwise.weight_gradient(
            g, a2, block.project.weight, **behind, norm=norm2, activation=block.activation, gate=gate
        )
    if before_gate:
        coefficients = normalisation("depthwise", block.depthwise, norm2, partials, statistics[-2][1])
    if before_depthwise or wanted.depthwise_weight:
        expanded = _expanded(block, saved)
        n_grad, found["depthwise_weight"], _, partials = depthwise_kernels.backward(
            z_grad.unflatten(1, grad.shape[1:3]),
            expanded,
            block.depthwise.weight,
            size=block.x.shape[1:3],
            **block.window,
            a=saved.convolved,
            a_norm=norm2,
            a_activation=block.activation,
            coefficients=coefficients,
            gate=gate,
            pooled=pooled,
            norm=norm1,
            activation="none" if block.expand is None else block.activation,
            residual=grad if block.expand is None and block.residual else None,
            needs=(before_depthwise, wanted.depthwise_weight, False),
        )
        found["x"] = n_grad
        if block.expand is not None and before_depthwise:
            coefficients = normalisation("expand", block.expand, norm1, partials, statistics[0][1])
            behind = {"coefficients": coefficients, "a": _pixels(expanded)}
            found |= _expand_gradients(_pixels(n_grad), g, block, behind, wanted)
    return Gradients(**{name: value for name, value in found.items() if getattr(wanted, name)})


def _expand_gradients(
    n_grad: Tensor, grad: Tensor, block: Block, behind: dict[str, Tensor], wanted: Gradients
) -> dict[str, Tensor | None]:
    """Step B5, with the residual's gradient."""
    found: dict[str, Tensor | None] = {}
    weight, x, residual = block.expand.weight, _pixels(block.x), grad if block.residual else None
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
