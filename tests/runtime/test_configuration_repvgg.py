"""The configuration: the published variants, saving, and what it refuses."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

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
    ],
)
def test_bad_fields_are_named(tiny_config, fields, message):
    with pytest.raises((StrictDataclassError, ValueError), match=message):
        tiny_config(**fields)


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
