"""Classify pictures with a checkpoint, or with a file for an engine: the five likeliest classes of each.

    python recipes/predict.py cat.jpg --model outputs/quantize/cluster-per_tensor-scale-w4
    python recipes/predict.py cat.jpg dog.jpg --model my-model/onnx/model_q4.onnx --threads 1
    python recipes/predict.py pictures/ --model my-model/openvino/openvino_model.xml --csv predictions.csv
    python recipes/predict.py cat.jpg --model my-model --engine onnxruntime --json

Names of classes and the image processor are read from the checkpoint's folder that the file is in or beside. Times are
those of a picture, with and without reading and preparing it, which is most of it for small networks. Needs
`pip install 'repvgg-hf[train]'`, and the extra of the engine.
"""

import csv
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import AutoImageProcessor

from repvgg_hf.interop.engines import ENGINES, Engine, load_engine
from repvgg_hf.training.arguments import OptionParser
from repvgg_hf.training.images import open_image
from repvgg_hf.training.report import masked, write_json

BAR = 30  # characters of a probability of 1
SHOWN = 20  # pictures, of which all predictions are printed; of more only the first


@dataclass
class PredictArguments:
    """Options that say which model classifies, and what to print."""

    model: str = field(
        metadata={"help": "A checkpoint: folder or Hub id; or a file: .onnx, OpenVINO's .xml, .pt2, .pte, .tflite."}
    )
    engine: str | None = field(
        default=None,
        metadata={"help": f"What runs it: {', '.join(ENGINES)}; by default that of the file's kind, or PyTorch."},
    )
    processor: str | None = field(
        default=None, metadata={"help": "Folder with the image processor, if it is not beside the model."}
    )
    top: int = field(default=5, metadata={"help": "How many classes to name for each picture."})
    batch_size: int = field(default=1, metadata={"help": "Pictures in a call of the engine."})
    threads: int | None = field(default=None, metadata={"help": "Threads of the engine, which chooses by default."})
    json: bool = field(default=False, metadata={"help": "Print JSON and nothing else."})
    csv: str | None = field(
        default=None, metadata={"help": "Write the predictions to this CSV file, a line for each picture and class."}
    )
    output_json: str | None = field(default=None, metadata={"help": "Write the figures to this JSON file, too."})

    def __post_init__(self):
        for name in ("top", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")


def list_pictures(entries: Sequence[str]) -> list[Path]:
    """The files that are meant: those named, and all pictures in the folders named, in order.

    Raises `ValueError` for one that is not there, and for a folder without pictures.
    """
    known, found = Image.registered_extensions(), []
    for entry in map(Path, entries):
        if entry.is_dir():
            inside = [path for path in sorted(entry.rglob("*")) if path.suffix.lower() in known and path.is_file()]
            if not inside:
                raise ValueError(f"{entry} has no pictures: give a folder with files that PIL opens, such as .jpg.")
            found += inside
        elif entry.is_file():
            found.append(entry)
        else:
            raise ValueError(f"The picture {entry} does not exist: correct its path.")
    return found


def read(path: Path, mode: str = "RGB") -> Image.Image:
    """A picture, upright. Raises `ValueError` naming the file if it is none."""
    return open_image(str(path), mode, "The picture")


def prepare(path: Path, processor) -> np.ndarray:
    """A picture as the model sees it, float32 `[channels, height, width]`."""
    gray = len(getattr(processor, "image_mean", None) or [0] * 3) == 1 and not getattr(processor, "do_convert_rgb", 0)
    image = read(path, "L" if gray else "RGB")
    return np.asarray(processor(image, return_tensors="pt")["pixel_values"][0], dtype=np.float32)


def load_processor(name: str | Path):
    """An image processor. Raises `ValueError` naming the folder or Hub id that has none."""
    try:
        return AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{name} has no image processor ({reason:.300}): give a folder or Hub id with a preprocessor_config.json."
        ) from error


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities `[images, classes]`."""
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def name_of(engine: Engine, index: int) -> str:
    """The name of a class; its number where no names are known."""
    return engine.labels[index] if engine.labels is not None and index < len(engine.labels) else f"class {index}"


def likeliest(engine: Engine, probabilities: np.ndarray, top: int) -> list[dict]:
    """The first classes of one picture."""
    order = np.argsort(-probabilities, kind="stable")[:top]
    return [
        {"class": int(index), "label": name_of(engine, int(index)), "probability": float(probabilities[index])}
        for index in order
    ]


def predict(engine: Engine, pictures: list[Path], args: PredictArguments) -> tuple[list[dict], dict, list[str]]:
    """The predictions for each picture, the medians of the times of one in milliseconds, and why others can't be read.

    Raises `ValueError` if none can be read.
    """
    if engine.takes_pictures:  # of any size, so one at a time
        batch_size, processor = 1, None
    else:
        batch_size = args.batch_size
        processor = engine.processor() if args.processor is None else load_processor(args.processor)
    rows, preparing, running, unread = [], [], [], []
    for first in range(0, len(pictures), batch_size):
        start, parts = time.perf_counter(), {}
        for path in pictures[first : first + batch_size]:
            try:
                parts[path] = np.asarray(read(path)) if processor is None else prepare(path, processor)
            except ValueError as error:
                unread.append(str(error))
        if not parts:
            continue
        paths, images = list(parts), np.stack(list(parts.values()))
        prepared = time.perf_counter()
        if not rows:
            engine(images)  # lazy initialization is no time of a picture
        before = time.perf_counter()
        logits = engine(images)
        running += [(time.perf_counter() - before) / len(paths)] * len(paths)
        preparing += [(prepared - start) / len(paths)] * len(paths)
        for path, probabilities in zip(paths, softmax(logits)):
            rows.append({"image": str(path), "predictions": likeliest(engine, probabilities, args.top)})
    if not rows:
        raise ValueError("\n".join(unread))
    both = [sum(pair) for pair in zip(preparing, running)]
    times = {"prepared_and_run": both, "run": running}
    return rows, {name: 1000 * statistics.median(seconds) for name, seconds in times.items()}, unread


def show(record: dict) -> None:
    """Print a table of the predictions, with bars, and the times."""
    few = len(record["results"]) <= SHOWN
    table = Table(title=f"{record['model']}, {record['engine']}", title_justify="left")
    for heading, justify in (("picture", "left"), ("class", "left"), ("probability", "right"), ("", "left")):
        table.add_column(heading, justify=justify, overflow="fold")
    for row in record["results"]:
        for place, entry in enumerate(row["predictions"][: None if few else 1]):
            percent, bar = f"{100 * entry['probability']:.2f} %", "█" * round(BAR * entry["probability"])
            table.add_row("" if place else row["image"], entry["label"], percent, bar)
        if few:
            table.add_section()
    console = Console(width=None if sys.stdout.isatty() else 120, markup=False, highlight=False)
    console.print(table)
    times = record["milliseconds"]
    console.print(
        f"{times['prepared_and_run']:.2f} ms a picture, of which the engine takes {times['run']:.2f} ms and reading "
        "and preparing it the rest (medians)."
    )


def write_csv(path: str, rows: list[dict]) -> None:
    """Write a line for each picture and class."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "rank", "class", "label", "probability"])
        for row in rows:
            for rank, entry in enumerate(row["predictions"], 1):
                writer.writerow([row["image"], rank, entry["class"], entry["label"], entry["probability"]])


def main(arguments: list[str] | None = None) -> dict:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = OptionParser((PredictArguments,))
    parser.usage = f"{parser.prog} IMAGE ... --model MODEL [--option value ...]"
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="Pictures, and folders of them.")
    found, _ = parser.parse(arguments)
    args = PredictArguments(**{entry.name: getattr(found, entry.name) for entry in fields(PredictArguments)})
    pictures = list_pictures(found.images)
    engine = load_engine(args.model, args.engine, threads=args.threads)
    rows, milliseconds, unread = predict(engine, pictures, args)
    record = {
        "command": ["recipes/predict.py", *masked(arguments)],
        "model": args.model,
        "engine": engine.title,
        "threads": args.threads,
        "machine": platform.machine(),
        "milliseconds": milliseconds,
        "results": rows,
        "unread": unread,
    }
    if args.csv is not None:
        write_csv(args.csv, rows)
    if args.output_json is not None:
        write_json(args.output_json, record)
    if args.json:
        print(json.dumps(record, indent=2, ensure_ascii=False))
    else:
        show(record)
    if unread:
        raise ValueError("\n".join(unread))
    return record


if __name__ == "__main__":
    main()
