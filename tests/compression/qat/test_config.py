"""What the options of quantization-aware training accept."""

import dataclasses

import pytest

from repvgg_hf import ClusterConfig, QATConfig, RepVGGForImageClassification
from repvgg_hf.compression.qat.config import check_qat_options
from repvgg_hf.runtime.quantization_methods import METHODS


def test_defaults_and_help():
    assert dataclasses.asdict(QATConfig()) == {
        "codebook_momentum": 0.9, "codebook_update_every": 10, "blend_steps": 0
    }  # fmt: skip
    assert all(field.metadata["help"].endswith(".") for field in dataclasses.fields(QATConfig))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"codebook_momentum": 1}, "codebook_momentum must be at least 0 and less than 1, got 1"),
        ({"codebook_momentum": -0.1}, "codebook_momentum must be at least 0 and less than 1, got -0.1"),
        ({"codebook_update_every": 0}, "codebook_update_every must be an integer of at least 1, got 0"),
        ({"codebook_update_every": 2.0}, "codebook_update_every must be an integer of at least 1, got 2.0"),
        ({"blend_steps": -1}, "blend_steps must be an integer of at least 0, got -1"),
        ({"blend_step": 3}, "QATConfig has no option 'blend_step': did you mean 'blend_steps'"),
        ({"bits": 3}, "QATConfig has no option 'bits': it takes blend_steps, codebook_momentum, codebook_update_every"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        QATConfig(**options)


@pytest.mark.parametrize("option, value", [("codebook_momentum", 0.5), ("codebook_update_every", 1)])
def test_options_of_another_method_are_refused_by_name(option, value, tiny_config):
    given = QATConfig(**{option: value}, blend_steps=3)
    check_qat_options(ClusterConfig(), given)
    check_qat_options(ClusterConfig(method="uniform"), QATConfig(blend_steps=3))
    message = f"^{option}={value!r} is an option of method='cluster', not of 'uniform': leave it out, or choose that"
    model = RepVGGForImageClassification(tiny_config())
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.prepare_qat("uniform", 4, qat_config=given)
    assert set(model.state_dict()) == before and model.config.qat_config is None


def test_each_option_is_of_all_methods_or_of_one():
    fields = {field.name for field in dataclasses.fields(QATConfig)}
    owned = [name for method in METHODS.values() for name in method.qat_options]
    assert len(owned) == len(set(owned)) and set(owned) < fields
