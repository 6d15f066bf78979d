"""What users bring: it trains, in real processes, or stops at once with an error that says what to do."""

import importlib
import io
import json

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, BitImageProcessor, pipeline

from repvgg_hf import RepVGGConfig, RepVGGForImageClassification

TINY = "--num_train_epochs 1 --stem_hidden_size 8 --hidden_sizes 8 16 --depths 1 1 --image_size 16".split()
COLORS = {"ant": (220, 40, 40), "bee": (40, 220, 40), "cow": (40, 40, 220)}


def picture(label: str, size=(16, 16)) -> PILImage.Image:
    noise = np.random.default_rng(0).normal(0, 30, (*size, 3))
    return PILImage.fromarray(np.clip(np.array(COLORS.get(label, (0, 0, 0))) + noise, 0, 255).astype(np.uint8))


@pytest.fixture
def folder(tmp_path):
    """`folder(name, classes, mode)`: six images in a folder for each class."""

    def make(name="pictures", classes=("ant", "bee"), mode="RGB"):
        for label in classes:
            (tmp_path / name / label).mkdir(parents=True)
            for index in range(6):
                picture(label).convert(mode).save(tmp_path / name / label / f"{index}.png")
        return tmp_path / name

    return make


@pytest.fixture
def table(tmp_path):
    """`table(labels of each split, feature)`: a folder of parquet files; `names` are those that colors stand for."""

    def make(splits: dict, feature, names=tuple(COLORS)):
        (tmp_path / "table").mkdir()
        for split, labels in splits.items():
            images = []
            for label in labels:
                buffer = io.BytesIO()
                picture(label if isinstance(label, str) else names[label or 0]).save(buffer, "PNG")
                images.append({"bytes": buffer.getvalue(), "path": None})
            features = Features({"image": Image(), "label": feature})
            Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(
                tmp_path / "table" / f"{split}-00000-of-00001.parquet"
            )
        return tmp_path / "table"

    return make


@pytest.fixture
def color_model(tmp_path):
    """A folder with a model that tells the colors, whose classes are in another order than the alphabet's."""

    def make(names=("cow", "ant", "bee"), side=16, **processor):
        import torch

        config = RepVGGConfig(
            stem_hidden_size=8, hidden_sizes=[8], depths=[1], strides=[1], oabn=False,
            id2label=dict(enumerate(names)), label2id={name: place for place, name in enumerate(names)},
        )  # fmt: skip
        model = RepVGGForImageClassification(config)
        with torch.no_grad():  # the sums of the channels go through the centers of the 3x3 kernels
            for name, parameter in model.named_parameters():
                parameter.zero_() if parameter.dim() > 1 or name.endswith("bias") else None
            for layer in [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]:
                for channel in range(min(3, layer.in_channels)):
                    if layer.kernel_size == (1, 1):
                        layer.weight[channel, channel] = 1
            for place, name in enumerate(names):
                model.classifier.weight[place, sorted(COLORS).index(name) if name in COLORS else place] = 1
        model.save_pretrained(tmp_path / "model")
        sides = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        BitImageProcessor(**(sides | {"image_mean": [0.0] * 3, "image_std": [1.0] * 3} | processor)).save_pretrained(
            tmp_path / "model"
        )
        return tmp_path / "model"

    return make


def call(recipe: str, *options):
    """Run a recipe in this process, which is quicker."""
    return importlib.import_module(f"repvgg_hf.recipes.{recipe}").main(list(map(str, options)))


def evaluate(model, *options) -> dict:
    return call("evaluate", "--model_name_or_path", model, *options)


def test_classes_are_found_by_name(color_model, folder):
    figures = evaluate(color_model(), "--validation_dir", folder(classes=sorted(COLORS)))
    assert figures["top1"] == 100  # 0 by position


def test_a_validation_set_may_lack_a_class(color_model, folder):
    assert evaluate(color_model(), "--validation_dir", folder())["top1"] == 100


def test_other_names_are_an_error_with_both_sides(color_model, folder):
    with pytest.raises(ValueError, match="cow, ant, bee.*ant, cow, wasp.*only in the dataset: wasp"):
        evaluate(color_model(), "--validation_dir", folder(classes=["ant", "cow", "wasp"]))


def test_training_keeps_the_names_of_a_kept_head(color_model, folder, run, tmp_path):
    model, pictures, qat = color_model(), folder(classes=sorted(COLORS)), tmp_path / "qat"
    options = ("--model_name_or_path", model, "--train_dir", pictures, "--output_dir", qat)
    run("qat", *options, "--num_train_epochs", "1", "--learning_rate", "1e-6", "--bits", "8")
    trained = AutoModelForImageClassification.from_pretrained(qat / "quantized")
    assert trained.config.id2label == {0: "cow", 1: "ant", 2: "bee"}
    results = json.loads((qat / "qat_results.json").read_text())["results"]
    assert results[0]["top1"] == 100
    classify = pipeline("image-classification", str(qat / "float"))
    for label in COLORS:
        assert classify(str(pictures / label / "0.png"))[0]["label"] == label


@pytest.mark.parametrize(
    "processor",
    [
        {"size": {"shortest_edge": 20}, "resample": 3},
        {"do_normalize": False},
        {"image_mean": [0.3, 0.4, 0.5], "image_std": [0.1, 0.2, 0.3]},
    ],
)
def test_evaluation_sees_the_pixels_that_pipeline_sees(color_model, folder, processor):
    """The loss is that of the probabilities which `pipeline` gives."""
    model, pictures = color_model(**processor), folder(classes=sorted(COLORS))
    figures = evaluate(model, "--validation_dir", pictures)
    classify = pipeline("image-classification", str(model))
    losses = []
    for path in sorted(pictures.rglob("*.png")):
        scores = {line["label"]: line["score"] for line in classify(str(path))}
        losses.append(-np.log(scores[path.parent.name]))
    assert figures["loss"] == pytest.approx(np.mean(losses), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [("pictures [v2]", "RGB", ()), ("gray", "L", ("--num_channels", "1", "--crop_ratio", "0.8"))],
)
def test_folders_train(folder, run, tmp_path, name, mode, options):
    run("train", "--train_dir", f"{folder(name, mode=mode)}/", *TINY, *options, "--output_dir", tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "ant", "1": "bee"} and config["num_channels"] == (1 if mode == "L" else 3)


def test_integers_keep_their_values(table, run, tmp_path):
    data = table({"train": [place % 12 for place in range(24)], "test": [11, 2]}, Value("int64"), list(COLORS) * 4)
    run("train", "--dataset_name", data, *TINY, "--output_dir", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert list(config["id2label"].values()) == [str(value) for value in range(12)]


@pytest.mark.parametrize("recipe", ["train", "qat"])
def test_images_without_a_label_stop_every_recipe(table, recipe, tmp_path):
    names = ClassLabel(names=list(COLORS))
    options = ("--dataset_name", table({"train": [0, 1, 2] * 4, "test": [-1] * 4}, names), "--image_size", "16")
    with pytest.raises(ValueError, match="test split has 4 of 4 images without a label in the column 'label'.*filter"):
        call(recipe, *options, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", ["train", "qat"])
def test_an_epoch_may_end_with_a_single_image(table, run, recipe, tmp_path):
    """Of which batch normalization can't be trained on the last maps, of one pixel."""
    labels = {"train": ["ant", "bee", "cow"] * 3, "test": ["ant"]}
    data = table(labels, ClassLabel(names=list(COLORS)))
    epochs = "--num_train_epochs 1" + (" --num_float_epochs 1" if recipe == "qat" else "")
    sizes = f"{epochs} --stem_hidden_size 8 --hidden_sizes 8 16 --depths 1 1 --stem_stride 4 --strides 2 2"
    options = f"{sizes} --image_size 16 --per_device_train_batch_size 8".split()
    run(recipe, "--dataset_name", data, *options, "--output_dir", tmp_path / "out")


def test_a_damaged_file_stops_the_training_before_it_begins(folder, tmp_path):
    pictures = folder()
    path = pictures / "bee" / "3.png"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"column 'image', file {path}, can't be read"):
        call("train", "--train_dir", pictures, *TINY, "--output_dir", tmp_path / "out")
    assert not list((tmp_path / "out").glob("checkpoint*"))


def test_two_sources_are_an_error(folder):
    with pytest.raises(ValueError, match="--dataset_name digits both say which images to use"):
        call("train", "--train_dir", folder(), "--dataset_name", "digits", *TINY)
