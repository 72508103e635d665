"""optimize_for_inference: a copy of a model whose batch normalisations are folded into its convolutions.

What follows what is known from the structure of classes: MBConv blocks through the adapters' plans, `CHAINS` and
`SEQUENCES`. Nothing is traced, so control flow in a model's forward stays. What is not known is left as it is.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from effnet_ops import layers
from effnet_ops.checks import FLOAT_DTYPES
from effnet_ops.models import efficientnet
from effnet_ops.params import BatchNormParams, ConvNormParams
from effnet_ops.surgery.folded import (
    POOLS,
    Folded,
    FoldedConvolution,
    FoldedLinear,
    FoldedMBConv,
    FoldedNorm,
    FoldedPointwise,
    FoldedSequence,
    fold,
)
from effnet_ops.surgery.fused import (
    ACTIVATIONS,
    CHAINS,
    CONVOLUTIONS,
    NORMS,
    SEQUENCES,
    BlockPlan,
    FusedLayer,
    Part,
    Unfit,
    check_pointwise,
    check_untouched,
    conv_norm_params,
    convolution_padding,
    describe,
)
from effnet_ops.surgery.replace import (
    ReplacementReport,
    check_module,
    classify,
    own_kind,
    reason_lines,
    replace_layers,
    restore_layers,
)

_OWN_CHAINS = {
    layers.ConvNormAct: (("conv", "bn1"),),
    efficientnet.EfficientNet: (("conv_stem", "bn1"), ("conv_head", "bn2")),
    efficientnet.EfficientNetFeatures: (("conv_stem", "bn1"),),
}
_OWN_CONVOLUTIONS = (layers.PaddedConv2d, layers.DepthwiseConv2d)
_HALF = (torch.bfloat16, torch.float16)
_FEW_CHANNELS, _TALLEST = 16, 16
"""Dense convolutions up to this many channels and filter rows, such as a network's first, have a packed form."""
_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)


@dataclass
class OptimizationReport:
    """What `optimize_for_inference` did, by the modules' qualified names in the given model.

    Attributes:
        blocks: the MBConv blocks that became one call without normalisations.
        folded: each normalisation that was folded, with the convolution it went into; those of blocks, too.
        left: the normalisations and blocks that are as they were, with the reason.
        replaced: what `replace_layers` did to the depthwise and squeeze-and-excitation layers outside these blocks.
    """

    blocks: list[str] = field(default_factory=list)
    folded: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    replaced: ReplacementReport = field(default_factory=ReplacementReport)

    def __str__(self) -> str:
        done = f"{len(self.folded)} batch normalisations folded, {len(self.blocks)} MBConv blocks fused"
        lines = [done, *reason_lines("left", self.left)]
        if self.replaced.replaced:
            lines.append(f"  outside these blocks: {str(self.replaced).splitlines()[0]}")
        return "\n".join(lines)


def optimize_for_inference(model: nn.Module, *, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of ``model`` for inference: batch normalisations folded into convolutions, MBConv blocks in one call.

    Knows the EfficientNets of timm, torchvision, efficientnet_pytorch, geffnet and `effnet_ops.create_model`, their
    relatives, and in any other model convolutions followed by a normalisation in an ``nn.Sequential``. The given model
    is not touched. The copy is in evaluation mode, its parameters need no gradient (its input may), and its forward
    takes and returns what the model's does. Modules with hooks on a folded part keep their stock form. It pickles,
    copies, moves and compiles; its state dict is its own. ``train()`` raises a RuntimeError once something is folded.

    Args:
        model: any module; the copy takes the running statistics and weights that it has now.
        dtype: of the activations: float32, float64, bfloat16, float16, or None for the model's own. For half precision,
            the parameters of fused layers are kept in float32, except that products in bfloat16 have weights in
            bfloat16. The input of any floating dtype is cast, and outputs
            (tensors in tuples, lists and dictionaries too) come back in the dtype of the first tensor given.
            Layers that are put into the copy later, such as another classifier, keep their own dtype.
            Other methods than the call itself, such as timm's ``forward_features``, return ``dtype``. On the CPU,
            autocast does not change the precision of the folded layers.

    Returns:
        The copy, or what replaces it where the model is itself an MBConv block; its ``optimization_report``
        (`OptimizationReport`, printable) says what was done and what was left.

    Raises:
        TypeError: ``model`` is not a torch.nn.Module, or ``dtype`` is not a torch.dtype.
        ValueError: ``dtype`` is another one, or ``model`` is compiled TorchScript, which cannot be changed.
    """
    check_module(model)
    _check_dtype(dtype)
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(f"{type(model).__name__} is compiled TorchScript: optimize the model before torch.jit.script")
    model = copy.deepcopy(model).eval()
    restore_layers(model)
    folding = _Folding(model, torch.float32 if dtype in _HALF else dtype)
    model = folding.visit("", model)
    report = folding.report
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            report.left.setdefault(name, f"{type(module).__name__} does not follow a known convolution")
    if report.blocks:
        _convert_head(model)
        for module in model.modules():
            FoldedSequence.convert(module)
    report.replaced = replace_layers(model)
    model.requires_grad_(False)
    if dtype is not None:
        _convert(model, dtype, folding.kept)
    model.optimization_report = report
    return model


def _convert_head(model: nn.Module) -> None:
    """Convert the pool and the linear layers behind folded blocks, except where one does more than its class says."""
    for name, module in model.named_modules():
        linear = type(module) is nn.Linear and module.weight.dtype in FLOAT_DTYPES
        pool = POOLS.get(type(module))
        if not linear and (pool is None or not pool.averages(module)):
            continue
        try:
            for inner_name, inner in module.named_modules():
                check_untouched(_join(name, inner_name), inner)
        except Unfit:
            continue
        if linear:
            FoldedLinear.convert(module)
        else:
            module.__class__ = pool


def _check_dtype(dtype: object) -> None:
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype or None, got {dtype!r}")
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype must be float32, float64, bfloat16 or float16, got {dtype}")


class _Chain(NamedTuple):
    """A convolution and the normalisation on its result; ``activation`` is the module on that, if it is a child."""

    conv: Part
    norm: Part
    activation: Part | None


class _Folding:
    """Folds the normalisations of one model, in place, and keeps the report."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        self.report = OptimizationReport()
        self.kept: set[nn.Module] = set()
        """Convolutions that our own modules run as fused operators: these take float32 parameters."""
        self._dtype = dtype
        self._uses = Counter(module for _, module in model.named_modules(remove_duplicate=False))
        self._visited: dict[nn.Module, nn.Module] = {}

    def visit(self, name: str, module: nn.Module) -> nn.Module:
        """Fold what is in ``module``; return it or what replaces it."""
        if module in self._visited:
            return self._visited[module]
        self._visited[module] = module
        found = classify(module)
        if isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule):
            self.report.left[name] = found[1]
            return module
        if found is not None and found[0] == "block":
            try:
                self._visited[module] = self._block(name, module, found[1])
                return self._visited[module]
            except Unfit as reason:
                self.report.left[name] = str(reason)
        if own_kind(module):
            return module
        self._fold_chains(name, module)
        for child_name, child in module.named_children():
            module._modules[child_name] = self.visit(_join(name, child_name), child)
        return module

    def _block(self, name: str, block: nn.Module, layer: type[FusedLayer] | str) -> nn.Module:
        own = own_kind(block) == "block"
        if isinstance(layer, str) and not own:
            raise Unfit(layer)
        parts, folded = self._own_block(block) if own else self._planned_block(block, layer)
        folded.__dict__.update({hooks: block.__dict__[hooks] for hooks in _HOOKS if hooks in block.__dict__})
        names = {module: inner for inner, module in block.named_modules()}
        self.report.blocks.append(name)
        self.report.folded.update({_join(name, names[norm]): _join(name, names[conv]) for conv, norm in parts})
        return folded.eval()

    def _planned_block(self, block: nn.Module, layer: type[FusedLayer]) -> tuple[list, FoldedMBConv]:
        plan: BlockPlan = describe(layer, block)
        stages = [plan.expand, plan.depthwise, plan.project]
        for _, norm in filter(None, stages):
            _check_statistics(norm)
        expand, depthwise, project = (stage and self._fold(conv_norm_params(*stage)) for stage in stages)
        squeeze_excite = plan.squeeze_excite
        folded = (layer.folded or FoldedMBConv)(
            expand,
            depthwise,
            squeeze_excite and squeeze_excite.params(),
            project,
            stride=plan.stride,
            padding=plan.padding,
            activation=plan.activation,
            gate=squeeze_excite.gate if squeeze_excite else "sigmoid",
            residual=plan.residual,
            after=plan.after,
        )
        return list(filter(None, stages)), folded

    def _own_block(self, block: layers.MBConv) -> tuple[list, FoldedMBConv]:
        groups = block._groups()
        stages = list(filter(None, block._conv_norms()))
        if groups is None or any(type(norm) is not nn.BatchNorm2d for _, norm in stages):
            raise Unfit("a part of it is not the plain module that it was built with")
        for _, norm in stages:
            _check_statistics(norm)
        expand, depthwise, squeeze_excite, project, conv, _ = groups
        folded = FoldedMBConv(
            expand and self._fold(expand),
            self._fold(depthwise),
            squeeze_excite,
            self._fold(project),
            stride=conv.stride,
            padding=conv.padding,
            activation=block.activation,
            gate=block.gate,
            residual=block.residual,
        )
        return stages, folded

    def _fold(self, params: ConvNormParams) -> ConvNormParams:
        return fold(params, self._dtype)

    def _fold_chains(self, name: str, owner: nn.Module) -> None:
        """Fold the convolutions that ``owner`` calls itself."""
        if "forward" in owner.__dict__:
            return
        own, chains, fit = type(owner) in _OWN_CHAINS, _chains(owner), []
        for chain in chains:
            try:
                self._check(chain)
                fit.append(chain)
            except Unfit as reason:
                self.report.left[_join(name, chain.norm.name)] = str(reason)
        # An activation moves into the folded layers where all that it follows are folded and one can compute it.
        moved = {chain.activation.module for chain in fit if _conversion(chain.conv) and self._movable(chain)}
        moved -= {chain.activation.module for chain in chains if chain.activation and chain not in fit}
        for chain in fit:
            self._fold_chain(owner, chain, moved, own)
            self.report.folded[_join(name, chain.norm.name)] = _join(name, chain.conv.name)
        for chain in fit:
            if chain.activation is not None and chain.activation.module in moved:
                owner._modules[chain.activation.name] = nn.Identity()

    def _movable(self, chain: _Chain) -> bool:
        if chain.activation is None or type(chain.activation.module) not in ACTIVATIONS:
            return False
        try:
            check_untouched(*chain.activation)
        except Unfit:
            return False
        return self._uses[chain.activation.module] == 1

    def _check(self, chain: _Chain) -> None:
        """Raise `Unfit` unless calling the convolution and the normalisation does what their classes say."""
        conv, norm = chain.conv.module, chain.norm.module
        if type(norm) not in NORMS:
            raise Unfit(f"{chain.norm.name} is {type(norm).__name__}, not a BatchNorm2d that is folded")
        if type(conv) not in CONVOLUTIONS and type(conv) not in _OWN_CONVOLUTIONS:
            raise Unfit(f"{chain.conv.name} is {type(conv).__name__}, a convolution that is not folded")
        if getattr(conv, "activation", "none") != "none":
            raise Unfit(f"{chain.conv.name} has an activation before {chain.norm.name}")
        for part in (chain.conv, chain.norm):
            for inner, module in part.module.named_modules():
                check_untouched(_join(part.name, inner), module)
            if self._uses[part.module] != 1:
                raise Unfit(f"{part.name} is used in several places")
        _check_statistics(norm)
        if norm.num_features != conv.out_channels or conv.weight.dtype not in FLOAT_DTYPES:
            raise Unfit(f"{chain.norm.name} has {norm.num_features} features for {conv.out_channels} channels")

    def _fold_chain(self, owner: nn.Module, chain: _Chain, moved: set[nn.Module], own: bool) -> None:
        conv, norm = chain.conv.module, chain.norm.module
        statistics = BatchNormParams(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)
        _, conv.bias, _ = folded = self._fold(ConvNormParams(conv.weight, conv.bias, statistics))
        conv.weight = folded.weight
        behind = [part.module for part in NORMS[type(norm)](norm)]
        if chain.activation is not None and chain.activation.module in moved:
            behind.append(chain.activation.module)
        behind = [module for module in behind if type(module) is not nn.Identity]
        rest = FoldedNorm(*behind)
        if own and _is_pointwise(chain.conv):
            # `layers.conv_norm_act` fuses exactly these two.
            self.kept.add(conv)
            rest = nn.Identity()
        elif (convert := _conversion(chain.conv)) is not None:
            fits = len(behind) == 1 and type(behind[0]) in ACTIVATIONS
            convert(ACTIVATIONS[type(behind[0])] if fits else "none")
            rest = FoldedNorm() if fits else rest
        owner._modules[chain.norm.name] = rest.eval()


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name and child else name or child


def _chains(owner: nn.Module) -> list[_Chain]:
    """The convolutions with a normalisation behind that ``owner``'s forward calls directly."""
    parts = {name: Part(name, child) for name, child in owner._modules.items() if child is not None}
    names = CHAINS.get(type(owner), ()) or _OWN_CHAINS.get(type(owner), ())
    if type(owner) in SEQUENCES:
        listed = list(parts)
        triples = (tuple(listed[i : i + 3]) for i in range(len(listed) - 1))
        names = [triple for triple in triples if isinstance(parts[triple[0]].module, nn.Conv2d)]
    chains = []
    for conv, norm, *activation in names:
        if conv in parts and norm in parts and isinstance(parts[norm].module, _BatchNorm):
            chains.append(_Chain(parts[conv], parts[norm], parts.get(activation[0]) if activation else None))
    return chains


def _is_pointwise(part: Part) -> bool:
    try:
        return type(part.module) is nn.Conv2d and check_pointwise(part) is part.module
    except Unfit:
        return False


def _conversion(part: Part) -> Callable[[str], None] | None:
    """What makes a convolution, folded already, a packed one with the activation of the given name; None: it stays."""
    conv = part.module
    if _is_pointwise(part):
        return partial(FoldedPointwise.convert, conv)
    try:
        padding = convolution_padding(part)
    except Unfit:
        return None
    dense = conv.groups == 1 and tuple(conv.dilation) == (1, 1) and conv.kernel_size[0] <= _TALLEST
    return partial(FoldedConvolution.convert, conv, padding) if dense and conv.in_channels <= _FEW_CHANNELS else None


def _check_statistics(norm: nn.BatchNorm2d) -> None:
    if norm.running_mean is None or norm.running_var is None:
        raise Unfit("it has no running statistics: it normalises by the batch's in evaluation, too")


def _convert(model: nn.Module, dtype: torch.dtype, kept: set[nn.Module]) -> None:
    """Let ``model`` compute in ``dtype``; what can have float32 parameters beside half-precision activations does."""
    wide = torch.float32 if dtype in _HALF else dtype
    inside_fused: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, FusedLayer) or own_kind(module):
            inside_fused.update(inner for inner in module.modules() if inner is not module)
        exempt = isinstance(module, Folded | _BatchNorm) or module in kept
        target = wide if exempt else dtype
        module._apply(lambda t, to=target: t.to(to) if t.is_floating_point() else t, recurse=False)
        if isinstance(module, Folded) and module.__dict__.get("depths"):
            module.set_activations(dtype)
        elif not exempt and module not in inside_fused and _needs_cast(module):
            module.register_forward_pre_hook(_cast_input)
    if _cast_output not in model._forward_hooks.values():
        model.register_forward_hook(_cast_output, with_kwargs=True)


def _needs_cast(module: nn.Module) -> bool:
    """Whether an input must be cast for this layer: at the layer, so that all methods of the model can be called."""
    return module._parameters.get("weight") is not None and _cast_input not in module._forward_pre_hooks.values()


def _cast_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return _cast(args, module.weight.dtype)


def _cast_output(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return _cast(output, value.dtype)
    return output


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in ``value``, a nest of tuples, lists and dictionaries, in ``dtype``."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)([_cast(item, dtype) for item in value])
    if isinstance(value, dict):
        return type(value)((key, _cast(item, dtype)) for key, item in value.items())
    return value
