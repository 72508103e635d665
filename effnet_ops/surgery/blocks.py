"""MBConv blocks and squeeze-and-excitation layers of any library, by what `surgery.recognise` found in them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from effnet_ops import functional
from effnet_ops.checks import padding_sides
from effnet_ops.surgery.fused import (
    ACTIVATIONS,
    GATES,
    AnyBlockPlan,
    BlockPlan,
    FusedBlockPlan,
    FusedLayer,
    NotFusable,
    Part,
    SqueezeExcitePlan,
    Steps,
    activation_name,
    check_norm,
    check_pointwise,
    check_statistics_settings,
    convolution_padding,
    convolution_pair,
    fused_class,
    gate_name,
    is_average,
)
from effnet_ops.surgery.generic import conv2d_padding
from effnet_ops.surgery.recognise import (
    DROP_PATHS,
    Block,
    Form,
    Input,
    Op,
    Rate,
    Step,
    form_of,
    is_sequence,
    submodule,
    takes_rate,
)
from effnet_ops.surgery.structure import stock_class


def _part(module: nn.Module, op: Op) -> Part:
    return Part(op.path or "it", submodule(module, op.path))


def _activation(module: nn.Module, ops: Sequence[Op]) -> str:
    """The name of the one activation that operations are; "none" for none."""
    names = [op.value if op.kind == "function" else activation_name(_part(module, op)) for op in ops]
    if unknown := [name for name in names if name not in ACTIVATIONS.values()]:
        raise NotFusable(f"{unknown[0]} is no activation that is fused")
    names = [name for name in names if name != "none"]
    if len(names) > 1:
        raise NotFusable(f"it has {' and '.join(names)} one after the other")
    return names[0] if names else "none"


def _norm(module: nn.Module, norm: Op | None, ops: Sequence[Op]) -> tuple[nn.Module | None, str]:
    """The normalisation of a stage, if it has one, and the name of the one activation behind it."""
    if norm is None:
        return None, _activation(module, ops)
    part = _part(module, norm)
    names = {check_norm(part), _activation(module, ops)} - {"none"}
    if len(names) > 1:
        raise NotFusable(f"{part.name} has {len(names)} activations behind it")
    check_statistics_settings(part)
    return part.module, names.pop() if names else "none"


def _pointwise(module: nn.Module, op: Op) -> nn.Conv2d:
    return check_pointwise(_part(module, op), plain=op.value == "plain")


def _padding(module: nn.Module, conv: Part, plain: bool, pads: Sequence[Op]) -> Any:
    """The padding of the depthwise convolution with what is padded before; a function of x if it goes by the size."""
    sides = conv2d_padding(conv.module) if plain else convolution_padding(conv)
    if not pads:
        return sides
    if sides == "same" or len(pads) > 1:
        raise NotFusable(f"{conv.name} is padded twice")
    value = pads[0].value if pads[0].kind == "pad" and pads[0].path == "" else _padded_by(_part(module, pads[0]))
    if isinstance(value, Step):
        given = dict(value.kwargs)
        kernel, stride = (convolution_pair(conv, name) for name in ("kernel_size", "stride"))
        expected = (given.pop("kernel_size", None), given.pop("stride", 1))
        if any(sides) or given or len(value.args) != 1 or [(n, n) for n in expected] != [kernel, stride]:
            raise NotFusable(f"{conv.name} is padded for another convolution")
        return functools.partial(_sides_at_call, _call(module, value))
    left, right, top, bottom = value
    return tuple(own + added for own, added in zip(sides, (top, bottom, left, right), strict=True))


def _sides_at_call(pad: Callable[[Tensor], Any], x: Tensor) -> tuple[int, ...]:
    left, right, top, bottom = pad(x)
    return (top, bottom, left, right)


def _padded_by(part: Part) -> tuple[int, ...]:
    padding = part.module.padding
    if getattr(part.module, "value", 0) != 0 or not isinstance(padding, tuple) or len(padding) != 4 or min(padding) < 0:
        raise NotFusable(f"{part.name} pads by {padding}, not with zeros around the image")
    return padding


def _call(module: nn.Module, step: Op | Step) -> Callable[..., Any]:
    """What a step calls, as a function of a tensor and the drop rate of the call."""
    if isinstance(step, Op):
        if isinstance(step.value, Step):
            return _call(module, step.value)
        if not step.path:
            raise NotFusable(f"it calls {step.value} outside the block")
        return _of_one(submodule(module, step.path))
    call = functools.partial(_call_function, step.function, step.args, step.kwargs)
    return functools.partial(_call_at_rate, call) if takes_rate(step) else call


def _call_at_rate(call: Callable[..., Any], x: Tensor, rate: float | None = None) -> Any:
    return call(x, rate) if rate else x


def _of_one(module: nn.Module) -> Callable[..., Any]:
    return lambda x, rate=None: module(x)


def _call_function(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Sequence[tuple[str, Any]], x: Tensor, rate: Any = None
) -> Any:
    def given(value: Any) -> Any:
        return x if value is Input else rate if isinstance(value, Rate) else value

    return function(*map(given, args), **{name: given(value) for name, value in kwargs})


def _squeeze_excite(module: nn.Module, op: Op) -> SqueezeExcitePlan:
    pool, reduce, *between, gate = op.value
    *between, expand = between
    if pool.kind == "module" and not is_average(submodule(module, pool.path)):
        raise NotFusable(f"{pool.path} is not the average over the image")
    for extra in between:
        if extra.kind not in ("function", "module"):
            part = _part(module, extra)
            raise NotFusable(f"{part.name} is {type(part.module).__name__}, which is not fused")
    if expand.kind != "conv":
        raise NotFusable(f"{_part(module, expand).name} is called between the second convolution and the gate")
    name = gate.value if gate.kind == "function" else gate_name(_part(module, gate))
    if name not in GATES.values():
        raise NotFusable(f"{name} is no gate that is fused")
    convs = (_pointwise(module, reduce), _pointwise(module, expand))
    if convs[0].in_channels != convs[1].out_channels:
        raise NotFusable(f"{expand.path} makes {convs[1].out_channels} gates for {convs[0].in_channels} channels")
    return SqueezeExcitePlan(*convs, _activation(module, between), name)


def block_plan(module: nn.Module, block: Block) -> AnyBlockPlan:
    """What runs instead of a block; raises `NotFusable` where a part is not what the operators compute."""
    conv, norm, behind = block.depthwise
    depthwise = _part(module, conv)
    padding = _padding(module, depthwise, conv.value == "plain", block.pads)
    norms = [_norm(module, norm, behind)]
    expand = None
    if block.expand is not None:
        first, first_norm, first_behind = block.expand
        norms.append(_norm(module, first_norm, first_behind))
        expand = (_pointwise(module, first), norms[1][0])
        if norms[0][1] != norms[1][1]:
            raise NotFusable(f"its activations differ: {norms[1][1]} and {norms[0][1]}")
    last, last_norm, last_behind = block.project or (conv, None, ())
    after = "none"
    project: tuple[nn.Conv2d, nn.Module | None] | None = (
        None if block.project is None else (_pointwise(module, last), None)
    )
    if last_norm is not None:
        norms.append(_norm(module, last_norm, last_behind))
        project, after = (project[0], norms[-1][0]), norms[-1][1]
    found = [id(norm) for norm, _ in norms if norm is not None]
    if len(set(found)) < len(found):
        raise NotFusable("two of its normalisations are one shared module")
    excite = None if block.excite is None else _squeeze_excite(module, block.excite)
    steps, drop = _steps(module, block, after)
    residual = block.shortcut is not None and steps is None
    channels = (depthwise.module if expand is None else expand[0]).in_channels
    out_channels = (depthwise.module if project is None else project[0]).out_channels
    if residual and out_channels != channels:
        raise NotFusable(f"its residual has {channels} channels and {last.path} {out_channels}")
    stride = convolution_pair(depthwise, "stride")
    kernel, dilation = (convolution_pair(depthwise, name) for name in ("kernel_size", "dilation"))
    if residual and not callable(padding) and not _keeps_size(kernel, stride, padding, dilation):
        raise NotFusable("its residual has another size than its result")
    window, settings = (excite, project, stride, padding), (norms[0][1], residual, after)
    dense_or_depthwise = depthwise.module, norms[0][0]
    if not block.fused:
        behind = (dilation, *settings, functional.MBConvInference(), drop, steps)
        return BlockPlan(expand, dense_or_depthwise, *window, *behind)
    if depthwise.module.groups != 1:
        raise NotFusable(f"{conv.path} has {depthwise.module.groups} groups, not a dense convolution")
    if dilation != (1, 1):
        raise NotFusable(f"{conv.path} has dilation {dilation}")
    return FusedBlockPlan(dense_or_depthwise, *window, *settings, functional.FusedMBConvInference(), drop, steps)


def _keeps_size(kernel: tuple[int, int], stride: tuple[int, int], padding: Any, dilation: tuple[int, int]) -> bool:
    """Whether a convolution gives images of the size that it takes."""
    if stride != (1, 1) or padding == "same":
        return stride == (1, 1)
    top, bottom, left, right = padding_sides(padding)
    return (top + bottom, left + right) == tuple(d * (k - 1) for k, d in zip(kernel, dilation, strict=True))


def _steps(module: nn.Module, block: Block, activation: str) -> tuple[Steps | None, Callable[..., Any] | None]:
    """What is called around the block, None for nothing but a residual; and drop path, where that is the only step."""
    after, drop = block.after, None
    # The kernels add the residual, and drop, before an activation.
    linear = activation == "none"
    if linear and len(after) == 1 and after[0].kind == "drop" and _drops_images(module, after[0]):
        drop, after = submodule(module, after[0].path) if after[0].path else _call(module, after[0]), ()
    if not (block.before or after or block.shortcut or block.last) and (linear or block.shortcut is None):
        return None, drop
    for op in block.before:
        if getattr(submodule(module, op.path), "inplace", False) and block.shortcut is not None:
            raise NotFusable(f"{op.path} changes the input of the shortcut")
    before, behind, shortcut, last = (
        [_call(module, op) for op in ops or ()] for ops in (block.before, after, block.shortcut, block.last)
    )
    return Steps(before, behind, None if block.shortcut is None else shortcut, last), drop


def _drops_images(module: nn.Module, op: Op) -> bool:
    """Whether a step drops whole images, and nothing else."""
    return (stock_class(submodule(module, op.path)) if op.path else op.value.function) in DROP_PATHS


def check_modes(module: nn.Module, training: bool) -> None:
    """Raise `NotFusable` where something inside is not in the mode of the whole, which a trace goes by.

    Norms and drop path are asked themselves at each call.
    """
    for name, child in module._modules.items():
        if child is not None and not hasattr(child, "running_mean") and stock_class(child) not in DROP_PATHS:
            if child.training is not training:
                raise NotFusable(f"{name} is in another mode")
            check_modes(child, training)


def match_of(module: nn.Module) -> Block | Op:
    """What a layer computes in its mode; raises `NotFusable` where it is not recognised."""
    form = _form(module)
    if form.reason:
        raise NotFusable(form.reason)
    return form.training if module.training else form.evaluation


def _form(module: nn.Module) -> Form:
    form: Form | None = getattr(type(module), "form", None)
    if form is not None and form.holds(module):
        return form
    if torch.compiler.is_compiling():
        raise NotFusable("its settings are others than when it was replaced")
    return form_of(module)


def settings_of(module: nn.Module) -> list[str]:
    """The settings of a recognised layer itself, any of which its forward may read."""
    return [name for name, _ in _form(module).parts[0][4]]


def described_block(module: nn.Module) -> AnyBlockPlan:
    """What runs instead of a block in its mode; raises `NotFusable` where there is nothing."""
    match = match_of(module)
    if not isinstance(match, Block):
        raise NotFusable("it is no block")
    return block_plan(module, match)


def has_more(module: nn.Module) -> bool:
    """Whether a module is more than a block, which is a part of it or which nothing but a sequence holds together."""
    match = match_of(module)
    if not isinstance(match, Block) or block_plan(module, match).steps is None:
        return False
    if is_sequence(module):
        return True
    convs = [stage[0].path.partition(".") for stage in (match.expand, match.depthwise, match.project) if stage]
    first = convs[0][0]
    if any(name != first or not rest for name, _, rest in convs):
        return False
    try:
        return not has_more(module._modules[first])
    except NotFusable:
        return False


class Recognised(FusedLayer):
    """Base of the layers that are replaced because of what they compute. There is a class for each `Form`."""

    form: ClassVar[Form]

    @property
    def attributes(self) -> list[str]:
        """The settings of the layer itself."""
        return settings_of(self)

    def check_now(self) -> None:
        check_modes(self, self.training)

    @classmethod
    def methods(cls, stock: type[nn.Module], form: Form) -> dict[str, Any]:
        """What the class for a form has beside this one."""
        first, *others = list(inspect.signature(stock.forward).parameters)[1:]

        @functools.wraps(stock.forward)
        def forward(self: Recognised, *args: Any, **kwargs: Any) -> Any:
            if len(args) == 1 and not kwargs:
                y = self.run(args[0])
            else:
                given = dict(zip((first, *others), args, strict=False)) | kwargs
                x, rates = given.pop(first, None), [given.pop(name) for name in (form.rate,) if name in given]
                y = None if given or len(args) > 1 + len(others) or x is None else self.run(x, *rates)
            return stock.forward(self, *args, **kwargs) if y is None else y

        return {"forward": forward}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__class__ = fused_class(type(self).__bases__[0], self.stock, form_of(self))


class FusedBlock(Recognised):
    """An MBConv or Fused-MBConv block."""

    kind = "block"

    @classmethod
    def describe(cls, module: nn.Module) -> AnyBlockPlan:
        return described_block(module)

    def run(self, x: Tensor, rate: float | None = None) -> Tensor | None:
        """The block's output for x, or None where only the stock forward is right."""
        plan: AnyBlockPlan | None = self.plan(x)
        return None if plan is None or plan.mixed(x) else plan.run(x, rate)


class FusedSqueezeExcite(Recognised):
    """A squeeze-and-excitation layer."""

    kind = "squeeze_excite"

    @classmethod
    def describe(cls, module: nn.Module) -> SqueezeExcitePlan:
        match = match_of(module)
        if not isinstance(match, Op):
            raise NotFusable("it is no squeeze-and-excitation")
        return _squeeze_excite(module, match)

    def run(self, x: Tensor) -> Tensor | None:
        """The layer's output for x, or None where only the stock forward is right."""
        plan: SqueezeExcitePlan | None = self.plan(x)
        return None if plan is None else plan.run(x)
