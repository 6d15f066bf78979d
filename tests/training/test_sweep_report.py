"""The words about a sweep of quantized models."""

import re

import pytest

from repvgg_hf.training.sweep_report import (
    accuracy_fields,
    choose,
    sweep_table,
    training_helps,
    tuning_helps,
    waste,
    why,
)

IMAGES = 200
FLOAT = [True] * 180 + [False] * 20


def row(name: str, bits: int, size: int, lost: int, **more) -> dict:
    """A model that is wrong on `lost` images that float has right, and else the same."""
    right = [False] * lost + FLOAT[lost:]
    row = {"model": name, "bits": bits, "bytes": size, "top1": 50 * sum(right) / 100, "stage": "calibrated"}
    row |= {"method": "cluster", "activation_bits": None, "calibration_config": {"tuning_steps": 0}}
    row |= {"granularity": "per_tensor", "bits_per_weight": bits + 0.1, "bits_per_weight_with_one_codebook": bits + 0.1}
    return row | accuracy_fields(right, FLOAT) | more


FLOAT_ROW = row("float", 32, 8000, 0, stage="float")


def test_reasons_of_the_recommendation():
    rows = [row("w8", 8, 2000, 0), row("w4", 4, 1000, 2), row("w3", 3, 750, 3), row("w2", 2, 500, 40)]

    def sentence(rows, tolerance):
        chosen, small = choose(rows, IMAGES, tolerance)
        return why(chosen, small, IMAGES, tolerance, FLOAT_ROW)

    assert sentence(rows, 2.0).startswith(
        "Recommended: w3 (750 bytes, 10.7 times smaller than float), the smallest one"
    )
    assert "within --tolerance: 1.5 of 2 points" in sentence(rows, 2.0)
    assert "w3" in sentence(rows, 0.0) and "chance explains up to 1.5 points" in sentence(rows, 0.0)
    assert "not worse than float on 200 images" in sentence(rows[:1], 1.0)
    assert "w2" in sentence(rows[3:], 1.0) and "but it drops 20.0 points" in sentence(rows[3:], 1.0)


def test_training_is_named_only_where_fewer_bits_need_it():
    rows, command = [row("w4", 4, 1000, 0), row("w2", 2, 500, 40)], ["--model_name_or_path", "a run"]
    told = training_helps(rows, *choose(rows, IMAGES, 1.0), IMAGES, command)
    assert "w2 drops 20.0 points" in told and told.endswith("repvgg-hf qat --model_name_or_path 'a run' --bits 2")
    told = tuning_helps(rows, *choose(rows, IMAGES, 1.0), IMAGES, command)
    assert "20.0 points that w2 drops" in told and told.endswith(
        "repvgg-hf quantize --model_name_or_path 'a run' --method cluster --granularity per_tensor --bits 2 "
        "--target_bits_per_weight 2.1 --tuning_steps 300"
    )
    few = [row("w2-a4", 2, 500, 40, activation_bits=4), row("w2.1-mixed", 2.1, 510, 30, stage="mixed")]
    told = tuning_helps(few, *choose(few, IMAGES, 1.0), IMAGES, command)
    assert "scaled to one range: " in told and "--bits 2 --activation_bits 4 --equalization 0.3 --target" in told
    few[0]["calibration_config"] = {"tuning_steps": 0, "equalization": 0.5}
    assert "--activation_bits 4 --target" in tuning_helps(few, *choose(few, IMAGES, 1.0), IMAGES, command)
    tuned = [*rows, row("w3-tuned", 3, 750, 3, calibration_config={"tuning_steps": 300})]
    assert tuning_helps(tuned, *choose(tuned, IMAGES, 1.0), IMAGES, command) is None
    assert tuning_helps(rows[:1], *choose(rows[:1], IMAGES, 1.0), IMAGES, command) is None
    assert training_helps(rows[:1], *choose(rows[:1], IMAGES, 1.0), IMAGES, command) is None
    assert training_helps(rows[1:], *choose(rows[1:], IMAGES, 1.0), IMAGES, command) is not None


@pytest.mark.parametrize(
    ("granularity", "stored", "one", "said"),
    [
        ("per_channel", 11.3, 8.1, "stores 11.3 bits per weight for codes of 8, as each channel .* stores 8.1"),
        ("per_tensor", 16.0, 17.0, "codebook of 256 entries: take fewer bits"),
        ("per_channel", 17.0, 18.0, "take fewer bits"),
        ("per_channel", 9.9, 8.1, None),
    ],
)
def test_codebooks_that_weigh_too_much(granularity, stored, one, said):
    figures = {"granularity": granularity, "bits_per_weight": stored, "bits_per_weight_with_one_codebook": one}
    entry = row("w8", 8, 2000, 0, **figures)
    told = waste(entry)
    table = sweep_table([FLOAT_ROW, entry], FLOAT_ROW, IMAGES, entry)
    if said is None:
        assert told is None and "wasteful" not in table
    else:
        assert re.search(said, told) and "recommended, wasteful" in table
    assert waste(entry | {"stage": "mixed"}) is None


def test_table_fits_a_terminal():
    entry = row("cluster-per_tensor-scale-w4-a8-calibrated", 4, 12_345_678, 5)
    lines = sweep_table([FLOAT_ROW, entry], FLOAT_ROW, IMAGES, entry).splitlines()
    assert max(map(len, lines)) <= 125 and lines[2].split()[:4] == [entry["model"], "4", "4.10", "12,345,678"]
    assert "87.5" in lines[2] and "2.5 ± 2.2" in lines[2] and lines[1].split()[-1] != "recommended"


def test_training_is_not_proposed_for_mixed_bits():
    rows, command = [row("mixed", 2.5, 600, 30, stage="mixed"), row("w4", 4, 1000, 40)], ["--model_name_or_path", "run"]
    assert training_helps(rows, *choose(rows, IMAGES, 1.0), IMAGES, command).endswith("--bits 4")
    assert training_helps(rows[:1], *choose(rows[:1], IMAGES, 1.0), IMAGES, command) is None
