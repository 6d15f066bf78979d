"""Data sources and splits, and what they say to bad input."""

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value

from repvgg_hf.runtime.configuration_repvgg import RepVGGConfig
from repvgg_hf.training.images import open_image
from repvgg_hf.training.splits import DataArguments, align_splits, load_splits


@pytest.fixture
def tables(tmp_path, make_images):
    """`tables(labels of each split, feature)`: a folder of parquet files."""

    def make(splits: dict, label=None, name="tables", image=None):
        folder = tmp_path / name
        folder.mkdir()
        for split, labels in splits.items():
            features = Features({"image": image or Image(), "label": label or Value("string")})
            dataset = Dataset.from_dict({"image": make_images(len(labels)), "label": labels}, features=features)
            dataset.to_parquet(folder / f"{split}-00000-of-00001.parquet")
        return str(folder)

    return make


def first_image(split):
    return open_image(split.rows[0][split.column], "RGB", "first", split.folder)


def test_digits_are_complete_and_disjoint():
    from sklearn.datasets import load_digits

    splits = load_splits(DataArguments())
    assert len(splits["train"]) == 1437 and len(splits["validation"]) == 360
    assert splits["train"].classes == [str(digit) for digit in range(10)]
    digits = load_digits()
    held_out = splits["validation"].select([7])  # every fifth one
    assert np.array_equal(np.asarray(first_image(held_out))[..., 0], (digits.images[35] * 255 / 16).round())
    assert held_out.labels.tolist() == [digits.target[35]]


def test_parquet_folder_with_its_own_column_names(tables):
    folder = tables({"train": ["cat", "dog"] * 4, "test": ["dog", "cat"]})
    args = DataArguments(dataset_name=folder)
    splits = load_splits(args)
    assert len(splits["train"]) == 8 and splits["validation"].labels.tolist() == [1, 0]
    assert splits["train"].classes == ["cat", "dog"]
    for option, message in (("image_column_name", "image, label"), ("label_column_name", "image, label")):
        with pytest.raises(ValueError, match=f"--{option} is 'other'.*{message}"):
            load_splits(DataArguments(dataset_name=folder, **{option: "other"}))


@pytest.mark.parametrize("name", ["pictures", "pictures [v2]", "what? {a,b}*"])
def test_image_folders_of_any_name(image_folder, name):
    folder = image_folder(name=name)
    (folder / "ant" / "more" / "[1]").mkdir(parents=True)
    (folder / "ant" / "0.png").rename(folder / "ant" / "more" / "[1]" / "0.PNG")  # the class is the first folder's
    (folder / "bee" / "notes.txt").write_text("no image")
    (folder / ".hidden").mkdir()
    for args in (DataArguments(train_dir=f"{folder}/"), DataArguments(dataset_name=str(folder))):
        splits = load_splits(args)
        assert splits["train"].classes == ["ant", "bee"]
        assert sorted([*splits["train"].labels, *splits["validation"].labels]) == [0] * 5 + [1] * 5
        assert first_image(splits["train"]).size == (12, 12)


def test_tables_in_a_folder_with_brackets(tables):
    splits = load_splits(DataArguments(dataset_name=tables({"train": ["b", "a"], "val": ["a"]}, name="tables [v2]")))
    assert len(splits["train"]) == 2 and splits["validation"].labels.tolist() == [0]


def test_paths_in_a_csv_file_may_be_relative_to_it(tmp_path, make_images):
    for index, image in enumerate(make_images(4)):
        image.save(tmp_path / f"{index}.png")
    rows = [f"{tmp_path / '0.png'},a", "1.png,b", "2.png,a", "3.png,b"]
    (tmp_path / "train.csv").write_text("\n".join(["image,label", *rows]))
    splits = load_splits(DataArguments(dataset_name=str(tmp_path), train_val_split=0.5))
    assert len(splits["train"]) == len(splits["validation"]) == 2
    for split in splits.values():
        for value in split.rows[:][split.column]:
            open_image(value, "RGB", "row", split.folder)


def test_bytes_that_nobody_calls_an_image(tables, tmp_path, make_images):
    import pyarrow.parquet as pq

    folder = tables({"train": ["a", "b"] * 3})
    table = pq.read_table(f"{folder}/train-00000-of-00001.parquet").replace_schema_metadata(None)  # as pandas writes it
    pq.write_table(table, f"{folder}/train-00000-of-00001.parquet")
    assert first_image(load_splits(DataArguments(dataset_name=folder))["train"]).size == (12, 12)


def test_a_column_without_images_is_refused(tables):
    folder = tables({"train": ["a", "b"] * 3})
    with pytest.raises(ValueError, match="column 'label' holds ClassLabel|'label' holds Value.'int64'"):
        args = DataArguments(dataset_name=tables({"train": [0, 1] * 3}, Value("int64"), "integers"))
        args.image_column_name = "label"
        load_splits(args)
    assert load_splits(DataArguments(dataset_name=folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_train_samples": 0}, "train split is empty.*--max_train_samples"),
        ({"max_eval_samples": 0}, "validation split is empty.*--max_eval_samples"),
        ({"validation_split_name": "dev"}, "--validation_split_name is 'dev', but the splits are train, validation"),
        ({"train_val_split": 1.5, "validation_split_name": "none"}, "--train_val_split 1.5 of 1437"),
        ({"dataset_name": "./nowhere"}, "--dataset_name ./nowhere does not exist"),
        ({"train_dir": "/nowhere"}, "The train folder /nowhere does not exist"),
        ({"train_dir": __file__}, "The train folder .* is a file"),
    ],
)
def test_bad_input_names_the_option(options, message):
    with pytest.raises(ValueError, match=message):
        load_splits(DataArguments(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augmentation": "flip"}, "--augmentation must be one of none, crop.*'flip'"),
        ({"train_dir": "a", "dataset_name": "digits"}, "--train_dir a and --dataset_name digits both say"),
        ({"validation_dir": "a", "dataset_name": "b"}, "--validation_dir a and --dataset_name b both say"),
        ({"crop_ratio": 1.5}, "--crop_ratio must be above 0 and at most 1, got 1.5"),
        ({"image_size": 0}, "--image_size must be at least 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**options)


def test_folders_that_are_no_classes(image_folder, tmp_path):
    one = image_folder(["ant"], name="one")
    with pytest.raises(ValueError, match="all of one class, 'ant' in the column 'label'.*needs two or more"):
        load_splits(DataArguments(train_dir=str(one)))
    with pytest.raises(ValueError, match="has no folders but 5 images: put the images of each class"):
        load_splits(DataArguments(train_dir=str(one / "ant")))
    splits = image_folder(["train", "val"], name="splits")
    with pytest.raises(
        ValueError, match=f"for each split.*give --train_dir {splits}/train --validation_dir {splits}/val"
    ):
        load_splits(DataArguments(train_dir=str(splits)))
    (one / "bee").mkdir()
    with pytest.raises(ValueError, match="has no images in 'bee': remove the folder"):
        load_splits(DataArguments(train_dir=str(one)))
    assert len(load_splits(DataArguments(validation_dir=str(one)), train=False)["validation"]) == 5


def test_missing_training_split(tables):
    args = DataArguments(dataset_name=tables({"test": ["a", "b"]}))
    with pytest.raises(ValueError, match="no 'train' split, only test"):
        load_splits(args)
    assert list(load_splits(args, train=False)) == ["validation"]


def test_labels_are_the_same_in_every_split(tables):
    strings = tables({"train": ["ant", "bee", "cow"] * 2, "test": ["bee", "cow"]})
    assert load_splits(DataArguments(dataset_name=strings))["validation"].labels.tolist() == [1, 2]
    integers = tables({"train": list(range(12)), "test": [11, 2]}, Value("int64"), "integers")
    splits = load_splits(DataArguments(dataset_name=integers))
    assert splits["train"].labels.tolist() == list(range(12)) and splits["validation"].labels.tolist() == [11, 2]


def test_labels_that_training_lacks_are_refused(tables):
    folder = tables({"train": ["ant", "bee"] * 2, "test": ["Bee", "ant"]})
    with pytest.raises(ValueError, match="test split has labels .*'label' that no training image has: Bee; those of"):
        load_splits(DataArguments(dataset_name=folder))


def test_a_split_without_labels_can_be_passed_over(tables):
    names = ClassLabel(names=["ant", "bee"])
    folder = tables({"train": [0, 1] * 5, "test": [-1] * 4}, names)
    with pytest.raises(ValueError, match="test split has 4 of 4 images without a label in the column 'label'"):
        load_splits(DataArguments(dataset_name=folder))
    splits = load_splits(DataArguments(dataset_name=folder, validation_split_name="none"))
    assert len(splits["train"]) == 8 and len(splits["validation"]) == 2


def test_sizes_are_cut_with_the_seed():
    first, again, other = (load_splits(DataArguments(max_train_samples=10), seed=seed)["train"] for seed in (1, 1, 2))
    assert len(first) == 10 and (first.labels == again.labels).all() and (first.labels != other.labels).any()


def test_a_sample_keeps_images_and_labels_together(tables):
    folder = tables({"train": [0, 1, 2, 3, 4, 5]}, Value("int64"))
    whole = load_splits(DataArguments(dataset_name=folder, train_val_split=0.5))
    pixels = {}
    for split in load_splits(DataArguments(dataset_name=folder, train_val_split=0.01)).values():
        for index in range(len(split)):
            pixels[split.labels[index]] = np.asarray(first_image(split.select([index])))
    for split in (*whole.values(), whole["train"].sample(2, 0)):
        for index in range(len(split)):
            assert np.array_equal(first_image(split.select([index])), pixels[split.labels[index]])


def test_labels_follow_the_models_order(image_folder):
    splits = load_splits(DataArguments(train_dir=str(image_folder(["ant", "bee", "cow"]))))
    names = ["cow", "ant", "bee", "dog"]
    config = RepVGGConfig(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    aligned = align_splits(splits, config, DataArguments())
    for name, split in splits.items():
        found = [names[label] for label in aligned[name].labels]
        assert found == [split.classes[label] for label in split.labels] and aligned[name].classes == names
