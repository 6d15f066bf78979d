"""The study of post-training quantization."""

import json

import pytest
import torch

from repvgg_hf import RepVGGForImageClassification
from repvgg_hf.recipes.studies import ptq


def test_it_goes_on_where_it_stopped(digits_checkpoint, run, tmp_path):
    figures = tmp_path / "study.json"
    options = ["--models", f"tiny/7={digits_checkpoint}", "--image_size", 8, "--bits", 3, "--max_eval_samples", 32]
    options += ["--calibration_images", 32, "--output_json", figures, "--dataset_title", "Digits"]
    run("studies.ptq", *options)
    record = json.loads(figures.read_text())
    results = record["models"]["tiny/7"]
    assert record["images"] == 32 and "k-means, channel|3" in results and "W4A8" in results
    assert results["W4A8"]["activation_bits"] == 8 and results["W4A8"]["bits"] == 4
    mixed = results["mixed precision, target 3.2"]
    assert mixed["bits_per_weight"] <= mixed["target_bits_per_weight"] == 3.2 and mixed["bits"] is None
    table = figures.with_suffix(".md").read_text()
    assert "| tiny, float" in table and "trained with the seeds 7." in table
    for row in results.values():
        assert f"{row['top1']:.2f}" in table and row["line"] in table
    assert str(tmp_path) not in figures.read_text() + table

    del results["W4A8"]
    results["k-means, channel|3"]["top1"] = 12.34  # what is there is kept
    figures.write_text(json.dumps(record))
    run("studies.ptq", *options)
    again = json.loads(figures.read_text())["models"]["tiny/7"]
    assert again["k-means, channel|3"]["top1"] == 12.34 and "W4A8" in again
    printed = run("studies.ptq", *options, "--calibration_images", 16, expect=1)
    assert "study.json has figures of calibration_images=32, and calibration_images=16 is asked for" in printed


def test_a_quantized_checkpoint_is_refused_before_any_work(digits_checkpoint, run, tmp_path):
    quantized, figures = tmp_path / "w4", tmp_path / "study.json"
    RepVGGForImageClassification.from_pretrained(digits_checkpoint).quantize(bits=4).save_pretrained(quantized)
    models = [f"tiny/7={digits_checkpoint}", f"small/7={quantized}"]
    printed = run("studies.ptq", "--models", *models, "--image_size", 8, "--output_json", figures, expect=1)
    assert f"{quantized} is quantized to 4 bits" in printed and "again: give the float checkpoint that" in printed
    assert not figures.exists()


def test_equalized_lines_are_further_ones():
    study = ptq.PTQStudyArguments(models=[], methods=["none"], others=False, activations=["W4A8", "W4A8, equalized"])
    plain, equalized = (ptq.lines(study, torch.zeros(1, 3, 8, 8))[name].row() for name in study.activations)
    assert plain["calibration_config"] == {} and equalized["calibration_config"] == {"equalization": 0.3}
    assert plain["options"] == equalized["options"] == {"bits": 4, "activation_bits": 8}
    with pytest.raises(ValueError, match="^--activations must be of W8A8; .* got 'W2A2'"):
        ptq.PTQStudyArguments(models=[], activations=["W2A2"])


def test_seeds_share_a_table_of_means():
    models = {}
    for seed, more in (("0", 0.0), ("1", 3.0)):
        models[f"BN/{seed}"] = {}
        for line, bits, size in (("float", 32, 32.0), ("k-means, channel", 4, 4.5), ("theirs", 4, 5.0)):
            row = {"network": "BN", "network_seed": seed, "line": line, "bits": bits, "bits_per_weight": size}
            row |= {"activation_bits": None, "target_bits_per_weight": None, "top1": 90.0 - 2 * size + more}
            models[f"BN/{seed}"][f"{line}|{bits}"] = row
    record = {"images": 1, "dataset": "D", "calibration_images": 2, "seed": 0, "models": models}
    table = ptq.markdown(record)
    assert "trained with the seeds 0 and 1." in table
    assert table.rstrip().splitlines()[2:] == [
        "| BN, float 27.50 | 4 bit | stored |", "|---|---|---|",
        "| k-means, channel | 82.50 | 4.50 |", "| theirs | 81.50 | 5.00 |",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["ptq", "ptq_tiny_imagenet"])
def test_committed_tables_are_made_from_the_committed_json(name, recipes):
    figures = recipes / "studies" / "results" / f"{name}.json"
    assert ptq.markdown(json.loads(figures.read_text())) == figures.with_suffix(".md").read_text()
