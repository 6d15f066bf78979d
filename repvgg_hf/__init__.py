"""RepVGG that survives low-bit quantization, in the idiom of Transformers.

Importing the package makes RepVGG and the `cluster` quantization method known to the Auto classes.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from transformers import AutoConfig

from .runtime.configuration_repvgg import RepVGGConfig, before_first_config

__version__ = "0.1.0"

# public name: module that defines it, imported on first use
_LAZY = {
    "CalibrationConfig": ".compression",
    "ClusterConfig": ".runtime.quantization_cluster",
    "ClusterConv2d": ".runtime.cluster_layers",
    "ClusterLinear": ".runtime.cluster_layers",
    "ClusterQuantizer": ".runtime.quantization_cluster",
    "Distillation": ".compression",
    "QATCallback": ".compression",
    "QATConfig": ".compression",
    "RepVGGBackbone": ".runtime.modeling_repvgg",
    "RepVGGForImageClassification": ".runtime.modeling_repvgg",
    "RepVGGModel": ".runtime.modeling_repvgg",
    "RepVGGPreTrainedModel": ".runtime.modeling_repvgg",
    "ReparamConv2d": ".runtime.reparameterization",
    "kernel_report": ".analysis",
    "update_codebooks": ".compression",
}

if TYPE_CHECKING:
    from .analysis import kernel_report
    from .compression import CalibrationConfig, Distillation, QATCallback, QATConfig, update_codebooks
    from .runtime.cluster_layers import ClusterConv2d, ClusterLinear
    from .runtime.modeling_repvgg import (
        RepVGGBackbone,
        RepVGGForImageClassification,
        RepVGGModel,
        RepVGGPreTrainedModel,
    )
    from .runtime.quantization_cluster import ClusterConfig, ClusterQuantizer
    from .runtime.reparameterization import ReparamConv2d


def _register_models():
    import transformers
    from transformers import AutoImageProcessor, BitImageProcessor, BitImageProcessorPil

    from .runtime.modeling_repvgg import AUTO_CLASSES

    for auto_class, model_class in AUTO_CLASSES.items():
        getattr(transformers, auto_class).register(RepVGGConfig, model_class)
    AutoImageProcessor.register(
        RepVGGConfig, image_processor_classes={"torchvision": BitImageProcessor, "pil": BitImageProcessorPil}
    )


AutoConfig.register("repvgg", RepVGGConfig)
before_first_config.append(_register_models)


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)


def __dir__():
    return sorted([*globals(), *_LAZY])


__all__ = [
    "CalibrationConfig",
    "ClusterConfig",
    "ClusterConv2d",
    "ClusterLinear",
    "ClusterQuantizer",
    "Distillation",
    "QATCallback",
    "QATConfig",
    "RepVGGBackbone",
    "RepVGGConfig",
    "RepVGGForImageClassification",
    "RepVGGModel",
    "RepVGGPreTrainedModel",
    "ReparamConv2d",
    "kernel_report",
    "update_codebooks",
]
