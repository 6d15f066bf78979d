"""The configuration of quantised models, and their layers against float layers with the decoded weight."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn

from repvgg_hf import ClusterConfig, ClusterConv2d, ClusterLinear
from repvgg_hf.quantization_cluster import decode_layers, dequantize_layers


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
            ("uniform", "per_channel", "int8", True),
        ],
    )
    def test_the_channel_scale_that_fits(self, method, granularity, codebook_dtype, expected):
        options = {"method": method, "granularity": granularity, "codebook_dtype": codebook_dtype}
        assert ClusterConfig(**options).channel_scale is expected
        if codebook_dtype != "int8":
            assert ClusterConfig(**options, channel_scale=not expected).channel_scale is not expected

    def test_json_and_back(self):
        options = {"granularity": "per_group", "group_size": 4, "bits_overrides": {"classifier": 8}, "bits": 3}
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
            ({"range_method": "max"}, "^range_method must be one of minmax, mse, got 'max'"),
            ({"decode": "lazy"}, "^decode must be one of at_load, on_the_fly, got 'lazy'"),
            ({"granularity": "per_group"}, "^granularity='per_group' and group_size=None don't fit: give group_size"),
            ({"group_size": 4}, "^granularity='per_tensor' and group_size=4 don't fit"),
            ({"granularity": "per_group", "group_size": 0}, "^group_size must be a positive integer, got 0"),
            ({"granularity": "per_group", "group_size": 2.0}, "^group_size must be a positive integer, got 2.0"),
            ({"granularity": "per_group", "group_size": True}, "^group_size must be a positive integer, got True"),
            ({"channel_scale": "yes"}, "^channel_scale must be True or False, got 'yes'"),
            ({"symmetric": 1}, "^symmetric must be True or False, got 1"),
            ({"codebook_dtype": "int8", "channel_scale": False}, "^codebook_dtype='int8' .*set channel_scale=True"),
            ({"method": "uniform", "channel_scale": True, "symmetric": False}, "no offset: set symmetric=True or"),
            ({"activation_bits": 8}, r"^activation_bits must be None \(weights only\), got 8"),
            ({"quant_method": "gptq"}, "^quant_method must be 'cluster', got 'gptq'"),
            ({"format_version": 2}, "format_version 2, this version of repvgg_hf reads 1: upgrade with"),
            ({"format_version": 2, "new_in_2": 0}, "format_version 2, this version of repvgg_hf reads 1"),
            ({"format_version": None}, "format_version None, this version"),
        ],
        ids=str,
    )  # fmt: skip
    def test_what_cannot_be_meant_is_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            ClusterConfig(**options)

    def test_unknown_options_are_named(self):
        with pytest.raises(TypeError, match="^Unknown quantization option 'bit': ClusterConfig takes bits, method, "):
            ClusterConfig(bit=4)

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

    def test_groups_divide_the_channels(self):
        assert ClusterConfig().groups_of("conv", 7) == 1
        assert ClusterConfig(granularity="per_channel").groups_of("conv", 7) == 7
        config = ClusterConfig(granularity="per_group", group_size=3)
        assert config.groups_of("conv", 12) == 4
        with pytest.raises(ValueError, match="group_size=3 does not divide the 10 output channels of 'classifier'"):
            config.groups_of("classifier", 10)


CONV = nn.Conv2d(6, 12, (3, 5), stride=2, padding=(1, 2), dilation=(1, 2), groups=2)
LINEAR = nn.Linear(20, 12)
GROUPS = {"per_tensor": 1, "per_channel": 12, "per_group": 3}


def random_layer(layer, bits=3, groups=3, channel_scale=True, codebook_dtype=torch.float16, on_the_fly=False):
    """The cluster layer in the place of `layer`, with random contents, and these as `(codes, codebook, scale)`."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, layer.weight.shape, generator=generator, dtype=torch.uint8)
    codebook = torch.randn(groups, 2**bits, generator=generator).sort(dim=1).values
    codebook = (40 * codebook).round() if codebook_dtype == torch.int8 else codebook
    codebook = codebook.clamp(-127, 127).to(codebook_dtype)
    scale = torch.rand(layer.weight.shape[0], generator=generator) + 0.5 if channel_scale else None
    cls = ClusterConv2d if isinstance(layer, nn.Conv2d) else ClusterLinear
    quantized = cls(copy.deepcopy(layer), bits, groups, channel_scale, codebook_dtype, on_the_fly)
    quantized.set_codes(codes, codebook, scale)
    return quantized, (codes, codebook, scale)


def decode_by_hand(codes, codebook, scale) -> torch.Tensor:
    channels = []
    for channel, indices in enumerate(codes.flatten(1).tolist()):
        entries = codebook[channel * len(codebook) // len(codes)].float().tolist()
        values = torch.tensor([entries[index] for index in indices])
        channels.append(values if scale is None else values * scale[channel])
    return torch.stack(channels).view(codes.shape)


def float_layer(layer, weight, dtype=torch.float32):
    """With the channels last, as the decoded kernel has them: the layout decides in which order a convolution adds."""
    layer = copy.deepcopy(layer).to(dtype)
    layout = torch.channels_last if weight.dim() == 4 else torch.contiguous_format
    layer.weight.data = weight.to(dtype).contiguous(memory_format=layout)
    return layer


def inputs(layer, dtype=torch.float32) -> torch.Tensor:
    shape = (2, 6, 9, 11) if isinstance(layer, nn.Conv2d) else (2, 20)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("codebook_dtype", [torch.float16, torch.float32, torch.int8], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("channel_scale", [True, False], ids=["scaled", "plain"])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("bits", [1, 3, 4, 8], ids=lambda bits: f"{bits}bit")
@pytest.mark.parametrize("layer", [CONV, LINEAR], ids=["conv", "linear"])
def test_outputs_are_those_of_the_float_layer(layer, bits, groups, channel_scale, codebook_dtype, dtype):
    quantized, contents = random_layer(layer, bits, groups, channel_scale, codebook_dtype)
    expected = float_layer(layer, decode_by_hand(*contents), dtype)
    quantized.to(dtype)
    assert torch.equal(quantized.weight, expected.weight)
    assert torch.equal(quantized(inputs(layer, dtype)), expected(inputs(layer, dtype)))
    assert torch.equal(quantized.codes(), contents[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("layer", [CONV, LINEAR], ids=["conv", "linear"])
def test_decoding_on_the_fly_changes_nothing(layer, dtype):
    at_load, lazy = (random_layer(layer, on_the_fly=on_the_fly)[0].to(dtype) for on_the_fly in (False, True))
    assert lazy.weight is None and at_load.weight is not None
    assert torch.equal(lazy(inputs(layer, dtype)), at_load(inputs(layer, dtype)))
    assert at_load.state_dict().keys() == lazy.state_dict().keys()
    decode_layers(lazy, on_the_fly=False)
    assert torch.equal(lazy.weight, at_load.weight)
    decode_layers(lazy, on_the_fly=True)
    assert lazy.weight is None and torch.equal(lazy.dense_weight(), at_load.weight)


@pytest.mark.parametrize("layer", [CONV, LINEAR], ids=["conv", "linear"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_state_dict_is_the_format_table(layer, bits):
    quantized, (codes, codebook, scale) = random_layer(layer, bits)
    state = quantized.state_dict()
    numel = layer.weight.numel()
    described = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in state.items()}
    assert described == {
        "weight_codes": (torch.uint8, [-(-numel * bits // 8)]),
        "weight_codebook": (torch.float16, [3, 2**bits]),
        "weight_scale": (torch.float32, [12]),
        "bias": (torch.float32, [12]),
    }
    assert torch.equal(state["weight_codebook"], codebook) and torch.equal(state["weight_scale"], scale)
    without = random_layer(layer, channel_scale=False)[0].state_dict()
    assert without.keys() == {"weight_codes", "weight_codebook", "bias"}


def test_a_layer_without_bias():
    layer = nn.Conv2d(3, 12, 3, bias=False)
    quantized, contents = random_layer(layer)
    assert "bias" not in quantized.state_dict()
    pixels = torch.randn(1, 3, 5, 5)
    assert torch.equal(quantized(pixels), float_layer(layer, decode_by_hand(*contents))(pixels))


CHANGES = {
    "to(bfloat16)": lambda layer: layer.to(torch.bfloat16),
    "half": lambda layer: layer.half(),
    "double": lambda layer: layer.double(),
    "bfloat16 and back": lambda layer: layer.bfloat16().float(),
    "deepcopy": copy.deepcopy,
    "deepcopy, half": lambda layer: copy.deepcopy(layer).half(),
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "cpu": lambda layer: layer.cpu(),
}


@pytest.mark.parametrize("codebook_dtype", [torch.float16, torch.float32, torch.int8], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_stored_never_changes(change, codebook_dtype):
    model = nn.Sequential(random_layer(CONV, codebook_dtype=codebook_dtype)[0], nn.BatchNorm2d(12))
    stored = {name: tensor.clone() for name, tensor in model[0].state_dict().items() if name.startswith("weight")}
    changed = change(model)[0]
    for name, tensor in stored.items():
        assert changed.state_dict()[name].dtype == tensor.dtype and torch.equal(changed.state_dict()[name], tensor)
    assert changed.weight.dtype == changed.bias.dtype
    assert torch.equal(changed.weight, changed.decoded())


def test_a_copy_shares_nothing():
    layer, (codes, codebook, scale) = random_layer(CONV)
    other = copy.deepcopy(layer)
    other.set_codes(7 - codes, codebook, 2 * scale)
    assert torch.equal(layer.weight, decode_by_hand(codes, codebook, scale))
    assert torch.equal(other.weight, decode_by_hand(7 - codes, codebook, 2 * scale))


def test_a_state_dict_replaces_the_weight():
    layer, contents = random_layer(LINEAR)
    other, _ = random_layer(LINEAR)
    other.set_codes(7 - contents[0], contents[1], contents[2])
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, decode_by_hand(*contents))


@pytest.mark.parametrize("layer", [CONV, LINEAR, nn.Conv2d(3, 12, 1, bias=False)], ids=["conv", "linear", "no bias"])
def test_dequantising_gives_the_float_layer(layer):
    quantized, contents = random_layer(layer)
    expected = float_layer(layer, decode_by_hand(*contents))
    model = nn.Sequential(quantized)
    dequantize_layers(model)
    assert repr(model[0]) == repr(layer)
    assert model[0].state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model[0].state_dict().items())
    assert model[0].weight.requires_grad


DAMAGE = {
    "NaN": ("weight_codebook", 1, float("nan"), "has NaN or"),
    "infinite": ("weight_codebook", 1, float("inf"), "has NaN or"),
    "unsorted": ("weight_codebook", 1, 100.0, "is not ascending"),
    "scale": ("weight_scale", 0, float("-inf"), "has NaN or"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_contents_are_named(damage):
    tensor, dim, value, message = DAMAGE[damage]
    model = nn.Sequential(LINEAR, random_layer(CONV)[0])
    decode_layers(model)
    getattr(model[1], tensor).index_fill_(dim, torch.tensor(2), value)
    with pytest.raises(ValueError, match=f"^1.{tensor} {message}.*download it again or quantise the float model again"):
        decode_layers(model)


def test_repr_says_what_a_layer_holds():
    assert repr(random_layer(LINEAR, bits=2)[0]) == (
        "ClusterLinear(weight=[12, 20], bits=2, codebooks=3 x float16, channel_scale)"
    )
