"""What replaced modules share: how a block is described, when its description is still true, and how it is run.

A replaced module keeps its children, parameters, buffers and attributes; only its class changes, to a subclass of its
own (`FusedLayer`) whose forward reads the children when it is called. Before each call a cheap look at everything the
description was read from decides between the fused operators and the stock forward, which is always right.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from effnet_ops import context, distributed, functional
from effnet_ops.checks import FLOAT_DTYPES, integers
from effnet_ops.layers import padded_conv2d
from effnet_ops.params import BatchNormParams, ConvNormParams, SqueezeExciteParams
from effnet_ops.reference import activate
from effnet_ops.surgery.drop_path import drop_path_scale
from effnet_ops.surgery.structure import FORWARDS, HOOKS, Structure, below_sharding, stock_class

_CACHE = "_effnet_ops_plan"


class NotFusable(Exception):
    """A module that cannot run fused; the message is the reason that the report gives."""


class Part(NamedTuple):
    """A module inside a layer, with its name there."""

    name: str
    module: nn.Module


class SqueezeExcitePlan(NamedTuple):
    """A squeeze-and-excitation layer: its two convolutions and the names of what follows each."""

    reduce: nn.Conv2d
    expand: nn.Conv2d
    activation: str
    gate: str

    def params(self) -> SqueezeExciteParams:
        reduce, expand = self.reduce, self.expand
        tensors = (parameter(conv, name) for conv in (reduce, expand) for name in ("weight", "bias"))
        return SqueezeExciteParams(*tensors, self.activation)

    def run(self, x: Tensor) -> Tensor:
        return functional.squeeze_excite(x, *self.params()[:4], activation=self.activation, gate=self.gate)


class DepthwisePlan(NamedTuple):
    """The settings of a depthwise convolution, as `effnet_ops.depthwise_conv2d` takes them."""

    stride: tuple[int, int]
    padding: functional.Padding
    dilation: tuple[int, int]


class Steps(NamedTuple):
    """What a block calls around its core, each a function of one tensor and the drop rate of the call.

    What ``shortcut`` makes of the block's input is added to the result of ``after``; None for no sum. ``last`` takes
    what comes out.
    """

    before: Sequence[Callable[..., Tensor]]
    after: Sequence[Callable[..., Tensor]]
    shortcut: Sequence[Callable[..., Tensor]] | None
    last: Sequence[Callable[..., Tensor]]

    def run(self, core: Callable[[Tensor], Tensor], x: Tensor, rate: float | None) -> Tensor:
        added = None if self.shortcut is None else _through(self.shortcut, x, None)
        # A norm may keep more precision than the block computes in.
        y = _through(self.after, core(_through(self.before, x, None).to(x.dtype)), rate)
        return _through(self.last, y if added is None else y + added, None)


def _through(steps: Sequence[Callable[..., Tensor]], x: Tensor, rate: float | None) -> Tensor:
    for step in steps:
        x = step(x, rate)
    return x


class BlockPlan(NamedTuple):
    """An MBConv block: (convolution, normalisation) of each stage and the settings of `effnet_ops.mbconv`.

    A stage may have no normalisation. ``padding`` may be a function of the block's input. ``after`` is an
    activation behind the projection. ``residual`` is what the kernels add, ``drop`` drop path (`drop_path_scale`).
    """

    expand: tuple[nn.Conv2d, nn.Module | None] | None
    depthwise: tuple[nn.Conv2d, nn.Module | None]
    squeeze_excite: SqueezeExcitePlan | None
    project: tuple[nn.Conv2d, nn.Module | None]
    stride: tuple[int, int]
    padding: functional.Padding | Callable[[Tensor], functional.Padding]
    dilation: tuple[int, int]
    activation: str
    residual: bool
    after: str
    inference: functional.BlockInference
    drop: nn.Module | Callable[..., Tensor] | None = None
    steps: Steps | None = None

    function = staticmethod(functional.mbconv)

    def stages(self) -> list[tuple[nn.Conv2d, nn.Module | None]]:
        """What there is of them, the depthwise one first."""
        return [stage for stage in (self.depthwise, self.project, self.expand) if stage is not None]

    def norms(self) -> list[nn.Module]:
        return [norm for _, norm in self.stages() if norm is not None]

    def mixed(self, x: Tensor) -> bool:
        """Whether the normalisations differ: the functions have one flag for training, and one process group.

        On a GPU, those that share their statistics are left to torch.nn.SyncBatchNorm.
        """
        norms = self.norms()
        mode = mode_of(norms[0]) if norms else False
        if any(mode_of(norm) is not mode for norm in norms[1:]):
            return True
        return not isinstance(mode, bool) and x.device.type != "cpu"

    def run(self, x: Tensor, rate: float | None = None) -> Tensor:
        """The block's output for x; ``rate`` is the drop rate of this call, where the block takes one."""
        scale = None if self.drop is None else drop_path_scale(self.drop, x, rate)
        if self.steps is None:
            return self._run(x, scale)
        return self.steps.run(functools.partial(self._run, drop_path=scale), x, rate)

    def _run(self, x: Tensor, drop_path: Tensor | None) -> Tensor:
        norms, padding, settings = self.norms(), self.padding, self.settings()
        training = trains(norms[0]) if norms else False
        if callable(padding):
            padding = padding(x)
        if training or drop_path is not None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            settings |= {"padding": padding, "drop_path": drop_path, "training": training}
            y = self.function(x, *self._params(), **settings)
        else:
            y = self.inference(x, self._state(), self._params, padding, settings)
        return y if self.after == "none" else activate(y, self.after)

    def settings(self) -> dict[str, Any]:
        """Those that `effnet_ops.mbconv` takes and that no call changes."""
        return {**_settings(self), "dilation": self.dilation}

    def _params(self) -> tuple[Any, ...]:
        """expand, depthwise, squeeze_excite and project as `effnet_ops.mbconv` takes them."""
        return (
            None if self.expand is None else conv_norm_params(*self.expand),
            conv_norm_params(*self.depthwise),
            None if self.squeeze_excite is None else self.squeeze_excite.params(),
            conv_norm_params(*self.project),
        )

    def _state(self) -> list[Any]:
        """All that `_params` reads, the weight of the k x k convolution first."""
        state: list[Any] = []
        for conv, norm in self.stages():
            state += parameter(conv, "weight"), parameter(conv, "bias")
            if norm is not None:
                buffers = norm._buffers
                state += parameter(norm, "weight"), parameter(norm, "bias")
                state += buffers["running_mean"], buffers["running_var"], norm.eps
        if self.squeeze_excite is not None:
            for conv in self.squeeze_excite[:2]:
                state += parameter(conv, "weight"), parameter(conv, "bias")
        return state


class FusedBlockPlan(NamedTuple):
    """A Fused-MBConv block, as `BlockPlan`: ``expand`` is its dense convolution; ``project`` may be missing."""

    expand: tuple[nn.Conv2d, nn.Module | None]
    squeeze_excite: SqueezeExcitePlan | None
    project: tuple[nn.Conv2d, nn.Module | None] | None
    stride: tuple[int, int]
    padding: functional.Padding | Callable[[Tensor], functional.Padding]
    activation: str
    residual: bool
    after: str
    inference: functional.BlockInference
    drop: nn.Module | Callable[..., Tensor] | None = None
    steps: Steps | None = None

    function = staticmethod(functional.fused_mbconv)
    norms, mixed, run = BlockPlan.norms, BlockPlan.mixed, BlockPlan.run
    _run, _state = BlockPlan._run, BlockPlan._state

    def settings(self) -> dict[str, Any]:
        """Those that `effnet_ops.fused_mbconv` takes and that no call changes."""
        return _settings(self)

    def stages(self) -> list[tuple[nn.Conv2d, nn.Module | None]]:
        """What there is of them, the dense one first."""
        return [self.expand] if self.project is None else [self.expand, self.project]

    def _params(self) -> tuple[Any, ...]:
        """expand, squeeze_excite and project as `effnet_ops.fused_mbconv` takes them."""
        return (
            conv_norm_params(*self.expand),
            None if self.squeeze_excite is None else self.squeeze_excite.params(),
            None if self.project is None else conv_norm_params(*self.project),
        )


AnyBlockPlan = BlockPlan | FusedBlockPlan


def _settings(plan: AnyBlockPlan) -> dict[str, Any]:
    gate = "sigmoid" if plan.squeeze_excite is None else plan.squeeze_excite.gate
    return {"stride": plan.stride, "activation": plan.activation, "gate": gate, "residual": plan.residual}


def parameter(module: nn.Module, name: str) -> Tensor | None:
    """``module.name`` without the cost of nn.Module.__getattr__ where the tensor is a registered parameter."""
    registered = module._parameters
    # Replicas of nn.DataParallel, flattened and pruned modules keep a plain attribute instead.
    return registered[name] if name in registered else getattr(module, name)


def trains(norm: nn.Module) -> bool:
    """Whether a normalisation uses the statistics of the batch, as a frozen one never does."""
    return norm.training and isinstance(norm, _BatchNorm)


def mode_of(norm: nn.Module) -> Any:
    """The process group with which a normalisation shares the statistics of its batch, else whether it uses them."""
    return trains(norm) and (distributed.group_of(norm) or True)


def conv_norm_params(conv: nn.Conv2d, norm: nn.Module | None) -> ConvNormParams:
    return ConvNormParams(
        parameter(conv, "weight"), parameter(conv, "bias"), None if norm is None else norm_params(norm)
    )


def norm_params(norm: nn.Module) -> BatchNormParams:
    buffers = norm._buffers
    weight, bias = parameter(norm, "weight"), parameter(norm, "bias")
    if not isinstance(norm, _BatchNorm):
        return BatchNormParams(weight, bias, buffers["running_mean"], buffers["running_var"], norm.eps)
    tracks = norm.track_running_stats or not norm.training
    running = (buffers["running_mean"], buffers["running_var"]) if tracks else (None, None)
    count = buffers["num_batches_tracked"] if tracks else None
    return BatchNormParams(weight, bias, *running, norm.eps, norm.momentum, count, distributed.group_of(norm))


class FusedLayer(nn.Module):
    """Base of all replacement classes. Each derives from the class it replaces, too, and is listed by `fuses`.

    `fuses` gives it a forward with the stock's signature, which runs the stock's where `run` gives None.
    """

    stock: ClassVar[type[nn.Module]]
    kind: ClassVar[str]
    attributes: ClassVar[tuple[str, ...]] = ()
    """Settings of the layer itself that `describe` reads and somebody could change later."""

    @classmethod
    def methods(cls, stock: type[nn.Module], form: Any) -> dict[str, Any]:
        """What the class that takes the place of ``stock`` has beside this one (`fused_class`)."""
        return {"forward": _forward(stock)}

    @classmethod
    def concerns(cls, module: nn.Module) -> bool:
        """Whether a module of the stock class is a layer of this kind at all."""
        return True

    @classmethod
    def describe(cls, module: nn.Module) -> Any:
        """What to run instead of ``module``, read from it and its children; raises `NotFusable`."""
        raise NotImplementedError

    def check_now(self) -> None:
        """Raise `NotFusable` where the layer is in a mode in which only the stock forward is right."""

    def run(self, x: Tensor) -> Tensor | None:
        """The layer's output for x, or None where only the stock forward is right."""
        raise NotImplementedError

    def plan(self, x: Tensor) -> Any:
        """The description of this layer as it is now, or None where only the stock forward is right."""
        if not isinstance(x, Tensor) or x.dim() != 4 or x.dtype not in FLOAT_DTYPES or x.layout is not torch.strided:
            return None
        if torch.compiler.is_compiling():
            onnx = torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()
            return None if onnx else describe_or_none(self)
        if torch.jit.is_tracing() or context.in_transform() or context.overridden():
            return None
        cached = self.__dict__.get(_CACHE)
        if cached is not None and cached.holds(self):
            return cached.plan
        self.forget_plan()
        cached = _CachedPlan(self)
        if cached.may_be_kept():
            self.__dict__[_CACHE] = cached
        return cached.plan

    def forget_plan(self) -> None:
        """Leave nothing of the fused layer behind in the module's attributes."""
        self.__dict__.pop(_CACHE, None)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != _CACHE}

    def __reduce_ex__(self, protocol: int) -> Any:
        cls = type(self)
        if "form" not in vars(cls):
            return super().__reduce_ex__(protocol)
        return _restored, (cls.__bases__[0], cls.stock), self.__getstate__()

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}: call effnet_ops.restore_layers(model) first"
        )


LAYERS: dict[type[nn.Module], type[FusedLayer]] = {}
"""The replacement of each stock class; `fuses` adds to it."""

UNSUPPORTED: dict[type[nn.Module], str] = {}
"""Blocks of other libraries that are known and not fused, with the reason."""

ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.Identity: "none",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.GELU: "gelu",
}
GATES: dict[type[nn.Module], str] = {nn.Sigmoid: "sigmoid", nn.Hardsigmoid: "hard_sigmoid"}

NORMS: dict[type[nn.Module], Callable[[Any], list[Part]]] = {
    nn.BatchNorm2d: lambda norm: [],
    nn.SyncBatchNorm: lambda norm: [],
}
"""The modules that a normalisation runs behind itself: all must be activations that fit. What is here and no BatchNorm
of PyTorch is frozen: it always normalises by its running statistics."""

CONVOLUTIONS: dict[type[nn.Module], Callable[[Any], functional.Padding]] = {}
"""The padding of each convolution class, as `effnet_ops.depthwise_conv2d` takes it."""

CHAINS: dict[type[nn.Module], tuple[tuple[str, ...], ...]] = {}
"""Names of a convolution, the normalisation that the class's forward calls on its result, and the activation module on
that, if there is one. The names may be missing, or be other modules, in some instances."""

SEQUENCES: set[type[nn.Module]] = {nn.Sequential}
"""Classes whose forward calls the children one after the other."""


def known(table: dict[type[nn.Module], Any], module: nn.Module) -> Any:
    """What a table has for the class of ``module``, or for one from which it inherits all that a call runs."""
    own: dict[str, Any] = {}
    for cls in stock_class(module).__mro__:
        if cls in table:
            changed = any(hasattr(cls, name) or _hides(value, module, name) for name, value in own.items())
            return None if changed else table[cls]
        own.update((name, value) for name, value in vars(cls).items() if changes_calls(name))
    return None


def _hides(value: Any, module: nn.Module, name: str) -> bool:
    """Whether an attribute of a class is found before a module's own attribute of that name."""
    state = module.__dict__
    if any(name in state.get(table, ()) for table in ("_parameters", "_buffers", "_modules")):
        return True
    return name in state and hasattr(type(value), "__set__")


def changes_calls(name: str) -> bool:
    """Whether a subclass that defines this name may compute something else than the class that it inherits from."""
    return name in _CALLED if name.startswith("__") else name not in _HARMLESS


_HARMLESS = frozenset(("extra_repr", "reset_parameters", "reset_running_stats", "_get_name", "_version"))
_CALLED = frozenset(("__call__", "__getattr__", "__getattribute__", "__setattr__"))


_Fused = TypeVar("_Fused", bound=type[FusedLayer])


def fuses(
    stock: type[nn.Module], table: dict[type[nn.Module], type[FusedLayer]] = LAYERS
) -> Callable[[_Fused], _Fused]:
    """Class decorator: the class replaces modules whose class is exactly ``stock``, where ``table`` is looked up.

    Its forward is that of ``stock`` where ``run(x)`` gives None, and has its signature.
    """

    def register(fused: _Fused) -> _Fused:
        fused.stock = stock
        if "forward" not in vars(fused):
            fused.forward = _forward(stock)
        table[stock] = fused
        return fused

    return register


@functools.cache
def fused_class(layer: type[FusedLayer], stock: type[nn.Module], form: Any = None) -> type[FusedLayer]:
    """The class of replaced modules of class ``stock``; ``form`` says what their forward computes."""
    own = {"stock": stock, "form": form, "__module__": __name__, **layer.methods(stock, form)}
    return type(f"Fused{stock.__name__}", (layer, stock), own)


def _restored(layer: type[FusedLayer], stock: type[nn.Module]) -> nn.Module:
    cls = fused_class(layer, stock)
    return cls.__new__(cls)


def _forward(stock: type[nn.Module]) -> Callable[..., Any]:
    first = list(inspect.signature(stock.forward).parameters)[1]

    @functools.wraps(stock.forward)
    def forward(self: FusedLayer, *args: Any, **kwargs: Any) -> Any:
        y = self.run(args[0] if args else kwargs.get(first))
        return stock.forward(self, *args, **kwargs) if y is None else y

    return forward


def activation_name(part: Part) -> str:
    """The name of an activation module; raises `NotFusable` for one that the fused operators do not have."""
    module = part.module
    name = known(ACTIVATIONS, module)
    if name is None:
        raise NotFusable(f"{part.name} is {type(module).__name__}, an activation that is not fused")
    if isinstance(module, nn.Hardtanh) and (module.min_val, module.max_val) != (0, 6):
        raise NotFusable(f"{part.name} is {type(module).__name__} from {module.min_val} to {module.max_val}")
    if isinstance(module, nn.GELU) and module.approximate != "none":
        return "gelu_tanh"
    return name


def gate_name(part: Part) -> str:
    """The name of a squeeze-and-excitation gate; raises `NotFusable` for one that the fused operators do not have."""
    name = known(GATES, part.module)
    if name is None:
        raise NotFusable(f"{part.name} is {type(part.module).__name__}, a gate that is not fused")
    return name


def convolution_padding(part: Part) -> functional.Padding:
    """The padding of a convolution that is known exactly; raises `NotFusable` for every other module."""
    padding_of = known(CONVOLUTIONS, part.module)
    if padding_of is None:
        raise NotFusable(f"{part.name} is {type(part.module).__name__}, a convolution that is not fused")
    if part.module.padding_mode != "zeros":
        raise NotFusable(f"{part.name} has padding_mode {part.module.padding_mode!r}")
    padding = padding_of(part.module)
    if padding != "same" and min(padding) < 0:
        raise NotFusable(f"{part.name} pads by {padding}")
    return padding


def same_convolution(conv: nn.Conv2d, x: Tensor) -> Tensor | None:
    """The convolution where it pads as TensorFlow's SAME does, else None: for graphs in which the size of x is open.

    The libraries' own forwards divide the size and round that up. Such a number can neither be saved by torch.export
    nor be rounded well by ONNX, and a graph of whole numbers is smaller.
    """
    try:
        padding = convolution_padding(Part("it", conv))
    except NotFusable:
        return None
    if padding != "same":
        return None
    return padded_conv2d(x, conv.weight, conv.bias, conv.stride, "same", conv.dilation, conv.groups)


def convolution_pair(part: Part, name: str, minimum: int = 1) -> tuple[int, int]:
    """The setting called ``name`` of a convolution as (vertical, horizontal), from all that torch's conv2d takes.

    That is a whole number of any kind, one in a list or tuple, or a pair. Raises `NotFusable` for what torch refuses.
    """
    value = getattr(part.module, name)
    pair = integers(value, 2)
    pair = pair * 2 if len(pair) == 1 else pair
    if len(pair) != 2 or min(pair) < minimum:
        raise NotFusable(f"{part.name} has {name} {value!r}")
    return pair


def is_average(pool: nn.Module) -> bool:
    """Whether a module is exactly the average over the image; its size may have any form that torch takes."""
    return stock_class(pool) is nn.AdaptiveAvgPool2d and integers(pool.output_size, 2) == (1, 1)


def check_pointwise(part: Part, plain: bool = False) -> nn.Conv2d:
    """The convolution, if it is pointwise; ``plain``: its forward is known to pad only by its ``padding``."""
    conv, padding = part.module, (CONVOLUTIONS[nn.Conv2d](part.module) if plain else convolution_padding(part))
    for name in ("kernel_size", "stride"):
        if (pair := convolution_pair(part, name)) != (1, 1):
            raise NotFusable(f"{part.name} has {name} {pair}, not a pointwise convolution")
    if conv.groups != 1:
        raise NotFusable(f"{part.name} has {conv.groups} groups, not a pointwise convolution")
    # At kernel 1 and stride 1, TensorFlow's SAME pads nothing.
    if padding != "same" and any(padding):
        raise NotFusable(f"{part.name} pads its input by {padding}")
    return conv


def check_norm(norm: Part, activation: Part | None = None) -> str:
    """The name of the one activation behind a normalisation; raises `NotFusable` for what is not one that is fused."""
    name, module = norm
    parts_of = known(NORMS, module)
    if stock_class(module) is nn.SyncBatchNorm and module._modules:
        raise NotFusable(
            f"{name} is SyncBatchNorm with parts that it does not call. Note that torch's convert_sync_batchnorm "
            "dropped the activation of timm's BatchNormAct2d, which timm.layers.convert_sync_batchnorm keeps"
        )
    if parts_of is None:
        raise NotFusable(f"{name} is {type(module).__name__}, not a BatchNorm2d that is fused")
    behind = [Part(f"{name}.{inner}", part) for inner, part in parts_of(module)]
    if activation is not None:
        behind.append(activation)
    names = [found for found in map(activation_name, behind) if found != "none"]
    if len(names) > 1:
        raise NotFusable(f"{name} has {len(names)} activations behind it")
    return names[0] if names else "none"


def check_statistics_settings(part: Part) -> None:
    norm = part.module
    tracks = isinstance(norm, _BatchNorm) and norm.track_running_stats
    if tracks and norm.momentum is None and norm.num_batches_tracked is None:
        raise NotFusable(f"{part.name} has neither a momentum nor num_batches_tracked")


def describe(layer: type[FusedLayer], module: nn.Module) -> Any:
    """What ``layer`` runs instead of ``module``; `NotFusable` also where somebody relies on a child being called."""
    if "stock" not in vars(layer):
        raise NotFusable(f"{layer.__name__} is a class that somebody put on top")
    check_inside(layer.stock, module)
    return layer.describe(module)


def check_inside(stock: type[nn.Module], module: nn.Module) -> None:
    """Raise `NotFusable` where ``module``, of class ``stock``, or something inside does more than its class says."""
    check_class("its class", stock)
    for name, inner in module.named_modules():
        if inner is not module:
            check_untouched(name, inner)


def describe_now(module: FusedLayer) -> Any:
    """`describe` of a replaced module in its present mode."""
    module.check_now()
    return describe(below_sharding(type(module)), module)


def describe_or_none(module: FusedLayer) -> Any:
    """`describe_now`, None instead of `NotFusable`."""
    try:
        return describe_now(module)
    except NotFusable:
        return None


def check_class(name: str, cls: type[nn.Module]) -> None:
    """Raise `NotFusable` where a method of the class of the module ``name`` is not the one that its library defines."""
    for method in FORWARDS:
        if context.is_patched(cls, method):
            raise NotFusable(f"the {method} of {cls.__name__}, {name}, was replaced")


def check_untouched(name: str, module: nn.Module, known: object = None) -> None:
    """Raise `NotFusable` where a child does more than its class says, but for the ``known`` hook: it is not called."""
    if isinstance(module, torch.jit.ScriptModule):
        raise NotFusable(f"{name} is a TorchScript module")
    state = module.__dict__
    for attribute, kind in HOOKS.items():
        if any(hook is not known for hook in (state.get(attribute) or {}).values()):
            raise NotFusable(f"{name} has a {kind} hook")
    for method in FORWARDS:
        if method in state:
            raise NotFusable(f"the {method} of {name} was replaced on the instance")
    check_class(name, stock_class(module))
    if "parametrizations" in module._modules:
        raise NotFusable(f"{name} has parametrized parameters")
    if state.get("qconfig") is not None:
        raise NotFusable(f"{name} is prepared for quantization")


class _CachedPlan(Structure):
    """A plan with everything it was read from."""

    __slots__ = ("_kernels", "_states", "plan")

    def __init__(self, layer: FusedLayer) -> None:
        inside = [module for module in layer.modules() if module is not layer]
        super().__init__(layer, inside, layer.attributes, (), ("_modules",))
        self._states = [module.__dict__ for module in inside]
        convs = [module for module in (layer, *inside) if isinstance(module, nn.Conv2d)]
        # PyTorch's "same" goes by the size of the weight.
        self._kernels = [(m, parameter(m, "weight").shape) for m in convs if isinstance(m.padding, str)]
        self.plan = describe_or_none(layer)

    def holds(self, layer: FusedLayer) -> bool:
        """Whether nothing has changed since."""
        if not self.same(layer):
            return False
        return not self._kernels or all(parameter(m, "weight").shape == shape for m, shape in self._kernels)

    def may_be_kept(self) -> bool:
        """Whether each change would be noticed, and nothing has a graph, as a pruned weight, which is an attribute."""
        values = (value for state in self._states for value in state.values())
        return self.fixed and all(value.grad_fn is None for value in values if isinstance(value, Tensor))
