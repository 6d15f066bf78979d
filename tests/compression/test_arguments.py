"""The arguments of `quantize` and `prepare_qat`: what help and editors show, and what errors say."""

import dataclasses
import inspect
import pydoc

import pytest
import torch

from repvgg_hf import (
    CalibrationConfig,
    ClusterConfig,
    QATConfig,
    RepVGGBackbone,
    RepVGGForImageClassification,
    RepVGGModel,
    compression,
)
from repvgg_hf.runtime.quantization_cluster import ClusterOptions

METHODS = ["quantize", "prepare_qat"]
POSITIONAL, KEYWORD, OPTIONS = (
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.KEYWORD_ONLY,
    inspect.Parameter.VAR_KEYWORD,
)
SIGNATURES = {
    "quantize": {"method": POSITIONAL, "bits": POSITIONAL, "calibration": KEYWORD, "calibration_config": KEYWORD},
}
SIGNATURES["prepare_qat"] = SIGNATURES["quantize"] | {"qat_config": KEYWORD}


@pytest.fixture
def model(make_model):
    return make_model().eval()


@pytest.fixture
def images(generator):
    return torch.randn(8, 3, 16, 16, generator=generator)


@pytest.mark.parametrize("name", METHODS)
def test_signatures_show_every_argument(name, model):
    for function in (getattr(model, name), getattr(compression, name)):
        parameters = dict(inspect.signature(function).parameters)
        parameters.pop("model", None)
        assert {key: parameter.kind for key, parameter in parameters.items()} == SIGNATURES[name] | {"options": OPTIONS}
        assert all(parameter.default is None for key, parameter in parameters.items() if key != "options")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("cls", [RepVGGForImageClassification, RepVGGModel, RepVGGBackbone])
def test_help_names_every_option(cls, name):
    text = pydoc.render_doc(getattr(cls, name), renderer=pydoc.plaintext)
    assert "ClusterOptions" in text.splitlines()[2]  # in the signature
    documented = text[text.index("Args:") : text.index("Raises")]
    for option in [*SIGNATURES[name], *ClusterOptions.__annotations__]:
        assert option in documented, option
    hint = inspect.signature(getattr(cls, name)).parameters["options"].annotation
    assert hint.__args__ == (ClusterOptions,)


def test_help_of_the_configs_names_every_field():
    for cls in (ClusterConfig, CalibrationConfig, QATConfig):
        text = inspect.getdoc(cls)
        for field in dataclasses.fields(cls):
            assert f"{field.name}:" in text, f"{cls.__name__}.{field.name}"
        assert list(inspect.signature(cls).parameters)  # no bare *args, **kwargs
        assert "kwargs" not in inspect.signature(cls).parameters


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "options, message",
    [
        ({"granularty": "per_channel"}, "^Quantization has no option 'granularty': did you mean 'granularity'"),
        ({"bit": 4}, "^Quantization has no option 'bit': did you mean 'bits'"),
        ({"preserve_zero": True}, "^Quantization has no option 'preserve_zero': it takes activation_bits, "),
        ({"start": "decoded"}, "^Quantization has no option 'start'"),
        ({"checksum": "crc32:0"}, "^Quantization has no option 'checksum'"),  # written by the package alone
        (
            {"sensitivity": "fisher"},
            r"^sensitivity is an option of calibration_config: pass calibration_config=CalibrationConfig\(sensitivity=",
        ),
        (
            {"blend_steps": 10},
            r"^blend_steps is an option of qat_config: pass qat_config=QATConfig\(blend_steps=\.\.\.\)",
        ),
        ({"codebook_momentum": 0.5}, "^codebook_momentum is an option of qat_config"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_unknown_option_says_what_or_where_it_may_be(name, options, message, model, images):
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for data in ({}, {"calibration": images}):
        with pytest.raises(TypeError, match=message):
            getattr(model, name)(**options, **data)
    state = model.state_dict()
    assert state.keys() == before.keys() and all(torch.equal(state[key], before[key]) for key in before)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("value", [{"damping": 0.1}, "fisher", ClusterConfig(), QATConfig()], ids=str)
def test_a_calibration_config_of_another_type(name, value, model, images):
    with pytest.raises(TypeError, match="^calibration_config must be a CalibrationConfig, got "):
        getattr(model, name)(activation_bits=8, calibration=images, calibration_config=value)


@pytest.mark.parametrize("value", [{"blend_steps": 1}, CalibrationConfig()], ids=str)
def test_a_qat_config_of_another_type(value, model):
    with pytest.raises(TypeError, match="^qat_config must be a QATConfig, got "):
        model.prepare_qat(qat_config=value)


def test_quantize_has_no_qat_config(model):
    with pytest.raises(TypeError, match="qat_config"):
        model.quantize(qat_config=QATConfig())


def test_calibration_without_use_is_an_error(model, images):
    """Codebooks of QAT start without data; images would be ignored in silence."""
    with pytest.raises(ValueError, match="^Calibration images only find input ranges .* neither is asked for: set one"):
        model.prepare_qat(calibration=images)
    with pytest.raises(ValueError, match="^tuning_steps=9 does nothing in prepare_qat"):
        model.prepare_qat(activation_bits=8, calibration=images, calibration_config=CalibrationConfig(tuning_steps=9))
    with pytest.raises(ValueError, match="^activation_bits needs calibration data"):
        model.prepare_qat(activation_bits=8)
    assert model.config.qat_config is None
    model.prepare_qat(activation_bits=8, calibration=images)
    assert model.config.qat_config["quantization"]["activation_bits"] == 8


def test_a_calibration_config_without_data_is_an_error(model):
    how, message = CalibrationConfig(), "^calibration_config needs calibration data: pass calibration=, a DataLoader or"
    for prepare, options in (
        (model.quantize, {}),
        (model.quantize, {"activation_bits": 8}),
        (model.prepare_qat, {"activation_bits": 8}),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(calibration_config=how, **options)


@pytest.mark.parametrize("argument", ["method", "bits", "calibration", "calibration_config", "granularity"])
def test_a_prepared_model_takes_no_arguments(argument, model, images):
    model.prepare_qat(bits=4)
    values = {"method": "cluster", "bits": 4, "calibration": images, "calibration_config": CalibrationConfig()}
    with pytest.raises(ValueError, match=r"prepared for QAT, .*call quantize\(\) without arguments"):
        model.quantize(**{argument: values.get(argument, "per_tensor")})
    assert model.quantize().is_quantized
