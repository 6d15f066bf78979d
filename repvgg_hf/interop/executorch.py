"""ExecuTorch programs (`.pte`) whose convolutions are XNNPACK's int8 kernels, for phones and small devices."""

from pathlib import Path

import torch
from torch import nn

from ..runtime.saving import replace_files
from .arguments import require_folder
from .extras import require
from .programs import clip_to_grids, export_module, fixed_shape
from .qdq import QDQLayer, to_qdq

_RELU = (torch.ops.aten.relu.default, torch.ops.aten.relu_.default)
_END = ".weight_int8"


def export_executorch(
    model: nn.Module, folder: str | Path, *, image_size: int | tuple[int, int] = 224, batch_size: int = 1
) -> Path:
    """Write a quantized model as `<folder>/executorch/model.pte`, for ExecuTorch with its XNNPACK backend.

    XNNPACK computes in integers what has an int8 input, weight and output. Layers whose output stays float, the
    classifier above all, or has fewer than 8 bits get the same weight as float32 constants, with which they give the
    same numbers: see [`float_layers`]. Int8 weights take a byte each; ExecuTorch unpacks no codes of fewer bits. Call
    the program with contiguous images (`images.contiguous()`): its runtime for Python reads others as if they were.

    Args:
        model (`nn.Module`): a quantized model with activation bits, RepVGG or another that PyTorch can export.
        folder (`str` or `Path`): of the checkpoint; made if it is missing.
        image_size (`int` or two of them, defaults to 224): height and width of the images, which are fixed.
        batch_size (`int`, defaults to 1): images in a call, fixed too.

    Returns the path of the file. Raises `ImportError` naming the extra if executorch is missing, `ValueError` for
    sizes that are not fixed, and for a model without integers, see [`~repvgg_hf.interop.integers.integer_layers`].

    Example:
    ```python
    >>> from repvgg_hf import RepVGGForImageClassification, export_executorch

    >>> model = RepVGGForImageClassification.from_pretrained("org/repvgg-a0-oabn-w4a8")
    >>> export_executorch(model, "repvgg-a0-oabn-w4a8")
    PosixPath('repvgg-a0-oabn-w4a8/executorch/model.pte')
    ```"""
    example = torch.zeros(fixed_shape("ExecuTorch", model, image_size, batch_size))
    require_folder(folder, "executorch", "export_executorch()")
    module = clip_to_grids(to_qdq(model, signed=True)).cpu()
    exir = require("executorch.exir", extra="executorch")
    xnnpack = require("executorch.backends.xnnpack.partition.xnnpack_partitioner", extra="executorch")
    for name in float_layers(export_module(module, example)):
        _keep_float(module.model.get_submodule(name))
    program = exir.to_edge_transform_and_lower(
        export_module(module, example),
        partitioner=[xnnpack.XnnpackPartitioner()],
        compile_config=exir.EdgeCompileConfig(_check_ir_validity=False),  # of operations that XNNPACK takes as they are
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replace_files(folder) as staging:
        (staging / "executorch").mkdir()
        (staging / "executorch" / "model.pte").write_bytes(program.to_executorch().buffer)
    return folder / "executorch" / "model.pte"


def float_layers(program: torch.export.ExportedProgram) -> list[str]:
    """Return the names of the model's layers in a `program` whose output is not rounded to 8 bits right away."""
    buffers = program.graph_signature.inputs_to_buffers
    names = []
    for node in program.graph.nodes:
        name = buffers.get(node.name, "")
        if name.endswith(_END):
            (dequantize,) = node.users
            if not all(_is_rounded(layer) for layer in dequantize.users):
                names.append(name.removeprefix("model.").removesuffix(_END))
    return names


def _is_rounded(node: torch.fx.Node) -> bool:
    """Tell whether all that takes the output of a `node`, or of its ReLU, rounds it to integers of 8 bits."""
    users = list(node.users)
    if len(users) == 1 and users[0].target in _RELU:
        return _is_rounded(users[0])
    return all(user.target == torch.ops.quantized_decomposed.quantize_per_tensor.default for user in users)


def _keep_float(layer: QDQLayer) -> None:
    """Let a layer compute with a float32 constant instead of int8 that is dequantized."""
    layer.weight = nn.Parameter(layer.dense_weight(), requires_grad=False)
    layer.form = "float"
    del layer.weight_int8


__all__ = ["export_executorch", "float_layers"]
