"""The pictures of a recipe: which ones, their splits and classes."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict

from repvgg_hf.training.labels import check_trained, encode_labels, find_classes, match_classes
from repvgg_hf.training.sources import load_digits_dataset, load_image_folders, load_named_dataset, undecoded

AUGMENTATIONS = ("none", "crop", "crop_flip", "resized_crop_flip", "photo")
HELD_OUT = ("validation", "test", "valid", "val")  # what a split to evaluate on is called, the first that is there


# what a command's first argument without a name is: see OptionParser
FOLDER = ("folder", "Pictures: one folder per class, or such folders in train/ and val/.", "dataset_name")


@dataclass
class DataArguments:
    """Which images to use, named as in Transformers' `run_image_classification.py`."""

    # options that `--help-all` shows, and `--help` does not
    RARE = (
        "dataset_config_name", "image_column_name", "label_column_name", "labels_by_position", "max_train_samples",
        "max_eval_samples", "crop_ratio", "cache_gigabytes",
    )  # fmt: skip

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "'digits' (scikit-learn's, embedded, the default), a dataset on the Hub, or a local folder of "
            "parquet or other files."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset on the Hub."})
    train_dir: str | None = field(
        default=None, metadata={"help": "Training images: a folder with one folder of images per class."}
    )
    validation_dir: str | None = field(
        default=None, metadata={"help": "Evaluation images: a folder with one folder of images per class."}
    )
    validation_split_name: str | None = field(
        default=None,
        metadata={
            "help": "Split to evaluate on, by default validation or test if there is one; 'none' to hold out training "
            "images."
        },
    )
    train_val_split: float = field(
        default=0.2, metadata={"help": "Share of the training images to hold out if there is no evaluation split."}
    )
    image_column_name: str = field(default="image", metadata={"help": "Column with the images."})
    label_column_name: str = field(default="label", metadata={"help": "Column with the labels."})
    labels_by_position: bool = field(
        default=False,
        metadata={"help": "Take the dataset's classes for the checkpoint's in their order, whatever their names."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training images."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many evaluation images."})
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Side in pixels of the images for the model; by default the checkpoint's, 8 for digits, and what "
            "the pictures have where train.py makes a new model of them."
        },
    )
    crop_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Side of the crop as a share of the short side that images are resized to before it, such as 0.875 "
            "for 224 of 256; by default the checkpoint's, 1 for a new model."
        },
    )
    augmentation: str = field(
        default="crop",
        metadata={
            "help": f"Augmentation of training images: {', '.join(AUGMENTATIONS)}; train.py takes photo for pictures."
        },
    )
    cache_gigabytes: float = field(
        default=2.0,
        metadata={"help": "Keep decoded images in memory if they fit, in GiB for all of a recipe's; 0 for never."},
    )

    def __post_init__(self):
        if self.augmentation not in AUGMENTATIONS:
            raise ValueError(f"--augmentation must be one of {', '.join(AUGMENTATIONS)}, got {self.augmentation!r}.")
        if self.crop_ratio is not None and not 0 < self.crop_ratio <= 1:
            raise ValueError(f"--crop_ratio must be above 0 and at most 1, got {self.crop_ratio}.")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"--image_size must be at least 1, got {self.image_size}.")
        folders = [name for name in ("train_dir", "validation_dir") if getattr(self, name) is not None]
        if folders and self.dataset_name is not None:
            raise ValueError(
                f"--{folders[0]} {getattr(self, folders[0])} and --dataset_name {self.dataset_name} both say which "
                "images to use: give one of them."
            )
        if not folders and self.dataset_name is None:
            self.dataset_name = "digits"


def check_picture_folder(args: DataArguments, given: set[str]) -> None:
    """Raise `ValueError` if a folder of pictures is among the options that were `given`, and is not there."""
    if FOLDER[0] in given and not Path(args.dataset_name).is_dir():
        raise ValueError(
            f"There is no folder {args.dataset_name}: give a folder with one folder of pictures per class, or a "
            "dataset on the Hub with --dataset_name."
        )


@dataclass(frozen=True)
class ImageSplit:
    """The images of one split and their classes.

    Attributes:
        source: the dataset's split that the images are from, such as `train`.
        numbers: int64 `[images]`, their rows there.
        rows: of which `column` holds the images as files, see `open_image`.
        column: the column of images.
        labels: int64 `[images]`, places in `classes`.
        classes: names of the classes.
        folder: what paths of images may be relative to.
    """

    source: str
    numbers: np.ndarray
    rows: Dataset
    column: str
    labels: np.ndarray
    classes: list[str]
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, places: Sequence[int]) -> "ImageSplit":
        """The images at these places, in this order."""
        places = np.asarray(places, dtype=np.int64)
        return replace(self, rows=self.rows.select(places), labels=self.labels[places], numbers=self.numbers[places])

    def where(self, place: int) -> str:
        """Say where in the dataset, which somebody may want to correct, the image at this place is."""
        return f"Image {self.numbers[place]} of the {self.source} split, column {self.column!r}"

    def sample(self, count: int, seed: int) -> "ImageSplit":
        """`count` images chosen at random; all of them, in a random order, if there are no more."""
        return self.select(_places(len(self)).shuffle(seed=seed)["place"][:count])

    def hold_out(self, share: float, seed: int) -> "tuple[ImageSplit, ImageSplit]":
        """Two random parts, of which the second is `share` of the images."""
        parts = _places(len(self)).train_test_split(share, seed=seed)
        return self.select(parts["train"]["place"]), self.select(parts["test"]["place"])


def _places(images: int) -> Dataset:
    """A dataset of the numbers of images, to be shuffled as the images would be."""
    return Dataset.from_dict({"place": range(images)})


def load_splits(args: DataArguments, seed: int = 0, train: bool = True) -> dict[str, ImageSplit]:
    """The `train` and `validation` splits, with columns checked and labels encoded alike, cut to the wanted sizes.

    Without `train` there is the `validation` split only, for which the training images may be missing. Raises
    `ValueError` for a missing column or split, an image without label, or when nothing is left.
    """
    image_column, label_column = columns = (args.image_column_name, args.label_column_name)
    if args.dataset_name == "digits":
        loaded = load_digits_dataset()
    elif args.dataset_name is not None:
        loaded = load_named_dataset(args.dataset_name, args.dataset_config_name, columns)
    else:
        folders = {"train": args.train_dir, "validation": args.validation_dir}
        loaded = load_image_folders({name: folder for name, folder in folders.items() if folder}, columns)
    held_out = find_held_out(loaded, args.validation_split_name)
    if "train" not in loaded and (train or held_out is None):
        raise ValueError(
            f"The dataset has no 'train' split, only {', '.join(loaded)}: give --train_dir or another dataset."
        )
    for dataset in loaded.values():
        check_columns(dataset, args)
    classes = find_classes(loaded, label_column)
    wanted = {"train": "train"} if train or held_out is None else {}
    wanted |= {"validation": held_out} if held_out else {}
    splits = {name: _encode(loaded[found], found, classes, args) for name, found in wanted.items()}
    if held_out is None:
        _check_share(args, len(splits["train"]))
        splits["train"], splits["validation"] = splits["train"].hold_out(args.train_val_split, seed)
    elif train and not has_names(loaded["train"], args):
        check_trained(
            splits["train"].labels, splits["validation"].labels, splits["train"].classes, held_out, label_column
        )
    if not train:
        splits.pop("train", None)
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples}
    for name, split in splits.items():
        if limits[name] is not None:
            splits[name] = split.sample(limits[name], seed)
        if len(splits[name]) == 0:
            option = "--max_train_samples" if name == "train" else "--max_eval_samples"
            raise ValueError(f"The {name} split is empty: check {option} and the dataset's files.")
    if train and len(splits["train"].classes) < 2:
        raise ValueError(
            f"The training images are all of one class, {splits['train'].classes[0]!r} in the column {label_column!r}: "
            "a classifier needs two or more; in an image folder each has a folder of its own."
        )
    return splits


def _encode(dataset: Dataset, name: str, classes: list, args: DataArguments) -> ImageSplit:
    labels = encode_labels(dataset, args.label_column_name, classes, name)
    rows = undecoded(dataset.select_columns([args.image_column_name]), args.image_column_name)
    folder = Path(args.dataset_name) if args.dataset_name is not None and Path(args.dataset_name).is_dir() else None
    return ImageSplit(
        source=name,
        numbers=np.arange(len(labels)),
        rows=rows,
        column=args.image_column_name,
        labels=labels,
        classes=[str(value) for value in classes],
        folder=folder,
    )


def has_names(dataset: Dataset, args: DataArguments) -> bool:
    """Whether somebody wrote a list of the classes, so that one without a training image is no slip."""
    return isinstance(dataset.features[args.label_column_name], ClassLabel) and args.dataset_name is not None


def find_held_out(splits: DatasetDict, wanted: str | None) -> str | None:
    """The name of the split to evaluate on, `None` if training images are to be held out.

    Raises `ValueError` if there is none of the `wanted` name.
    """
    if wanted == "none":
        return None
    if wanted is not None and (wanted not in splits or wanted == "train"):
        raise ValueError(
            f"--validation_split_name is {wanted!r}, but the splits are {', '.join(splits)}: name another."
        )
    return wanted or next((name for name in HELD_OUT if name in splits), None)


def check_columns(dataset: Dataset, args: DataArguments) -> None:
    """Raise `ValueError` if the image or label column is missing."""
    for option in ("image_column_name", "label_column_name"):
        column = getattr(args, option)
        if column not in dataset.column_names:
            raise ValueError(
                f"--{option} is {column!r}, but the dataset's columns are {', '.join(dataset.column_names)}: name one."
            )


def _check_share(args: DataArguments, images: int) -> None:
    share = args.train_val_split
    if not 0 < share < 1 or images < 2:
        raise ValueError(
            f"--train_val_split {share} of {images} training images can't be held out for evaluation: give a share "
            "between 0 and 1 of two or more images, or --validation_dir."
        )


def align_splits(splits: dict[str, ImageSplit], config, args: DataArguments) -> dict[str, ImageSplit]:
    """The splits with the classes of the model that `config` configures, in its order.

    Raises `ValueError` that lists both sides if they don't match, see [`match_classes`].
    """
    names = model_classes(config)
    aligned = {}
    for name, split in splits.items():
        places = np.array(match_classes(names, split.classes, by_position=args.labels_by_position), dtype=np.int64)
        aligned[name] = replace(split, labels=places[split.labels], classes=names)
    return aligned


def model_classes(config) -> list[str]:
    """The names of a model's classes, in the order of its logits."""
    return [config.id2label.get(place, f"LABEL_{place}") for place in range(config.num_labels)]
