"""What the studies share."""

import pytest

from repvgg_hf.recipes.studies.shared import mean, rows_by_network, split_checkpoints


def test_a_name_is_a_network_and_a_seed():
    found = split_checkpoints(["BN/0=a=b", "plain=c"])
    assert found == {
        "BN/0": ("a=b", {"network": "BN", "network_seed": "0"}),
        "plain": ("c", {"network": "plain", "network_seed": None}),
    }
    with pytest.raises(ValueError, match="--models takes name/seed=folder, got 'x'"):
        split_checkpoints(["x"])


def test_rows_of_all_seeds_are_together():
    rows = [{"network": network, "top1": top1} for network, top1 in (("BN", 1.0), ("OABN", 5.0), ("BN", 2.0))]
    record = {"models": {"BN/0": {"float": rows[0]}, "OABN/0": {"float": rows[1]}, "BN/1": {"float": rows[2]}}}
    networks = rows_by_network(record)
    assert networks == {"BN": [rows[0], rows[2]], "OABN": [rows[1]]} and mean(networks["BN"]) == 1.5
