"""A sample of the mutants of `tests/fuzz_checkpoints.py`, and that the fuzz finds what it is to find."""

import importlib.util
from pathlib import Path

import pytest

from repvgg_hf.runtime import checkpoints

SCRIPT = Path(__file__).parents[1] / "fuzz_checkpoints.py"


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz_checkpoints", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.fuzz


def test_no_mutant_loads_to_other_logits_or_crashes(fuzz):
    record = fuzz(144, seed=2)
    assert record["failures"] == []
    assert sum(outcomes.get("refused", 0) for outcomes in record["outcomes"].values()) > 144 / 2
    assert all("refused" in outcomes for outcomes in record["outcomes"].values())


def test_the_fuzz_notices_a_checksum_of_names_and_bytes_alone(fuzz, monkeypatch):
    """Without dtypes, shapes and the configuration some mutants load to other logits."""
    whole = checkpoints.checksum

    def without_forms(tensors, settings):
        return whole({name: checkpoints.StoredTensor("", [], tensor.crc) for name, tensor in tensors.items()}, {})

    monkeypatch.setattr(checkpoints, "checksum", without_forms)
    assert any(failure["outcome"] == "other logits" for failure in fuzz(144, seed=2)["failures"])
