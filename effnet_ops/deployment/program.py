"""A model as a program of torch.export, with everything computed beforehand that does not depend on the image."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.export import Dim, ExportedProgram

from effnet_ops.checks import unknown_name
from effnet_ops.ops._library import NAMESPACE, OPERATORS

AXES = {"batch": 0, "height": 2, "width": 3}
"""The axes of the images that may be open, by name."""

DynamicShapes = tuple[dict[int, Any] | None]


def decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """Each of this package's operators as PyTorch's own ones, for ``ExportedProgram.run_decompositions``.

    Those of training and of gradients are not among them: export the model in evaluation, under ``torch.no_grad()``.
    """
    found = (operator for operator in OPERATORS.values() if hasattr(operator.signature.call, "standard"))
    return {operator.overload: operator.decompose for operator in found}


def export_program(
    model: nn.Module, example: Tensor, *, dynamic: Iterable[str] = ("batch",), decompose: bool = False
) -> ExportedProgram:
    """``model`` as a program of ``torch.export``, for `torch.export.save`.

    What depends on parameters alone, such as the packed weights of an optimized copy, is computed here, once. Unlike
    ``torch.export.export`` itself, the program never trains: it is the model in evaluation without gradients.

    Args:
        model: in evaluation mode; a stock, replaced, optimized or own one. It is not changed.
        example: images (N, C, H, W), whose sizes are fixed but for the ``dynamic`` ones. Values do not matter.
        dynamic: the axes of any size: "batch", "height", "width".
        decompose: leave PyTorch's own operators alone, so that the program runs without this package.

    Raises:
        ValueError: the model is in training mode, or an axis cannot be dynamic.
        TypeError: the example is no image.
    """
    axes = check_arguments(model, example, dynamic)
    return _export_folded(model, example, dynamic_shapes(axes), decompose)


def check_arguments(model: nn.Module, example: Tensor, dynamic: Iterable[str]) -> list[str]:
    """The dynamic axes by name, or an error that names the argument that does not fit."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(
                f"{name or 'the model'} ({type(module).__name__}) is in training mode: call model.eval() before export"
            )
    if not isinstance(example, Tensor) or example.dim() != 4 or not example.is_floating_point():
        kind = f"{example.dtype} {tuple(example.shape)}" if isinstance(example, Tensor) else type(example).__name__
        raise TypeError(f"example must be a batch of images (N, C, H, W), got {kind}")
    if 0 in example.shape:
        raise ValueError(f"example must have no empty axis, got shape {tuple(example.shape)}")
    axes = [dynamic] if isinstance(dynamic, str) else list(dynamic)
    for axis in axes:
        if axis == "channels":
            raise ValueError("channels cannot be dynamic: a convolution's weights are made for one number of channels")
        if axis not in AXES:
            raise unknown_name("dynamic axis", axis, AXES)
    return axes


def dynamic_shapes(axes: Iterable[str]) -> DynamicShapes:
    """The argument of that name of ``torch.export.export``.

    Of heights and widths PyTorch finds out itself how small they may be: the last layers have to see several pixels.
    """
    return ({AXES[axis]: Dim(axis, min=1) if axis == "batch" else Dim.DYNAMIC for axis in axes} or None,)


def _export_folded(model: nn.Module, example: Tensor, shapes: DynamicShapes, decompose: bool) -> ExportedProgram:
    if 0 in (shapes[0] or ()) and example.shape[0] == 1:
        # PyTorch takes the one image of an example for a constant.
        example = example.repeat(2, 1, 1, 1)
    with torch.no_grad():
        program = torch.export.export(model, (example,), dynamic_shapes=shapes)
        if decompose:
            program = program.run_decompositions(decompositions())
        return torch.export.export(fold_constants(program), (example,), dynamic_shapes=shapes)


def fold_constants(program: ExportedProgram) -> fx.GraphModule:
    """The program as a module, in which what is computed from parameters and buffers alone is a buffer."""
    module = program.module(check_guards=False)
    graph, values = module.graph, {}
    for node in graph.nodes:
        if node.op == "get_attr":
            values[node] = _attribute(module, node.target)
        elif node.op == "call_function" and _is_constant(node, values):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    for index, (node, value) in enumerate(values.items()):
        used = node.op != "get_attr" and any(user not in values for user in node.users)
        if used and isinstance(value, Tensor):
            module.register_buffer(name := f"_effnet_ops_constant_{index}", value.detach().clone())
            with graph.inserting_before(node):
                folded = graph.get_attr(name)
            folded.meta.update(node.meta)
            node.replace_all_uses_with(folded)
    for node in reversed(list(values)):
        # Some look as if they had an effect, such as the check of a constant's dtype.
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    _delete_unused_tensors(module)
    module.recompile()
    return module


def _delete_unused_tensors(module: fx.GraphModule) -> None:
    """Else a file would have the weights of a copy twice."""
    used = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    tensors = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    for name in [name for name, _ in tensors if name not in used]:
        owner, _, attribute = name.rpartition(".")
        delattr(module.get_submodule(owner), attribute)


def _attribute(module: nn.Module, target: str) -> Any:
    for name in target.split("."):
        module = getattr(module, name)
    return module


def _is_constant(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    """Whether the node is a function of constants, and of nothing else, such as a generator of random numbers."""
    inputs = node.all_input_nodes
    if not inputs or not all(each in values for each in inputs):
        return False
    tags, schema = getattr(node.target, "tags", ()), getattr(node.target, "_schema", None)
    return torch.Tag.nondeterministic_seeded not in tags and not (schema is not None and schema.is_mutable)


def own_operators(program: ExportedProgram) -> list[str]:
    """The names of this package's operators in the program, one for each call."""
    targets = (node.target for node in program.graph.nodes if node.op == "call_function")
    return [t._schema.name for t in targets if isinstance(t, OpOverload) and t.namespace == NAMESPACE]
