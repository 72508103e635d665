"""replace_layers and restore_layers: they change the class of modules, and nothing else.

Swapping ``module.__class__`` for a subclass of it survives copy.deepcopy, pickle and torch.save; parameters keep
their identity, so optimizers, state dicts and hooks on the modules themselves notice nothing. What a module is, is
told by its class and, for blocks, by a trace of its forward (`surgery.recognise`).
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import torch
from torch import nn

from effnet_ops import layers
from effnet_ops.surgery import (
    adapters,
    generic,  # noqa: F401  (registers the layers of PyTorch itself)
)
from effnet_ops.surgery.around import AROUND, NETWORK_POOLS, NETWORKS, SYNC_NORMS, AroundLayer
from effnet_ops.surgery.blocks import FusedBlock, FusedSqueezeExcite, has_more
from effnet_ops.surgery.folded import Folded
from effnet_ops.surgery.fused import (
    LAYERS,
    UNSUPPORTED,
    FusedLayer,
    NotFusable,
    check_inside,
    describe,
    describe_now,
    fused_class,
    known,
    stock_class,
)
from effnet_ops.surgery.recognise import form_of, likely_kind, looks_like_block

_KINDS = {
    "block": "MBConv blocks",
    "depthwise": "depthwise convolutions",
    "squeeze_excite": "squeeze-and-excitation layers",
}
_OWN = {"MBConv": "block", "FusedMBConv": "block", "DepthwiseConv2d": "depthwise", "SqueezeExcite": "squeeze_excite"}
_NAMES_SHOWN = 4
_SQUEEZES = re.compile("squeeze|^SE|SE$|SELayer|SEModule|SEBlock", re.IGNORECASE)


@dataclass
class ReplacementReport:
    """What `replace_layers` did, by the modules' qualified names; a whole block is one entry.

    Attributes:
        replaced: the modules that this call replaced, in the order of the model.
        skipped: the modules that were recognised and left as they are, with the reason.
        kinds: "block", "depthwise" or "squeeze_excite" for each of these modules; "other" for other kinds of block.
        around: what this call replaced around the blocks of a known network, for evaluation without gradients only:
            "convolution", "norm", "conv_norm" (both and the activation) or "pool" for each of these modules.
    """

    replaced: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    around: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.kinds:
            return "nothing to replace: no MBConv block, depthwise convolution or squeeze-and-excitation layer found"
        found, done = Counter(self.kinds.values()), Counter(self.kinds[name] for name in self.replaced)
        counts = [f"{done[kind]} of {found[kind]} {noun}" for kind, noun in _KINDS.items() if found[kind]]
        return "\n".join([f"{', '.join(counts) or 'nothing'} replaced", *reason_lines("skipped", self.skipped)])


def reason_lines(verb: str, reasons: dict[str, str]) -> list[str]:
    """A line for each reason, with the names of the first modules that it holds for."""
    by_reason, lines = defaultdict(list), []
    for name, reason in reasons.items():
        by_reason[reason].append(name or "the model itself")
    for reason, names in by_reason.items():
        more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        lines.append(f"  {verb} {', '.join(names[:_NAMES_SHOWN])}{more}: {reason}")
    return lines


def replace_layers(model: nn.Module) -> ReplacementReport:
    """Let MBConv blocks, depthwise convolutions and squeeze-and-excitation layers run the fused operators, in place.

    A block of any library, or of your own, is recognised by what its forward computes. One that is not exactly MBConv
    is skipped, with the reason, and what is inside it is replaced layer by layer. Around the blocks of the networks of
    timm, torchvision, efficientnet_pytorch and geffnet, the first and last convolutions, their normalisations and the
    pool are replaced, too: fused in evaluation without gradients, and the stock forward otherwise. Modules, parameters,
    buffers and their names stay; a module's stock
    forward runs whenever something changes later that the fused one would miss (a hook on a child, a child of another
    class, a class with another forward, BatchNorm modes that differ within a block, tracing). Hooks on a replaced
    module itself work; one that is registered for all modules at once sees the block and not its children. Calling it
    again replaces only what was added since. `restore_layers` undoes it.

    Args:
        model: any module; it is changed in place, all of it or, if an error is raised, nothing.

    Returns:
        What was replaced, and what was skipped and why.

    Raises:
        TypeError: ``model`` is not a torch.nn.Module.
    """
    check_module(model)
    report = ReplacementReport()
    changes: list[tuple[nn.Module, type[nn.Module]]] = []
    _visit("", model, report, changes, set())
    _surround("", model, False, report, changes, {module for module, _ in changes})
    _synchronise(model, report, changes)
    _apply(changes)
    return report


def restore_layers(model: nn.Module) -> None:
    """Give every module that `replace_layers` changed its own class back, in place, bit for bit.

    Raises:
        TypeError: ``model`` is not a torch.nn.Module.
    """
    check_module(model)
    # Listed first: a class on top of the fused one can belong to several modules, and changes for all of them at once.
    fused_modules = [(module, _replacement(module)) for module in model.modules() if isinstance(module, FusedLayer)]
    for module, fused in fused_modules:
        FusedLayer.forget_plan(module)
        if type(module) is fused:
            module.__class__ = fused.stock
        else:
            # torch.nn.utils.parametrize and FSDP put a class of their own on top.
            type(module).__bases__ = tuple(fused.stock if base is fused else base for base in type(module).__bases__)


def _replacement(module: FusedLayer) -> type[FusedLayer]:
    """The class that a replaced module was given."""
    return next(base for base in type(module).__mro__ if issubclass(base, FusedLayer) and "stock" in base.__dict__)


def check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _visit(
    name: str,
    module: nn.Module,
    report: ReplacementReport,
    changes: list[tuple[nn.Module, type[nn.Module]]],
    seen: set[int],
) -> None:
    """Plan the changes to a module or, where it stays, to its children."""
    if id(module) in seen or (isinstance(module, Folded) and module.closed):
        return
    seen.add(id(module))
    found = classify(module)
    if found is not None:
        kind, result = found
        report.kinds[name] = kind
        if not isinstance(result, str):
            report.replaced.append(name)
            changes.append((module, result))
            return
        report.skipped[name] = result
    if found is None or not _closed(module):
        for child_name, child in module.named_children():
            _visit(f"{name}.{child_name}" if name else child_name, child, report, changes, seen)
    if name in report.skipped:
        _forget_outer(name, module, report)


def _forget_outer(name: str, module: nn.Module, report: ReplacementReport) -> None:
    """Say nothing of a module that looked like a block because a part of it does."""
    start = f"{name}." if name else ""
    for inner, kind in report.kinds.items():
        if kind == "block" and inner.startswith(start) and inner != name:
            part = module.get_submodule(inner[len(start) :])
            if _weights(part) < _weights(module):
                del report.skipped[name], report.kinds[name]
                return


def _weights(module: nn.Module) -> int:
    return sum(1 for _ in module.parameters())


def _surround(
    name: str,
    module: nn.Module,
    inside: bool,
    report: ReplacementReport,
    changes: list[tuple[nn.Module, type[nn.Module]]],
    seen: set[nn.Module],
) -> None:
    """Plan the changes to the layers around the fused blocks of a known network; ``inside``: this is in one."""
    if module in seen or _closed(module) or _is_block(module):
        return
    seen.add(module)
    network = type(module) in NETWORKS and _has_blocks(module, changes)
    layer = AROUND.get(type(module)) if inside else None
    if layer is not None and not _why_not(module, layer):
        _change(name, module, layer, report, changes)
        return
    for child_name, child in module.named_children():
        pool = NETWORK_POOLS.get(type(child)) if network else None
        inner = f"{name}.{child_name}" if name else child_name
        if pool is not None and child not in seen and not _why_not(child, pool):
            seen.add(child)
            _change(inner, child, pool, report, changes)
        else:
            _surround(inner, child, inside or network, report, changes, seen)


def _synchronise(model: nn.Module, report: ReplacementReport, changes: list[tuple[nn.Module, type[nn.Module]]]) -> None:
    """Plan the changes to normalisations that share their statistics, but for those that blocks and our layers run."""
    owners = {module for module, layer in changes if layer.kind == "block"}
    for module in model.modules():
        if type(module).__module__ == layers.__name__ or (isinstance(module, FusedLayer) and module.kind == "block"):
            owners.add(module)
    inside = {part for owner in owners for part in owner.modules()}
    for name, module in model.named_modules():
        layer = SYNC_NORMS.get(type(module))
        if layer is not None and module not in inside and "forward" not in module.__dict__:
            _change(name, module, layer, report, changes)


def _change(
    name: str,
    module: nn.Module,
    layer: type[FusedLayer],
    report: ReplacementReport,
    changes: list[tuple[nn.Module, type[nn.Module]]],
) -> None:
    report.around[name] = layer.kind
    changes.append((module, layer))


def _is_block(module: nn.Module) -> bool:
    return type(module) in UNSUPPORTED or likely_kind(module) != ""


def _has_blocks(network: nn.Module, changes: list[tuple[nn.Module, type[nn.Module]]]) -> bool:
    fused = {module for module, layer in changes if layer.kind == "block"}
    blocks = (isinstance(module, FusedLayer) and module.kind == "block" for module in network.modules())
    return any(blocks) or any(module in fused for module in network.modules())


def _closed(module: nn.Module) -> bool:
    """Whether what is inside a module must be left alone."""
    return isinstance(module, (FusedLayer, torch.jit.ScriptModule, torch.fx.GraphModule)) or own_kind(module) != ""


def own_kind(module: nn.Module) -> str:
    """The kind of a layer of `effnet_ops.layers`, "" for anything else."""
    return _OWN.get(type(module).__name__, "") if type(module).__module__ == "effnet_ops.layers" else ""


def classify(module: nn.Module) -> tuple[str, type[FusedLayer] | str] | None:
    """A module's kind with its replacement class or the reason to skip it; None if it is none of our business."""
    if isinstance(module, (torch.jit.ScriptModule, torch.fx.GraphModule)):
        return "other", "its code is compiled (TorchScript or torch.fx): replace the layers before that"
    if isinstance(module, AroundLayer):
        return None
    if isinstance(module, FusedLayer):
        return module.kind, _fused_already(module)
    if kind := own_kind(module):
        return kind, f"it is fused already: effnet_ops.layers.{type(module).__name__}"
    adapter_error = load_adapters(type(module))
    if type(module) in UNSUPPORTED:
        return "other", UNSUPPORTED[type(module)]
    layer = next((LAYERS[base] for base in type(module).__mro__ if base in LAYERS), None)
    if layer is not None and layer.concerns(module):
        if known(LAYERS, module) is layer and stock_class(module) is not layer.stock:
            layer = fused_class(layer, stock_class(module))
        return layer.kind, _why_not(module, layer) or layer
    return _recognised(module) or (("other", adapter_error) if adapter_error else None)


def _fused_already(module: FusedLayer) -> str:
    """What the report says of a layer of an earlier `replace_layers`, in which something may have changed since."""
    try:
        describe_now(module)
    except NotFusable as reason:
        return f"it was fused by an earlier replace_layers, and runs its stock forward now: {reason}"
    return "it is fused already, by an earlier replace_layers"


def _recognised(module: nn.Module) -> tuple[str, type[FusedLayer] | str] | None:
    """`classify` for what has to be traced."""
    kind = likely_kind(module)
    if not kind or isinstance(module, Folded):
        return None
    errors = [load_adapters(cls) for cls in {type(inner) for inner in module.modules()}]
    stock, form = stock_class(module), None
    try:
        check_inside(stock, module)
        form = form_of(module)
    except NotFusable as error:
        reason = str(error)
    else:
        layer = fused_class(FusedBlock if kind == "block" else FusedSqueezeExcite, stock, form)
        reason = _why_not(module, layer)
        if not reason:
            return None if kind == "block" and has_more(module) else (kind, layer)
    matched = form is not None and not form.reason and kind == form.kind
    if matched or (looks_like_block(module) if kind == "block" else _SQUEEZES.search(stock.__name__)):
        return kind, "; ".join(filter(None, (reason, *errors)))
    return None


def _why_not(module: nn.Module, layer: type[FusedLayer]) -> str:
    """Why ``module`` cannot become a ``layer``, or "" if it can."""
    if "parametrizations" in module._modules:
        return "its parameters are parametrized"
    if stock_class(module) is not layer.stock:
        return f"{type(module).__name__} is a subclass of {layer.stock.__name__}, and its forward may differ"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if getattr(module, "qconfig", None) is not None:
        return "it is prepared for quantization"
    for name in ("__getstate__", "__setstate__", "__reduce__", "__reduce_ex__", "__copy__", "__deepcopy__"):
        owner = next((cls for cls in stock_class(module).__mro__ if name in vars(cls)), object)
        if owner.__module__.partition(".")[0] not in ("torch", "builtins"):
            return f"{owner.__name__} has a {name} of its own"
    try:
        describe(layer, module)
    except NotFusable as reason:
        return str(reason)
    return ""


@functools.cache
def _libraries() -> set[str]:
    return {file.name for file in pkgutil.iter_modules(adapters.__path__)}


def load_adapters(cls: type) -> str:
    """Load the adapter of the library that a class or one of its bases comes from; the reason if that fails, or ""."""
    for library in {base.__module__.partition(".")[0] for base in cls.__mro__} & _libraries():
        try:
            importlib.import_module(f"{adapters.__name__}.{library}")
        except (ImportError, AttributeError) as error:
            return f"this version of {library} is not supported: {error}"
    return ""


def _apply(changes: list[tuple[nn.Module, type[nn.Module]]]) -> None:
    """Change every class, or none if one of them cannot be changed."""
    done: list[nn.Module] = []
    try:
        for module, fused in changes:
            module.__class__ = fused
            done.append(module)
    except BaseException:
        for module in done:
            module.__class__ = module.stock
        raise
