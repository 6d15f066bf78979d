"""OpenVINO's intermediate representation (`.xml` and `.bin`) whose weights stay packed, and loading it."""

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from torch import nn

from ..runtime.saving import replace_files
from .arguments import require_folder, require_model
from .extras import require
from .integers import IntegerLayer, integer_layers
from .onnx import export_onnx

EXTRA = "openvino"
PARTS = {1: (1,), 2: (2,), 3: (3,), 4: (4,), 5: (4, 1), 6: (6,), 7: (6, 1), 8: (8,)}  # bits of a code: of constants
_INTEGERS = ".weight_int8"  # how the ONNX file's int8 weights are called, after the name of their layer


def export_openvino(
    model: nn.Module,
    folder: str | Path,
    *,
    preprocess: Any = None,
    image_size: int | tuple[int, int] | None = None,
    dynamic: Sequence[str] = ("batch", "height", "width"),
) -> Path:
    """Write a quantized model as `<folder>/openvino/openvino_model.xml` and `.bin`, for OpenVINO on CPUs.

    Codes stay packed in the file, as constants of 1, 2, 3, 4, 6 or 8 bits (5 bits are 4 and 1, 7 are 6 and 1). OpenVINO
    looks them up in the int8 codebook when it loads the file, and computes every quantized layer in int8.

    Args:
        model (`nn.Module`): a quantized model with activation bits, RepVGG or another that PyTorch can export.
        folder (`str` or `Path`): of the checkpoint; made if it is missing.
        preprocess (*optional*): an image processor or its folder; the file, called `openvino_model_image.xml`, then
            takes uint8 images `[batch, height, width, 3]`, see [`export_onnx`].
        image_size (`int` or `(height, width)`, *optional*): of images, where it is not dynamic.
        dynamic (sequence of `str`, defaults to all three): which of batch, height and width may be of any size.

    Returns the path of the `.xml` file. Raises `ImportError` naming the extra if openvino or onnx is missing, and
    `ValueError` for a model without integers, see [`~repvgg_hf.interop.integers.integer_layers`].

    Example:
    ```python
    >>> from repvgg_hf import RepVGGForImageClassification, export_openvino, load_openvino

    >>> model = RepVGGForImageClassification.from_pretrained("org/repvgg-a0-oabn-w4a8")
    >>> path = export_openvino(model, "repvgg-a0-oabn-w4a8")
    >>> load_openvino(path)(pixel_values)["logits"].argmax(1)
    array([281])
    ```"""
    require_model(model)
    require_folder(folder, "openvino", "export_openvino()")
    layers = integer_layers(model)
    openvino = _import_openvino()
    name = "openvino_model" if preprocess is None else "openvino_model_image"
    with TemporaryDirectory() as temporary:
        path = export_onnx(model, temporary, "int8", preprocess=preprocess, image_size=image_size, dynamic=dynamic)
        graph = openvino.Core().read_model(path)
        _pack_weights(graph, layers)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with replace_files(folder) as staging:
            (staging / "openvino").mkdir()
            written = staging / "openvino" / f"{name}.xml"
            openvino.save_model(graph, written, compress_to_fp16=False)
            written.write_text(written.read_text(encoding="utf-8").replace("\t", ""), encoding="utf-8")  # half of it
    return folder / "openvino" / f"{name}.xml"


def load_openvino(path: str | Path, *, threads: int | None = None, **options: Any):
    """Load a file of [`export_openvino`] for this CPU, so that it computes what the model does: integers and float32.

    Args:
        path (`str` or `Path`): of the `.xml` file, or an ONNX file.
        threads (`int`, *optional*): how many to use; OpenVINO chooses by default.
        **options: OpenVINO's own, such as `PERFORMANCE_HINT="THROUGHPUT"`.

    Returns an `openvino.CompiledModel`, called with an array or tensor. Raises `ValueError` for a broken or foreign
    file.
    """
    openvino = _import_openvino()
    # bfloat16, which OpenVINO takes by itself on CPUs that have it, would round what is not quantized
    options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"} | options
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    try:
        return openvino.Core().compile_model(path, "CPU", options)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} can't be loaded by OpenVINO ({reason}): write it with export_openvino().") from error


def read_openvino(path: str | Path) -> dict[str, np.ndarray]:
    """Return the int8 weights in a file of [`export_openvino`] by layer, as OpenVINO itself unpacks them."""
    openvino = _import_openvino()
    found = {}
    for node in openvino.Core().read_model(path).get_ordered_ops():
        if node.get_friendly_name().endswith(_INTEGERS):
            unpacking = openvino.Model([node.output(0)], [])
            name = node.get_friendly_name().removesuffix(_INTEGERS)
            found[name] = openvino.Core().compile_model(unpacking, "CPU")([])[0].copy()
    return found


def _import_openvino():
    openvino = require("openvino", extra=EXTRA)
    if not hasattr(openvino.Type, "u3"):
        raise ImportError(
            f"openvino {openvino.__version__} has no constants of 2, 3 and 6 bits: `pip install --upgrade "
            f"'repvgg-hf[{EXTRA}]'`."
        )
    return openvino


def _pack_weights(graph, layers: dict[str, IntegerLayer]) -> None:
    """Replace the int8 weights of an OpenVINO model by packed codes that are looked up in the codebook."""
    constants = {node.get_friendly_name(): node for node in graph.get_ordered_ops()}
    for name, layer in layers.items():
        unpacked = _unpacked_weight(layer)
        old = constants[f"{name}{_INTEGERS}"]
        unpacked.set_friendly_name(old.get_friendly_name())
        for user in old.output(0).get_target_inputs():
            user.replace_source_output(unpacked.output(0))
    for index, node in enumerate(graph.get_ordered_ops()):  # else called after a counter of the process
        if re.fullmatch(f"{node.get_type_name()}_[0-9]+", node.get_friendly_name()):
            node.set_friendly_name(f"{node.get_type_name()}.{index}")
    graph.set_rt_info("packed", ["framework", "repvgg_hf.weights"])
    graph.validate_nodes_and_infer_types()


def _unpacked_weight(layer: IntegerLayer):
    """Return the node that looks up a layer's codes in its codebook, int8 of the weight's shape."""
    operators = importlib.import_module("openvino.opset15")
    types = importlib.import_module("openvino").Type
    codes, codebook = layer.codes.cpu().numpy(), layer.codebook.cpu().numpy()
    index, below = None, 0
    for bits in PARTS[layer.bits]:
        part = operators.constant((codes >> below) & (2**bits - 1), dtype=getattr(types, f"u{bits}"))
        part = operators.convert(part, "i32")
        if below:
            part = operators.multiply(part, operators.constant(np.int32(2**below)))
        index = part if index is None else operators.add(index, part)
        below += bits
    if len(codebook) > 1:  # entries of all codebooks, one after the other
        start = np.arange(len(codes)) * len(codebook) // len(codes) * codebook.shape[1]
        start = start.astype(np.int32).reshape(-1, *[1] * (codes.ndim - 1))
        index = operators.add(index, operators.constant(start))
    return operators.gather(operators.constant(codebook.reshape(-1)), index, operators.constant(np.int64(0)))


__all__ = ["export_openvino", "load_openvino", "read_openvino"]
