"""Classes by name, of datasets and of models."""

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Sequence, Value

from repvgg_hf.training.labels import encode_labels, find_classes, match_classes


def column(values, feature) -> Dataset:
    return Dataset.from_dict({"label": values}, features=Features({"label": feature}))


def test_strings_have_one_list_over_all_splits():
    splits = {"train": column(["cow", "ant", "bee"], Value("string")), "test": column(["bee", "cow"], Value("string"))}
    classes = find_classes(splits, "label")
    assert classes == ["ant", "bee", "cow"]
    assert encode_labels(splits["test"], "label", classes, "test").tolist() == [1, 2]


@pytest.mark.parametrize(
    ("values", "classes", "labels"),
    [
        ([11, 2, 10, 1, 0, *range(3, 10)], list(range(12)), [11, 2, 10, 1, 0, *range(3, 10)]),
        ([30, 7, 100], [7, 30, 100], [1, 0, 2]),
        ([True, False], [False, True], [1, 0]),
    ],
)
def test_integers_are_sorted_by_value(values, classes, labels):
    dataset = column(values, Value("bool" if values[0] is True else "int64"))
    assert find_classes({"train": dataset}, "label") == classes
    assert encode_labels(dataset, "label", classes, "train").tolist() == labels


@pytest.mark.parametrize(
    ("values", "feature", "found"),
    [
        (["ant", None, "bee", None], Value("string"), "2 of 4 images .*null, the first in row 1"),
        (["ant", "bee", " "], Value("string"), "1 of 3 images .*' ', the first in row 2"),
        ([0, -1, 1], Value("int64"), "1 of 3 images .*-1, the first in row 1"),
        ([0, -1, 1], ClassLabel(names=["ant", "bee"]), "1 of 3 images .*-1, the first in row 1"),
        ([None, 1], ClassLabel(names=["ant", "bee"]), "1 of 2 images .*null, the first in row 0"),
    ],
)
def test_images_without_a_label_are_refused(values, feature, found):
    dataset = column(values, feature)
    classes = find_classes({"test": dataset}, "label")
    with pytest.raises(ValueError, match=f"The test split has {found}.*filter these rows out"):
        encode_labels(dataset, "label", classes, "test")
    assert None not in classes and -1 not in classes


def test_other_columns_and_names_are_refused():
    with pytest.raises(ValueError, match="'label' of the train split holds Value..float64.*--label_column_name"):
        find_classes({"train": column([0.5], Value("float64"))}, "label")
    with pytest.raises(ValueError, match="one label for each image"):
        find_classes({"train": column([[0, 1]], Sequence(ClassLabel(names=["a", "b"])))}, "label")
    splits = {name: column([0], ClassLabel(names=[name, "b"])) for name in ("train", "test")}
    with pytest.raises(ValueError, match=r"the test split \(test, b\) than in the train split \(train, b\)"):
        find_classes(splits, "label")


MODEL = ["cow", "ant", "bee"]


def test_names_find_their_places():
    assert match_classes(MODEL, ["ant", "bee", "cow"]) == [1, 2, 0]
    assert match_classes(MODEL, ["bee", "cow"]) == [2, 0]  # of a validation set that lacks a class
    assert match_classes(["crane", "ox", "crane"], ["crane", "ox", "crane"]) == [0, 1, 2]


@pytest.mark.parametrize(
    ("model", "dataset", "options", "places"),
    [
        (["LABEL_0", "LABEL_1"], ["bee", "ant"], {}, [0, 1]),
        (["bee", "ant"], ["LABEL_0", "LABEL_1"], {}, [0, 1]),
        (["bee", "ant"], ["wasp", "emmet"], {"by_position": True}, [0, 1]),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["0", "2"], {}, [0, 2]),  # integers are places
    ],
)
def test_places_count_if_there_are_no_names(model, dataset, options, places):
    assert match_classes(model, dataset, **options) == places


@pytest.mark.parametrize(
    ("model", "dataset", "options"),
    [
        (MODEL, ["ant", "bee", "dog"], {}),
        (MODEL, ["ant", "bee", "cow", "dog"], {}),
        (MODEL, ["ant", "bee"], {"all_needed": True}),
        (["LABEL_0", "LABEL_1"], ["ant", "bee", "cow"], {}),
        (MODEL, ["x", "y"], {"by_position": True}),
    ],
)
def test_other_names_are_refused_with_both_sides(model, dataset, options):
    with pytest.raises(ValueError) as error:
        match_classes(model, dataset, **options)
    assert f"The model has {len(model)} classes, the dataset {len(dataset)}" in str(error.value)
    assert ", ".join(model) in str(error.value) and ", ".join(dataset) in str(error.value)


def test_a_name_that_the_model_has_twice_is_refused():
    with pytest.raises(ValueError, match="Several classes of the model are called crane.*--labels_by_position"):
        match_classes(["crane", "ox", "crane"], ["ox", "crane"])


def test_many_names_are_cut():
    with pytest.raises(ValueError, match="and 980 more") as error:
        match_classes([f"a{index}" for index in range(1000)], [f"b{index}" for index in range(1000)])
    assert len(str(error.value)) < 2000 and np.char.count(str(error.value), "--labels_by_position") == 1
