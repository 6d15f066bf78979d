"""What the options of quantization-aware training accept."""

import dataclasses

import pytest

from repvgg_hf import QATConfig


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
