"""The configuration of quantized models."""

import json

import pytest
import torch
from transformers.quantizers.auto import AutoQuantizationConfig

from repvgg_hf import ClusterConfig


class TestConfig:
    def test_the_defaults(self):
        config = ClusterConfig()
        assert (config.quant_method, config.bits, config.method, config.granularity) == (
            "cluster",
            4,
            "cluster",
            "per_tensor",
        )
        assert (config.codebook_dtype, config.decode, config.format_version) == ("float16", "at_load", 1)

    @pytest.mark.parametrize(
        "method, granularity, codebook_dtype, expected",
        [
            ("cluster", "per_tensor", "float16", True),
            ("cluster", "per_channel", "float16", False),
            ("cluster", "per_channel", "int8", True),
            ("uniform", "per_tensor", "float16", False),
            ("uniform", "per_channel", "float16", True),
            ("uniform", "per_channel", "int8", True),
        ],
    )
    def test_the_channel_scale_that_fits(self, method, granularity, codebook_dtype, expected):
        options = {"method": method, "granularity": granularity, "codebook_dtype": codebook_dtype}
        assert ClusterConfig(**options).channel_scale is expected
        if codebook_dtype != "int8":
            assert ClusterConfig(**options, channel_scale=not expected).channel_scale is not expected

    @pytest.mark.parametrize("method", ["cluster", "uniform"])
    @pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
    def test_quantized_activations_come_with_integers(self, granularity, method):
        options = {"method": method, "granularity": granularity, "activation_bits": 8}
        config = ClusterConfig(**options)
        assert (config.codebook_dtype, config.channel_scale, config.activation_scheme) == ("int8", True, "affine")
        assert ClusterConfig(**options, codebook_dtype="float16").codebook_dtype == "float16"
        without = ClusterConfig(**options, channel_scale=False)
        assert (without.codebook_dtype, without.channel_scale) == ("float16", False)

    def test_grids_with_an_offset_are_no_integers(self):
        config = ClusterConfig(method="uniform", symmetric=False, activation_bits=8)
        assert (config.codebook_dtype, config.channel_scale) == ("float16", False)

    def test_fields_that_came_later_are_stored_where_they_say_something(self):
        later = {"reduce_range", "activation_scheme", "quantize_last_map"}
        for config in (ClusterConfig(), ClusterConfig(activation_bits=8)):
            assert later.isdisjoint(config.to_dict())
        options = {"reduce_range": False, "activation_scheme": "int8_symmetric", "quantize_last_map": False}
        stored = ClusterConfig(activation_bits=8, **options).to_dict()
        assert stored.items() >= options.items() and ClusterConfig.from_dict(stored).to_dict() == stored

    def test_json_and_back(self):
        options = {"granularity": "per_group", "group_size": 4, "bits_overrides": {"classifier": 8}, "bits": 3}
        options["activation_bits"] = 6
        config = ClusterConfig(**options, modules_to_not_convert=["embeddings"])
        stored = json.loads(json.dumps(config.to_dict()))
        assert ClusterConfig.from_dict(stored).to_dict() == config.to_dict() == stored
        assert stored["quant_method"] == "cluster" and stored["checksum"] is None

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"bits": 0}, "^bits must be an integer from 1 to 8, got 0"),
            ({"bits": 9}, "^bits must be an integer from 1 to 8, got 9"),
            ({"bits": 4.0}, "^bits must be an integer from 1 to 8, got 4.0"),
            ({"bits": True}, "^bits must be an integer from 1 to 8, got True"),
            ({"bits_overrides": {"classifier": 12}}, r"^bits_overrides\['classifier'\] must be .* 1 to 8, got 12"),
            ({"method": "kmeans"}, "^method must be one of cluster, uniform, got 'kmeans'"),
            ({"granularity": "channel"}, "^granularity must be one of per_tensor, per_channel, per_group, got"),
            ({"codebook_dtype": "bfloat16"}, "^codebook_dtype must be one of float16, float32, int8, got 'bfloat16'"),
            ({"codebook_dtype": torch.float16}, "^codebook_dtype must be one of float16, float32, int8, got torch"),
            ({"method": "uniform", "range_method": "max"}, "^range_method must be one of minmax, mse, got 'max'"),
            ({"decode": "lazy"}, "^decode must be one of at_load, on_the_fly, got 'lazy'"),
            ({"granularity": "per_group"}, "^granularity='per_group' and group_size=None don't fit: give group_size"),
            ({"group_size": 4}, "^granularity='per_tensor' and group_size=4 don't fit"),
            ({"granularity": "per_group", "group_size": 0}, "^group_size must be a positive integer, got 0"),
            ({"granularity": "per_group", "group_size": 2.0}, "^group_size must be a positive integer, got 2.0"),
            ({"granularity": "per_group", "group_size": True}, "^group_size must be a positive integer, got True"),
            ({"channel_scale": "yes"}, "^channel_scale must be True or False, got 'yes'"),
            ({"method": "uniform", "symmetric": 1}, "^symmetric must be True or False, got 1"),
            ({"codebook_dtype": "int8", "channel_scale": False}, "^codebook_dtype='int8' .*set channel_scale=True"),
            ({"method": "uniform", "channel_scale": True, "symmetric": False}, "no offset: set symmetric=True or"),
            ({"activation_bits": 1}, r"^activation_bits must be None \(.*\) or an integer from 2 to 8, got 1"),
            ({"activation_bits": 9}, "^activation_bits must be None .*, got 9"),
            ({"activation_bits": 8.0}, "^activation_bits must be None .*, got 8.0"),
            ({"activation_bits": True}, "^activation_bits must be None .*, got True"),
            ({"activation_bits": 8, "activation_scheme": "int8"}, "^activation_scheme must be one of affine, int8"),
            ({"activation_scheme": "affine"}, "^activation_scheme='affine' is for quantized activations, .* is None"),
            ({"activation_bits": 8, "quantize_last_map": 1}, "^quantize_last_map must be True, False or None"),
            ({"codebook_dtype": "int8", "reduce_range": "yes"}, "^reduce_range must be True, False or None .*yes"),
            ({"quant_method": "gptq"}, "^quant_method must be 'cluster', got 'gptq'"),
            ({"format_version": 2}, "format_version 2, this version of repvgg_hf reads 1: upgrade with"),
            ({"format_version": None}, "format_version None, this version"),
        ],
        ids=str,
    )  # fmt: skip
    def test_what_cannot_be_meant_is_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            ClusterConfig(**options)

    def test_a_later_format_is_no_unknown_option(self):
        """What it adds is not understood, but the message says why."""
        stored = {"quant_method": "cluster", "format_version": 2, "new_in_2": 0}
        for read in (ClusterConfig.from_dict, AutoQuantizationConfig.from_dict):
            with pytest.raises(ValueError, match="format_version 2, this version of repvgg_hf reads 1: upgrade with"):
                read(stored)

    @pytest.mark.parametrize(
        "option, message",
        [
            ("bit", "^ClusterConfig has no option 'bit': did you mean 'bits'"),
            ("granularty", "^ClusterConfig has no option 'granularty': did you mean 'granularity'"),
            ("preserve_zero", "^ClusterConfig has no option 'preserve_zero': it takes activation_bits, .*symmetric"),
        ],
    )
    def test_unknown_options_are_named(self, option, message):
        with pytest.raises(TypeError, match=message):
            ClusterConfig(**{option: 4})

    def test_the_longest_matching_name_wins(self):
        config = ClusterConfig(
            bits_overrides={"repvgg.encoder": 2, "encoder.stages": 3, "encoder.stages.1.layers.0": 5}
        )
        for prefix in ("", "repvgg."):
            assert config.bits_of(prefix + "embeddings.layer.conv") == 4
            assert config.bits_of(prefix + "encoder.stages.0.layers.0.conv") == 3
            assert config.bits_of(prefix + "encoder.stages.1.layers.0.conv") == 5
            assert config.bits_of(prefix + "encoder.stages.1.layers.01.conv") == 3  # not a parent: only the same start
        assert ClusterConfig(bits_overrides={"encoder.stages": 3, "repvgg.encoder": 2}).bits_of("encoder.stages.0") == 3

    @pytest.mark.parametrize("key", ["embeddings", "repvgg.embeddings", "repvgg.embeddings.layer.conv"])
    def test_modules_not_converted_with_or_without_prefix(self, key):
        config = ClusterConfig(modules_to_not_convert=[key])
        assert not config.converts("repvgg.embeddings.layer.conv") and not config.converts("embeddings.layer.conv")
        assert config.converts("embeddings2.layer.conv") and config.converts("classifier")

    @pytest.mark.parametrize("field", ["bits_overrides", "modules_to_not_convert"])
    def test_names_that_match_nothing_are_refused(self, field):
        names = ["repvgg.embeddings.layer.conv", "classifier"]
        value = {"classifier": 8, "embeddings.layer": 8} if field == "bits_overrides" else ["classifier", "embeddings"]
        ClusterConfig(**{field: value}).check_names(names)
        for key in ("head", "class", "embeddings.layer.conv.weight"):
            value = {"classifier": 8, key: 8} if field == "bits_overrides" else ["classifier", key]
            with pytest.raises(
                ValueError, match=f"^{field} names '{key}', which is no .*layers: repvgg.embeddings.layer"
            ):
                ClusterConfig(**{field: value}).check_names(names)

    @pytest.mark.parametrize(
        ("key", "meant"),
        [
            ("clasifier", "classifier"),
            ("embeding", "embeddings"),
            ("repvgg.embeddings.layer.cnv", "repvgg.*layer.conv"),
        ],
    )
    def test_names_that_are_misspelt_get_a_suggestion(self, key, meant):
        names = ["repvgg.embeddings.layer.conv", "classifier"]
        with pytest.raises(ValueError, match=f"names '{key}'.*: did you mean '{meant}'"):
            ClusterConfig(bits_overrides={key: 8}).check_names(names)

    def test_groups_divide_the_channels(self):
        assert ClusterConfig().groups_of("conv", 7) == 1
        assert ClusterConfig(granularity="per_channel").groups_of("conv", 7) == 7
        assert ClusterConfig(granularity="per_channel", channel_scale=True).groups_of("conv", 7) == 7
        config = ClusterConfig(granularity="per_group", group_size=3)
        assert config.groups_of("conv", 12) == 4
        with pytest.raises(ValueError, match="group_size=3 does not divide the 10 output channels of 'classifier'"):
            config.groups_of("classifier", 10)

    def test_a_symmetric_grid_per_channel_is_one_codebook_with_scales(self):
        """Integers times a step for each channel; other grids have a codebook for each."""
        options = {"method": "uniform", "granularity": "per_channel"}
        assert ClusterConfig(**options).groups_of("conv", 7) == 1
        assert ClusterConfig(**options, channel_scale=False).groups_of("conv", 7) == 7
        assert ClusterConfig(**options, symmetric=False).groups_of("conv", 7) == 7
        assert ClusterConfig(**options, codebook_dtype="int8").groups_of("conv", 7) == 1
        grouped = {"method": "uniform", "granularity": "per_group", "group_size": 3}
        assert ClusterConfig(**grouped, channel_scale=True).groups_of("conv", 12) == 4
