"""The publishing recipe: figures from other recipes' files, the folder of a dry run, bad options."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from repvgg_hf import RepVGGConfig, RepVGGForImageClassification
from repvgg_hf.recipes import publish as recipe
from repvgg_hf.training.processors import make_processor
from repvgg_hf.training.report import quantization_fields

CARDS = Path(__file__).parents[2] / "model_cards"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A folder with a float model in `train/`, a 4 bit one in `w4/`, and the file that quantize.py would write."""
    folder = tmp_path_factory.mktemp("quantize")
    config = RepVGGConfig(
        stem_hidden_size=8, hidden_sizes=[8, 16], depths=[1, 1], stem_stride=1, strides=[1, 2], num_labels=10
    )
    model = RepVGGForImageClassification(config)
    model.save_pretrained(folder / "train")
    model.quantize(bits=4).save_pretrained(folder / "w4")
    make_processor(8).save_pretrained(folder / "w4")
    row = {"top1": 95.0, "top5": 99.0, "loss": 0.2, "bits_per_weight": 4.4}
    row |= quantization_fields(model.config.quantization_config) | {"stage": "quantized"}
    row |= {"model": "cluster-per_tensor-scale-w4", "bytes": (folder / "w4" / "model.safetensors").stat().st_size}
    float_row = row | quantization_fields(None) | {"model": "float", "stage": "float", "top1": 96.0, "bytes": 9000}
    rows = [float_row | {"bits_per_weight": 32.0}, row]
    command = ["recipes/quantize.py", "--model_name_or_path", str(folder / "train")]
    record = {"command": command, "seed": 0, "images": 360}
    (folder / "quantize_results.json").write_text(json.dumps(record | {"results": rows}))
    return folder


def options(checkpoint: Path, *more) -> list[str]:
    return [
        "--repo_id", "org/tiny", "--models", str(checkpoint / "w4"), "--dataset_title", "digits",
        "--license", "mit", "--visibility", "private",
        "--quantize_json", str(checkpoint / "quantize_results.json"), *map(str, more),
    ]  # fmt: skip


def test_dry_run_writes_folder_and_card(checkpoint, tmp_path):
    more = ("--train_checkpoint", checkpoint / "train", "--card_json", tmp_path / "tiny.json")
    recipe.main(options(checkpoint, "--dry_run", "--output_dir", tmp_path / "repo", *more))
    card = (tmp_path / "repo" / "README.md").read_text()
    assert "**Top-1 95.00 %** on digits, held out (360 images)" in card and "before fusing" in card
    assert "python recipes/quantize.py --model_name_or_path train" in card and str(checkpoint) not in card
    assert (tmp_path / "tiny.md").read_text() == card
    (tmp_path / "tiny.md").unlink()
    subprocess.run([sys.executable, "-m", "repvgg_hf.hub", str(tmp_path / "tiny.json")], check=True)
    assert (tmp_path / "tiny.md").read_text() == card


def test_commands_are_shown_without_secrets(checkpoint, tmp_path):
    commands = ["--commands", "python train.py --hub_token s3cret --seed 3", "python make_data.py"]
    recipe.main(options(checkpoint, "--dry_run", "--output_dir", tmp_path / "repo", "--draw_plots", "False", *commands))
    card = (tmp_path / "repo" / "README.md").read_text()
    assert "python train.py --hub_token '***' --seed 3" in card and "python make_data.py" in card
    assert not any(b"s3cret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_files_for_engines_and_what_was_measured_with_them(checkpoint, tmp_path):
    pytest.importorskip("onnxscript")
    row = {"engine": "ONNX Runtime", "file": "onnx/model.onnx", "top1": 94.5, "agreement": 99.0, "near": 98.0}
    record = {"images": 360, "bytes": (checkpoint / "w4" / "model.safetensors").stat().st_size, "cpu": "a processor"}
    record |= {"command": ["recipes/evaluate.py", "--engines", "onnxruntime"], "engines": [row]}
    (tmp_path / "engines.json").write_text(json.dumps(record))
    more = ("--engine_json", tmp_path / "engines.json", "--formats", "onnx", "--draw_plots", "False")
    recipe.main(options(checkpoint, "--dry_run", "--output_dir", tmp_path / "repo", *more))
    card = (tmp_path / "repo" / "README.md").read_text()
    size = (tmp_path / "repo" / "onnx" / "model.onnx").stat().st_size
    assert f"| ONNX Runtime | `onnx/model.onnx` | {size:,} | a processor | 94.50 | 99.00 | 98.00 |" in card
    assert "python recipes/evaluate.py --engines onnxruntime" in card


def test_dry_run_of_a_family(checkpoint, tmp_path):
    models = ["--models", f"big={checkpoint / 'w4'}", f"small={checkpoint / 'w4'}"]
    root = tmp_path / "family"
    recipe.main(options(checkpoint, *models, "--dry_run", "--output_dir", root, "--draw_plots", "False"))
    for name in ("big", "small"):
        assert f"# tiny-{name}" in (root / name / "README.md").read_text()
    assert sorted(path.name for path in root.iterdir()) == ["big", "small"]


@pytest.mark.parametrize(
    "more, message",
    [
        (["--dry_run"], r"say where with folder="),
        (["--card_json", "x.json"], "copies the card from --output_dir"),
        (["--models", "a={w4}", "b={w4}", "--tag", "v1"], "A family takes none of .*--tag"),
        (["--models", "a={w4}", "b={w4}", "--dry_run"], "say where with folder="),
        (["--plain_checkpoint", "{w4}/../train"], "--plain_checkpoint .*train has OABN: train one with --oabn False"),
        (["--license", "MIT"], "license 'MIT' is none of the Hub's identifiers: did you mean mit"),
        (["--visibility", "secret"], "--visibility is 'secret': say public"),
        (["--dry_run", "--visibility", "secret"], "--visibility is 'secret': say public"),
        (["--plots", "no caption"], "--plots takes <name>=<value>"),
        (["--models", "a=b", "a=c"], "--models takes <name>=<value> with different names"),
        (["--dry_run", "--output_dir", "{new}", "--plots", "A plot=none.png"], "The plot 'A plot' must be a .png"),
        (["--dry_run", "--output_dir", "{new}", "--repo_id", "tiny"], "must be 'namespace/name'"),
        (["--dry_run", "--output_dir", "{new}", "--formats", "tensorrt"], "formats must be a list of some of onnx"),
        (["--quantize_json", "none.json"], "none.json is no readable JSON file"),
        (["--dry_run", "--output_dir", "{new}", "--published", "w4"], "card.published is 'w4'"),
    ],
)
def test_bad_options(checkpoint, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        recipe.main(options(checkpoint, *(part.format(new=tmp_path / "new", w4=checkpoint / "w4") for part in more)))
    assert list(tmp_path.iterdir()) == []


def test_license_and_visibility_are_asked_for(checkpoint):
    given = options(checkpoint)
    place = given.index("--license")
    for option, start in {"--license": place, "--visibility": place + 2}.items():
        with pytest.raises(ValueError, match=f"{option} is not given: say "):
            recipe.main([*given[:start], *given[start + 2 :]])


@pytest.mark.parametrize("path", sorted(CARDS.glob("repvgg-*.json")), ids=lambda path: path.stem)
def test_committed_cards_are_made_from_the_committed_json(path):
    from repvgg_hf.hub import ModelCard

    assert path.with_suffix(".md").read_text(encoding="utf-8") == str(ModelCard.from_json(path))


def test_there_are_committed_cards():
    names = {path.stem for path in CARDS.glob("repvgg-*.json")}
    assert any("digits" in name for name in names) and any("cifar10" in name for name in names)
