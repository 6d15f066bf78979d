"""The evaluation of a checkpoint, in real processes."""

import json

import pytest


def test_it_agrees_with_the_recipe_that_quantized(checkpoint, tmp_path, run):
    folder, figures = tmp_path / "quantize", tmp_path / "figures.json"
    run("quantize", "--model_name_or_path", checkpoint, "--output_dir", folder, "--plot", "False")
    results = json.loads((folder / "quantize_results.json").read_text())["results"]
    name = "cluster-per_tensor+scale-w4"
    row = next(row for row in results if row["model"] == name)
    run("evaluate", "--model_name_or_path", folder / name, "--output_json", figures)
    evaluated = json.loads(figures.read_text())
    for key in ("top1", "top5", "loss", "bytes", "bits_per_weight"):
        assert evaluated[key] == pytest.approx(row[key], rel=1e-4)
    assert evaluated["bytes"] == (folder / name / "model.safetensors").stat().st_size
    assert evaluated["command"][0] == "recipes/evaluate.py"


def test_a_script_takes_its_arguments_from_a_json_file(checkpoint, tmp_path, start, recipes):
    options = {"model_name_or_path": str(checkpoint), "max_eval_samples": 50, "output_json": str(tmp_path / "out.json")}
    (tmp_path / "arguments.json").write_text(json.dumps(options))
    done = start(recipes / "evaluate.py", tmp_path / "arguments.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["images"] == 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--label_column_name", "digit"], "--label_column_name is 'digit'"),
        (["--validation_dir", "{images}"], "The model has 10 classes, the dataset 2"),
    ],
)
def test_bad_options(options, message, checkpoint, images_of_two_classes, run):
    options = [option.format(images=images_of_two_classes) for option in options]
    assert message in run("evaluate", "--model_name_or_path", checkpoint, *options, expect=1).replace("\n", " ")
