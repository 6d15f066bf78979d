"""The configuration: the published variants, saving, and what it refuses."""

import json
import resource
import time

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForImageClassification

from repvgg_hf import RepVGGConfig, RepVGGForImageClassification
from repvgg_hf.runtime.configuration_repvgg import VARIANTS

# millions of parameters of the fused ImageNet models, table 4 of the RepVGG paper (arXiv 2101.03697)
PAPER_MILLIONS = {
    "a0": 8.30,
    "a1": 12.78,
    "a2": 25.49,
    "b0": 14.33,
    "b1": 51.82,
    "b1g2": 41.36,
    "b1g4": 36.12,
    "b2": 80.31,
    "b2g4": 55.77,
    "b3": 110.96,
    "b3g4": 75.62,
}


def test_defaults_are_a0():
    defaults, a0 = RepVGGConfig().to_dict(), RepVGGConfig.from_variant("a0").to_dict()
    for config in (defaults, a0):
        for name in ("hidden_sizes", "depths", "strides", "block_branches"):
            config[name] = list(config[name])
    assert defaults == a0
    assert RepVGGConfig().oabn


@pytest.mark.parametrize("variant", PAPER_MILLIONS)
def test_variant_has_the_papers_size(variant):
    with torch.device("meta"):
        model = RepVGGForImageClassification(RepVGGConfig.from_variant(variant, num_labels=1000, deploy=True))
    assert model.num_parameters() // 10_000 / 100 == PAPER_MILLIONS[variant]  # the paper rounds down


@pytest.mark.parametrize("name", ["b1g4", "B1g4", "RepVGG-B1g4", "repvgg_b1g4"])
def test_variant_names(name):
    config = RepVGGConfig.from_variant(name, num_labels=7)
    assert (config.hidden_sizes, config.groups, config.num_labels) == ([128, 256, 512, 2048], 4, 7)


def test_unknown_variant_lists_the_known():
    with pytest.raises(ValueError, match=r"Unknown RepVGG variant 'c0': choose one of a0, a1, .*d2se") as raised:
        RepVGGConfig.from_variant("c0")
    assert all(name in str(raised.value) for name in VARIANTS)


def test_overrides_win():
    config = RepVGGConfig.from_variant("d2se", use_squeeze_excitation=False, depths=[1, 1, 1, 1])
    assert not config.use_squeeze_excitation
    assert config.depths == [1, 1, 1, 1]


def test_save_and_load(tmp_path, tiny_config):
    config = tiny_config(
        oabn_threshold=4, block_branches=["3x3", "1x3", "identity"], out_features=["stem", "stage2"], deploy=True
    )
    config.save_pretrained(tmp_path)
    loaded = RepVGGConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert (loaded.oabn_threshold, loaded.block_branches) == (4, ["3x3", "1x3", "identity"])
    assert (loaded.out_features, loaded.out_indices) == (["stem", "stage2"], [0, 2])


def test_stage_names(tiny_config):
    config = tiny_config(hidden_sizes=[8, 8, 16], depths=[1, 1, 1], strides=[1, 2, 2])
    assert config.stage_names == ["stem", "stage1", "stage2", "stage3"]
    assert config.num_stages == config.num_hidden_layers == 3
    assert config.out_features == ["stage3"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_sizes": [8]}, "hidden_sizes has 1 entries, depths 2 and strides 2: give one entry per stage"),
        ({"strides": [1, 1, 1]}, "hidden_sizes has 2 entries, depths 2 and strides 3"),
        ({"depths": [0, 2]}, r"depths must be positive, got \[0, 2\]"),
        ({"hidden_sizes": [8, -16]}, r"hidden_sizes must be positive, got \[8, -16\]"),
        ({"strides": [2, 0]}, r"strides must be positive, got \[2, 0\]"),
        ({"stem_stride": 0}, "stem_stride and squeeze_ratio must be at least 1"),
        ({"num_channels": 0}, "num_channels, stem_hidden_size.* must be at least 1"),
        ({"squeeze_ratio": -1}, "squeeze_ratio must be at least 1"),
        ({"groups": 3}, r"groups=3 must divide every entry of hidden_sizes=\[8, 16\]"),
        ({"groups": 0}, "groups=0 must divide"),
        ({"oabn_threshold": 0.0}, "oabn_threshold must be positive and finite, got 0.0; 6 is the default"),
        ({"oabn_threshold": -2}, "oabn_threshold must be positive"),
        ({"oabn_threshold": float("inf")}, "oabn_threshold must be positive and finite, got inf"),
        ({"oabn_threshold": float("nan")}, "oabn_threshold must be positive and finite, got nan"),
        ({"hidden_sizes": "8, 16"}, "hidden_sizes"),
        ({"deploy": "yes"}, "deploy"),
        ({"out_features": ["stage9"]}, "stage9"),
        ({"hidden_act": "remu"}, "hidden_act must be one of .*relu.*, got 'remu'"),
        ({"dtype": "int8"}, "dtype must be one of float16, bfloat16, float32, float64, got 'int8'"),
        ({"dtype": 3}, "dtype must be one of float16, .*, got 3"),
        ({"torch_dtype": "relu"}, "torch_dtype must be one of float16, .*, got 'relu'"),
        ({"id2label": ["ant", "bee"]}, "id2label must be an object that gives a name for each number"),
        ({"id2label": {"ant": 0}}, "id2label must be an object .*got {'ant': 0}"),
        ({"label2id": {"ant": [0]}}, "label2id must be an object that gives a number for each name"),
        ({"to_dict": 3}, "'to_dict' can't be a field of a configuration, the class has it"),
        ({"attribute_map": 0.5}, "'attribute_map' can't be a field of a configuration, the class has it"),
        ({"output_hidden_states": "relu"}, "output_hidden_states must be true or false, got 'relu'"),
        ({"return_dict": 3}, "return_dict must be true or false, got 3"),
        (
            {"quantization_config": {"quant_method": "cluster", "dtype": [1]}},
            "quantization_config has no option 'dtype'",
        ),
        ({"base_model_tp_plan": [2, 2]}, r"base_model_tp_plan must be an object or null, got \[2, 2\]"),
        ({"quantization_config": True}, "quantization_config must be an object with a text as quant_method, got True"),
        ({"quantization_config": {"quant_method": [1]}}, "must be an object with a text as quant_method"),
        ({"num_labels": True}, "num_labels must be an integer from 0 to 5,000,000, got True"),
        ({"num_labels": -1}, "num_labels must be an integer"),
    ],
)
def test_bad_fields_are_named(tiny_config, fields, message):
    with pytest.raises((StrictDataclassError, ValueError), match=message):
        tiny_config(**fields)


# what no memory holds: a message within a second, and a process that has not grown
HUGE = {
    "hidden_sizes": ({"hidden_sizes": [10**9, 10**9]}, r"20,000,000,000 is the most: .*hidden_sizes=\[1000000000, "),
    "hidden_sizes of a head": ({"hidden_sizes": [8, 10**9], "depths": [1, 1]}, "20,000,000,000 is the most"),
    "stem": ({"stem_hidden_size": 10**12}, "20,000,000,000 is the most: .*stem_hidden_size=1000000000000"),
    "num_channels": ({"num_channels": 10**12}, "20,000,000,000 is the most: .*num_channels=1000000000000"),
    "depths": ({"depths": [1, 10**9]}, r"depths=\[1, 1000000000\] .* ask for 3,000,000,003 branches, and 20,000 is"),
    "num_labels": ({"num_labels": 10**12}, "num_labels must be an integer from 0 to 5,000,000, got 1000000000000"),
    "block_branches": (
        {"block_branches": ["3x3"] * 10**5},
        r"block_branches=\['3x3', .* \.\.\. 100000 in all\] ask for",
    ),
}


@pytest.mark.parametrize("way", ["fields", "config.json", "from_pretrained", "Auto class"])
@pytest.mark.parametrize(("fields", "message"), HUGE.values(), ids=HUGE)
def test_what_no_memory_holds_is_refused_at_once(tiny_config, tmp_path, fields, message, way):
    tiny_config(num_labels=2).save_pretrained(tmp_path)
    loaders = {
        "fields": lambda: tiny_config(**fields),
        "config.json": lambda: RepVGGConfig.from_pretrained(tmp_path),
        "from_pretrained": lambda: RepVGGForImageClassification.from_pretrained(tmp_path, **fields),
        "Auto class": lambda: AutoModelForImageClassification.from_pretrained(tmp_path, **fields),
    }
    if way == "config.json":
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((StrictDataclassError, ValueError), match=message):
        loaders[way]()
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB on Linux


def test_the_largest_networks_pass():
    """An eighth of a billion parameters, a head for ImageNet-21k, and a network of a thousand layers."""
    RepVGGConfig.from_variant("b3", num_labels=21_843)
    RepVGGConfig(depths=[100, 200, 600, 100])


@pytest.mark.parametrize(
    "name", ["hidden_atc", "hidden_size", "deepths", "strids", "gruops", "oabn_thresholt", "id2labels"]
)
def test_misspelt_fields(name, tmp_path):
    """A slip would leave the field at its default: in code, and in a file that someone edited."""
    meant = {"hidden_atc": "hidden_act", "hidden_size": "hidden_sizes", "deepths": "depths", "strids": "strides",
             "gruops": "groups", "oabn_thresholt": "oabn_threshold", "id2labels": "id2label"}[name]  # fmt: skip
    with pytest.raises(ValueError, match=f"RepVGGConfig has no field {name!r}: did you mean {meant!r}"):
        RepVGGConfig(**{name: 1})
    RepVGGConfig().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: 1}))
    with pytest.raises(ValueError, match=f"has no field {name!r}"):
        RepVGGConfig.from_pretrained(tmp_path)


def test_other_fields_are_kept(tmp_path):
    """As Transformers does: it and its tools write fields of their own."""
    config = RepVGGConfig(finetuning_task="ants", _name_or_path="somewhere", custom={"a": 1})
    config.save_pretrained(tmp_path)
    assert RepVGGConfig.from_pretrained(tmp_path).custom == {"a": 1}


@pytest.mark.parametrize(
    ("branches", "message"),
    [
        (["3x3", "skip"], "Unknown branch 'skip' in block_branches: use \"identity\" or"),
        (["3x3", "2x2"], "Unknown branch '2x2'"),
        (["3x3", "5x5"], "Branch '5x5' is larger than the 3x3 block"),
        (["1x1", "identity"], "needs a dense 3x3 branch"),
        ([], "needs a dense 3x3 branch"),
    ],
)
def test_bad_branches_are_named(tiny_config, branches, message):
    with pytest.raises(ValueError, match=message):
        RepVGGForImageClassification(tiny_config(block_branches=branches))
