"""Core ML packages (`.mlpackage`) whose weights stay packed: lookup tables of int8 entries and scales per channel.

Core ML itself runs on Apple's systems alone. Elsewhere a package can be written and read back, see [`read_coreml`].
"""

import importlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..runtime.logs import quiet
from ..runtime.saving import replace_files
from .arguments import require_folder
from .extras import require
from .integers import IntegerLayer, integer_layers
from .programs import clip_to_grids, export_module, fixed_shape, output_names
from .qdq import to_qdq

TABLE_BITS = (1, 2, 3, 4, 6)  # of the indices that Core ML has for tables; weights of 8 bits need no table
_LAYERS = "repvgg_hf.layers"  # entry of a package's metadata: names of layers by those of their weights
_DATA = Path("Data", "com.apple.CoreML")  # where a package has its files


@dataclass
class CoreMLWeight:
    """A weight as a Core ML package stores it.

    Attributes:
        codes (`np.ndarray`, *optional*): uint8, of the weight's shape, or `None` for an int8 weight without a table.
        table (`np.ndarray`, *optional*): int8 `[out, entries]`, a table for each output channel.
        integers (`np.ndarray`): int8, of the weight's shape: the entries that the codes select.
        scale (`np.ndarray`): float32 `[out]`.
    """

    codes: np.ndarray | None
    table: np.ndarray | None
    integers: np.ndarray
    scale: np.ndarray


def export_coreml(
    model: nn.Module, folder: str | Path, *, image_size: int | tuple[int, int] = 224, batch_size: int = 1
) -> Path:
    """Write a quantized model as `<folder>/coreml/model.mlpackage`, for Core ML of iOS 18, macOS 15 and later.

    Weights are the checkpoint's own codes, tables and scales. The inputs of layers are rounded as in the model; all
    else is computed in float32. Codes of 5 bits take 6 bits, since Core ML has none of 5. Weights of 7 and 8 bits, and
    those whose channels are so short that int8 is smaller than codes and tables, are stored as int8.

    Args:
        model (`nn.Module`): a quantized model with activation bits, RepVGG or another that PyTorch can export.
        folder (`str` or `Path`): of the checkpoint; made if it is missing.
        image_size (`int` or two of them, defaults to 224): height and width of the images, which are fixed.
        batch_size (`int`, defaults to 1): images in a call, fixed too.

    Returns the path of the package. Raises `ImportError` naming the extra if coremltools is missing, `ValueError` for
    sizes that are not fixed, and for a model without integers, see [`~repvgg_hf.interop.integers.integer_layers`].

    Example:
    ```python
    >>> from repvgg_hf import RepVGGForImageClassification, export_coreml

    >>> model = RepVGGForImageClassification.from_pretrained("org/repvgg-a0-oabn-w4a8")
    >>> export_coreml(model, "repvgg-a0-oabn-w4a8")
    PosixPath('repvgg-a0-oabn-w4a8/coreml/model.mlpackage')
    ```"""
    example = torch.zeros(fixed_shape("Core ML", model, image_size, batch_size))
    require_folder(folder, "coreml", "export_coreml()")
    layers = integer_layers(model)
    coremltools = _import_coremltools()
    module = clip_to_grids(to_qdq(model, weight="float")).cpu()
    with torch.no_grad():
        names = output_names(module(example))
    exported = export_module(module, example).run_decompositions({})
    options = {
        "minimum_deployment_target": coremltools.target.iOS18,
        "compute_precision": coremltools.precision.FLOAT32,
    }
    with quiet("coremltools"):  # of versions that it was not tried with, and of libraries of Apple's systems
        # without passes: they may change weights, and are to see what cannot be changed
        passes = coremltools.PassPipeline.EMPTY
        program = coremltools.convert(exported, convert_to="milinternal", pass_pipeline=passes, **options)
        weights = _pack_weights(program.functions["main"], exported, layers)
        for variable, name in zip(program.functions["main"].outputs, names):
            variable.name = name
        package = coremltools.convert(program, convert_to="mlprogram", skip_model_load=True, **options)
    package.user_defined_metadata[_LAYERS] = json.dumps(weights)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replace_files(folder) as staging:
        written = staging / "coreml" / "model.mlpackage"
        written.parent.mkdir()
        package.save(str(written))
        for debugging in written.glob("*_debug_handle_mapping.json"):  # of no use to Core ML
            debugging.unlink()
    return folder / "coreml" / "model.mlpackage"


def read_coreml(path: str | Path) -> dict[str, CoreMLWeight]:
    """Return the weights in a package that [`export_coreml`] wrote, by the names of the model's layers."""
    names = json.loads(_load_spec(path).description.metadata.userDefined.get(_LAYERS, "{}"))
    if not names:
        raise ValueError(f"{path} does not say which layers its weights are of: it was not written by export_coreml().")
    operations = {operation.outputs[0].name: operation for operation in read_program(path).operations}
    if missing := names.keys() - operations.keys():
        raise ValueError(f"{path} lacks the weights {', '.join(sorted(missing))}: write it again.")
    return {layer: _read_weight(operations[name]) for name, layer in names.items()}


def read_program(path: str | Path):
    """Return the function that a package computes, as coremltools represents it (`mil.Function`).

    Raises `ValueError` if the folder is no Core ML package.
    """
    spec = _load_spec(path)
    load = importlib.import_module("coremltools.converters.mil.frontend.milproto.load").load
    weights = str(Path(path) / _DATA / "weights")
    with quiet("coremltools"):
        program = load(spec, specification_version=spec.specificationVersion, file_weights_dir=weights)
    return program.functions["main"]


def _load_spec(path: str | Path):
    coremltools = _import_coremltools()
    try:
        return coremltools.models.utils.load_spec(str(path))
    except Exception as error:  # what it raises depends on what the folder has
        raise ValueError(
            f"{path} can't be read as a Core ML package ({error}): write it with export_coreml()."
        ) from error


def _import_coremltools():
    """Import coremltools; `ImportError` if it is missing, or too old for the operators of iOS 18."""
    with quiet("coremltools"):
        coremltools = require("coremltools", extra="coreml")
    if not hasattr(coremltools.target, "iOS18"):
        raise ImportError(
            f"coremltools {coremltools.__version__} has no operators of iOS 18, which weights with tables and scales "
            "need: `pip install --upgrade 'repvgg-hf[coreml]'`."
        )
    return coremltools


def _pack_weights(function, exported: torch.export.ExportedProgram, layers: dict[str, IntegerLayer]) -> dict[str, str]:
    """Replace float weights of a MIL `function` by the integers of `layers`; returns names of layers by theirs."""
    builder = importlib.import_module("coremltools.converters.mil").Builder
    scope = importlib.import_module("coremltools.converters.mil.mil.scope").ScopeInfo
    parameters = exported.graph_signature.inputs_to_parameters  # "p_model_stem_weight": "model.stem.weight"
    names, packed = {}, {}
    for operation in list(function.operations):
        parameter = parameters.get(operation.weight.name, "") if operation.op_type in ("conv", "linear") else ""
        layer = parameter.removeprefix("model.").removesuffix(".weight")
        if layer not in layers:
            continue
        if layer not in packed:  # a module may be used twice
            name = f"{layer.replace('.', '_')}_weight"
            name = f"_{name}" if name[0].isdigit() else name  # as coremltools calls it in the package
            with function, builder.scope(*(scope(source=key, data=value) for key, value in operation.scopes.items())):
                packed[layer] = _packed_weight(builder, layers[layer], name, operation)
            names[name] = layer
        function.replace_uses_of_var_after_op(
            anchor_op=packed[layer].op,
            end_op=operation,
            old_var=operation.weight,
            new_var=packed[layer],
            force_replace=True,
        )
    if left := layers.keys() - packed.keys():
        raise ValueError(
            f"coremltools turned {', '.join(sorted(left))} into operations that take no packed weight: leave them "
            "float (modules_to_not_convert)."
        )
    return names


def _packed_weight(builder, layer: IntegerLayer, name: str, before):
    """Add operations that unpack a weight `before` an operation, and return the variable that holds it."""
    ones = [1] * (layer.weight.dim() - 1)
    scale = layer.weight_scale.cpu().numpy().reshape(-1, *ones)
    bits = next((bits for bits in TABLE_BITS if bits >= layer.bits), 8)
    of_channel = layer.weight[0].numel()
    if of_channel * bits / 8 + 2**bits >= of_channel:  # coremltools stores a table for every channel
        return builder.constexpr_blockwise_shift_scale(
            data=layer.weight.cpu().numpy(), scale=scale, before_op=before, name=name
        )
    table = layer.codebook.cpu().numpy()
    table = np.pad(table, ((0, 0), (0, 2**bits - table.shape[1])), mode="edge")
    kinds = importlib.import_module("coremltools.converters.mil.mil").types
    codes = layer.codes.cpu().numpy().astype(getattr(kinds, f"np_uint{bits}_dtype"))
    integers = builder.constexpr_lut_to_dense(
        indices=codes, lut=table.reshape(len(table), *ones, -1, 1), before_op=before, name=f"{name}_int8"
    )
    return builder.constexpr_blockwise_shift_scale(data=integers, scale=scale, before_op=before, name=name)


def _read_weight(operation) -> CoreMLWeight:
    """Read a weight that an operation unpacks: coremltools scales the entries of a table before it looks them up."""
    codes = table = None
    scaled = operation
    if operation.op_type == "constexpr_lut_to_dense":
        scaled, codes = operation.lut.op, operation.indices.val.astype(np.uint8)
    integers, scale = scaled.data.val, scaled.scale.val
    out = operation.outputs[0].shape[0]
    if codes is not None:
        tables = integers.reshape(len(integers), -1)
        table = tables[np.arange(out) * len(tables) // out]
        integers = np.take_along_axis(table, codes.reshape(out, -1), axis=1).reshape(codes.shape)
    return CoreMLWeight(codes, table, integers, scale.reshape(-1))


__all__ = ["CoreMLWeight", "export_coreml", "read_coreml", "read_program"]
