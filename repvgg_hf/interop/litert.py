"""LiteRT files (`.tflite`, TensorFlow Lite's format) of integers, for phones and small devices."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..runtime.saving import replace_files
from .arguments import require_folder
from .extras import require
from .integers import integer_layers
from .programs import clip_to_grids, fixed_shape
from .qdq import to_qdq
from .tflite_graph import LAYERS, TFLiteGraph, use_integers


def export_litert(
    model: nn.Module, folder: str | Path, *, image_size: int | tuple[int, int] = 224, batch_size: int = 1
) -> Path:
    """Write a quantized model as `<folder>/litert/model.tflite`, for LiteRT (TensorFlow Lite).

    Layers whose output is rounded to integers of 8 bits are int8 operations. The others, the classifier above all,
    compute in float32 with an int8 weight that is dequantized when the file is loaded. Weights take a byte each: LiteRT
    looks up no codes. Images are float32 `[batch, channels, height, width]`, as in PyTorch.

    Args:
        model (`nn.Module`): a quantized model with activation bits, RepVGG or another that PyTorch can export.
        folder (`str` or `Path`): of the checkpoint; made if it is missing.
        image_size (`int` or two of them, defaults to 224): height and width of the images, which are fixed.
        batch_size (`int`, defaults to 1): images in a call, fixed too.

    Returns the path of the file. Raises `ImportError` naming the extra if litert-torch is missing, `ValueError` for
    sizes that are not fixed, and for a model without integers, see [`~repvgg_hf.interop.integers.integer_layers`].

    Example:
    ```python
    >>> from repvgg_hf import RepVGGForImageClassification, export_litert

    >>> model = RepVGGForImageClassification.from_pretrained("org/repvgg-a0-oabn-w4a8")
    >>> export_litert(model, "repvgg-a0-oabn-w4a8")
    PosixPath('repvgg-a0-oabn-w4a8/litert/model.tflite')
    ```"""
    example = torch.zeros(fixed_shape("LiteRT", model, image_size, batch_size))
    require_folder(folder, "litert", "export_litert()")
    layers = integer_layers(model)
    litert_torch = require("litert_torch", extra="litert")
    module = clip_to_grids(to_qdq(model, signed=True, weight="unfolded")).cpu().eval()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replace_files(folder) as staging:
        path = staging / "litert" / "model.tflite"
        path.parent.mkdir()
        litert_torch.convert(module, (example,)).export(str(path))
        graph = TFLiteGraph(path.read_bytes())
        use_integers(graph)
        path.write_bytes(graph.to_bytes())
        _check_weights(graph, {name: layer.weight for name, layer in layers.items()})
    return folder / "litert" / "model.tflite"


def read_litert(path: str | Path) -> list[np.ndarray]:
    """Return the int8 weights in a file in the order of its layers, `[out, in, height, width]` as in PyTorch."""
    return _weights(TFLiteGraph(Path(path).read_bytes()))


def _weights(graph: TFLiteGraph) -> list[np.ndarray]:
    found = []
    for layer in graph.operations:
        if graph.kind(layer) not in LAYERS:
            continue
        tensor = layer.inputs[1]
        if (dequantize := graph.producer(tensor, "DEQUANTIZE")) is not None:
            tensor = dequantize.inputs[0]
        weight = graph.constant(tensor)
        if weight is None or weight.dtype != np.int8:
            continue
        if weight.ndim == 4:
            weight = weight.transpose((3, 0, 1, 2) if graph.kind(layer) == "DEPTHWISE_CONV_2D" else (0, 3, 1, 2))
        found.append(weight)
    return found


def _check_weights(graph: TFLiteGraph, expected: dict[str, torch.Tensor]) -> None:
    """Raise `ValueError` if the int8 weights in a `graph` are not those of the model."""
    found = [weight.reshape(len(weight), -1) for weight in _weights(graph)]
    lost = [
        name
        for name, weight in expected.items()
        if not any(np.array_equal(other, weight.reshape(len(weight), -1).cpu()) for other in found)
    ]
    if lost:
        raise ValueError(
            f"litert-torch turned {', '.join(lost)} into operations whose weights are no longer the model's integers: "
            "leave them float (modules_to_not_convert)."
        )


__all__ = ["export_litert", "read_litert"]
