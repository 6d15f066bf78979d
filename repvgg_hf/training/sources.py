"""Where pictures come from: scikit-learn's digits (no download), a dataset of the Hub, local files, image folders."""

import glob
import os
import re
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset
from PIL import Image as PILImage

# parts of names of files and folders that tell a split, as in `datasets`
SPLIT_WORDS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
_TABLES = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json", ".arrow": "arrow"}


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


def load_named_dataset(name: str, configuration: str | None, columns: tuple[str, str]) -> DatasetDict:
    """The splits of a dataset on the Hub, or of a local folder of tables or images.

    In a folder without tables the images are in a folder for each class, perhaps in a folder for each split before;
    `columns` are then the names of the image column and the label column. Raises `ValueError` for a path that does not
    exist.
    """
    folder = Path(name)
    if not folder.is_dir():
        if folder.is_absolute() or name.startswith((".", "~")) or name.endswith(os.sep):
            raise ValueError(f"--dataset_name {name} does not exist: give a folder that does, or a dataset on the Hub.")
        return load_dataset(name, configuration)
    tables = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in _TABLES and path.is_file()]
    if not tables:
        return load_image_folders(split_folders(folder), columns)
    if glob.escape(name) == name:
        return load_dataset(name, configuration)
    # `datasets` takes the path for a pattern
    kinds = {_TABLES[path.suffix.lower()] for path in tables}
    if len(kinds) > 1:
        raise ValueError(f"--dataset_name {name} has files of several kinds, {', '.join(sorted(kinds))}: keep one.")
    files: dict[str, list[str]] = {}
    for path in tables:
        files.setdefault(_split_of(path.relative_to(folder)), []).append(glob.escape(str(path)))
    return load_dataset(kinds.pop(), data_files=files)


def _split_of(path: Path) -> str:
    words = re.split(r"[^a-z0-9]+", str(path).lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "train")


def split_folders(folder: Path) -> dict[str, Path]:
    """The folder of each split of an image folder: those below it that are called so, or else itself for `train`."""
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))
    below = {SPLIT_WORDS.get(path.name.lower()): path for path in folders}
    return {"train": folder} if None in below or not below else below


def load_image_folders(folders: dict[str, str | Path], columns: tuple[str, str]) -> DatasetDict:
    """Images in a folder for each class, however deep below it.

    Args:
        folders: the folder of each split.
        columns: what to call the column of images and that of labels.

    Raises `ValueError` for a folder that does not exist or has no such images.
    """
    found = {split: _images_below(split, Path(folder)) for split, folder in folders.items()}
    names = sorted({name for images in found.values() for name in images})
    features = Features({columns[0]: Image(), columns[1]: ClassLabel(names=names)})
    splits = DatasetDict()
    for split, images in found.items():
        paths = [path for name in images for path in images[name]]
        labels = [names.index(name) for name in images for _ in images[name]]
        splits[split] = Dataset.from_dict({columns[0]: paths, columns[1]: labels}, features=features)
    return splits


def _images_below(split: str, folder: Path) -> dict[str, list[str]]:
    """The sorted paths of the images of each class, by its name."""
    where = f"The {split} folder {folder}"
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"{where} {what}: give a folder with one folder of images for each class.")
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))
    if classes and all(path.name.lower() in SPLIT_WORDS for path in classes):
        options = " ".join(f"--{SPLIT_WORDS[path.name.lower()]}_dir {path}" for path in classes)
        options = options.replace("--test", "--validation")
        raise ValueError(f"{where} has a folder for each split, not for each class: give {options}.")
    endings = {ending for ending, kind in PILImage.registered_extensions().items() if kind in PILImage.OPEN}
    images = {path.name: _files_below(path, endings) for path in classes}
    empty = [name for name, paths in images.items() if not paths]
    if empty and (split == "train" or len(empty) == len(images)):
        raise ValueError(
            f"{where} has no images in {', '.join(map(repr, empty[:5]))}: remove the folder, or store images with an "
            "ending that PIL opens, such as .png or .jpg."
        )
    if not images:
        loose = len(_files_below(folder, endings))
        raise ValueError(
            f"{where} has no folders but {loose} images: put the images of each class into a folder that is called as "
            "the class is."
        )
    return {name: paths for name, paths in images.items() if paths}


def _files_below(folder: Path, endings: set[str]) -> list[str]:
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        found += [
            os.path.join(parent, name)
            for name in sorted(files)
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in endings
        ]
    return found


def undecoded(dataset: Dataset, column: str) -> Dataset:
    """`dataset` with the images in `column` as files or bytes, for `open_image`.

    Raises `ValueError` if the column holds anything else.
    """
    feature = dataset.features[column]
    if isinstance(feature, Image):
        return dataset.cast_column(column, Image(decode=False))
    is_file = isinstance(feature, Value) and feature.dtype in ("string", "large_string", "binary", "large_binary")
    if is_file or (isinstance(feature, dict) and feature.keys() & {"bytes", "path"}):
        return dataset
    raise ValueError(
        f"The column {column!r} holds {feature}, not images, paths or the bytes of image files: choose another "
        "--image_column_name, or cast it to datasets.Image()."
    )
