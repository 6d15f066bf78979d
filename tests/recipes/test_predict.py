"""Classifying pictures by a checkpoint and by a file for an engine."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from repvgg_hf import RepVGGForImageClassification, export_onnx
from repvgg_hf.recipes import predict as recipe


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 13, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def predict(capsys, *options) -> dict:
    recipe.main([*map(str, options), "--json"])
    return json.loads(capsys.readouterr().out)


def test_predictions_are_those_of_a_pipeline(checkpoint, picture, capsys):
    record = predict(capsys, picture, "--model", checkpoint)
    expected = pipeline("image-classification", str(checkpoint))(str(picture), top_k=5)
    found = record["results"][0]["predictions"]
    assert [entry["label"] for entry in found] == [entry["label"] for entry in expected]
    assert [entry["probability"] for entry in found] == pytest.approx([e["score"] for e in expected], rel=1e-5)
    assert found[0]["class"] == int(found[0]["label"]) and record["engine"] == "PyTorch"
    assert record["milliseconds"]["prepared_and_run"] > record["milliseconds"]["run"] > 0


def test_a_file_for_an_engine_in_a_real_process(checkpoint, picture, tmp_path, run, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    shutil.copytree(checkpoint, tmp_path / "model")
    model = RepVGGForImageClassification.from_pretrained(checkpoint).eval().reparameterize()
    path = export_onnx(model, tmp_path / "model", "float")
    printed = run("predict", picture, "--model", path, "--threads", 1, "--output_json", tmp_path / "out.json")
    assert "ONNX Runtime" in printed and "█" in printed and "ms a picture, of which the engine takes" in printed
    record = json.loads((tmp_path / "out.json").read_text())
    expected = predict(capsys, picture, "--model", checkpoint)["results"][0]["predictions"]
    found = record["results"][0]["predictions"]
    assert [entry["label"] for entry in found] == [entry["label"] for entry in expected]
    with_image = export_onnx(model, tmp_path / "model", "float", preprocess=checkpoint)
    own = predict(capsys, picture, "--model", with_image)["results"][0]["predictions"]  # which prepares it itself
    assert own[0]["probability"] == pytest.approx(found[0]["probability"], abs=0.01)


def test_a_folder_as_csv(checkpoint, images_of_two_classes, tmp_path, capsys):
    (images_of_two_classes / "notes.txt").write_text("no picture")
    recipe.main([
        str(images_of_two_classes), "--model", str(checkpoint), "--batch_size", "3", "--top", "2",
        "--csv", str(tmp_path / "out" / "predictions.csv"),
    ])  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "out" / "predictions.csv").open()))
    assert len(rows) == 16 and {row["rank"] for row in rows} == {"1", "2"}
    assert len({row["image"] for row in rows}) == 8 and all(row["image"].endswith(".png") for row in rows)
    model = RepVGGForImageClassification.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        expected = model(
            torch.from_numpy(recipe.prepare(rows[0]["image"], recipe.load_engine(checkpoint).processor()))[None]
        )
    assert int(rows[0]["class"]) == expected.logits.argmax()
    assert float(rows[0]["probability"]) == pytest.approx(expected.logits.softmax(1).max().item(), rel=1e-5)


def test_pictures_that_cannot_be_read_are_named_after_the_others(checkpoint, images_of_two_classes, tmp_path, capsys):
    for name in ("broken.jpg", "also.png"):
        (images_of_two_classes / name).write_bytes(b"no picture")
    csv_file = tmp_path / "predictions.csv"
    arguments = [str(images_of_two_classes), "--model", str(checkpoint), "--batch_size", "3", "--csv", str(csv_file)]
    with pytest.raises(ValueError, match=r"(?s)also\.png.*broken\.jpg"):
        recipe.main(arguments)
    assert len({row["image"] for row in csv.DictReader(csv_file.open())}) == 8


def test_many_pictures_are_a_line_each(checkpoint, images_of_two_classes, capsys, monkeypatch):
    monkeypatch.setattr(recipe, "SHOWN", 4)
    recipe.main([str(images_of_two_classes), "--model", str(checkpoint)])
    assert capsys.readouterr().out.count(" %") == 8


def test_classes_without_names(checkpoint, picture, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = RepVGGForImageClassification.from_pretrained(checkpoint).eval().reparameterize()
    path = export_onnx(model, tmp_path / "alone", "float")
    record = predict(capsys, picture, "--model", path, "--processor", checkpoint)
    assert record["results"][0]["predictions"][0]["label"].startswith("class ")
    with pytest.raises(ValueError, match="has no preprocessor_config.json"):
        recipe.main([str(picture), "--model", str(path)])


@pytest.mark.parametrize(
    "options, message",
    [
        (["{folder}/text.png"], r"The picture, file .*text.png, can't be read .*replace it by an image"),
        (["{folder}/none.png"], "The picture .*none.png does not exist"),
        (["{folder}/empty"], "empty has no pictures"),
        (["{picture}", "--top", "0"], "--top must be at least 1"),
        (["{picture}", "--model", "{folder}/text.onnx"], "text.onnx can't be loaded by ONNX Runtime"),
        (["{picture}", "--processor", "{folder}/none"], "none has no image processor .*give a folder or Hub id"),
        (["{picture}", "--processor", "{folder}/empty"], "empty has no image processor .*preprocessor_config.json"),
        (["{picture}", "--engine", "onnxruntime"], "has no file for ONNX Runtime .* write one with recipes/export.py"),
    ],
)
def test_bad_input(options, message, checkpoint, picture, tmp_path):
    if "onnx" in message:
        pytest.importorskip("onnxruntime")
    for name in ("text.png", "text.onnx"):
        (tmp_path / name).write_text("no picture and no model")
    (tmp_path / "empty").mkdir()
    given = [option.format(folder=tmp_path, picture=picture) for option in options]
    with pytest.raises(ValueError, match=message):
        recipe.main(given if "--model" in given else [*given, "--model", str(checkpoint)])


def test_a_missing_package_is_named_with_its_extra(picture, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(ImportError, match=r"onnxruntime is not installed.*`pip install 'repvgg-hf\[onnx\]'`"):
        recipe.main([str(picture), "--model", str(tmp_path / "model.onnx")])
