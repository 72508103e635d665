"""Models as files that run elsewhere: programs of torch.export, AOTInductor packages, ONNX (docs/deployment.md)."""

from effnet_ops.deployment.onnx_file import export_onnx
from effnet_ops.deployment.package import export_package, load_package
from effnet_ops.deployment.program import decompositions, export_program

__all__ = ["decompositions", "export_onnx", "export_package", "export_program", "load_package"]
