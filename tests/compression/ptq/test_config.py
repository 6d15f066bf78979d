"""How calibration data is used: what can be chosen, and what is refused."""

import pytest

from repvgg_hf import CalibrationConfig


def test_the_defaults():
    config = CalibrationConfig()
    assert (config.sensitivity, config.error_compensation, config.bias_correction) == ("none", True, True)
    assert (config.target_bits_per_weight, config.activation_range, config.calibration_batch_size) == (None, "mse", 64)
    assert config == CalibrationConfig(damping=0.01, activation_memory=4.0, order="sequential")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"order": "chain"}, "^order must be one of sequential, one_pass, got 'chain'"),
        ({"sensitivity": "hessian"}, "^sensitivity must be one of none, fisher, got 'hessian'"),
        ({"activation_range": "max"}, "^activation_range must be one of minmax, mse, got 'max'"),
        ({"calibration_batch_size": 0}, "^calibration_batch_size must be an integer of at least 1, got 0"),
        ({"calibration_batch_size": 2.0}, "^calibration_batch_size must be an integer of at least 1, got 2.0"),
        ({"calibration_batch_size": True}, "^calibration_batch_size must be an integer of at least 1, got True"),
        ({"bias_correction": 1}, "^bias_correction must be True or False, got 1"),
        ({"error_compensation": "no"}, "^error_compensation must be True or False, got 'no'"),
        ({"equalization": -0.1}, "^equalization must be None or from 0 to 1, such as 0.3, got -0.1"),
        ({"equalization": True}, "^equalization must be None or from 0 to 1, such as 0.3, got True"),
        ({"equalization": "on"}, "^equalization must be None or from 0 to 1, such as 0.3, got 'on'"),
        ({"damping": 0}, "^damping must be a positive number, got 0"),
        ({"damping": float("nan")}, "^damping must be a positive number, got nan"),
        ({"damping": None}, "^damping must be a positive number, got None"),
        ({"activation_memory": -1}, "^activation_memory must be a number of GiB, at least 0, got -1"),
        ({"activation_memory": "x"}, "^activation_memory must be a number of GiB, at least 0, got 'x'"),
        ({"tuning_steps": -1}, "^tuning_steps must be an integer of at least 0, got -1"),
        ({"tuning_steps": 10.0}, "^tuning_steps must be an integer of at least 0, got 10.0"),
        ({"tuning_learning_rate": 0}, "^tuning_learning_rate must be above 0 and below 1, such as 0.001, got 0"),
        (
            {"tuning_learning_rate": 0.01},
            "^tuning_learning_rate=0.01 does nothing without tuning_steps: give tuning_steps=300, or leave",
        ),
        (
            {"damping": 0.1, "error_compensation": False},
            "^damping=0.1 does nothing without error_compensation: give error_compensation=True, or leave damping out",
        ),
        ({"tuning_learning_rate": "1"}, "^tuning_learning_rate must be above 0 and below 1, such as 0.001, got '1'"),
        ({"target_bits_per_weight": 0.9}, "^target_bits_per_weight must be from 1 to 8, got 0.9"),
        ({"target_bits_per_weight": 8.1}, "^target_bits_per_weight must be from 1 to 8, got 8.1"),
        ({"target_bits_per_weight": "3"}, "^target_bits_per_weight must be from 1 to 8, got '3'"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CalibrationConfig(**options)


@pytest.mark.parametrize("option", ["rounds", "seed"])
def test_options_that_there_are_not(option):
    with pytest.raises(TypeError, match=f"^CalibrationConfig has no option '{option}': it takes activation_memory, "):
        CalibrationConfig(**{option: 1})
    with pytest.raises(TypeError, match="^CalibrationConfig has no option 'sensitivty': did you mean 'sensitivity'"):
        CalibrationConfig(sensitivty="fisher")
