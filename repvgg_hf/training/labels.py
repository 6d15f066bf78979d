"""Classes by name: one list for all splits of a dataset, and where each of them is in a model."""

import re
from collections.abc import Mapping

import numpy as np
from datasets import ClassLabel, Dataset, Value

LISTED = 20  # names that an error shows of each side

_CURE = "filter these rows out, or evaluate on images with labels: --validation_split_name or --validation_dir"


def find_classes(splits: Mapping[str, Dataset], column: str) -> list:
    """The classes of all splits, in the order of their labels: the names of a `ClassLabel`, or else all values.

    Strings are sorted, integers too, by value; integers that are 0 to n - 1 so keep their place. Raises `ValueError`
    if the column holds neither, or if the splits disagree about the names.
    """
    features = {split: dataset.features[column] for split, dataset in splits.items()}
    named = {split: feature.names for split, feature in features.items() if isinstance(feature, ClassLabel)}
    if len(named) == len(features):
        (first, names), *others = named.items()
        for split, other in others:
            if other != names:
                raise ValueError(
                    f"The column {column!r} has other classes in the {split} split ({shown(other)}) than in the "
                    f"{first} split ({shown(names)}): cast both to the same ClassLabel."
                )
        return names
    for split, feature in features.items():
        known = isinstance(feature, Value) and re.fullmatch(r"u?int\d+|bool|(large_)?string|null", feature.dtype)
        if not known:
            raise ValueError(
                f"The column {column!r} of the {split} split holds {feature}, expected one label for each image, an "
                "integer, a string or a ClassLabel: choose another --label_column_name, or cast the column."
            )
    values = {value for dataset in splits.values() for value in dataset.unique(column)}
    values = {value for value in values if not _is_missing(value)}
    if len({type(value) for value in values}) > 1:
        raise ValueError(f"The column {column!r} holds integers in one split and strings in another: cast one of them.")
    return sorted(values)


def encode_labels(dataset: Dataset, column: str, classes: list, split: str) -> np.ndarray:
    """The labels of a split, int64 `[images]`: places in `classes`, which [`find_classes`] found.

    Raises `ValueError` that names split and column for images without a label: null, an empty string, -1.
    """
    values = list(dataset[column])
    missing = [index for index, value in enumerate(values) if _is_missing(value)]
    if missing:
        example = values[missing[0]]
        raise ValueError(
            f"The {split} split has {len(missing)} of {len(values)} images without a label in the column {column!r} "
            f"({'null' if example is None else repr(example)}, the first in row {missing[0]}): {_CURE}."
        )
    if isinstance(dataset.features[column], ClassLabel):
        labels = np.array(values, dtype=np.int64)
        if len(labels) and labels.max() >= len(classes):
            raise ValueError(
                f"The {split} split has the label {labels.max()} in the column {column!r}, which has {len(classes)} "
                "names: correct the label, or give the ClassLabel all names."
            )
        return labels
    places = {value: place for place, value in enumerate(classes)}
    return np.array([places[value] for value in values], dtype=np.int64)


def _is_missing(value) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or value < 0


def check_trained(labels: np.ndarray, other: np.ndarray, names: list[str], split: str, column: str) -> None:
    """Raise `ValueError` if a split has classes, not only names, that no training image has.

    `labels` are those of the training split and `other` those of `split`.
    """
    unknown = [names[label] for label in np.setdiff1d(other, labels)]
    if unknown:
        raise ValueError(
            f"The {split} split has labels in the column {column!r} that no training image has: {shown(unknown)}; "
            f"those of training are {shown([names[label] for label in np.unique(labels)])}. Correct them, or leave "
            "these images out."
        )


def are_places(names: list[str]) -> bool:
    """Whether `names` name nothing: `LABEL_0`, `LABEL_1`, ..., as a configuration has where none are given."""
    return all(name == f"LABEL_{place}" for place, name in enumerate(names))


def match_classes(
    model: list[str], dataset: list[str], *, by_position: bool = False, all_needed: bool = False
) -> list[int]:
    """The place in a model of each class of a dataset.

    Classes are the same if they have the same name. Places count only if the names of one side are `LABEL_0`,
    `LABEL_1`, ..., and with `by_position`.

    Args:
        model: names of the model's classes.
        dataset: names of the dataset's.
        by_position: whether the places count, whatever the names.
        all_needed: whether the dataset must have every class of the model.

    Raises `ValueError` that lists both sides if the classes don't match.
    """
    if model == dataset:
        return list(range(len(model)))
    if by_position or are_places(model) or are_places(dataset):
        values = [int(name) for name in dataset if name.isdecimal()]
        if len(values) == len(dataset) and are_places(model) and max(values) < len(model) and not all_needed:
            return values  # integers are places themselves, also where some are missing
        if len(model) == len(dataset):
            return list(range(len(model)))
    elif set(dataset) <= set(model) and not (all_needed and set(model) - set(dataset)):
        twice = sorted({name for name in dataset if model.count(name) > 1})
        if not twice:
            return [model.index(name) for name in dataset]
        raise ValueError(f"{_both(model, dataset)} Several classes of the model are called {shown(twice)}: {_PLACES}.")
    only_model, only_dataset = ([name for name in a if name not in b] for a, b in ((model, dataset), (dataset, model)))
    raise ValueError(
        f"{_both(model, dataset)} Only in the model: {shown(only_model)}; only in the dataset: {shown(only_dataset)}. "
        "Choose the dataset that the model was trained on, or another --label_column_name, or rename one side"
        + (f", or {_PLACES}." if len(model) == len(dataset) else ".")
    )


_PLACES = "if they have the same places, pass --labels_by_position True"


def _both(model: list[str], dataset: list[str]) -> str:
    return (
        f"The model has {len(model)} classes, the dataset {len(dataset)}, and they don't match. The model's are "
        f"{shown(model)}; the dataset's are {shown(dataset)}."
    )


def shown(names: list[str]) -> str:
    """The names for an error, as many as one can read."""
    if not names:
        return "none"
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(map(str, names[:LISTED])) + more
