"""The study of quantization-aware training."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_it_goes_on_where_it_stopped(digits_checkpoint, run_study, tmp_path):
    figures = tmp_path / "study.json"
    options = ["--models", f"tiny/7={digits_checkpoint}", "--dataset_name", "digits", "--image_column_name", "image"]
    options += ["--augmentation", "crop", "--bits", 2, "--activations", "W4A8", "--num_train_epochs", 1]
    options += ["--max_train_samples", 64, "--max_eval_samples", 32, "--output_json", figures]
    options += ["--output_dir", tmp_path / "qat"]
    done = run_study("qat_study.py", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(figures.read_text())
    results = record["models"]["tiny/7"]
    assert list(results) == ["uniform (LSQ)|2", "ClusterQAT|2", "ClusterQAT, all switches|2", "W4A8"]
    packed = json.loads((tmp_path / "qat" / "qat_results.json").read_text())  # of the last line
    assert packed["quantization_config"]["activation_bits"] == 8 and packed["quantization_config"]["bits"] == 4
    assert results["W4A8"]["top1"] == next(r["accuracy"] for r in packed["results"] if r["model"] == "4 bit, packed")
    assert results["ClusterQAT|2"]["bits_per_weight"] < results["W4A8"]["bits_per_weight"]
    table = figures.with_suffix(".md").read_text()
    assert all(f"{row['top1']:.2f}" in table for row in results.values())
    assert str(tmp_path) not in figures.read_text() + table

    del results["W4A8"]
    results["ClusterQAT|2"]["top1"] = 12.34  # what is there is kept
    figures.write_text(json.dumps(record))
    assert run_study("qat_study.py", *options).returncode == 0
    again = json.loads(figures.read_text())["models"]["tiny/7"]
    assert again["ClusterQAT|2"]["top1"] == 12.34 and "W4A8" in again

    mixed = run_study("qat_study.py", *options, "--seed", 1)
    assert mixed.returncode != 0 and "give another --output_json" in mixed.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--models", "x"], "--models takes name/seed=folder, got 'x'"),
        (["--models", "x=y", "--activations", "W1A1"], "--activations must be of W4A8, W4A4, W2A8, got 'W1A1'"),
    ],
)
def test_bad_arguments(options, message, run_study):
    done = run_study("qat_study.py", *options, "--dataset_name", "digits")
    assert done.returncode != 0 and message in done.stdout + done.stderr


def test_committed_tables_are_made_from_the_committed_json(run_study):
    script = "import json, sys, qat_study; print(json.dumps(qat_study.markdown(json.load(open(sys.argv[1])))))"
    tables = {}
    for figures in sorted((ROOT / "model_cards").glob("qat_*.json")):
        done = run_study("-c", script, figures)
        assert done.returncode == 0, done.stderr
        tables[figures.stem] = json.loads(done.stdout)
        assert tables[figures.stem] == figures.with_suffix(".md").read_text()
    assert f"<!-- qat -->\n{tables['qat_study']}<!-- /qat -->" in (ROOT / "README.md").read_text()
