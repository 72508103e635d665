"""A model as an ONNX file of standard operators, in the form that ONNX Runtime and OpenVINO run best."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effnet_ops.deployment.program import AXES, check_arguments, export_program

OPSETS = range(18, 25)
_LARGEST = 2**31 - 1
"""Bytes of a file of Protocol Buffers."""


def export_onnx(
    model: nn.Module,
    example: Tensor,
    path: str | os.PathLike[str],
    *,
    dynamic: Iterable[str] = ("batch",),
    opset: int = 20,
) -> Path:
    """Write ``model`` as one ONNX file, with the input ``x`` and the output ``y`` (``y0``, ``y1`` ... of several).

    Normalisations are folded into convolutions. The average over an image is GlobalAveragePool and SiLU is Sigmoid and
    Mul, in every opset: ONNX Runtime runs those in the layout of its convolutions, and the two as one.

    Args:
        model: in evaluation mode; a stock, replaced, optimized or own one. It is not changed.
        example: images (N, C, H, W), whose sizes are fixed but for the ``dynamic`` ones. Values do not matter.
        path: of the file, which is there in whole or, where something fails, not at all.
        dynamic: the axes of any size: "batch", "height", "width".
        opset: the version of ONNX's operators, 18 to 24.

    Returns the path. Raises:
        ValueError: the model is in training mode, an axis cannot be dynamic, or the opset is another.
        TypeError: the example is no image.
        ImportError: onnx or onnxscript is not installed.
        RuntimeError: PyTorch's exporter has no ONNX operator for something in the model.
    """
    if isinstance(opset, bool) or not isinstance(opset, int) or opset not in OPSETS:
        raise ValueError(f"opset must be from {OPSETS[0]} to {OPSETS[-1]}, got {opset!r}")
    axes, path = check_arguments(model, example, dynamic), Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} for {path.name}")
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"export to ONNX needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    file = _as_onnx(model, example, axes, opset)
    if file.ByteSize() > _LARGEST:
        raise ValueError(f"the model has {file.ByteSize()} bytes, and an ONNX file at most {_LARGEST}")
    _write_whole(path, file.SerializeToString())
    return path


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file that nobody sees half written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _as_onnx(model: nn.Module, example: Tensor, axes: list[str], opset: int) -> Any:
    """The model as an ``onnx.ModelProto``."""
    program = export_program(model, example, dynamic=axes, decompose=True)
    outputs = len(program.graph_signature.user_outputs)
    names = ["y"] if outputs == 1 else [f"y{i}" for i in range(outputs)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            program, dynamo=True, opset_version=opset, input_names=["x"], output_names=names, verbose=False
        )
    file = exported.model_proto
    _name_axes(file, axes)
    return for_runtimes(file)


def _name_axes(file: Any, axes: list[str]) -> None:
    """Call the open sizes of the images by their names, wherever they appear."""
    (image,) = file.graph.input
    sizes = image.type.tensor_type.shape.dim
    names = {sizes[AXES[axis]].dim_param: axis for axis in axes}
    for value in (*file.graph.input, *file.graph.output, *file.graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param in names:
                size.dim_param = names[size.dim_param]


def for_runtimes(file: Any) -> Any:
    """The ONNX model with the average over an image and SiLU as runtimes run them best."""
    with_squeeze(file, "GlobalAveragePool")
    without_swish(file)
    used = {name for node in file.graph.node for name in node.input}
    for unused in [each for each in file.graph.initializer if each.name not in used]:
        file.graph.initializer.remove(unused)
    return file


def without_swish(file: Any) -> None:
    """Swish of opset 24 as Sigmoid and Mul, in place: ONNX Runtime 1.32 runs it as four operators, those two as one."""
    import onnx

    nodes = []
    for node in file.graph.node:
        if node.op_type == "Swish" and not node.attribute:
            gate = f"{node.output[0]}_gate"
            nodes.append(onnx.helper.make_node("Sigmoid", node.input, [gate], f"{node.name}_sigmoid"))
            node = onnx.helper.make_node("Mul", [node.input[0], gate], node.output, f"{node.name}_mul")
        nodes.append(node)
    del file.graph.node[:]
    file.graph.node.extend(nodes)


def with_squeeze(model: Any, operator: str) -> Any:
    """The ONNX model with every average over the image, keeping its axes, as ReduceMean or GlobalAveragePool."""
    import onnx

    constants = {initializer.name: onnx.numpy_helper.to_array(initializer) for initializer in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = onnx.helper.get_node_attr_value(node, "value")
    reduces_by_input = next(entry.version for entry in model.opset_import if entry.domain == "") >= 18
    if reduces_by_input and operator == "ReduceMean":
        model.graph.initializer.append(onnx.helper.make_tensor("image_axes", onnx.TensorProto.INT64, [2], [2, 3]))
    for node in model.graph.node:
        if node.op_type != operator and _averages_image(node, constants):
            node.op_type = operator
            del node.attribute[:], node.input[1:]
            if operator == "ReduceMean" and reduces_by_input:
                node.input.append("image_axes")
            elif operator == "ReduceMean":
                node.attribute.append(onnx.helper.make_attribute("axes", [2, 3]))
    return model


def _averages_image(node: Any, constants: dict[str, Any]) -> bool:
    """Whether the ONNX node is the average over the last two of four axes, which stay with size 1."""
    import onnx

    if node.op_type == "GlobalAveragePool":
        return True
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    if node.op_type != "ReduceMean" or not attributes.get("keepdims", 1):
        return False
    axes = attributes.get("axes")
    if axes is None and len(node.input) > 1:
        value = constants.get(node.input[1])
        axes = onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value
    return axes is not None and sorted(int(axis) % 4 for axis in axes) == [2, 3]
