"""Write a quantized checkpoint as files for engines, all at once, and check each: its weights, and what it computes.

    python recipes/export.py --model_name_or_path outputs/quantize/cluster-per_tensor-scale-w4-a8-calibrated
    python recipes/export.py --model_name_or_path ... --formats onnx openvino --weights packed int8 float
    python recipes/export.py --model_name_or_path ... --formats onnx --images pictures/ --output_dir export

Each format goes into a folder of its own below `--output_dir`, by default the checkpoint's: `onnx/`, `openvino/`,
`coreml/`, `torch/`, `executorch/`, `litert/`. The weights in a file are compared with the checkpoint's integers, all of
them, and the logits of the engine that runs it with those of the simulation in PyTorch. Packages that are missing are
named with the extra that installs them. Needs `pip install 'repvgg-hf[train]'`, too.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoImageProcessor

from repvgg_hf.analysis import checkpoint_bytes
from repvgg_hf.hub.folder import processor_image_size
from repvgg_hf.interop.agreement import agreement, in_batches
from repvgg_hf.interop.engine_loaders import load_checkpoint
from repvgg_hf.interop.engines import find_checkpoint, load_engine
from repvgg_hf.interop.formats import FORMATS, ONNX_WEIGHTS, ExportedFile, check_formats, equal_weights, export_format
from repvgg_hf.interop.integers import integer_layers, runs_exactly_without_vnni
from repvgg_hf.recipes.predict import list_pictures, load_processor, prepare
from repvgg_hf.runtime.cluster_layers import cluster_layers
from repvgg_hf.training.arguments import parse_arguments
from repvgg_hf.training.report import write_json

BATCH = 32  # images in a call
# Standard deviations of the logits. A value on the border between two integers may fall to the other one, which changes
# logits by hundredths; weights or scales that are not the checkpoint's change them by more.
LARGEST_DIFFERENCE = 0.1
COLUMNS = ("format", "weights", "file", "bytes", "weights equal", "engine", "agreement %", "near %")


@dataclass
class ExportArguments:
    """Options that say what to export, and where to."""

    model_name_or_path: str = field(metadata={"help": "A quantized checkpoint with activation bits: folder or Hub id."})
    formats: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"What to write: {', '.join(FORMATS)}. By default all whose packages are installed; what is named "
            "here must be."
        },
    )
    weights: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"Forms of the weights in ONNX files, a file for each: {', '.join(ONNX_WEIGHTS)}; by default "
            f"{ONNX_WEIGHTS[0]}. Other formats have one form each."
        },
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for the files, by default the checkpoint's own."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the images in pixels, by default that of the image processor."}
    )
    images: list[str] = field(
        default_factory=list,
        metadata={"help": "Pictures, or folders of them, to compare the engines on; by default random images."},
    )
    random_images: int = field(default=64, metadata={"help": "How many random images to compare on."})
    threads: int | None = field(default=None, metadata={"help": "Threads of the engines that are compared."})
    seed: int = field(default=0, metadata={"help": "Seed of all that is random: the images to compare on."})
    output_json: str | None = field(
        default=None, metadata={"help": "File for the figures, by default export_results.json in --output_dir."}
    )

    def __post_init__(self):
        check_formats(self.formats)
        unknown = [form for form in self.weights if form not in ONNX_WEIGHTS]
        if unknown:
            raise ValueError(f"--weights takes {', '.join(ONNX_WEIGHTS)}, got {', '.join(unknown)}.")
        for form in self.weights:
            if self.formats and not any(form in FORMATS[name].weights for name in self.formats):
                known = "; ".join(f"{name} has {', '.join(FORMATS[name].weights)}" for name in self.formats)
                raise ValueError(f"--weights {form} is no form of --formats {' '.join(self.formats)}: {known}.")
        for name in ("random_images", "image_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}.")


def plan(args: ExportArguments) -> list[tuple[str, str]]:
    """The (format, form of weights) of each file to write."""
    pairs = []
    for name in args.formats or FORMATS:
        known = FORMATS[name].weights
        forms = [form for form in args.weights or known[:1] if form in known] if len(known) > 1 else [known[0]]
        pairs += [(name, form) for form in forms]
    return pairs


def sample_images(args: ExportArguments, folder: Path, model, size: int) -> np.ndarray:
    """Images to compare on, float32 `[images, channels, size, size]`."""
    if args.images:
        processor = load_processor(folder)
        return np.stack([prepare_of_size(path, processor, size) for path in list_pictures(args.images)])
    generator = torch.Generator().manual_seed(args.seed)
    channels = getattr(model.config, "num_channels", 3)
    return torch.randn(args.random_images, channels, size, size, generator=generator).numpy()


def prepare_of_size(path: Path, processor, size: int) -> np.ndarray:
    """A picture as the model sees it. Raises `ValueError` if that is not as large as the files are written for."""
    image = prepare(path, processor)
    if image.shape[1:] != (size, size):
        raise ValueError(
            f"The image processor makes {path} {' x '.join(map(str, image.shape[1:]))}, and files are written for "
            f"images {size} x {size}: leave out --image_size, or leave out --images and compare on random images."
        )
    return image


def require_writable(model, args: ExportArguments) -> None:
    """Raise `ValueError` for a model without integers, if what is to be written needs them."""
    if set(args.weights) == {"float"} and set(args.formats) == {"onnx"}:
        return
    try:
        integer_layers(model)
    except ValueError as error:
        fault = str(error)
        without = [name for name, layer in cluster_layers(model).items() if layer.weight_scale is None]
        if without:
            fault = (
                f"{without[0]!r} has no scale for each channel (channel_scale=False), so the entries of its codebook "
                "are floats, and engines compute with int8: quantize the float model again with activation_bits=8, "
                "calibration= and channel_scale=True."
            )
        raise ValueError(f"{fault} Or write --formats onnx --weights float, which takes any fused model.") from error


def side_of_images(args: ExportArguments, folder: Path) -> int:
    """`--image_size`, or what the checkpoint's image processor makes."""
    if args.image_size is not None:
        return args.image_size
    try:
        return processor_image_size(AutoImageProcessor.from_pretrained(folder))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} does not say how large images are ({error}): give --image_size.") from error


def measure(model, file: ExportedFile, images: np.ndarray, expected: np.ndarray, threads: int | None) -> dict:
    """What is checked of a file: how many layers have the same weights, and how the engine's logits agree."""
    figures: dict = {"remarks": []}
    if (equal := equal_weights(model, file)) is not None:
        figures["layers_equal"], figures["layers"] = equal
        if equal[0] < equal[1]:
            figures["remarks"].append("WEIGHTS DIFFER")
    else:
        figures["remarks"].append("weights can't be read back")
    kind = FORMATS[file.format]
    if kind.engine is None:
        figures["remarks"].append("runs on Apple's systems alone: read back, not run")
        return figures
    try:
        engine = load_engine(file.path, kind.engine, threads=threads)
    except ImportError as error:
        figures["remarks"].append(f"not run: {error}")
        return figures
    figures |= {"engine": engine.title} | agreement(in_batches(engine, images, BATCH), expected)
    if file.weights == "float":
        figures["remarks"].append("inputs are not rounded to integers")
    elif figures["largest_difference"] > LARGEST_DIFFERENCE:
        figures["remarks"].append("LOGITS DIFFER")
    return figures


def export_one(model, folder: Path, name: str, form: str, size: int) -> tuple[ExportedFile | None, dict]:
    """Write one file; (the file, what to record), of a package that is missing (`None`, the error)."""
    start = time.perf_counter()
    row = {"format": name, "weights": form}
    try:
        file = export_format(model, folder, name, form, image_size=size)
    except ImportError as error:
        return None, row | {"missing": str(error)}
    seconds = time.perf_counter() - start
    return file, row | {"file": file.path.relative_to(folder).as_posix(), "bytes": file.bytes, "seconds": seconds}


def show(title: str, rows: list[dict]) -> None:
    """Print a table of the files, and below it what is to be said of them and of those that were not written."""
    table = Table(title=title, title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("format", "weights", "file", "engine") else "right")
    for row in rows:
        if "missing" not in row:
            table.add_row(*cells_of(row))
    console = Console(width=None if sys.stdout.isatty() else 140, markup=False, highlight=False)
    console.print(table)
    for row in rows:
        for remark in [*row.get("remarks", []), *([row["missing"]] if "missing" in row else [])]:
            console.print(f"{row['format']}, {row['weights']}: {remark}")


def cells_of(row: dict) -> list[str]:
    """What the table shows of one file."""
    equal = f"{row['layers_equal']} of {row['layers']}" if "layers" in row else "-"
    shares = [f"{row[name]:.2f}" if name in row else "-" for name in ("agreement", "near")]
    return [row["format"], row["weights"], row["file"], f"{row['bytes']:,}", equal, row.get("engine", "-"), *shares]


def main(arguments: list[str] | None = None) -> dict:
    (args,), arguments = parse_arguments((ExportArguments,), arguments)
    source = find_checkpoint(args.model_name_or_path)
    model = load_checkpoint(source)
    require_writable(model, args)  # its errors come before any work
    size = side_of_images(args, source)
    folder = Path(args.output_dir or source)
    images = sample_images(args, source, model, size)
    expected = in_batches(load_engine(source, "pytorch", threads=args.threads), images, BATCH)
    record = {
        "command": ["recipes/export.py", *arguments],
        "seed": args.seed,
        "images": len(images),
        "image_size": size,
        "checkpoint_bytes": checkpoint_bytes(source),
        "exact_without_vnni": exact_without_vnni(model),
        "files": [],
    }
    for name, form in plan(args):
        file, row = export_one(model, folder, name, form, size)
        if file is not None:
            row |= measure(model, file, images, expected, args.threads)
        record["files"].append(row)
        write_json(args.output_json or folder / "export_results.json", record)
    title = f"{args.model_name_or_path}, {record['checkpoint_bytes']:,} bytes; compared on {len(images)} images"
    show(title, record["files"])
    require_sound(record["files"], args.formats)
    return record


def exact_without_vnni(model) -> bool | None:
    """Whether every CPU computes the same integers; `None` for a model without integers."""
    try:
        return runs_exactly_without_vnni(integer_layers(model))
    except ValueError:
        return None


def require_sound(rows: list[dict], wanted: list[str]) -> None:
    """End the process with an error if a file is wrong, or one that was asked for was not written."""
    faults = [f"{row['file']}: {remark}" for row in rows for remark in row.get("remarks", []) if remark.isupper()]
    faults += [row["missing"] for row in rows if "missing" in row and row["format"] in wanted]
    if all("missing" in row for row in rows):
        faults += [row["missing"] for row in rows]
    if faults:
        raise SystemExit("\n".join(dict.fromkeys(faults)))


if __name__ == "__main__":
    main()
