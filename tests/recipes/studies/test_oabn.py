"""The study of batch norm against OABN."""

import json

import pytest

from repvgg_hf.recipes.studies import oabn


@pytest.mark.slow
def test_it_makes_its_tables_from_its_json(tmp_path, run):
    from datasets import ClassLabel, Dataset, Features, Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    features = Features({"img": Image(), "label": ClassLabel(num_classes=10)})
    for name, start in (("train", 0), ("test", 500)):
        images = [(image * 15).astype("uint8") for image in digits.images[start : start + 40]]
        columns = {"img": images, "label": digits.target[start : start + 40].tolist()}
        (tmp_path / "data").mkdir(exist_ok=True)
        Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "data" / f"{name}.parquet")
    run(
        "studies.oabn", "--dataset_name", tmp_path / "data", "--num_train_epochs", "1", "--dataloader_num_workers", "0",
        "--output_dir", tmp_path / "models", "--output_json", tmp_path / "study.json", "--max_eval_samples", "16",
        "--bits", "4",
    )  # fmt: skip
    record = json.loads((tmp_path / "study.json").read_text())
    table = (tmp_path / "study.md").read_text()
    for norm in ("BN", "OABN"):
        assert len(record["norms"][norm]["results"]) == 5
        for row in record["norms"][norm]["results"]:
            assert f"{row['top1']:.2f}" in table
        for kernel in record["norms"][norm]["kernels"][:-1]:
            assert f"{kernel['kurtosis']:.1f} | {kernel['max_over_std']:.1f}" in table


def test_committed_tables_are_made_from_the_committed_json(recipes):
    figures = recipes / "studies" / "results" / "oabn.json"
    record = json.loads(figures.read_text())
    assert figures.with_suffix(".md").read_text() == oabn.markdown(record)
