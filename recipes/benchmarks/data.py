"""Images per second that a training gets from JPEG files: our datasets against torchvision's `ImageFolder`."""

import functools
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from repvgg_hf.recipes.benchmarks.measuring import BenchmarkArguments, compare, time_alternately
from repvgg_hf.training.batches import collate, evaluation_data, training_data
from repvgg_hf.training.processors import make_processor
from repvgg_hf.training.splits import DataArguments, load_splits

OURS, TORCHVISION = "ours", "torchvision ImageFolder"
BAR = 1 / 0.95  # of the time: no less than 0.95 of its images per second
CROP_RATIO = 0.875


@dataclass
class DataBenchmarkArguments(BenchmarkArguments):
    """Options of this benchmark."""

    images: int = field(default=256, metadata={"help": "JPEG files, in four classes, of 500 x 375 pixels each."})
    image_size: int = field(default=224, metadata={"help": "Side of the images for the model in pixels."})
    batch_size: int = field(default=32, metadata={"help": "Images per batch."})
    workers: list[int] = field(
        default_factory=lambda: [0, 2], metadata={"help": "Processes that load images; each number is two runs."}
    )


def write_images(folder: Path, count: int, seed: int) -> None:
    """Write JPEG files that are about as large as ImageNet's: smooth shapes with some noise."""
    generator = np.random.default_rng(seed)
    for index in range(count):
        path = folder / f"class{index % 4}" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        shapes = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((500, 375), 3)
        noise = generator.normal(0, 12, (375, 500, 3))
        pixels = np.clip(np.asarray(shapes) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path, quality=90)


def epoch(loader: DataLoader) -> int:
    """Go through all batches once; how many images they have."""
    return sum(len(batch["pixel_values"] if isinstance(batch, dict) else batch[0]) for batch in loader)


def run(args: DataBenchmarkArguments) -> list[dict]:
    torch.set_num_threads(1)  # as in a worker
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), args.images, args.seed)
        return [run_one(args, folder, train, workers) for workers in args.workers for train in (True, False)]


def run_one(args: DataBenchmarkArguments, folder: str, train: bool, workers: int) -> dict:
    processor = make_processor(args.image_size, CROP_RATIO)
    data_args = DataArguments(validation_dir=folder, augmentation="resized_crop_flip", cache_gigabytes=0)
    split = load_splits(data_args, train=False)["validation"]
    ours = training_data(split, data_args, processor) if train else evaluation_data(split, data_args, processor)
    # what torchvision's own references do
    change = (
        [v2.RandomResizedCrop(args.image_size), v2.RandomHorizontalFlip()]
        if train
        else [v2.Resize(round(args.image_size / CROP_RATIO)), v2.CenterCrop(args.image_size)]
    )
    normalize = v2.Normalize(processor.image_mean, processor.image_std)
    transform = v2.Compose([v2.PILToTensor(), *change, v2.ToDtype(torch.float32, scale=True), normalize])
    theirs = ImageFolder(folder, v2.Compose([*change, v2.PILToTensor(), *transform.transforms[-2:]]))
    make = functools.partial(
        DataLoader, batch_size=args.batch_size, shuffle=train, num_workers=workers, persistent_workers=workers > 0
    )
    loaders = {
        OURS: make(ours, collate_fn=collate),
        TORCHVISION: make(theirs),
        f"{TORCHVISION}, tensors": make(ImageFolder(folder, transform)),
    }
    assert {epoch(loader) for loader in loaders.values()} == {args.images}
    what = "training" if train else "evaluation"
    record = compare(
        f"{what}, {args.image_size} px, {workers} workers",
        "s",
        time_alternately({name: functools.partial(epoch, loader) for name, loader in loaders.items()}, args),
        [(OURS, name, BAR) for name in list(loaders)[1:]],
    )
    medians = record["medians"]
    return record | {"images_per_second": {name: args.images / seconds for name, seconds in medians.items()}}
