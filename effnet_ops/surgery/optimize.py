"""optimize_for_inference: a copy of a model that runs its batch normalisations inside its convolutions.

What follows what is known from the structure of classes: MBConv blocks through the adapters' plans, `CHAINS` and
`SEQUENCES`. Nothing is traced, so control flow in a model's forward stays. What is not known is left as it is.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from effnet_ops.checks import FLOAT_DTYPES
from effnet_ops.cuda_graphs import CUDAGraphs
from effnet_ops.surgery.around import NETWORKS
from effnet_ops.surgery.casting import CastInput, CastOutput, cast_input, own_dtype
from effnet_ops.surgery.folded import (
    OWN_CHAINS,
    POOLS,
    Chain,
    Folded,
    FoldedConvolution,
    FoldedLinear,
    FoldedMBConv,
    FoldedOwner,
    FoldedOwnOwner,
    FoldedPart,
    FoldedSequence,
    block_stages,
    chains_of,
    check_chain,
    check_methods,
    convert,
    has_runs,
    train_or_refuse,
    unfold,
)
from effnet_ops.surgery.fused import ACTIVATIONS, CHAINS, SEQUENCES, FusedLayer, NotFusable, stock_class
from effnet_ops.surgery.replace import (
    ReplacementReport,
    check_module,
    classify,
    own_kind,
    reason_lines,
    replace_layers,
    restore_layers,
)

_HALF = (torch.bfloat16, torch.float16)


@dataclass
class OptimizationReport:
    """What `optimize_for_inference` did, by the modules' qualified names in the given model.

    Attributes:
        blocks: the MBConv blocks that are one call without normalisations.
        folded: each normalisation that a convolution runs, with that convolution; those of blocks, too.
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


def optimize_for_inference(
    model: nn.Module, *, dtype: torch.dtype | None = None, cuda_graph: bool = False
) -> nn.Module:
    """A copy of ``model`` for inference: batch normalisations run inside convolutions, MBConv blocks as one call.

    Knows the EfficientNets of timm, torchvision, efficientnet_pytorch, geffnet and `effnet_ops.create_model`, their
    relatives, and in any other model convolutions followed by a normalisation in an ``nn.Sequential``. The given model
    is not touched. The copy is in evaluation mode, its parameters need no gradient (its input may), and its forward
    takes and returns what the model's does, in the model's layout.

    The copy has every module, parameter, buffer and attribute of the model under its name, and the model's state dict
    fits it. What is folded and packed lies beside the weights and is made at the first call, and again after a change
    of weights, settings or modules. It is used where a block, a network or a sequence of the copy calls its own parts.
    Somebody else who calls a part, slices a sequence or hooks a layer, before or after, gets what the model gives;
    a layer runs its stock form while somebody hooks it. So do function transforms, tracing and gradients of weights.
    It pickles, copies, moves and compiles. ``train()`` raises a RuntimeError, before it changes anything, once
    something is folded. docs/copies.md has a table of all this.

    Args:
        model: any module; of a DistributedDataParallel, its module. The copy takes the statistics and weights of now.
        dtype: of the activations: float32, float64, bfloat16, float16, or None for the model's own. For half precision,
            the parameters of folded layers stay in float32. The first floating tensor of the input is cast where it
            meets a layer, the others at once, and outputs come back in the dtype of the first one, or in the model's
            where none is given, such as for integer images: in mappings, lists, tuples and dataclasses, too. Layers
            of PyTorch and parameters take ``dtype``. Buffers of other modules keep their precision, and so does a
            module without children that computes with such buffers or with integers.
            Layers that are put into the copy later, such as another classifier, keep their own dtype.
            Other methods than the call itself, such as timm's ``forward_features``, return ``dtype``. On the CPU,
            autocast does not change the precision of the folded layers.
        cuda_graph: give the copy inside `effnet_ops.CUDAGraphs`, as its ``module``: on a GPU, a call replays the
            launches of the first call on such images.

    Returns:
        The copy; its ``optimization_report`` (`OptimizationReport`, printable) says what was done and what was left.

    Raises:
        TypeError: ``model`` is not a torch.nn.Module, or ``dtype`` is not a torch.dtype.
        ValueError: ``dtype`` is another one, or ``model`` is compiled TorchScript, which cannot be changed.
    """
    check_module(model)
    _check_dtype(dtype)
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(f"{type(model).__name__} is compiled TorchScript: optimize the model before torch.jit.script")
    # An inference tensor has no version, by which a change of weights is noticed.
    with torch.inference_mode(False):
        optimized = _optimize(_copy(model), dtype)
    if not cuda_graph:
        return optimized
    graphs = CUDAGraphs(optimized)
    graphs.optimization_report = optimized.optimization_report
    return graphs


def _copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode with the stock classes."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    # Pruned and weight-normed layers keep a result as an attribute, which deepcopy refuses to copy.
    results = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
    model = copy.deepcopy(model, {id(value): value.detach().clone() for value in results if not value.is_leaf})
    # What train() gives back is the model's own business.
    model.eval()
    restore_layers(model)
    unfold(model)
    return model


def _optimize(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    given = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    folding = _Folding(model)
    folding.visit("", model)
    report = folding.report
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and name not in report.folded:
            report.left.setdefault(name, f"{type(module).__name__} does not follow a known convolution")
    folding.apply()
    if report.blocks:
        _convert_head(model)
    report.replaced = replace_layers(model)
    model.requires_grad_(False)
    if dtype is not None:
        _convert(model, dtype, given)
    _refuse_training(model)
    model.optimization_report = report
    return model


def _convert_head(model: nn.Module) -> None:
    """Convert the pool and the linear layers behind folded blocks, except where one does more than its class says."""
    closed = [module for module in model.modules() if isinstance(module, Folded) and module.closed]
    inside = {inner for module in closed for inner in module.modules()}
    for module in model.modules():
        if module in inside:
            continue
        linear, pool = type(module) is nn.Linear, POOLS.get(type(module))
        if "forward" in module.__dict__ or "parametrizations" in module._modules:
            continue
        if linear and module.weight.dtype in FLOAT_DTYPES:
            convert(module, FoldedLinear)
        elif pool is not None and pool.averages(module):
            convert(module, pool)


def _refuse_training(model: nn.Module) -> None:
    """Let ``train()`` fail before it has changed anything, on every module that has folded ones inside."""
    for module in model.modules():
        inside = any(isinstance(inner, Folded) for inner in module.modules())
        if inside and not isinstance(module, Folded):
            module.train = functools.partial(train_or_refuse, module)


def _check_dtype(dtype: object) -> None:
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype or None, got {dtype!r}")
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype must be float32, float64, bfloat16 or float16, got {dtype}")


class _Folding:
    """Finds what can be folded in one model, keeps the report, and changes the classes."""

    def __init__(self, model: nn.Module) -> None:
        self.report = OptimizationReport()
        self._model = model
        self._uses = Counter(module for _, module in model.named_modules(remove_duplicate=False))
        self._seen: set[nn.Module] = set()
        self._classes: dict[nn.Module, type[Folded]] = {}

    def apply(self) -> None:
        for module, mixin in self._classes.items():
            convert(module, mixin)
        for module in self._model.modules():
            if type(module) is nn.Sequential and has_runs(module):
                convert(module, FoldedSequence)

    def visit(self, name: str, module: nn.Module) -> None:
        """Find what can be folded in ``module``."""
        if module in self._seen:
            return
        self._seen.add(module)
        found = classify(module)
        if isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule):
            self.report.left[name] = found[1]
            return
        if found is not None and found[0] == "block":
            try:
                self._block(name, module, found[1])
                return
            except NotFusable as reason:
                self.report.left[name] = str(reason)
        if own_kind(module):
            return
        self._chains(name, module)
        for child_name, child in module.named_children():
            self.visit(_join(name, child_name), child)

    def _block(self, name: str, block: nn.Module, layer: Any) -> None:
        own = own_kind(block) == "block"
        if isinstance(layer, str) and not own:
            raise NotFusable(layer)
        if "forward" in block.__dict__:
            raise NotFusable("its forward was replaced on the instance")
        names = {module: inner for inner, module in block.named_modules()}
        for conv, norm in block_stages(block):
            self.report.folded[_join(name, names[norm])] = _join(name, names[conv])
        self.report.blocks.append(name)
        self._classes[block] = FoldedMBConv

    def _chains(self, name: str, owner: nn.Module) -> None:
        """Find the convolutions that ``owner`` calls itself."""
        kind = self._kind(owner)
        if kind is None or "forward" in owner.__dict__:
            return
        found = False
        for chain in chains_of(owner):
            try:
                check_methods(type(owner))
                check_chain(chain)
                self._check_uses(chain)
            except NotFusable as reason:
                self.report.left[_join(name, chain.norm.name)] = str(reason)
                continue
            found = True
            self._classes[chain.conv.module], self._classes[chain.norm.module] = FoldedConvolution, FoldedPart
            if kind is FoldedOwner and chain.activation is not None and type(chain.activation.module) in ACTIVATIONS:
                self._classes[chain.activation.module] = FoldedPart
            self.report.folded[_join(name, chain.norm.name)] = _join(name, chain.conv.name)
        if found or type(owner) in NETWORKS or (kind is FoldedOwnOwner):
            self._classes[owner] = kind

    def _kind(self, owner: nn.Module) -> type[Folded] | None:
        if type(owner) in SEQUENCES:
            return FoldedSequence
        if type(owner) in OWN_CHAINS:
            return FoldedOwnOwner
        return FoldedOwner if type(owner) in CHAINS or type(owner) in NETWORKS else None

    def _check_uses(self, chain: Chain) -> None:
        for part in (chain.conv, chain.norm):
            if self._uses[part.module] != 1:
                raise NotFusable(f"{part.name} is used in several places")


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name and child else name or child


def _convert(model: nn.Module, dtype: torch.dtype, given: torch.dtype | None) -> None:
    """Let ``model`` compute in ``dtype``: layers take it, and get their input in it.

    Folded layers and normalisations have their parameters in float32 beside half precision. What is no layer keeps
    what ``dtype`` cannot hold exactly: a mean, a grid, a table of positions.
    """
    wide = torch.float32 if dtype in _HALF else dtype
    precise, inside = set(), set()
    for module in model.modules():
        if isinstance(module, Folded) and module.closed:
            precise.update(module.modules())
        elif isinstance(module, FusedLayer) or own_kind(module):
            inside.update(inner for inner in module.modules() if inner is not module)
    precise -= {module for module in precise if isinstance(module, FoldedLinear)}
    for module in model.modules():
        if module in precise or isinstance(module, _BatchNorm):
            _convert_tensors(module, wide, exactly=False)
            norm = isinstance(module, FoldedPart) and isinstance(module, _BatchNorm)
            if norm or isinstance(module, FoldedMBConv | FoldedConvolution):
                module.set_activations(dtype)
            continue
        if not _is_island(module):
            _convert_tensors(module, dtype, exactly=not _is_layer(module))
        if module not in inside and _computes(module) and cast_input not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(cast_input, with_kwargs=True)
    _cast_calls(model, given)


def _computes(module: nn.Module) -> bool:
    """Whether a module's input meets tensors of its own; a container may only keep buffers for somebody."""
    if isinstance(module, FusedLayer) or own_kind(module):
        return any(map(_floats, module.parameters()))
    leaf = not module._modules or "parametrizations" in module._modules
    return own_dtype(module) is not None and (leaf or any(map(_floats, module._parameters.values())))


def _floats(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.is_floating_point()


def _is_layer(module: nn.Module) -> bool:
    """Whether it is a layer of PyTorch, whose buffers are weights, such as masks, too."""
    return stock_class(module).__module__.startswith("torch.nn.")


def _is_island(module: nn.Module) -> bool:
    """Whether a module computes with constants in a precision that they have for a reason, and nothing is inside it."""
    buffers = [buffer for name, buffer in module._buffers.items() if name != "num_batches_tracked"]
    odd = any(map(_floats, buffers)) or any(t is not None and not _floats(t) for t in module._parameters.values())
    numbers = any(t is not None and not _floats(t) and t.dtype is not torch.bool for t in buffers)
    return not _is_layer(module) and not module._modules and (odd or numbers)


def _convert_tensors(module: nn.Module, dtype: torch.dtype, exactly: bool) -> None:
    """Convert the module's own tensors, and where ``exactly``, of the buffers those that keep their values."""
    kept = {name: b for name, b in module._buffers.items() if exactly and b is not None and _loses(b, dtype)}
    module._apply(lambda t: t.to(dtype) if t.is_floating_point() else t, recurse=False)
    module._buffers.update(kept)


def _loses(tensor: Tensor, dtype: torch.dtype) -> bool:
    return torch.promote_types(tensor.dtype, dtype) is not dtype


def _cast_calls(model: nn.Module, given: torch.dtype | None) -> None:
    """Cast what goes into the model and what comes out."""
    for hooks in (model._forward_hooks, model._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(hook, CastInput | CastOutput)]:
            del hooks[key]
    output = CastOutput(given)
    like = next((module for module in model.modules() if _is_converted(module)), None)
    # Before the hook of a model with parameters of its own, which casts the first tensor, too.
    model.register_forward_pre_hook(CastInput(output, like), with_kwargs=True, prepend=True)
    model.register_forward_hook(output, with_kwargs=True)


def _is_converted(module: nn.Module) -> bool:
    folded = isinstance(module, FoldedMBConv | FoldedConvolution)
    return folded or (cast_input in module._forward_pre_hooks.values() and not _is_island(module))
