"""The modules of an optimized copy: they run folded convolutions where the calls of the parts are their own.

A module keeps its children, parameters, buffers, attributes and names; only its class changes, to one that derives from
its own and from `Folded`. What it runs instead (`surgery.folding`) lies beside the weights, is made at the first call,
and again when something changed that it was made from (`guard.Kept`). Whoever calls, reads, slices, hooks or changes a
part finds the stock layer: there the stock forward runs, which is always right.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from effnet_ops import backends, context, internals, layers
from effnet_ops.checks import FLOAT_DTYPES
from effnet_ops.models import efficientnet
from effnet_ops.ops import PreparedCalls, packed
from effnet_ops.params import ConvNormParams
from effnet_ops.reference import compute_dtype
from effnet_ops.surgery.around import NETWORKS
from effnet_ops.surgery.blocks import check_modes, described_block, settings_of
from effnet_ops.surgery.casting import cast, cast_input
from effnet_ops.surgery.folding import (
    Block,
    BlockSequence,
    FusedBlock,
    Product,
    SteppedBlock,
    calls,
    convolution,
    fold,
)
from effnet_ops.surgery.fused import (
    CHAINS,
    CONVOLUTIONS,
    NORMS,
    SEQUENCES,
    AnyBlockPlan,
    BlockPlan,
    NotFusable,
    Part,
    activation_name,
    check_untouched,
    conv_norm_params,
    describe_or_none,
    is_average,
    known,
    parameter,
    same_convolution,
    stock_class,
)
from effnet_ops.surgery.guard import Kept, release
from effnet_ops.surgery.recognise import RATES, Form, form_of

_KEPT = "_effnet_ops_kept"
_WHOLE = "_effnet_ops_whole"
"""Of a network: what its forward is made from, with the prepared calls of all of it."""
OBSERVES = "_effnet_ops_observes"
"""An attribute of functions that replace a forward on an instance, call it, and change nothing."""

METHODS: dict[type[nn.Module], tuple[str, ...]] = {}
"""The methods of a class that call the parts in its `CHAINS` themselves, where that is not its forward."""

OWN_CONVOLUTIONS = (layers.PaddedConv2d, layers.DepthwiseConv2d)
OWN_CHAINS: dict[type[nn.Module], dict[str, tuple[str, str]]] = {
    layers.ConvNormAct: {"forward": ("conv", "bn1")},
    efficientnet.EfficientNet: {"forward_stem": ("conv_stem", "bn1"), "forward_last": ("conv_head", "bn2")},
    efficientnet.EfficientNetFeatures: {"forward_stem": ("conv_stem", "bn1")},
}
"""Methods of our own modules: each calls these two, and the activation that `_activation_of` names."""


def transformed() -> bool:
    """Whether the call is traced, compiled, transformed, or seen by modes and hooks: plain PyTorch then."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or context.in_transform()
        or internals.tracing_mode()
        or context.overridden()
    )


def _refuse_to_train() -> NoReturn:
    raise RuntimeError(
        "this model cannot train: optimize_for_inference folded its batch normalisations into the convolutions. "
        "Train the model that it was made from, and give that one, too, to functions that call train() themselves; "
        "call eval() on this one to use it on"
    )


def train_or_refuse(module: nn.Module, mode: bool = True) -> nn.Module:
    """``train`` of a module with folded ones inside: it refuses before any of them has changed."""
    if mode:
        _refuse_to_train()
    return type(module).train(module, mode)


class Folded(nn.Module):
    """Base of the classes of an optimized copy's modules.

    ``activations`` is an empty buffer whose dtype the input is cast to, so that ``.to(dtype)`` changes that too; None
    leaves the input as it is. Beside activations of half precision, the parameters are in fp32.
    """

    stock: ClassVar[type[nn.Module]]
    settings: ClassVar[tuple[str, ...]] = ()
    """Attributes of the module itself that `make` reads."""
    closed: ClassVar[bool] = True
    """Whether nothing else may be changed in what is inside it."""
    activations: Tensor | None

    @classmethod
    def methods(cls, stock: type[nn.Module]) -> dict[str, Any]:
        """Methods and settings of the class that takes the place of ``stock``, beside those of this one."""
        return {}

    def make(self) -> Any:
        """What runs instead of the stock forward; raises `NotFusable` where only that is right."""
        raise NotImplementedError

    def read_from(self) -> list[nn.Module]:
        """The modules inside that `make` reads."""
        return [module for module in self.modules() if module is not self]

    def value(self) -> Any:
        """What `make` makes of the module as it is now; None where the stock forward shall run."""
        if transformed():
            if not torch.compiler.is_compiling() and internals.tracing_mode():
                release(self.parameters())
            return None
        cell = self.__dict__.setdefault(_KEPT, [None])
        # nn.DataParallel's replica is a copy of __dict__, made for one call, whose parameters are plain attributes.
        if "_is_replica" in self.__dict__:
            return None
        kept = cell[0]
        if kept is None or not kept.holds(self):
            with torch.inference_mode(False), torch.no_grad():
                methods = [(self.stock, name) for name in _calling_methods(self.stock)]
                kept = cell[0] = Kept(self, self.read_from(), self.settings, methods, self._make_or_none)
        if kept.value is None or (torch.is_grad_enabled() and kept.sources.need_gradients()):
            return None
        return kept.value

    def _make_or_none(self) -> Any:
        # Of a class that somebody put on top, nothing is known.
        if "stock" not in vars(type(self)):
            return None
        # Dropout or drop path that is switched to training by itself does what it does then.
        if any(
            module.training and (hasattr(module, "p") or hasattr(module, "drop_prob")) for module in self.read_from()
        ):
            return None
        try:
            check_own("it", self.stock)
            return self.make()
        except NotFusable:
            return None

    def cast(self, x: Any) -> Any:
        """The input in the dtype of the activations."""
        like = self._buffers.get("activations")
        if like is None:
            return x
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a tensor of floating-point numbers, got {kind}")
        return x.to(like.dtype)

    def dtype(self) -> torch.dtype:
        """That of the activations."""
        like = self._buffers.get("activations")
        return self._wide() if like is None else like.dtype

    def _wide(self) -> torch.dtype:
        return next(p for p in self.parameters() if p.is_floating_point()).dtype

    def set_activations(self, dtype: torch.dtype) -> None:
        """Cast every input to ``dtype`` from now on."""
        device = next(t for t in (*self.parameters(), *self.buffers())).device
        self.register_buffer("activations", torch.empty(0, dtype=dtype, device=device), persistent=False)

    def run_stock(self, *args: Any, **kwargs: Any) -> Any:
        """The stock forward, in the precision of the parameters."""
        like = self._buffers.get("activations")
        if like is None:
            return self._stock_forward(*args, **kwargs)
        wide = self._wide()
        return cast(self._stock_forward(*cast(args, wide), **cast(kwargs, wide)), like.dtype)

    def _stock_forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.stock.forward(self, *args, **kwargs)

    def train(self, mode: bool = True) -> nn.Module:
        if mode:
            _refuse_to_train()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in (_KEPT, _WHOLE)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _begin(self)

    def __reduce_ex__(self, protocol: int) -> Any:
        return _restored, (type(self).__bases__[0], self.stock), self.__getstate__()

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}: script the model that was optimized instead"
        )


def _restored(mixin: type[Folded], stock: type[nn.Module]) -> nn.Module:
    # In a process that has optimized nothing yet. `replace` imports this file.
    from effnet_ops.surgery.replace import load_adapters

    load_adapters(stock)
    cls = folded_class(mixin, stock)
    return cls.__new__(cls)


@functools.cache
def folded_class(mixin: type[Folded], stock: type[nn.Module], form: Form | None = None) -> type[Folded]:
    """The class of folded modules of class ``stock``."""
    own = {"stock": stock, **({} if form is None else {"form": form}), **mixin.methods(stock)}
    if stock.__module__.startswith("torch.nn"):
        # By which torch.fx knows that it does not look inside.
        own["__module__"] = stock.__module__
    return type(f"Folded{stock.__name__}", (mixin, stock), own)


def _begin(module: Folded) -> None:
    """Have a place for what is kept: who watches this module must not see its attributes change."""
    module.__dict__[_KEPT] = [None]
    if module.stock in NETWORKS or (module.stock in OWN_CHAINS and module.stock is not layers.ConvNormAct):
        module.__dict__[_WHOLE] = [None]


@functools.cache
def _functions(cls: type[nn.Module]) -> list[str]:
    """The methods of a class that its library wrote."""
    found = (vars(base).items() for base in cls.__mro__ if base not in nn.Module.__mro__)
    return list(dict.fromkeys(name for items in found for name, value in items if inspect.isfunction(value)))


def convert(module: nn.Module, mixin: type[Folded]) -> None:
    """Make ``module`` a folded one, in place."""
    module.__class__ = folded_class(mixin, type(module))
    _begin(module)
    if mixin is FoldedMBConv:
        _with_form(module)


def unfold(model: nn.Module) -> None:
    """Give the modules of an optimized copy their own classes back, in place."""
    for module in model.modules():
        if isinstance(module, Folded):
            module.__dict__.pop(_KEPT, None)
            module.__dict__.pop(_WHOLE, None)
            module.__class__ = module.stock
        if getattr(module.__dict__.get("train"), "func", None) is train_or_refuse:
            del module.train


def check_own(name: str, cls: type, method: str = "forward") -> None:
    """Raise `NotFusable` where somebody put another function in the place of a class's own method."""
    defining = next(base for base in cls.__mro__ if method in vars(base))
    code = getattr(vars(defining)[method], "__code__", None)
    beside = getattr(vars(defining).get("__init__"), "__code__", None)
    file = sys.modules[defining.__module__].__file__ if beside is None else beside.co_filename
    if code is None or code.co_filename != file:
        raise NotFusable(f"the {method} of {cls.__name__}, the class of {name}, was replaced")


def _check_part(part: Part) -> None:
    """Raise `NotFusable` where calling a part would do more than its class says."""
    for inner, module in part.module.named_modules():
        if not getattr(module.__dict__.get("forward"), OBSERVES, False):
            check_untouched(f"{part.name}.{inner}" if inner else part.name, module)
        check_own(part.name, stock_class(module))


class FoldedMBConv(Folded):
    """An MBConv or Fused-MBConv block as one operator, without normalisations and without drop path."""

    form: ClassVar[Form | None] = None

    @classmethod
    def methods(cls, stock: type[nn.Module]) -> dict[str, Any]:
        first, *others = list(inspect.signature(stock.forward).parameters)[1:]

        @functools.wraps(stock.forward)
        def forward(self: FoldedMBConv, *args: Any, **kwargs: Any) -> Tensor:
            alone = len(args) == 1 and not kwargs
            return self.run(args[0]) if alone else self.run_named(first, others, args, kwargs)

        return {"forward": forward}

    def check_now(self) -> None:
        check_modes(self, self.training)

    @property
    def settings(self) -> Sequence[str]:
        """Attributes of the block itself that `make` reads."""
        return ("activation", "gate", "residual", "expands") if _is_own(self.stock) else settings_of(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _with_form(self)

    def run_named(self, first: str, others: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        given = dict(zip((first, *others), args, strict=False)) | kwargs
        if first in given and given.keys() - {first} <= set(RATES):
            return self.run(given[first])
        return self.run_stock(*args, **kwargs)

    def run(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self._run_compiled(self.cast(x))
        x = self.cast(x)
        block = self.value() if isinstance(x, Tensor) else None
        if block is not None:
            return block(x)
        return self.run_stock(x)

    def _run_compiled(self, x: Tensor) -> Tensor:
        """The block in a graph: folded from its parameters, which may change, and for ONNX in PyTorch's operators."""
        onnx = torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()
        if onnx or _is_own(self.stock) or describe_or_none(self) is None:
            return self.run_stock(x)
        return self._fold()(x)

    @classmethod
    def describe(cls, module: nn.Module) -> AnyBlockPlan:
        return described_block(module)

    def _stock_forward(self, *args: Any, **kwargs: Any) -> Any:
        # Our own blocks have a kernel for their gradient, but none for its gradient, and none that vmap could see into.
        own = _is_own(self.stock) and not torch.compiler.is_compiling()
        own = own and (torch.is_grad_enabled() or transformed())
        with backends.use_backend("reference") if own else contextlib.nullcontext():
            return self.stock.forward(self, *args, **kwargs)

    def make(self) -> Block | FusedBlock | SteppedBlock:
        block_stages(self)
        return self._fold()

    def _fold(self) -> Block | FusedBlock | SteppedBlock:
        return self._fold_own() if _is_own(self.stock) else self._fold_planned()

    def _folded(self, *params: ConvNormParams | None) -> list[ConvNormParams | None]:
        dtype = compute_dtype(self.dtype())
        return [None if conv is None else fold(conv, dtype) for conv in params]

    def _fold_planned(self) -> Block | FusedBlock | SteppedBlock:
        plan = described_block(self)
        fused = not isinstance(plan, BlockPlan)
        stages = (plan.expand, plan.project) if fused else (plan.expand, plan.depthwise, plan.project)
        *convs, project = self._folded(*(stage and conv_norm_params(*stage) for stage in stages))
        squeeze_excite = plan.squeeze_excite
        block = (FusedBlock if fused else Block)(
            *convs,
            squeeze_excite and squeeze_excite.params(),
            project,
            self.dtype(),
            padding=plan.padding,
            after=plan.after,
            **plan.settings(),
        )
        return block if plan.steps is None else SteppedBlock(block, plan.steps, self._wide())

    def _fold_own(self) -> Block | FusedBlock:
        *convs, squeeze_excite, project, conv, _ = self._groups()
        *convs, project = self._folded(*convs, project)
        return (FusedBlock if issubclass(self.stock, layers.FusedMBConv) else Block)(
            *convs,
            squeeze_excite,
            project,
            self.dtype(),
            stride=conv.stride,
            padding=conv.padding,
            activation=self.activation,
            gate=self.gate,
            residual=self.residual,
        )


def _is_own(stock: type[nn.Module]) -> bool:
    return issubclass(stock, (layers.MBConv, layers.FusedMBConv))


def _with_form(block: FoldedMBConv) -> None:
    """Have the block's class say what its forward computes, which cannot be asked for while it is compiled."""
    if not _is_own(block.stock):
        block.__class__ = folded_class(FoldedMBConv, block.stock, form_of(block))


def block_stages(block: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """(convolution, normalisation) of each stage; raises `NotFusable` where it is not exactly a block."""
    stock = stock_class(block)
    check_own("it", stock)
    for name, inner in block.named_modules():
        if inner is not block:
            check_untouched(name, inner)
            check_own(name, stock_class(inner))
    if not _is_own(stock):
        plan = described_block(block)
        if callable(plan.padding) and not isinstance(plan, BlockPlan):
            raise NotFusable("it is padded by the size at each call")
        stages = [stage for stage in plan.stages() if stage[1] is not None]
    else:
        stages = block._conv_norms()
        plain = all(type(norm) is nn.BatchNorm2d for _, norm in filter(None, stages))
        if block._groups() is None or not plain:
            raise NotFusable("a part of it is not the plain module that it was built with")
    for _, norm in filter(None, stages):
        check_statistics(norm)
    return list(filter(None, stages))


def check_statistics(norm: nn.BatchNorm2d) -> None:
    if norm.running_mean is None or norm.running_var is None:
        raise NotFusable("it has no running statistics: it normalises by the batch's in evaluation, too")
    if norm.training:
        raise NotFusable("it is in training mode")


class FoldedConvolution(Folded):
    """A convolution with a normalisation behind it, which it runs, too, where their container calls both."""

    @classmethod
    def methods(cls, stock: type[nn.Module]) -> dict[str, Callable[..., Any]]:
        first = list(inspect.signature(stock.forward).parameters)[1]

        @functools.wraps(stock.forward)
        def forward(self: FoldedConvolution, *args: Any, **kwargs: Any) -> Tensor:
            return self.run(args[0] if args else kwargs[first])

        return {"forward": forward}

    def run(self, x: Tensor) -> Tensor:
        x = self.cast(x)
        if torch.compiler.is_compiling():
            # The normalisation rounds once, as where both are one operator.
            x = cast(x, self._wide()) if "activations" in self._buffers else x
            y = same_convolution(self, x)
            return self.stock.forward(self, x) if y is None else y
        chain: FoldedChain | None = calls.armed.pop(self, None) if calls.armed else None
        if chain is None or not _is_activation(x):
            return self.run_stock(x)
        y = chain.run(x)
        calls.armed[chain.norm] = y, chain.behind
        if chain.activation is not None:
            calls.armed[chain.activation] = y, ()
        return y


class FoldedPart(Folded):
    """A normalisation or activation whose result its convolution may have already."""

    @classmethod
    def methods(cls, stock: type[nn.Module]) -> dict[str, Callable[..., Any]]:
        @functools.wraps(stock.forward)
        def forward(self: FoldedPart, *args: Any, **kwargs: Any) -> Tensor:
            if torch.compiler.is_compiling() or not calls.armed:
                return self.rounded(stock.forward(self, *args, **kwargs))
            done, behind = calls.armed.pop(self, (None, ()))
            if done is None or len(args) != 1 or args[0] is not done:
                return self.rounded(stock.forward(self, *args, **kwargs))
            for module in behind:
                done = module(done)
            return done

        return {"forward": forward}

    def rounded(self, y: Tensor) -> Tensor:
        like = self._buffers.get("activations")
        return y if like is None else y.to(like.dtype)


def _is_activation(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() == 4 and x.dtype in FLOAT_DTYPES and x.layout is torch.strided


class Chain(NamedTuple):
    """A convolution and the normalisation on its result; ``activation`` is the module on that, if it is a child."""

    conv: Part
    norm: Part
    activation: Part | None = None


class FoldedChain(NamedTuple):
    """What runs instead of a chain: its parts from the normalisation on, and what is left to be called behind it."""

    run: Callable[[Tensor], Tensor]
    conv: nn.Module
    norm: nn.Module
    behind: Sequence[nn.Module]
    activation: nn.Module | None

    def __call__(self, x: Any) -> Any:
        """All of it, where its container is a sequence."""
        x = self.conv.cast(x)
        if not _is_activation(x):
            for module in filter(None, (self.conv, self.norm, self.activation)):
                x = module(x)
            return x
        x = self.run(x)
        for module in self.behind:
            x = module(x)
        return x


def chains_of(owner: nn.Module) -> list[Chain]:
    """The convolutions with a normalisation behind that ``owner``'s own methods call directly."""
    parts = {name: Part(name, child) for name, child in owner._modules.items() if child is not None}
    stock = stock_class(owner)
    names: Sequence[tuple[str, ...]] = CHAINS.get(stock) or tuple(OWN_CHAINS.get(stock, {}).values())
    if stock in SEQUENCES:
        listed = list(parts)
        triples = (tuple(listed[i : i + 3]) for i in range(len(listed) - 1))
        names = [triple for triple in triples if isinstance(parts[triple[0]].module, nn.Conv2d)]
    chains = []
    for conv, norm, *activation in names:
        if conv in parts and norm in parts and isinstance(parts[norm].module, _BatchNorm):
            chains.append(Chain(parts[conv], parts[norm], parts.get(activation[0]) if activation else None))
    return chains


def check_chain(chain: Chain) -> None:
    """Raise `NotFusable` unless calling the convolution and the normalisation does what their classes say."""
    conv, norm = chain.conv.module, chain.norm.module
    if known(NORMS, norm) is None:
        raise NotFusable(f"{chain.norm.name} is {type(norm).__name__}, not a BatchNorm2d that is folded")
    if known(CONVOLUTIONS, conv) is None and stock_class(conv) not in OWN_CONVOLUTIONS:
        raise NotFusable(f"{chain.conv.name} is {type(conv).__name__}, a convolution that is not folded")
    if getattr(conv, "activation", "none") != "none":
        raise NotFusable(f"{chain.conv.name} has an activation before {chain.norm.name}")
    _check_part(chain.conv)
    _check_part(chain.norm)
    check_statistics(norm)
    if norm.num_features != conv.out_channels or parameter(conv, "weight").dtype not in FLOAT_DTYPES:
        raise NotFusable(f"{chain.norm.name} has {norm.num_features} features for {conv.out_channels} channels")


def _fold_chain(chain: Chain, owners: str | None = None) -> FoldedChain:
    """What runs instead of a chain; ``owners`` is the activation that the owner applies to its result by itself."""
    check_chain(chain)
    conv, norm = chain.conv.module, chain.norm.module
    if not isinstance(conv, FoldedConvolution) or not isinstance(norm, FoldedPart):
        raise NotFusable(f"{chain.conv.name} was not folded when the copy was made")
    behind = [part.module for part in known(NORMS, norm)(norm)]
    follows = None if chain.activation is None else _activation_behind(chain.activation)
    found = [module for module in (*behind, follows) if module is not None and stock_class(module) is not nn.Identity]
    name, one = owners or "none", None
    if owners is None and len(found) == 1 and (only := _activation(found[0])) is not None:
        name, one = only, found[0]
    params = conv_norm_params(conv, norm)._replace(bias=parameter(conv, "bias"))
    run = convolution(conv, params, conv.dtype(), name)
    return FoldedChain(run, conv, norm, [m for m in behind if m is not one], follows if follows is one else None)


def _activation_behind(part: Part) -> nn.Module | None:
    """The module, if it is an activation that a convolution can compute, and nobody relies on its being called."""
    try:
        _check_part(part)
    except NotFusable:
        return None
    return part.module if _activation(part.module) is not None else None


def _activation(module: nn.Module) -> str | None:
    """The name of an activation that a convolution can compute."""
    try:
        return activation_name(Part("it", module))
    except NotFusable:
        return None


def _call_container(armed: dict[nn.Module, Any], call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``call(...)`` with these parts armed; what leaves the outermost container has the layout of the model's."""
    outer, moved = calls.armed, False
    calls.armed = armed
    calls.depth += 1
    try:
        y = call(*args, **kwargs)
    finally:
        calls.armed = outer
        calls.depth -= 1
        if not calls.depth:
            moved, calls.moved = calls.moved, False
    return _contiguous(y) if moved else y


def _contiguous(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.contiguous() if value.dim() == 4 else value
    if type(value) in (list, tuple):
        return type(value)(map(_contiguous, value))
    return value


class _Whole(NamedTuple):
    """The prepared calls of a network, and its first layer if that is a folded one, which casts images."""

    calls: PreparedCalls
    first: FoldedConvolution | None

    def run(self, x: Tensor, function: Callable[[Tensor], Any]) -> Any:
        casts = self.first is not None and x.is_floating_point()
        return self.calls.run(self.first.cast(x) if casts else x, function)


class _Container(Folded):
    """Base of what calls folded parts."""

    closed = False

    def whole(self) -> _Whole | None:
        """The prepared calls of a network's forward; None where anything in it is not its library's."""
        cell = self.__dict__.get(_WHOLE)
        if cell is None or "_is_replica" in self.__dict__ or calls.depth:
            return None
        if cell[0] is None or not cell[0].holds(self):
            with torch.inference_mode(False), torch.no_grad():
                methods = [(self.stock, name) for name in _functions(self.stock)]
                cell[0] = Kept(self, list(self.modules()), (), methods, self._whole)
        return cell[0].value

    def _whole(self) -> _Whole | None:
        libraries = {"torch", "effnet_ops", self.stock.__module__.partition(".")[0]}
        try:
            for name in _functions(self.stock):
                check_own("it", self.stock, name)
                if name in self.__dict__ and name != "train":
                    return None
            for name, module in self.named_modules():
                if module is not self:
                    check_untouched(name, module, cast_input)
                file = stock_class(module).__module__
                if file.partition(".")[0] not in libraries or module.training or ".transforms" in file:
                    return None
        except NotFusable:
            return None
        # An image is cast by its first layer: only that one can be asked before.
        first = next(module for module in self.modules() if not module._modules)
        return _Whole(PreparedCalls(), first if isinstance(first, FoldedConvolution) else None)

    def read_from(self) -> list[nn.Module]:
        parts = (part.module for chain in chains_of(self) for part in chain if part is not None)
        return list(dict.fromkeys(inner for part in parts for inner in part.modules()))


class FoldedOwner(_Container):
    """A network or block whose own methods call chains: there the convolutions run the normalisations, too."""

    @classmethod
    def methods(cls, stock: type[nn.Module]) -> dict[str, Callable[..., Any]]:
        calling = METHODS.get(stock, ("forward",)) if stock in CHAINS else ()
        return {name: _own_method(stock, name, name in calling) for name in dict.fromkeys((*calling, "forward"))}

    def make(self) -> dict[nn.Module, FoldedChain]:
        check_methods(self.stock)
        return {chain.conv: chain for chain in self._folded_chains()}

    def _folded_chains(self) -> Iterator[FoldedChain]:
        for chain in chains_of(self):
            if chain.activation is not None and not isinstance(chain.activation.module, FoldedPart):
                # One that came later would be called once more.
                chain = chain._replace(activation=None)
            try:
                yield _fold_chain(chain)
            except NotFusable:
                continue


def check_methods(stock: type[nn.Module]) -> None:
    """Raise `NotFusable` where a method that calls the parts of a class is not the class's own."""
    for name in _calling_methods(stock):
        check_own("it", stock, name)


def _calling_methods(stock: type[nn.Module]) -> Sequence[str]:
    return METHODS.get(stock, tuple(OWN_CHAINS.get(stock, ("forward",))))


def _own_method(stock: type[nn.Module], name: str, calling: bool) -> Callable[..., Any]:
    @functools.wraps(getattr(stock, name))
    def call(self: FoldedOwner, *args: Any, **kwargs: Any) -> Any:
        method = getattr(stock, name)
        if transformed():
            # Nothing is used, but parameters may have to be released.
            self.value()
            return method(self, *args, **kwargs)

        def run(*args: Any) -> Any:
            armed = dict(self.value() or {}) if calling else {}
            return _call_container(armed, method, self, *args, **kwargs)

        alone = name == "forward" and len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        whole = self.whole() if alone else None
        return run(*args) if whole is None else whole.run(args[0], run)

    return call


class FoldedOwnOwner(_Container):
    """A module of ours that calls a convolution, its normalisation and an activation in one method."""

    settings = ("_folded_activation",)

    @classmethod
    def methods(cls, stock: type[nn.Module]) -> dict[str, Callable[..., Any]]:
        found = {name: _own_chain_method(stock, name) for name in OWN_CHAINS[stock]}
        others = [name for name in ("forward", "forward_features") if hasattr(stock, name) and name not in found]
        return found | {name: _own_method(stock, name, False) for name in others}

    @property
    def _folded_activation(self) -> str:
        return self.activation if stock_class(self) is layers.ConvNormAct else self.spec.architecture.activation

    def make(self) -> dict[str, FoldedChain]:
        found: dict[str, FoldedChain] = {}
        for name, (conv, norm) in OWN_CHAINS[self.stock].items():
            try:
                check_own("it", self.stock, name)
                chain = Chain(Part(conv, self._modules[conv]), Part(norm, self._modules[norm]))
                found[name] = _fold_chain(chain, self._folded_activation)
            except NotFusable:
                continue
        return found


def _own_chain_method(stock: type[nn.Module], name: str) -> Callable[..., Any]:
    @functools.wraps(getattr(stock, name))
    def call(self: FoldedOwnOwner, x: Tensor) -> Tensor:
        method = getattr(stock, name)
        chain = (self.value() or {}).get(name)
        return method(self, x) if chain is None else _call_container({}, chain, x)

    return call


class FoldedSequence(_Container):
    """A sequence that folds what follows one another in it; folded blocks are one call, on the CPU."""

    def read_from(self) -> list[nn.Module]:
        parts = [part.module for chain in chains_of(self) for part in chain if part is not None]
        parts += [child for child in self._modules.values() if blocks_of(child)]
        return list(dict.fromkeys(inner for part in parts for inner in part.modules()))

    def make(self) -> Callable[[Any], Any]:
        chains, steps = {chain.conv.name: chain for chain in chains_of(self)}, []
        children = list(self._modules.items())
        while children:
            name, module = children[0]
            run = list(itertools.takewhile(lambda child: blocks_of(child[1]), children))
            taken = max(len(run), 1)
            try:
                if run:
                    steps.append(_Blocks([child for _, child in run]))
                elif name in chains:
                    steps.append(chain := _fold_chain(chains[name]))
                    taken = 2 if chain.activation is None else 3
                else:
                    steps.append(module)
            except NotFusable:
                steps += [child for _, child in children[:taken]]
            del children[:taken]
        return functools.partial(_run_steps, steps)

    def forward(self, input: Any) -> Any:
        value = self.value()
        if value is None:
            return self.stock.forward(self, input)
        return _call_container({}, value, input)


def _run_steps(steps: Sequence[Callable[[Any], Any]], x: Any) -> Any:
    for step in steps:
        x = step(x)
    return x


def blocks_of(module: nn.Module) -> list[FoldedMBConv]:
    """The folded blocks that a call of ``module`` is, in the order of their calls; none where it is anything else."""
    try:
        check_untouched("", module)
    except NotFusable:
        return []
    if isinstance(module, FoldedMBConv):
        # Of a class that somebody put on top, nothing is known.
        return [module] if "stock" in vars(type(module)) else []
    if stock_class(module) is not nn.Sequential:
        return []
    inner = [blocks_of(child) for child in module._modules.values()]
    return [block for blocks in inner for block in blocks] if all(inner) else []


def has_runs(sequence: nn.Sequential) -> bool:
    """Whether several folded blocks follow one another in it, in one of its children or in neighbours."""
    runs = [*map(blocks_of, sequence._modules.values()), []]
    return any(one and len(one) + len(other) > 1 for one, other in itertools.pairwise(runs))


class _Blocks:
    """Modules one after the other that are nothing but folded blocks."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        blocks = [block for module in modules for block in blocks_of(module)]
        values = [block.value() for block in blocks]
        if len(blocks) < 2 or None in values:
            raise NotFusable("they are not several blocks that are folded")
        if len({block.dtype() for block in blocks}) > 1:
            raise NotFusable("they take several dtypes")
        self._modules, self._first, self._run = modules, blocks[0], BlockSequence(values)

    def __call__(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or transformed():
            return _run_steps(self._modules, x)
        return self._run(self._first.cast(x))


class FoldedLinear(Folded):
    """A linear layer behind folded blocks, with its weight packed for a vector an image."""

    def read_from(self) -> list[nn.Module]:
        return []

    def make(self) -> Product:
        if "parametrizations" in self._modules or self.weight.dtype not in FLOAT_DTYPES or 0 in self.weight.shape:
            raise NotFusable("it has no plain weight")
        bias = self.weight.new_zeros(self.out_features) if self.bias is None else self.bias
        params = ConvNormParams(Tensor.detach(self.weight)[:, :, None, None], bias)
        return Product(fold(params, compute_dtype(self.weight.dtype)), self.weight.dtype)

    def forward(self, input: Tensor) -> Tensor:
        product = self.value() if self._fits(input) else None
        if product is None:
            return self.stock.forward(self, input)
        return product(input[:, :, None, None]).flatten(1)

    def _fits(self, x: Any) -> bool:
        weight = parameter(self, "weight")
        vectors = isinstance(x, Tensor) and x.dim() == 2 and x.shape[1] == weight.shape[1] and x.dtype in FLOAT_DTYPES
        return vectors and x.is_cpu and weight.is_cpu and backends.requested() in (None, "cpu")


class FoldedPool(Folded):
    """Base of the classes for the average over an image, behind folded blocks."""

    keepdim: ClassVar[bool]

    @staticmethod
    def averages(pool: nn.Module) -> bool:
        """Whether a module of the replaced class averages over the image, and gives that the shape of ``keepdim``."""
        raise NotImplementedError

    def make(self) -> PreparedCalls:
        for name, inner in self.named_modules():
            if inner is not self:
                check_untouched(name, inner)
        if not self.averages(self):
            raise NotFusable("it is not the average over the image")
        return PreparedCalls()

    def forward(self, x: Tensor) -> Tensor:
        fits = _is_activation(x) and 0 not in x.shape and backends.select(x) == "cpu"
        prepared = self.value() if fits else None
        if prepared is None:
            return self.stock.forward(self, x)
        return prepared.run(x, lambda x: packed.average_pool(packed.AveragePoolCall(x, self.keepdim)))


class FoldedAdaptivePool(FoldedPool):
    """Made of an ``nn.AdaptiveAvgPool2d`` with one output pixel."""

    settings = ("output_size",)
    keepdim = True

    @staticmethod
    def averages(pool: nn.AdaptiveAvgPool2d) -> bool:
        return is_average(pool)


POOLS: dict[type[nn.Module], type[FoldedPool]] = {nn.AdaptiveAvgPool2d: FoldedAdaptivePool}
"""What takes the place of a pool that is the average over the image, by its class."""
