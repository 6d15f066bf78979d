"""The study of quantization-aware training."""

import json

import pytest

from repvgg_hf.recipes.studies import qat


def test_it_goes_on_where_it_stopped(digits_checkpoint, run, tmp_path):
    figures = tmp_path / "study.json"
    options = ["--models", f"tiny/7={digits_checkpoint}", "--dataset_name", "digits", "--image_column_name", "image"]
    options += ["--augmentation", "crop", "--bits", 2, "--activations", "W4A8", "--num_train_epochs", 1]
    options += ["--max_train_samples", 64, "--max_eval_samples", 32, "--output_json", figures]
    options += ["--output_dir", tmp_path / "qat"]
    run("studies.qat", *options)
    record = json.loads(figures.read_text())
    results = record["models"]["tiny/7"]
    assert list(results) == ["uniform (LSQ)|2", "ClusterQAT|2", "ClusterQAT, all switches|2", "W4A8"]
    last = json.loads((tmp_path / "qat" / "qat_results.json").read_text())
    assert last["quantization_config"]["activation_bits"] == 8 and last["quantization_config"]["bits"] == 4
    assert results["W4A8"]["top1"] == next(row["top1"] for row in last["results"] if row["stage"] == "packed")
    assert (results["W4A8"]["bits"], results["W4A8"]["activation_bits"]) == (4, 8)
    assert results["ClusterQAT|2"]["bits_per_weight"] < results["W4A8"]["bits_per_weight"]
    table = figures.with_suffix(".md").read_text()
    assert all(f"{row['top1']:.2f}" in table for row in results.values())
    assert str(tmp_path) not in figures.read_text() + table

    del results["W4A8"]
    results["ClusterQAT|2"]["top1"] = 12.34  # what is there is kept
    figures.write_text(json.dumps(record))
    run("studies.qat", *options)
    again = json.loads(figures.read_text())["models"]["tiny/7"]
    assert again["ClusterQAT|2"]["top1"] == 12.34 and "W4A8" in again
    with pytest.raises(ValueError, match="has figures of seed=0, and seed=1 is asked for"):
        qat.main([*map(str, options), "--seed", "1"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--models", "x"], "--models takes name/seed=folder, got 'x'"),
        (["--models", "x=y", "--activations", "W1A1"], "--activations must be of W4A8; W4A4; W2A8, got 'W1A1'"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        qat.main([*options, "--dataset_name", "digits"])


def test_lines_that_the_study_no_longer_has_come_last():
    def row(line, bits, seed="0"):
        return {
            "network": "BN", "network_seed": seed, "line": line, "bits": bits, "activation_bits": None,
            "top1": 10.0 * bits, "float_top1": 50.0, "images": 1,
        }  # fmt: skip

    lines = [("gone", 1), ("ClusterQAT", 2), ("uniform (LSQ)", 2), ("ClusterQAT", 1)]
    models = {"BN/0": {f"{line}|{bits}": row(line, bits) for line, bits in lines}, "BN/1": {"x": row("gone", 1, "1")}}
    table = qat.markdown({"dataset": "D", "epochs": 2, "seed": 0, "models": models}).splitlines()
    assert table[2:] == [
        "| BN, float 50.00, mean of 2 networks | 2 bit | 1 bit |", "|---|---|---|",
        "| uniform (LSQ) | 20.00 (of 1) |  |", "| ClusterQAT | 20.00 (of 1) | 10.00 (of 1) |", "| gone |  | 10.00 |",
    ]  # fmt: skip


def test_committed_tables_are_made_from_the_committed_json(recipes):
    for figures in sorted((recipes / "studies" / "results").glob("qat*.json")):
        table = qat.markdown(json.loads(figures.read_text()))
        assert table == figures.with_suffix(".md").read_text()
        if figures.stem == "qat":
            assert f"<!-- qat -->\n{table}<!-- /qat -->" in (figures.parent / "README.md").read_text()
