"""Files for engines in a model's repository: writing them, and what the card says of them."""

from collections.abc import Sequence
from pathlib import Path

from ..interop.engines import ENGINES
from ..interop.formats import FORMATS, check_formats, export_format
from .results import EngineResult, Results
from .snippets import javascript, onnx_runtime
from .tables import cell, code_block, details, table


def write_engine_files(model, target: Path, formats: Sequence[str], image_size: int | None) -> dict[str, int]:
    """Write a model in each of the `formats` into `target`; returns the bytes by path there.

    ONNX files of a model that has no integers, since it is float or its activations are, compute in float. Raises what
    [`~repvgg_hf.interop.formats.export_format`] does.
    """
    check_formats(formats)
    quantization = getattr(model.config, "quantization_config", None)
    in_integers = getattr(quantization, "activation_bits", None) is not None
    files = {}
    for name in formats:
        weights = "float" if name == "onnx" and not in_integers else None
        file = export_format(model, target, name, weights, image_size=image_size)
        files[file.path.relative_to(target).as_posix()] = file.bytes
    return files


def check_measured(files: dict[str, int], results: Results | None, published: str | None) -> None:
    """Raise `ValueError` if the published model was measured with a file of the same name and another size."""
    for row in results.engines if results is not None else []:
        size = files.get(row.file or "")
        if row.model == published and size is not None and row.bytes not in (None, size):
            raise ValueError(
                f"results.engines measured {row.file} of {row.bytes} bytes for {row.model!r}, and the one that is "
                f"published has {size}: export and evaluate this checkpoint again."
            )


def engines_section(
    name: str, revision: str | None, files: dict[str, int] | None, measured: list[EngineResult], classifies: bool
) -> str:
    """Return the section about the files for engines, and what was measured with them; empty if there is nothing.

    Args:
        name (`str`): of the repository.
        revision (`str`, *optional*): branch or tag of the model.
        files (`dict[str, int]`, *optional*): bytes by path in the repository.
        measured (`list[EngineResult]`): measurements of the published model.
        classifies (`bool`): whether it is a classifier, which a pipeline of transformers.js runs.
    """
    files = files or {}
    measured = [row for row in measured if row.file is None or row.file in files]
    if not files and not measured:
        return ""
    parts = ["## Engines", _table(files, measured)]
    if measured:
        first = measured[0]
        parts.append(
            f"Measured on {first.images:,} images against the simulation in PyTorch: agreement is the share of images "
            "with the same first class, same logits the share whose logits differ by less than 1e-5 standard "
            "deviations. Accuracy and shares in percent, times of one image without preparing it."
        )
    script = next((path for path in files if path.startswith("onnx/")), None)
    if script is not None and classifies:
        python = code_block(onnx_runtime(name, revision, script), "python")
        parts.append(details("In Python, with ONNX Runtime alone", python))
        lines = code_block(javascript(name, revision, script), "js")
        takes = "Its `AutoModel` takes any model type.\n\n"
        parts.append(details("In browsers and Node, with transformers.js", takes + lines))
    return "\n\n".join(parts)


def _table(files: dict[str, int], measured: list[EngineResult]) -> str:
    rows = [[*_of_file(row.file, files, row.engine), *_figures(row)] for row in measured]
    seen = {row.file for row in measured}
    rows += [[*_of_file(path, files, _engine_of(path)), *[""] * 5] for path in files if path not in seen]
    return table(["engine", "file", "bytes", "device", "median, ms", "top-1", "agreement", "same logits"], rows)


def _of_file(path: str | None, files: dict[str, int], engine: str) -> list[str]:
    return [cell(engine), "" if path is None else f"`{path}`", "" if path is None else f"{files[path]:,}"]


def _figures(row: EngineResult) -> list[str]:
    time = "" if row.milliseconds is None else f"{row.milliseconds:.3g}"
    return [cell(row.device or ""), time, f"{row.top1:.2f}", f"{row.agreement:.2f}", f"{row.near:.2f}"]


def _engine_of(path: str) -> str:
    """What runs a file, by the folder that it is in."""
    kind = FORMATS.get(path.partition("/")[0])
    if kind is None:
        return ""
    return kind.title if kind.engine is None else ENGINES[kind.engine].title
