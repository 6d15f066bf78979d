"""Images for the recipes: scikit-learn's digits (no download), a Hub dataset, a parquet folder, or an image folder."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms import InterpolationMode, v2
from transformers import BitImageProcessor

AUGMENTATIONS = ("none", "crop", "crop_flip", "resized_crop_flip")


@dataclass
class DataArguments:
    """Which images to use, named as in Transformers' `run_image_classification.py`."""

    dataset_name: str | None = field(
        default="digits",
        metadata={
            "help": "'digits' (scikit-learn's, embedded), a dataset on the Hub, or a local folder of parquet files."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset on the Hub."})
    train_dir: str | None = field(
        default=None, metadata={"help": "Training images: a folder with one folder of images per class."}
    )
    validation_dir: str | None = field(
        default=None, metadata={"help": "Evaluation images: a folder with one folder of images per class."}
    )
    train_val_split: float = field(
        default=0.2, metadata={"help": "Share of the training images to hold out if there is no evaluation split."}
    )
    image_column_name: str = field(default="image", metadata={"help": "Column with the images."})
    label_column_name: str = field(default="label", metadata={"help": "Column with the labels."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training images."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many evaluation images."})
    image_size: int | None = field(
        default=None,
        metadata={"help": "Side in pixels of the images for the model; by default the checkpoint's, 8 for digits."},
    )
    augmentation: str = field(
        default="crop", metadata={"help": f"Augmentation of training images: {', '.join(AUGMENTATIONS)}."}
    )
    cache_gigabytes: float = field(
        default=2.0,
        metadata={"help": "Keep decoded training images in memory if they fit (in qat.py), in GiB; 0 for never."},
    )

    def __post_init__(self):
        if self.augmentation not in AUGMENTATIONS:
            raise ValueError(f"--augmentation must be one of {', '.join(AUGMENTATIONS)}, got {self.augmentation!r}.")
        if self.train_dir is not None or self.validation_dir is not None:
            self.dataset_name = None


def load_digits_dataset() -> DatasetDict:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels as RGB images, every fifth one held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype("uint8")  # 0..16 gray levels
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})
    columns = {"image": [image[..., None].repeat(3, axis=2) for image in pixels], "label": digits.target.tolist()}
    dataset = Dataset.from_dict(columns, features=features)
    held_out = list(range(0, len(dataset), 5))
    train = [index for index in range(len(dataset)) if index % 5]
    return DatasetDict(train=dataset.select(train), validation=dataset.select(held_out))


def load_splits(args: DataArguments, seed: int = 0, train: bool = True) -> DatasetDict:
    """The `train` and `validation` splits, with columns checked, labels as `ClassLabel`, cut to the wanted sizes.

    Raises `ValueError` for a missing column or split, or when nothing is left.
    """
    if args.dataset_name == "digits":
        splits = load_digits_dataset()
    elif args.dataset_name is not None:
        splits = load_dataset(args.dataset_name, args.dataset_config_name)
    else:
        folders = {"train": args.train_dir, "validation": args.validation_dir}
        splits = load_dataset("imagefolder", data_files={k: f"{v}/**" for k, v in folders.items() if v})
    held_out = next((name for name in ("validation", "test", "valid") if name in splits), None)
    if "train" not in splits and (train or held_out is None):
        raise ValueError(
            f"The dataset has no 'train' split, only {', '.join(splits)}: give --train_dir or another one."
        )
    check_columns(next(iter(splits.values())), args)
    if not isinstance(next(iter(splits.values())).features[args.label_column_name], ClassLabel):
        splits = splits.class_encode_column(args.label_column_name)
    if held_out is None:
        parts = splits["train"].train_test_split(args.train_val_split, seed=seed)
        splits = DatasetDict(train=parts["train"], validation=parts["test"])
    else:
        splits = DatasetDict({"validation": splits[held_out]} | ({"train": splits["train"]} if train else {}))
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples}
    for name, limit in limits.items():
        if limit is not None and name in splits:
            splits[name] = splits[name].shuffle(seed=seed).select(range(min(limit, len(splits[name]))))
    for name, split in splits.items():
        if len(split) == 0:
            option = "--max_train_samples" if name == "train" else "--max_eval_samples"
            raise ValueError(f"The {name} split is empty: check {option} and the dataset's files.")
    return splits


def check_columns(dataset: Dataset, args: DataArguments) -> None:
    """Raise `ValueError` if the image or label column is missing."""
    for option in ("image_column_name", "label_column_name"):
        column = getattr(args, option)
        if column not in dataset.column_names:
            raise ValueError(
                f"--{option} is {column!r}, but the dataset's columns are {', '.join(dataset.column_names)}: name one."
            )


def label_names(dataset: Dataset, args: DataArguments) -> list[str]:
    """The names of the classes, in the order of their labels."""
    return dataset.features[args.label_column_name].names


def make_processor(image_size: int) -> BitImageProcessor:
    """The image processor that is saved with a model: resize the short side, crop the center, normalize to mean 0."""
    return BitImageProcessor(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        resample=2,  # bilinear
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


def with_pixel_values(dataset: Dataset, args: DataArguments, processor, train: bool) -> Dataset:
    """`dataset` that yields `pixel_values` `[3, size, size]` and `labels`; augmented if `train`."""
    size = processor.crop_size["height"]
    augment = {
        "none": [v2.Resize(size, InterpolationMode.BILINEAR), v2.CenterCrop(size)],
        "crop": [v2.Resize(size, InterpolationMode.BILINEAR), v2.RandomCrop(size, padding=max(1, size // 8))],
        "resized_crop_flip": [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()],
    }
    augment["crop_flip"] = [*augment["crop"], v2.RandomHorizontalFlip()]
    transform = v2.Compose(
        [
            v2.ToImage(),
            *augment[args.augmentation if train else "none"],
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(processor.image_mean, processor.image_std),
        ]
    )

    def apply(examples):
        images = [transform(image.convert("RGB")) for image in examples[args.image_column_name]]
        return {"pixel_values": images, "labels": examples[args.label_column_name]}

    return dataset.with_transform(apply)


class CachedImages(TorchDataset):
    """All images of `dataset`, decoded once to uint8 `[images, 3, size, size]`: resized, then cropped to the center."""

    def __init__(self, dataset: Dataset, args: DataArguments, processor):
        size = processor.crop_size["height"]
        fit = v2.Compose([v2.ToImage(), v2.Resize(size, InterpolationMode.BILINEAR), v2.CenterCrop(size)])
        self.images = torch.empty(len(dataset), 3, size, size, dtype=torch.uint8)
        for index, image in enumerate(dataset[args.image_column_name]):
            self.images[index] = fit(image.convert("RGB"))
        self.labels = torch.tensor(dataset[args.label_column_name])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """Return a whole batch at once: `pixel_values` uint8 `[batch, 3, size, size]`, `labels` int64 `[batch]`."""
        indices = torch.tensor(indices)
        return {"pixel_values": self.images[indices], "labels": self.labels[indices]}


class BatchTransform:
    """The `collate_fn` for [`CachedImages`]: augments and normalizes a whole batch, each image in its own way."""

    def __init__(self, args: DataArguments, processor):
        size = processor.crop_size["height"]
        self.padding = max(1, size // 8) if "crop" in args.augmentation else 0
        self.flip = args.augmentation.endswith("flip")
        mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
        # factor * image + offset normalizes an image from 0 to 255
        self.factor, self.offset = (1 / (255 * std)).view(3, 1, 1), (-mean / std).view(3, 1, 1)

    def __call__(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        images = batch["pixel_values"]
        if self.padding:
            images = self.random_crop(images)
        pixel_values = images.contiguous(memory_format=torch.channels_last) * self.factor + self.offset
        return {"pixel_values": pixel_values, "labels": batch["labels"]}

    def random_crop(self, images: torch.Tensor) -> torch.Tensor:
        """Move each of the square `images` `[batch, 3, size, size]` by up to `padding` pixels, and flip it perhaps."""
        count, _, size, _ = images.shape
        padded = F.pad(images, [self.padding] * 4)
        corners = torch.randint(2 * self.padding + 1, (2, count, 1))
        rows, columns = corners + torch.arange(size)  # [batch, size] each
        if self.flip:
            columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
        images_last = padded.permute(0, 2, 3, 1)[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None]]
        return images_last.permute(0, 3, 1, 2)


def training_data(dataset: Dataset, args: DataArguments, processor):
    """Return (dataset, collate_fn) for a `DataLoader`: a cache of decoded images if they fit `--cache_gigabytes`."""
    size = processor.crop_size["height"]
    fits = len(dataset) * 3 * size**2 <= args.cache_gigabytes * 2**30
    if fits and args.augmentation != "resized_crop_flip":  # that one needs the whole image
        return CachedImages(dataset, args, processor), BatchTransform(args, processor)
    return with_pixel_values(dataset, args, processor, train=True), collate


def calibration_images(train_split: Dataset, count: int, args: DataArguments, processor, seed: int) -> Dataset:
    """`count` images of the training split, chosen at random, as in evaluation; fewer if there are no more."""
    chosen = train_split.shuffle(seed=seed).select(range(min(count, len(train_split))))
    return with_pixel_values(chosen, args, processor, train=False)


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    """Stack examples: `pixel_values` `[batch, 3, size, size]`, `labels` int64 `[batch]`."""
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }
