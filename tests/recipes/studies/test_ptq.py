"""The study of post-training quantization."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_it_goes_on_where_it_stopped(digits_checkpoint, run_study, tmp_path):
    figures = tmp_path / "study.json"
    options = ["--models", f"tiny/7={digits_checkpoint}", "--image_size", 8, "--bits", 3, "--max_eval_samples", 32]
    options += ["--calibration_samples", 32, "--output_json", figures, "--dataset_title", "Digits"]
    done = run_study("ptq_study.py", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(figures.read_text())
    results = record["models"]["tiny/7"]
    assert record["images"] == 32 and "k-means, channel|3" in results and "W4A8|W4A8" in results
    assert results["mixed|3.2"]["bits_per_weight"] <= 3.2
    table = figures.with_suffix(".md").read_text()
    assert "| tiny, float" in table and "trained with the seeds 7." in table
    for line, row in results.items():
        assert f"{row['top1']:.2f}" in table and line.split("|")[0].replace("mixed", "mixed precision") in table
    assert str(tmp_path) not in figures.read_text() + table

    del results["W4A8|W4A8"]
    results["k-means, channel|3"]["top1"] = 12.34  # what is there is kept
    figures.write_text(json.dumps(record))
    assert run_study("ptq_study.py", *options).returncode == 0
    again = json.loads(figures.read_text())["models"]["tiny/7"]
    assert again["k-means, channel|3"]["top1"] == 12.34 and "W4A8|W4A8" in again


def test_seeds_share_a_table_of_means(run_study):
    sizes = {"float": 32.0, "k-means, channel|4": 4.5, "theirs|4": 5.0}
    rows = {line: {"top1": 90.0 - 2 * size, "bits_per_weight": size} for line, size in sizes.items()}
    rows["theirs|4"]["library"] = "x"
    other = {line: row | {"top1": row["top1"] + 3} for line, row in rows.items()}
    record = {"images": 1, "dataset": "D", "calibration_samples": 2, "seed": 0, "models": {"BN/0": rows, "BN/1": other}}
    script = "import json, sys, ptq_study; print(ptq_study.markdown(json.loads(sys.argv[1])))"
    table = run_study("-c", script, json.dumps(record)).stdout
    assert "trained with the seeds 0 and 1." in table
    assert table.rstrip().splitlines()[2:] == [
        "| BN, float 27.50 | 4 bit | stored |", "|---|---|---|",
        "| k-means, channel | 82.50 | 4.50 |", "| theirs | 81.50 | 5.00 |",
    ]  # fmt: skip


def test_committed_tables_are_made_from_the_committed_json(run_study):
    script = "import json, ptq_study; print(json.dumps(ptq_study.markdown(json.load(open('%s')))))"
    figures = ROOT / "model_cards" / "ptq_study.json"
    done = run_study("-c", script % figures)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == figures.with_suffix(".md").read_text()
