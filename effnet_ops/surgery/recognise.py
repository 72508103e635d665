"""Recognises layers by what they compute: the forward of a module is traced, and the trace is matched exactly.

A module of any library, or of the user, is an MBConv block where its forward is, on its input x,

    [steps,] [1x1 convolution, [norm,] activation,] [zero padding,] depthwise convolution, [norm,] activation,
    [pool, 1x1 convolution, activation, 1x1 convolution, gate, product,] 1x1 convolution, [norm, activation,]
    [steps,] [+ x, or + steps of x, [steps]]

or without the depthwise convolution and with a dense one in place of the first, as Fused-MBConv (`FUSED_BLOCKS`);

where a step is a module that is called with the one tensor, such as a norm before the block or dropout behind it: that
one stays what it is. Everything in the trace has to be accounted for, and nothing inside may be used a second time. The
same holds for squeeze-and-excitation alone. What cannot be traced or does not match is refused, with the reason.

A trace runs the module's forward on a copy of its structure whose leaves only note their calls, once in evaluation and
once in training. No global state is changed, so other threads may go on. What it finds are names (`Form`), which hold
for all modules of that class with the same settings inside; `surgery.blocks` reads the modules behind the names.
"""

from __future__ import annotations

import functools
import inspect
import operator
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.proxy import GraphAppendingTracer

from effnet_ops.checks import integers
from effnet_ops.surgery.fused import ACTIVATIONS, CONVOLUTIONS, GATES, NORMS, NotFusable, changes_calls, known
from effnet_ops.surgery.structure import stock_class

LIBRARIES = {
    *("torch", "torchvision", "timm", "geffnet", "efficientnet_pytorch"),
    *("segmentation_models_pytorch", "transformers", "monai", "pytorchcv"),
}
"""Packages whose forwards a trace may run: it sees all that they do (docs/compatibility.md)."""

_registered: set[type[nn.Module]] = set()


def register_block(cls: type[nn.Module]) -> type[nn.Module]:
    """Let `replace_layers` recognise blocks of a class of your own; also as a decorator.

    A trace cannot see everything, so this says of the class that its forward

    * is a function of its input, its submodules and its settings (attributes) alone: it asks for no global, no value of
      a parameter or buffer, no random number but through dropout modules, and enters no context such as no_grad;
    * writes nothing, neither attributes nor the tensor that it is given.

    What the forward computes is still matched exactly, and blocks that are something else are left with the reason.
    Parts of it that have forwards of your own are registered, too.

    Raises:
        TypeError: it is no class of modules.
    """
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise TypeError(f"register_block takes a subclass of torch.nn.Module, got {cls!r}")
    _registered.add(cls)
    _forms.clear()
    return cls


def _check_trusted(cls: type[nn.Module]) -> None:
    """Raise `NotFusable` for a class whose methods are neither a library's nor registered."""
    for base in cls.__mro__:
        if base in _registered or base.__module__.partition(".")[0] in LIBRARIES:
            return
        if any(changes_calls(name) for name in vars(base)):
            raise NotFusable(f"{base.__name__} is a class of your own: see effnet_ops.register_block")


RATES = ("drop_connect_rate",)
"""Names of a second argument of a block's forward: the drop rate of this call, None for no drop path."""

DROP_PATHS: set[Any] = set()
"""Modules' classes and functions that drop whole images: f(x) is x times a scale (N, 1, 1, 1) drawn for x's size.

A function takes ``training``, and its rate as ``p`` or ``drop_connect_rate``."""

FUSED_BLOCKS: set[type[nn.Module]] = set()
"""Classes whose modules may be Fused-MBConv blocks. A dense convolution and a 1x1 one behind it stand in many networks,
which nobody wants to see reported as blocks."""

PADDINGS: set[Callable[..., Any]] = set()
"""Functions of an image, ``kernel_size`` and ``stride`` that give what `torch.nn.functional.pad` shall pad it by."""

_FUNCTIONS = {
    **{F.silu: "silu", F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", F.relu6: "relu6"},
    **{F.hardswish: "hardswish", torch.sigmoid: "sigmoid", F.sigmoid: "sigmoid", F.hardsigmoid: "hard_sigmoid"},
    **{"relu": "relu", "relu_": "relu", "sigmoid": "sigmoid", "sigmoid_": "sigmoid"},
}
"""Activations and gates as functions of one tensor, or as its methods."""
_SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
_QUESTIONS = {getattr, "size", "dim"}
_STATE = frozenset(("is_grad_enabled", "is_autocast_enabled", "is_tracing", "is_compiling", "checkpoint", "random"))
"""What a forward may not ask for: a trace would not notice that the answer has changed."""
_KINDS = frozenset(("isinstance", "is_tensor"))
"""Questions for the kind of its input, to which a trace gives another answer than a tensor."""
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_OWN_STATE = frozenset(nn.Module().__dict__)
_SEQUENCE_FORWARDS = [getattr(cls, "forward", None) for cls in _CONTAINERS]
_MOST_FORMS = 256
_MOST_CONVOLUTIONS, _MOST_CHANNELS = 12, 8


class Input:
    """Stands for the tensor in the arguments of a step; `Rate` for the drop rate of a call."""


class Rate(float):
    """A drop rate that no network has; in a step, it stands for the one of the call."""

    def _compare(self, operation: Callable[[float, Any], bool], other: Any) -> bool:
        if 0 < other < 1:
            raise NotFusable("it goes by the size of its drop rate")
        return operation(float(self), other)

    def __lt__(self, other: Any) -> bool:
        return self._compare(operator.lt, other)

    def __le__(self, other: Any) -> bool:
        return self._compare(operator.le, other)

    def __gt__(self, other: Any) -> bool:
        return self._compare(operator.gt, other)

    def __ge__(self, other: Any) -> bool:
        return self._compare(operator.ge, other)


_RATE = Rate(0.4142135)


class Step(NamedTuple):
    """A call with one tensor: of the module at ``path``, or of ``function`` with these arguments."""

    path: str
    function: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()


class Op(NamedTuple):
    """What one node, or several that belong together, compute.

    ``kind`` is "conv", "norm", "pad", "drop", "excite" (squeeze-and-excitation), "function", or "module" for any other
    module. ``value`` is a function's name, what is padded by, the parts of squeeze-and-excitation, or, of a convolution
    that is written with torch.nn.functional, "plain".
    """

    kind: str
    path: str = ""
    value: Any = None


class Block(NamedTuple):
    """The parts of an MBConv block; a stage is (convolution, normalisation or None, what is called behind it).

    Where ``fused``, it is a Fused-MBConv block: the stage ``depthwise`` has its dense convolution, nothing is in front
    of that, and there may be no projection.
    """

    before: tuple[Op, ...]
    expand: tuple[Op, Op | None, tuple[Op, ...]] | None
    pads: tuple[Op, ...]
    depthwise: tuple[Op, Op | None, tuple[Op, ...]]
    excite: Op | None
    project: tuple[Op, Op | None, tuple[Op, ...]] | None
    after: tuple[Op, ...]
    shortcut: tuple[Op, ...] | None
    last: tuple[Op, ...] = ()
    """Behind the sum."""
    fused: bool = False


class Form:
    """What the forward of modules of one class computes that have the same parts and settings inside.

    ``evaluation`` and ``training`` are a `Block`, or the `Op` of a squeeze-and-excitation layer; ``reason`` says why it
    is neither. ``rate`` is the name of the argument for a drop rate.
    """

    def __init__(self, module: nn.Module) -> None:
        self.parts = list(_parts(module))
        self.evaluation = self.training = self.rate = None
        self.reason = ""
        try:
            for path, cls, leaf, _, settings in self.parts:
                if not leaf:
                    _check_code(path or "it", cls, dict(settings))
            self.rate = _rate_argument(stock_class(module))
            self.evaluation, self.training = (_match(module, training) for training in (False, True))
            if self.rate is not None:
                self.training = _with_rate(self.training, _match(module, True, self.rate))
                if self.kind != "block" or _match(module, False, self.rate) != self.evaluation:
                    raise NotFusable("its drop rate does more than drop path")
            if isinstance(self.evaluation, Block) != isinstance(self.training, Block):
                raise NotFusable("it computes something else in training")
        except NotFusable as reason:
            self.reason = str(reason)
        except Exception as error:  # somebody else's forward can make any graph
            self.reason = f"its trace cannot be read: {_first_line(error)}"

    @property
    def kind(self) -> str:
        """ "block" or "squeeze_excite"."""
        return "block" if isinstance(self.evaluation, Block) else "squeeze_excite"

    def holds(self, module: nn.Module) -> bool:
        """Whether a module of the same class has the same parts and settings inside."""
        for path, cls, leaf, children, settings in self.parts:
            part = submodule(module, path)
            if part is None or stock_class(part) is not cls:
                return False
            if children != ((is_depthwise(part),) if leaf else _children(part)):
                return False
            state = part.__dict__
            for name, value in settings:
                if name not in state or not _same(state[name], value):
                    return False
        return True


_forms: dict[type[nn.Module], list[Form]] = {}


def form_of(module: nn.Module) -> Form:
    """What a module computes, traced where no module like it has been."""
    forms = _forms.setdefault(stock_class(module), [])
    for form in forms:
        if form.holds(module):
            return form
    forms.append(Form(module))
    del forms[:-_MOST_FORMS]
    return forms[-1]


def submodule(module: nn.Module, path: str) -> nn.Module | None:
    """The module at a path, None where there is none."""
    for name in path.split(".") if path else ():
        module = module._modules.get(name)
        if module is None:
            return None
    return module


def _children(module: nn.Module) -> tuple[tuple[str, bool], ...]:
    return tuple((name, child is None) for name, child in module._modules.items())


def _same(value: Any, known: Any) -> bool:
    if value is known:
        return True
    return type(value) is type(known) and _is_plain(value) and _is_plain(known) and value == known


def _is_plain(value: Any) -> bool:
    """Whether a setting is a value, which does not change in its place."""
    if isinstance(value, tuple):
        return all(isinstance(item, list) or _is_plain(item) for item in value)
    return value is None or isinstance(
        value, int | float | str | torch.dtype | types.FunctionType | types.BuiltinFunctionType | type
    )


_CHANNELS = frozenset(("in_channels", "out_channels", "groups", "num_features"))


def _parts(
    module: nn.Module, path: str = ""
) -> Iterator[tuple[str, type, bool, tuple[Any, ...], list[tuple[str, Any]]]]:
    """Path and class of the modules inside that a trace tells apart; whether it does not look into one; its children.

    Then its settings, which a forward may ask it for. Of those that a trace does not look into: whether they are
    depthwise convolutions, and all settings but the numbers of channels, which differ between all blocks.
    """
    leaf = bool(path) and _is_leaf(module)
    settings = [
        (name, value)
        for name, value in module.__dict__.items()
        if name not in _OWN_STATE
        and not name.startswith("_effnet_ops")
        and (_is_plain(value) and name not in _CHANNELS if leaf else not isinstance(value, Tensor))
    ]
    yield path, stock_class(module), leaf, (is_depthwise(module),) if leaf else _children(module), settings
    for name, child in () if leaf else module._modules.items():
        if child is not None:
            yield from _parts(child, f"{path}.{name}" if path else name)


def _is_leaf(module: nn.Module) -> bool:
    """Whether a trace notes the call of a module and does not look inside."""
    if any(known(table, module) is not None for table in (CONVOLUTIONS, NORMS, ACTIVATIONS, GATES)):
        return True
    cls = stock_class(module)
    if cls in DROP_PATHS or isinstance(module, (*_NORMS, torch.jit.ScriptModule, fx.GraphModule)):
        return True
    owner = next((base for base in cls.__mro__ if "forward" in vars(base)), nn.Module)
    return owner.__module__.startswith("torch.nn.") and owner not in _CONTAINERS and owner is not nn.Module


def _check_code(part: str, cls: type[nn.Module], settings: dict[str, Any]) -> None:
    """Raise `NotFusable` where a forward may do more than a trace sees, or something else the next time."""
    _check_trusted(cls)
    code = getattr(getattr(cls, "forward", None), "__code__", None)
    names = set() if code is None else {*code.co_names}
    inherited = [vars(base)["forward"] for base in cls.__mro__ if "forward" in vars(base)]
    of_all = names.union(*(getattr(getattr(f, "__code__", None), "co_names", ()) for f in inherited))
    if asked := (_STATE | _KINDS) & of_all:
        raise NotFusable(f"the forward of {cls.__name__} asks for {min(asked)}")
    for name, value in settings.items():
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(item, nn.Module) for item in inside):
            raise NotFusable(f"{name} of {cls.__name__} keeps modules that are not registered")
        if name in names and not _is_plain(value) and _gate_function(value) is None:
            kind = type(value).__name__
            raise NotFusable(f"{part} is {cls.__name__}, whose forward reads {name}, a {kind} that may change")


def _rate_argument(cls: type[nn.Module]) -> str | None:
    """The name of the argument that is the drop rate; raises `NotFusable` where others have to be given, too."""
    _, *others = list(inspect.signature(cls.forward).parameters.values())[1:] or [None]
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if any(p.default is p.empty and p.kind not in variable for p in others):
        raise NotFusable(f"the forward of {cls.__name__} takes more than one tensor")
    return next((p.name for p in others if p.name in RATES and p.default is None), None)


# Tracing


class _Proxy(fx.Proxy):
    """A value of the trace. torch.fx notes ``x += y`` as ``x + y``: of the input, that is not the same."""

    def _in_place(self, operation: Callable[[Any, Any], Any], other: Any) -> Any:
        if self.node.op == "placeholder":
            raise NotFusable("it changes the tensor that it is given")
        return operation(self, other)

    def __iadd__(self, other: Any) -> Any:
        return self._in_place(operator.add, other)

    def __imul__(self, other: Any) -> Any:
        return self._in_place(operator.mul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._in_place(operator.truediv, other)

    def __isub__(self, other: Any) -> Any:
        return self._in_place(operator.sub, other)


class _Trace(GraphAppendingTracer):
    """The graph of one forward."""

    def __init__(self, module: nn.Module, training: bool, rate: str | None) -> None:
        super().__init__(fx.Graph())
        self.root, self._training, self._twins, self._inside = module, training, {}, []
        self.read: dict[fx.Node, Any] = {}
        """What `_read` has found."""
        self.owner: dict[fx.Node, str] = {}
        """The module inside whose forward a node was noted; its own forward has the path ""."""
        self._tensors: dict[int, tuple[Tensor, str]] = {}
        """Copies, which a forward may write to, of the tensors of modules that are looked into, with their names."""
        self.x = self.create_proxy("placeholder", "x", (), {})
        twin = self._twin(module, "")
        before = [(twin, _contents(twin)) for twin in self._twins.values()]
        try:
            y = twin.forward(self.x, **({} if rate is None else {rate: _RATE}))
        except NotFusable:
            raise
        except Exception as error:
            raise NotFusable(f"its forward cannot be traced: {_first_line(error)}") from None
        self.read.clear()
        if not isinstance(y, fx.Proxy):
            raise NotFusable("it returns no tensor of its input")
        if any(_contents(twin) != contents for twin, contents in before):
            raise NotFusable("its forward changes attributes")
        if any(tensor._version for tensor, _ in self._tensors.values()):
            raise NotFusable("its forward changes parameters or buffers")
        self.y: fx.Node = y.node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        self.owner[node] = self._inside[-1] if self._inside else ""
        return node

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            if id(a) not in self._tensors:
                raise NotFusable("it computes with a tensor that is none of its parameters and buffers")
            return self.create_node("get_attr", self._tensors[id(a)][1], (), {})
        return super().create_arg(a)

    def _twin(self, module: nn.Module, path: str) -> nn.Module:
        """A module that shares everything with ``module``, and notes calls."""
        if id(module) in self._twins:
            return self._twins[id(module)]
        leaf = bool(path) and _is_leaf(module)
        cls = _twin_class(stock_class(module), leaf)
        twin = self._twins[id(module)] = cls.__new__(cls)
        twin.__dict__.update(module.__dict__, training=self._training, _traced=(self, path))
        # A copy of a replaced module is traced, too.
        twin.__dict__.pop("_effnet_ops_plan", None)
        if not leaf:
            children = module._modules.items()
            twin.__dict__["_modules"] = {
                name: child and self._twin(child, f"{path}.{name}" if path else name) for name, child in children
            }
            for table in ("_parameters", "_buffers"):
                own = {
                    name: self._copy(t, f"{path}.{name}" if path else name) for name, t in twin.__dict__[table].items()
                }
                twin.__dict__[table] = own
            for name, value in module.__dict__.items():
                if isinstance(value, Callable) and _gate_function(value):
                    twin.__dict__[name] = functools.partial(self.note, value)
            self._watch(twin)
        return twin

    def _copy(self, tensor: Tensor | None, name: str) -> Tensor | None:
        if tensor is None:
            return None
        with torch.inference_mode(False), torch.no_grad():
            copied = Tensor.detach(tensor).clone()
        if isinstance(tensor, nn.Parameter):
            copied = nn.Parameter(copied, requires_grad=False)
        self._tensors[id(copied)] = (copied, name)
        return copied

    def _watch(self, twin: nn.Module) -> None:
        """Have a forward call what is looked up by name in its file through `note`, where that shall not be traced."""
        forward = type(twin).forward
        code, found = getattr(forward, "__code__", None), getattr(forward, "__globals__", {})
        if not isinstance(forward, types.FunctionType):
            return
        functions = {name: found[name] for name in code.co_names if isinstance(found.get(name), types.FunctionType)}
        noted = {
            name: functools.partial(self.note, function)
            for name, function in functions.items()
            if function in PADDINGS or function in DROP_PATHS or (self._training and "drop" in name)
        }
        if noted:
            rest = (forward.__name__, forward.__defaults__, forward.__closure__)
            changed = types.FunctionType(code, {**found, **noted}, *rest)
            changed.__kwdefaults__ = forward.__kwdefaults__
            twin.__dict__["forward"] = changed.__get__(twin)

    def note(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A function as one node; drop path is none where it is told so."""
        if function in DROP_PATHS and not self._training:
            given = inspect.signature(function).bind(*args, **kwargs)
            given.apply_defaults()
            if given.arguments["training"]:
                raise NotFusable("it drops paths in evaluation, too")
            return next(iter(given.arguments.values()))
        return self.create_proxy("call_function", function, args, kwargs)

    def asked_for_mode(self, path: str) -> None:
        """Raise `NotFusable` where a forward asks for the mode of another module."""
        if path != (self._inside[-1] if self._inside else ""):
            raise NotFusable(f"it goes by the mode of {path or 'the block'}")

    def call_leaf(self, twin: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cls = stock_class(submodule(self.root, path))
        if len(args) == 1 and not kwargs and (cls is nn.Identity or (cls in _DROPOUTS and not self._training)):
            return args[0]
        return self.create_proxy("call_module", path, args, kwargs)

    def enter(self, twin: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Trace into a module; where that fails, or gives nothing that is known, its call is a node."""
        before = len(self.graph.nodes)
        self._inside.append(path)
        try:
            y = twin.forward(*args, **kwargs)
        except Exception:
            y = None
        finally:
            self._inside.pop()
        nodes = list(self.graph.nodes)[before:]
        one = len(args) == 1 and not kwargs and isinstance(args[0], fx.Proxy)
        if not one or (isinstance(y, fx.Proxy) and (twin._modules or self._is_known(nodes))):
            if y is None:
                raise NotFusable(f"{path} is {stock_class(twin).__name__}, whose forward cannot be traced")
            return y
        for node in reversed(nodes):
            self.graph.erase_node(node)
        return self.create_proxy("call_module", path, args, kwargs)

    def _is_known(self, nodes: Sequence[fx.Node]) -> bool:
        """Whether a module without children is an activation, a gate or a convolution that it spells out itself."""
        if not nodes:
            return True
        op, _, inner = _read(self, nodes[-1])
        self.read.clear()
        return op is not None and {nodes[-1], *inner} == set(nodes)


def _gate_function(value: Any) -> str | None:
    """The name of a gate that a library keeps as a function; not all of those can be hashed."""
    return next((name for function, name in GATE_FUNCTIONS if function is value), None)


GATE_FUNCTIONS: list[tuple[Callable[..., Any], str]] = []
"""Gates that a layer has as an attribute. Pairs and no dictionary, because scripted functions cannot be hashed."""


class _Twin:
    @property
    def training(self) -> bool:
        """The mode of the trace. A part can be in another, by which only its own forward may go."""
        trace, path = self.__dict__["_traced"]
        trace.asked_for_mode(path)
        return self.__dict__["training"]


class _Leaf(_Twin):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        trace, path = self.__dict__["_traced"]
        return trace.call_leaf(self, path, args, kwargs)


class _Open(_Twin):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        trace, path = self.__dict__["_traced"]
        return trace.enter(self, path, args, kwargs)


@functools.cache
def _twin_class(cls: type[nn.Module], leaf: bool) -> type[nn.Module]:
    return type(cls.__name__, (_Leaf if leaf else _Open, cls), {"__module__": cls.__module__, "stock": cls})


def _contents(twin: nn.Module) -> dict[str, Any]:
    tables = (twin._modules, twin._parameters, twin._buffers)
    found = {name: list(value) if isinstance(value, list) else value for name, value in twin.__dict__.items()}
    # Objects, which may be equal to others in ways of their own.
    return {name: v if isinstance(v, list | int | str) else id(v) for name, v in found.items()} | {
        "tables": [{name: id(value) for name, value in table.items()} for table in tables]
    }


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


# Matching


_Read = tuple[Op | None, Any, list[fx.Node]]


def _read(trace: _Trace, node: Any) -> _Read:
    """What a node computes, the node it does that with, and other nodes that are part of it; None if unknown."""
    if not isinstance(node, fx.Node):
        return None, None, []
    if node not in trace.read:
        trace.read[node] = _read_anew(trace, node)
    return trace.read[node]


def _read_anew(trace: _Trace, node: fx.Node) -> _Read:
    if not node.args or node.op not in ("call_module", "call_function", "call_method"):
        return None, None, []
    target, first = node.target, node.args[0]
    if node.op == "call_module":
        if len(node.args) != 1 or node.kwargs:
            return None, None, []
        part = submodule(trace.root, target)
        if isinstance(part, _DROPOUTS) and part.p == 0:
            return Op("function", target, "none"), first, []
        return Op(_kind(part), target), first, []
    if target is F.conv2d:
        return _functional_convolution(trace, node)
    if target is F.pad:
        return _functional_pad(node)
    if (target in DROP_PATHS or "drop" in getattr(target, "__name__", "")) and node.op == "call_function":
        return Op("drop", value=_step(node)), first, []
    if (gate := _gate_function(target)) is not None:
        return Op("function", value=gate), first, []
    if target in _FUNCTIONS and len(node.args) == 1 and set(node.kwargs) <= {"inplace"}:
        return Op("function", value=_FUNCTIONS[target]), first, []
    if target is F.gelu and len(node.args) == 1 and set(node.kwargs) <= {"approximate"}:
        return Op("function", value="gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"), first, []
    if target is F.hardtanh and node.args[1:] in ((), (0, 6)) and _limits(node) == (0, 6):
        return Op("function", value="relu6"), first, []
    return _written_out(trace, node)


def _limits(node: fx.Node) -> tuple[Any, Any]:
    given = dict(zip(("min_val", "max_val"), node.args[1:], strict=False)) | node.kwargs
    return given.get("min_val", -1), given.get("max_val", 1)


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.modules.conv._ConvNd):
        return "conv"
    if known(NORMS, module) is not None or isinstance(module, _NORMS):
        return "norm"
    if stock_class(module) in (nn.ZeroPad2d, nn.ConstantPad2d):
        return "pad"
    return "drop" if stock_class(module) in DROP_PATHS else "module"


def _functional_convolution(trace: _Trace, node: fx.Node) -> _Read:
    """F.conv2d with the parameters and the settings of a Conv2d."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    weight, bias = given.get("weight"), given.get("bias")
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None, None, []
    path, _, name = weight.target.rpartition(".")
    conv = submodule(trace.root, path)
    expected = f"{path}.bias" if path else "bias"
    same = getattr(bias, "target", None) == (expected if getattr(conv, "bias", None) is not None else None)
    if not isinstance(conv, nn.Conv2d) or name != "weight" or not same or conv.padding_mode != "zeros":
        return None, None, []
    if any(given.get(name) != getattr(conv, name) for name in names[3:]):
        return None, None, []
    return Op("conv", path, "plain"), node.args[0], [n for n in (weight, bias) if n is not None]


def _functional_pad(node: fx.Node) -> _Read:
    given = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | node.kwargs
    pad, inner = given.get("pad"), []
    if given.get("mode", "constant") != "constant" or given.get("value", 0) not in (0, None):
        return None, None, []
    if isinstance(pad, fx.Node):
        if pad.target not in PADDINGS or pad.args[:1] != node.args[:1]:
            return None, None, []
        pad, inner = _step(pad), [pad]
    else:
        pad = tuple(pad)
        if len(pad) != 4 or any(isinstance(side, fx.Node) or side < 0 for side in pad):
            return None, None, []
    return Op("pad", value=pad), node.args[0], inner


def _step(node: fx.Node) -> Step:
    """The call of a function of one tensor."""
    args = tuple(Input if isinstance(a, fx.Node) else a for a in node.args)
    if sum(a is Input for a in args) != 1 or any(isinstance(a, fx.Node) for a in node.kwargs.values()):
        raise NotFusable(f"it calls {_name(node.target)} with several tensors")
    return Step("", node.target, args, tuple(node.kwargs.items()))


def _written_out(trace: _Trace, node: fx.Node) -> _Read:
    """x * sigmoid(x), relu6(x + 3) / 6, x times either, and squeeze-and-excitation."""
    if node.target in (operator.truediv, torch.div, "div", "div_") and node.args[1:] == (6,) and not node.kwargs:
        top = node.args[0]
        factors = top.args if isinstance(top, fx.Node) and top.target in _PRODUCTS else (None, top)
        for x, clipped in (factors, factors[::-1]) if len(factors) == 2 else ():
            op, moved, _ = _read(trace, clipped)
            added = isinstance(moved, fx.Node) and moved.target in _SUMS and not moved.kwargs
            shifted = added and moved.args[1:] == (3,)
            if op is None or op.value != "relu6" or not shifted:
                continue
            if x is None:
                return Op("function", value="hard_sigmoid"), moved.args[0], [clipped, moved]
            if moved.args[0] is x:
                return Op("function", value="hardswish"), x, [top, clipped, moved]
        return None, None, []
    if node.target in _PRODUCTS and len(node.args) == 2 and not node.kwargs:
        for x, factor in (node.args, node.args[::-1]):
            op, source, inner = _read(trace, factor)
            if op is None or not isinstance(x, fx.Node):
                continue
            if source is x and op.value in ("sigmoid", "hard_sigmoid"):
                name = "silu" if op.value == "sigmoid" else "hardswish"
                return Op("function", value=name), x, [factor, *inner]
            if found := _excitation(trace, x, factor):
                return found[0], x, found[1]
    return None, None, []


def _excitation(trace: _Trace, x: fx.Node, node: Any) -> tuple[Op, list[fx.Node]] | None:
    """Squeeze-and-excitation whose gate is ``node``; what is inside it, and its nodes."""
    ops: list[Op] = []
    nodes: list[fx.Node] = []
    while not (pool := _pool(trace, node)):
        op, source, inner = _read(trace, node)
        if op is None or op.kind in ("drop", "excite") or len(ops) > 8:
            return None
        ops.insert(0, op)
        nodes += [node, *inner]
        node = source
    if node.args[0] is not x or sum(op.kind == "conv" for op in ops) != 2:
        return None
    if ops[0].kind != "conv" or ops[-1].kind == "conv":
        return None
    return Op("excite", trace.owner[nodes[0]], (pool, *ops)), [*nodes, node]


def _pool(trace: _Trace, node: Any) -> Op | None:
    """The average over the image, which keeps its axes."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "call_module" and isinstance(submodule(trace.root, node.target), nn.AdaptiveAvgPool2d):
        return Op("module", node.target)
    if node.target is F.adaptive_avg_pool2d and not node.kwargs and node.args[1:] in ((1,), ((1, 1),), ([1, 1],)):
        return Op("function", value="average")
    if node.target in ("mean", torch.mean):
        given = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | node.kwargs
        axes = given.pop("dim", None)
        if given == {"keepdim": True} and isinstance(axes, list | tuple) and sorted(a % 4 for a in axes) == [2, 3]:
            return Op("function", value="average")
    return None


def _match(module: nn.Module, training: bool, rate: str | None = None) -> Block | Op:
    """What the forward of a module is; raises `NotFusable` for what is neither a block nor squeeze-and-excitation."""
    trace = _Trace(module, training, rate)
    used: set[fx.Node] = {trace.x.node}
    shortcut, last = None, []
    end = _sum_in_front(trace, trace.y)
    if end is None:
        chain = _chain(trace, trace.y, used)
    else:
        last = _chain(trace, trace.y, used, end)
        paths: list[set[fx.Node]] = [set(), set()]
        chains = [_chain(trace, node, own) for node, own in zip(end.args, paths, strict=True)]
        if paths[0] & paths[1]:
            raise NotFusable("both parts of its sum use the same values")
        used |= {end, *paths[0], *paths[1]}
        chains.sort(key=lambda chain: sum(op.kind == "conv" for op in chain))
        shortcut, chain = chains
    for node in trace.graph.nodes:
        if trace.x.node in node.args[:1] and _changes_its_input(node):
            raise NotFusable("it changes the tensor that it is given")
        if node not in used and not (node.target in _QUESTIONS and not node.users):
            raise NotFusable(_unknown(trace, node))
    if shortcut is None and len(chain) == 1 and chain[0].kind == "excite":
        return chain[0]
    return _block(module, chain, None if shortcut is None else tuple(shortcut), tuple(last))


def _sum_in_front(trace: _Trace, node: Any) -> fx.Node | None:
    """The sum of two values that ``node`` is, or is made of by steps and no convolution."""
    while isinstance(node, fx.Node):
        if node.target in _SUMS and len(node.args) == 2 and not node.kwargs:
            return node
        op, source, _ = _read(trace, node)
        if op is None or op.kind in ("conv", "excite"):
            return None
        node = source
    return None


def _changes_its_input(node: fx.Node) -> bool:
    """Whether a function or method works in place; modules are called as they are."""
    name = _name(node.target)
    in_place = name.endswith("_") and not name.endswith("__")
    return node.op != "call_module" and (in_place or node.kwargs.get("inplace") is True)


def _with_rate(plain: Block | Op, rated: Block | Op) -> Block | Op:
    """The form for calls with a drop rate, which may have drop path more than that for calls without."""
    if rated == plain:
        return plain
    if isinstance(plain, Block) and isinstance(rated, Block) and plain == rated._replace(after=plain.after):
        drops = [op.value for op in rated.after if op not in plain.after]
        if not plain.after and len(drops) == 1 and isinstance(drops[0], Step) and takes_rate(drops[0]):
            return rated
    raise NotFusable("its drop rate does more than drop path")


def takes_rate(step: Step) -> bool:
    """Whether the drop rate of a call goes to a step."""
    return any(isinstance(value, Rate) for value in (*step.args, *(value for _, value in step.kwargs)))


def _chain(trace: _Trace, node: Any, used: set[fx.Node], start: fx.Node | None = None) -> list[Op]:
    """What is computed from ``start``, which is the input if nothing is said, to ``node``, one after the other."""
    ops: list[Op] = []
    start = trace.x.node if start is None else start
    while node is not start:
        op, source, inner = _read(trace, node)
        if op is None:
            raise NotFusable(_unknown(trace, node))
        if len(node.users) > 1 and not _used_once(trace, node):
            raise NotFusable(f"what {_called(trace, node)} gives is used in several places")
        if any(not set(n.users) <= {node, *inner} for n in inner):
            raise NotFusable(f"a part of what {_called(trace, node)} computes is used in several places")
        used.update((node, *inner))
        ops.insert(0, op)
        node = source
    return ops


def _used_once(trace: _Trace, node: fx.Node) -> bool:
    """Whether one operation uses what a node gives: of several nodes together, such as the pool and the product."""
    if len(node.users) == 1:
        return True
    near = set(node.users)
    for _ in range(2):
        near |= {user for one in near for user in one.users}
    for user in near:
        op, source, inner = _read(trace, user)
        if op is not None and source is node and set(node.users) <= {user, *inner}:
            return True
    return False


def _called(trace: _Trace, node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else _name(node.target)


def _name(target: Any) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _unknown(trace: _Trace, node: Any) -> str:
    """Why what gives ``node`` is not known; of a product, the first factor that is not."""
    while isinstance(node, fx.Node) and node.target in _PRODUCTS and all(isinstance(a, fx.Node) for a in node.args):
        factor = node.args[1] if node.args[0] is trace.x.node else node.args[0]
        while (read := _read(trace, factor))[0] is not None:
            factor = read[1]
        if not isinstance(factor, fx.Node) or factor is trace.x.node:
            break
        node = factor
    if not isinstance(node, fx.Node):
        return "it computes with a constant"
    if path := trace.owner.get(node):
        return f"{path} is {stock_class(submodule(trace.root, path)).__name__}, which is not fused"
    if node.op == "call_module":
        return f"{node.target} is {stock_class(submodule(trace.root, node.target)).__name__}, which is not fused"
    return f"it calls {_name(node.target)}, which is not fused"


def is_depthwise(conv: Any) -> bool:
    return isinstance(conv, nn.Conv2d) and 1 < conv.groups == conv.in_channels == conv.out_channels


def _block(module: nn.Module, chain: list[Op], shortcut: tuple[Op, ...] | None, end: tuple[Op, ...]) -> Block:
    """The parts of a block in a chain of operations, with what is added to it and what is behind that sum."""
    at = [i for i, op in enumerate(chain) if op.kind == "conv" and is_depthwise(submodule(module, op.path))]
    dense = [i for i, op in enumerate(chain) if op.kind == "conv"][:1]
    fused = not at and may_be_fused(module) and submodule(module, chain[dense[0]].path).groups == 1 if dense else False
    if not at and not fused:
        raise NotFusable(_without_depthwise(module, chain))
    if fused:
        at = dense
    before, expand, pads = [], None, []
    for middle in at:
        start = middle
        while start and chain[start - 1].kind == "pad":
            start -= 1
        pads, before = chain[start:middle], chain[:start]
        expand = _stage_behind(module, before)
        if expand is not None:
            before = before[: before.index(expand[0])]
            break
    else:
        middle = at[0]
        before = chain[:middle]
        while before and before[-1].kind == "pad":
            before.pop()
        pads = chain[len(before) : middle]
    conv, rest = chain[middle], chain[middle + 1 :]
    norm = rest.pop(0) if rest and rest[0].kind == "norm" else None
    activations, rest = _activations(module, rest)
    excite = rest.pop(0) if rest and rest[0].kind == "excite" else None
    project = None
    if rest and rest[0].kind == "conv":
        last, rest = rest[0], rest[1:]
        last_norm = rest.pop(0) if rest and rest[0].kind == "norm" else None
        behind, rest = _activations(module, rest) if last_norm is not None else ((), rest)
        project = last, last_norm, behind
    elif not fused:
        raise NotFusable(_not_a_projection(module, rest))
    depthwise = (conv, norm, activations)
    if sum(any(_draws(module, op) for op in ops) for ops in (before, rest, shortcut or (), end)) > 1:
        raise NotFusable("it draws random numbers in front of the block and behind it")
    return Block(tuple(before), expand, tuple(pads), depthwise, excite, project, tuple(rest), shortcut, end, fused)


def may_be_fused(module: nn.Module) -> bool:
    """Whether a module is of a class that may be a Fused-MBConv block, and begins as one."""
    cls = stock_class(module)
    if cls not in FUSED_BLOCKS and cls not in _registered:
        return False
    convs = _convolutions(module)
    return bool(convs) and convs[0].groups == 1 and not _is_small(convs[0]) and all(map(_is_small, convs[1:]))


def _draws(module: nn.Module, op: Op) -> bool:
    """Whether a step draws random numbers."""
    part = submodule(module, op.path) if op.path else None
    return op.kind == "drop" or any(
        isinstance(inner, _DROPOUTS) and inner.p for inner in (part.modules() if part else ())
    )


def _activations(module: nn.Module, ops: list[Op]) -> tuple[tuple[Op, ...], list[Op]]:
    """The activations that operations begin with, and the others."""
    count = next((i for i, op in enumerate(ops) if not _is_activation(module, op)), len(ops))
    return tuple(ops[:count]), ops[count:]


def _is_activation(module: nn.Module, op: Op) -> bool:
    return op.kind == "function" or (op.kind == "module" and known(ACTIVATIONS, submodule(module, op.path)) is not None)


def _stage_behind(module: nn.Module, ops: list[Op]) -> tuple[Op, Op | None, tuple[Op, ...]] | None:
    """The convolution, normalisation and activation that operations end with."""
    end = len(ops)
    while end and ops[end - 1].kind in ("function", "module"):
        end -= 1
    activations = tuple(ops[end:])
    norm = ops[end - 1] if end and ops[end - 1].kind == "norm" else None
    conv = ops[end - (1 if norm is None else 2)] if end > (norm is not None) else None
    if conv is None or conv.kind != "conv":
        return None
    if norm is None:
        # Other convolutions are steps in front of the block.
        part = submodule(module, conv.path)
        if part.groups != 1 or not _is_small(part) or not all(_is_activation(module, op) for op in activations):
            return None
    return conv, norm, activations


def _without_depthwise(module: nn.Module, chain: list[Op]) -> str:
    for op in chain:
        part = submodule(module, op.path) if op.path else None
        if op.kind == "conv" and part.groups > 1:
            return f"{op.path} has {part.groups} groups for {part.in_channels} channels, so it is not depthwise"
    for op in chain:
        part = submodule(module, op.path) if op.kind == "module" else None
        if part is not None and any(isinstance(inner, nn.Conv2d) for inner in part.modules()):
            return f"{op.path} is {stock_class(part).__name__}, a convolution that is not fused"
    return "it has no depthwise convolution"


def _not_a_projection(module: nn.Module, rest: list[Op]) -> str:
    if rest and rest[0].path:
        return f"{rest[0].path} is {stock_class(submodule(module, rest[0].path)).__name__}, which is not fused"
    return "it has no projection behind its depthwise convolution"


def likely_kind(module: nn.Module) -> str:
    """What a module may be, by the convolutions inside it: "block", "squeeze_excite", or "" for neither."""
    convs = _convolutions(module)
    if may_be_fused(module):
        return "block"
    if is_sequence(module) and any(len(_convolutions(child)) == len(convs) for child in module.children()):
        # The child is what is looked for.
        return ""
    pointwise = [conv for conv in convs if conv.groups == 1 and _is_small(conv)]
    if len(convs) == 2 == len(pointwise):
        reduce, expand = pointwise
        matching = (reduce.in_channels, reduce.out_channels) == (expand.out_channels, expand.in_channels)
        return "squeeze_excite" if matching and not is_sequence(module) else ""
    depthwise = sum(map(_is_nearly_depthwise, convs))
    return "block" if 0 < depthwise <= 3 and pointwise and len(convs) <= _MOST_CONVOLUTIONS else ""


def _is_nearly_depthwise(conv: nn.Conv2d) -> bool:
    """Also with a few channels a group: somebody may expect that to be fused."""
    return conv.groups > 1 and conv.in_channels <= _MOST_CHANNELS * conv.groups


def looks_like_block(module: nn.Module) -> bool:
    """Whether a depthwise convolution stands between two 1x1 convolutions in a module that is more than a sequence.

    Or its class says it.
    """
    if may_be_fused(module):
        return True
    convs = _convolutions(module)
    pointwise = [i for i, conv in enumerate(convs) if conv.groups == 1 and _is_small(conv)]
    between = convs[pointwise[0] : pointwise[-1]] if pointwise else []
    return not is_sequence(module) and any(map(_is_nearly_depthwise, between))


def _convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [inner for inner in module.modules() if isinstance(inner, nn.Conv2d)]


def is_sequence(module: nn.Module) -> bool:
    return isinstance(module, _CONTAINERS) and stock_class(module).forward in _SEQUENCE_FORWARDS


def _is_small(conv: nn.Conv2d) -> bool:
    return all(size == 1 for size in (integers(conv.kernel_size, 2) or (0,)))
