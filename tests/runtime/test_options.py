"""Options: one declaration for keyword arguments, command lines, help and types."""

import dataclasses
import typing

import pytest
from transformers import HfArgumentParser

from repvgg_hf import CalibrationConfig, ClusterConfig, QATConfig
from repvgg_hf.runtime.options import suggest_options, unknown_option
from repvgg_hf.runtime.quantization_cluster import ClusterOptions, QuantizationOptions

OPTIONS = [QuantizationOptions, CalibrationConfig, QATConfig]


@suggest_options
@dataclasses.dataclass
class Recipe:
    flour: int = 3
    water: int = 2
    made: bool = dataclasses.field(default=False, init=False)


def test_a_typo_is_answered_with_what_was_meant():
    assert Recipe(flour=1, water=1) == Recipe(1, 1)
    with pytest.raises(TypeError, match="^Recipe has no option 'flower': did you mean 'flour'"):
        Recipe(flower=1)
    with pytest.raises(TypeError, match="^Recipe has no option 'salt': it takes flour, water.$"):
        Recipe(salt=1)
    with pytest.raises(TypeError, match="^Recipe has no option 'made'"):
        Recipe(made=True)
    assert unknown_option("bit", ["bits", "method"], "It") == "It has no option 'bit': did you mean 'bits'?"


@pytest.mark.parametrize("cls", [ClusterConfig, CalibrationConfig, QATConfig])
def test_configs_suggest(cls):
    for field in dataclasses.fields(cls):
        with pytest.raises(TypeError, match=f"^{cls.__name__} has no option '{field.name}s'.*{field.name}"):
            cls(**{f"{field.name}s": 1})


def test_keyword_arguments_are_the_fields_of_the_config():
    """Without bits and method, which have arguments of their own; with the same types, but for JSON text."""
    fields = typing.get_type_hints(QuantizationOptions)
    hints = typing.get_type_hints(ClusterOptions)
    assert list(hints) == [name for name in fields if name not in ("bits", "method")]
    assert not ClusterOptions.__required_keys__
    assert fields.pop("bits_overrides") == hints.pop("bits_overrides") | str
    assert {name: fields[name] for name in hints} == hints
    stored = {field.name for field in dataclasses.fields(ClusterConfig)}
    assert stored - set(fields) == {"bits_overrides", "format_version", "fused_structure", "checksum", "quant_method"}


@pytest.mark.parametrize("cls", OPTIONS)
def test_the_command_line_gives_the_defaults(cls):
    (parsed,) = HfArgumentParser(cls).parse_args_into_dataclasses([])
    assert parsed == cls() and type(parsed) is cls


@pytest.mark.parametrize("cls", OPTIONS)
def test_every_option_has_a_help_text_of_its_own(cls):
    texts = [field.metadata.get("help", "") for field in dataclasses.fields(cls)]
    assert all(len(text.split()) >= 4 and text[0].isupper() and text.endswith((".", "'.")) for text in texts), texts
    assert len(set(texts)) == len(texts)
    printed = " ".join(HfArgumentParser(cls).format_help().split())
    for field, text in zip(dataclasses.fields(cls), texts):
        assert f"--{field.name} " in printed and " ".join(text.split()) in printed


def test_command_lines_of_every_type():
    arguments = "--method uniform --bits 3 --granularity per_group --group_size 8 --channel_scale true".split()
    arguments += "--symmetric true --range_method minmax --activation_bits 8 --codebook_dtype float32".split()
    arguments += ["--modules_to_not_convert", "classifier", "embeddings", "--bits_overrides", '{"encoder": 2}']
    arguments += "--calibration_batch_size 16 --no_bias_correction --target_bits_per_weight 3.5 --damping 0.1".split()
    arguments += "--codebook_momentum 0.5 --codebook_update_every 2 --blend_steps 7".split()
    weights, calibration, training = HfArgumentParser(OPTIONS).parse_args_into_dataclasses(arguments)
    assert weights == QuantizationOptions(
        method="uniform", bits=3, granularity="per_group", group_size=8, channel_scale=True, symmetric=True,
        range_method="minmax", activation_bits=8, codebook_dtype="float32",
        modules_to_not_convert=["classifier", "embeddings"], bits_overrides={"encoder": 2},
    )  # fmt: skip
    assert calibration == CalibrationConfig(
        calibration_batch_size=16, bias_correction=False, target_bits_per_weight=3.5, damping=0.1
    )
    assert training == QATConfig(codebook_momentum=0.5, codebook_update_every=2, blend_steps=7)


@pytest.mark.parametrize("cls", [QuantizationOptions, ClusterConfig])
def test_bits_overrides_as_json_text(cls):
    assert cls(bits_overrides='{"classifier": 8}').bits_overrides == {"classifier": 8}
    with pytest.raises(ValueError, match=r"^bits_overrides is no JSON \(.*\): give text such as '{\"classifier\": 8}'"):
        cls(bits_overrides="classifier=8")
    with pytest.raises(ValueError, match=r"^bits_overrides must be an object of bits by module, got '\[8\]'"):
        cls(bits_overrides="[8]")
    with pytest.raises(ValueError, match=r"^bits_overrides\['classifier'\] must be an integer from 1 to 8, got '8'"):
        cls(bits_overrides='{"classifier": "8"}')


def test_options_make_a_config():
    """As a recipe does it."""
    options = QuantizationOptions(bits=3, bits_overrides='{"classifier": 8}')
    config = ClusterConfig(**dataclasses.asdict(options))
    assert config.bits_of("classifier") == 8 and config.bits == 3
