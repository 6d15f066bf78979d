"""RepVGG that survives low-bit quantization, in the idiom of Transformers.

Importing the package makes RepVGG and the `cluster` quantization method known to the Auto classes.
"""

import difflib
from importlib import import_module
from typing import TYPE_CHECKING

from transformers import AutoConfig

from .registration import register_models, register_quantizer
from .runtime.configuration_repvgg import RepVGGConfig, before_first_config

__version__ = "0.1.0"

# public name: module that defines it, imported on first use
_LAZY = {
    "CalibrationConfig": ".compression",
    "ClusterConfig": ".runtime.quantization_cluster",
    "ClusterConv1d": ".runtime.cluster_layers",
    "ClusterConv2d": ".runtime.cluster_layers",
    "ClusterLinear": ".runtime.cluster_layers",
    "ClusterQuantizer": ".runtime.quantizer_cluster",
    "Distillation": ".compression",
    "FuseReport": ".networks",
    "QATCallback": ".compression",
    "QATConfig": ".compression",
    "RepVGGBackbone": ".runtime.modeling_repvgg",
    "RepVGGForImageClassification": ".runtime.modeling_repvgg",
    "RepVGGModel": ".runtime.modeling_repvgg",
    "RepVGGPreTrainedModel": ".runtime.modeling_repvgg",
    "ReparamConv2d": ".runtime.reparameterization",
    "dequantize": ".compression",
    "export_coreml": ".interop.coreml",
    "export_program": ".interop.programs",
    "compile_int8": ".interop.torch_int8",
    "export_onnx": ".interop.onnx",
    "export_openvino": ".interop.openvino",
    "load_engine": ".interop.engines",
    "load_openvino": ".interop.openvino",
    "export_executorch": ".interop.executorch",
    "export_litert": ".interop.litert",
    "from_original": ".networks",
    "from_timm": ".networks",
    "fuse": ".networks",
    "add_oabn": ".networks.oabn",
    "kernel_report": ".analysis",
    "load_quantized": ".compression",
    "prepare_qat": ".compression",
    "quantize": ".compression",
    "save_quantized": ".compression",
    "to_timm_state_dict": ".networks",
    "update_codebooks": ".compression",
}

if TYPE_CHECKING:
    from .analysis import kernel_report
    from .compression import (
        CalibrationConfig,
        Distillation,
        QATCallback,
        QATConfig,
        dequantize,
        load_quantized,
        prepare_qat,
        quantize,
        save_quantized,
        update_codebooks,
    )
    from .interop.coreml import export_coreml
    from .interop.engines import load_engine
    from .interop.executorch import export_executorch
    from .interop.litert import export_litert
    from .interop.onnx import export_onnx
    from .interop.openvino import export_openvino, load_openvino
    from .interop.programs import export_program
    from .interop.torch_int8 import compile_int8
    from .networks import FuseReport, from_original, from_timm, fuse, to_timm_state_dict
    from .runtime.cluster_layers import ClusterConv1d, ClusterConv2d, ClusterLinear
    from .runtime.modeling_repvgg import (
        RepVGGBackbone,
        RepVGGForImageClassification,
        RepVGGModel,
        RepVGGPreTrainedModel,
    )
    from .runtime.quantization_cluster import ClusterConfig
    from .runtime.quantizer_cluster import ClusterQuantizer
    from .runtime.reparameterization import ReparamConv2d


AutoConfig.register("repvgg", RepVGGConfig)
before_first_config.append(register_models)
register_quantizer()


def __getattr__(name: str):
    if name not in _LAZY:
        similar = difflib.get_close_matches(name, __all__, n=1) if not name.startswith("_") else []
        hint = f": did you mean {similar[0]!r}?" if similar else ""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
    return getattr(import_module(_LAZY[name], __name__), name)


def __dir__():
    return sorted([*__all__, "__version__"])


__all__ = [
    "CalibrationConfig",
    "ClusterConfig",
    "ClusterConv1d",
    "ClusterConv2d",
    "ClusterLinear",
    "ClusterQuantizer",
    "Distillation",
    "FuseReport",
    "QATCallback",
    "QATConfig",
    "RepVGGBackbone",
    "RepVGGConfig",
    "RepVGGForImageClassification",
    "RepVGGModel",
    "RepVGGPreTrainedModel",
    "ReparamConv2d",
    "dequantize",
    "export_coreml",
    "export_program",
    "compile_int8",
    "export_onnx",
    "export_openvino",
    "load_engine",
    "load_openvino",
    "export_executorch",
    "export_litert",
    "from_original",
    "from_timm",
    "fuse",
    "add_oabn",
    "kernel_report",
    "load_quantized",
    "prepare_qat",
    "quantize",
    "save_quantized",
    "to_timm_state_dict",
    "update_codebooks",
]
