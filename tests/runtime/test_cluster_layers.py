"""Quantized layers against float layers with the decoded weight, and against ONNX's rounding of activations."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from repvgg_hf import ClusterConv2d, ClusterLinear
from repvgg_hf.runtime.cluster_layers import check_layers, decode_layers, fake_quantize
from repvgg_hf.runtime.layer_swaps import dequantize_layers

CONV = nn.Conv2d(6, 12, (3, 5), stride=2, padding=(1, 2), dilation=(1, 2), groups=2)
LINEAR = nn.Linear(20, 12)
LARGE = nn.Conv2d(8, 1024, 3)  # as many weights as it takes to decode a byte at a time
LAYERS = pytest.mark.parametrize("layer", [CONV, LINEAR], ids=["conv", "linear"])
CODEBOOK_DTYPES = [torch.float16, torch.float32, torch.int8]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def random_layer(layer, bits=3, groups=3, channel_scale=True, codebook_dtype=torch.float16, **options):
    """The cluster layer in the place of `layer`, with random contents, and these as `(codes, codebook, scale)`."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, layer.weight.shape, generator=generator, dtype=torch.uint8)
    codebook = torch.randn(groups, 2**bits, generator=generator).sort(dim=1).values
    codebook = (40 * codebook).round() if codebook_dtype == torch.int8 else codebook
    codebook = codebook.clamp(-127, 127).to(codebook_dtype)
    scale = torch.rand(layer.weight.shape[0], generator=generator) + 0.5 if channel_scale else None
    cls = ClusterConv2d if isinstance(layer, nn.Conv2d) else ClusterLinear
    quantized = cls(copy.deepcopy(layer), bits, groups, channel_scale, codebook_dtype, **options)
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


def combinations():
    """Every bits with every granularity; of the other options each with each of the former, in turns."""
    granularities = {"per_tensor": 1, "per_channel": 12, "per_group": 3}
    for index, (bits, (name, groups)) in enumerate(itertools.product((1, 3, 4, 8), granularities.items())):
        scaled, codebook_dtype, dtype = index // 3 % 2 == 0, CODEBOOK_DTYPES[(index + bits) % 3], DTYPES[index % 3]
        label = f"{bits}bit-{name}-{'scaled' if scaled else 'plain'}-{str(codebook_dtype)[6:]}-{str(dtype)[6:]}"
        yield pytest.param(bits, groups, scaled, codebook_dtype, dtype, id=label)


@pytest.mark.parametrize(("bits", "groups", "channel_scale", "codebook_dtype", "dtype"), combinations())
@LAYERS
def test_outputs_are_those_of_the_float_layer(layer, bits, groups, channel_scale, codebook_dtype, dtype):
    quantized, contents = random_layer(layer, bits, groups, channel_scale, codebook_dtype)
    expected = float_layer(layer, decode_by_hand(*contents), dtype)
    quantized.to(dtype)
    assert torch.equal(quantized.weight, expected.weight)
    assert quantized.weight.stride() == expected.weight.stride()
    assert torch.equal(quantized(inputs(layer, dtype)), expected(inputs(layer, dtype)))
    assert torch.equal(quantized.codes(), contents[0])


@pytest.mark.parametrize(("bits", "groups"), [(1, 1), (2, 4), (4, 4), (8, 8)], ids=str)
def test_a_large_kernel(bits, groups):
    quantized, contents = random_layer(LARGE, bits, groups)
    assert torch.equal(quantized.weight, decode_by_hand(*contents))
    assert quantized.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@LAYERS
def test_decoding_on_the_fly_changes_nothing(layer, dtype):
    kept, lazy = (random_layer(layer, on_the_fly=on_the_fly)[0].to(dtype) for on_the_fly in (False, True))
    assert torch.equal(lazy(inputs(layer, dtype)), kept(inputs(layer, dtype)))
    assert torch.equal(lazy.weight, kept.weight)
    assert lazy.weight is not lazy.weight and kept.weight is kept.weight
    assert kept.state_dict().keys() == lazy.state_dict().keys()
    decode_layers(lazy, on_the_fly=False)
    assert lazy.weight is lazy.weight and torch.equal(lazy.weight, kept.weight)
    decode_layers(lazy, on_the_fly=True)
    assert lazy.weight is not lazy.weight and torch.equal(lazy.weight, kept.weight)


@LAYERS
@pytest.mark.parametrize("bits", range(1, 9))
def test_state_dict_is_the_format_table(layer, bits):
    quantized, (codes, codebook, scale) = random_layer(layer, bits, activation_bits=8)
    state = quantized.state_dict()
    numel = layer.weight.numel()
    described = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in state.items()}
    assert described == {
        "weight_codes": (torch.uint8, [-(-numel * bits // 8)]),
        "weight_codebook": (torch.float16, [3, 2**bits]),
        "weight_scale": (torch.float32, [12]),
        "input_scale": (torch.float32, []),
        "input_zero_point": (torch.uint8, []),
        "bias": (torch.float32, [12]),
    }
    assert torch.equal(state["weight_codebook"], codebook) and torch.equal(state["weight_scale"], scale)
    without = random_layer(layer, channel_scale=False)[0]
    assert without.state_dict().keys() == {"weight_codes", "weight_codebook", "bias"}
    for some in (quantized, without):
        decode_layers(some)
        assert some.stored().keys() == some.state_dict().keys()


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
    "deepcopy, half": lambda layer: copy.deepcopy(layer).half(),
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "cpu": lambda layer: layer.cpu(),
}


@pytest.mark.parametrize("decoded", [True, False], ids=["decoded", "pending"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_stored_never_changes(change, decoded):
    for codebook_dtype in CODEBOOK_DTYPES:
        layer, contents = random_layer(CONV, codebook_dtype=codebook_dtype, activation_bits=8)
        layer.set_input_range(0.3, 7)
        model = nn.Sequential(layer, nn.BatchNorm2d(12))
        stored = {name: tensor.clone() for name, tensor in layer.state_dict().items() if name != "bias"}
        if decoded:
            decode_layers(model)
        changed = change(model)[0]
        for name, tensor in stored.items():
            assert changed.state_dict()[name].dtype == tensor.dtype and torch.equal(changed.state_dict()[name], tensor)
        assert changed.weight.dtype == changed.bias.dtype
        assert torch.equal(changed.weight, decode_by_hand(*contents).to(changed.bias.dtype))


def test_a_copy_shares_nothing():
    layer, (codes, codebook, scale) = random_layer(CONV)
    decode_layers(layer)
    other = copy.deepcopy(layer)
    other.set_codes(7 - codes, codebook, 2 * scale)
    assert torch.equal(layer.weight, decode_by_hand(codes, codebook, scale))
    assert torch.equal(other.weight, decode_by_hand(7 - codes, codebook, 2 * scale))


def test_a_state_dict_replaces_the_weight():
    layer, contents = random_layer(LINEAR)
    other, _ = random_layer(LINEAR)
    other.set_codes(7 - contents[0], contents[1], contents[2])
    decode_layers(other)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, decode_by_hand(*contents))


@pytest.mark.parametrize("layer", [CONV, LINEAR, nn.Conv2d(3, 12, 1, bias=False)], ids=["conv", "linear", "no bias"])
def test_dequantizing_gives_the_float_layer(layer):
    quantized, contents = random_layer(layer, activation_bits=4)
    expected = float_layer(layer, decode_by_hand(*contents))
    model = nn.Sequential(quantized)
    dequantize_layers(model)
    assert repr(model[0]) == repr(layer)
    assert model[0].state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model[0].state_dict().items())
    assert model[0].weight.requires_grad


DAMAGE = {
    "NaN": ("weight_codebook", float("nan"), "has NaN or"),
    "infinite": ("weight_codebook", float("inf"), "has NaN or"),
    "unsorted": ("weight_codebook", 100.0, "is not ascending"),
    "scale": ("weight_scale", float("-inf"), "has NaN or"),
    "no input scale": ("input_scale", 0.0, "is 0.0, not positive"),
    "negative input scale": ("input_scale", -1.0, "is -1.0, not positive"),
    "NaN input scale": ("input_scale", float("nan"), "is nan, not positive"),
    "infinite input scale": ("input_scale", float("inf"), "is inf, not positive"),
    "zero point": ("input_zero_point", 16, "is 16, and 4 bits end at 15"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_contents_are_named(damage):
    tensor, value, message = DAMAGE[damage]
    model = nn.Sequential(LINEAR, random_layer(CONV, activation_bits=4)[0])
    model[1].set_input_range(0.1, 15)
    check_layers(model)
    getattr(model[1], tensor)[..., 2 if tensor.startswith("weight") else ...] = value
    with pytest.raises(ValueError, match=f"^1.{tensor} {message}.*download it again or quantize the float model again"):
        check_layers(model)


def test_repr_says_what_a_layer_holds():
    assert repr(random_layer(LINEAR, bits=2)[0]) == (
        "ClusterLinear(weight=[12, 20], bits=2, codebooks=3 x float16, channel_scale)"
    )
    assert repr(random_layer(LINEAR, channel_scale=False, activation_bits=8)[0]) == (
        "ClusterLinear(weight=[12, 20], bits=3, codebooks=3 x float16, activation_bits=8)"
    )


def rounding_by_hand(x, scale: float, zero_point: int, bits: int) -> np.ndarray:
    """Quantize and dequantize in float32: multiply by the reciprocal, round halves to even, add, saturate."""
    scale = np.float32(scale)
    with np.errstate(over="ignore"):  # infinity saturates like any large number
        integers = np.clip(np.rint(np.asarray(x, np.float32) * (1 / scale)) + zero_point, 0, 2**bits - 1)
    return (integers - zero_point).astype(np.float32) * scale


RANGES = [(8, 0.25, 0), (8, 0.1, 114), (4, 0.3, 0), (2, 1 / 3, 3), (8, 1e-38, 255)]


class TestActivations:
    @pytest.mark.parametrize(("bits", "scale", "zero_point"), RANGES, ids=str)
    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=lambda dtype: str(dtype)[6:])
    def test_rounding(self, bits, scale, zero_point, dtype):
        integers = np.arange(-300, 300, dtype=np.float32)
        halves = (integers + np.float32(0.5)) * np.float32(scale)
        noise = np.random.default_rng(0).normal(size=10_000).astype(np.float32) * scale * 2**bits
        extremes = np.array([0, -0.0, 1e30, -1e30, np.inf, -np.inf], np.float32)
        x = torch.from_numpy(np.concatenate([integers * np.float32(scale), halves, noise, extremes])).to(dtype)
        expected = rounding_by_hand(x.float().numpy(), scale, zero_point, bits)
        rounded = fake_quantize(x, torch.tensor(scale), torch.tensor(zero_point, dtype=torch.uint8), bits)
        assert rounded.dtype == dtype
        assert torch.equal(rounded, torch.from_numpy(expected).to(dtype))

    def test_rounding_is_that_of_pytorch(self):
        """And not that of a quotient, which differs near halves: the engines' kernels multiply."""
        scale = torch.tensor(0.3)
        x = (torch.arange(255) + 0.5) * scale
        ours = fake_quantize(x, scale, torch.tensor(0, dtype=torch.uint8), 8)
        assert torch.equal(ours, torch.fake_quantize_per_tensor_affine(x, scale.item(), 0, 0, 255))
        assert not torch.equal(ours, (x / scale).round() * scale)

    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
    @LAYERS
    def test_a_layer_rounds_its_input(self, layer, dtype):
        quantized, contents = random_layer(layer, activation_bits=4)
        quantized.to(dtype).set_input_range(0.2, 5)
        x = inputs(layer, dtype)
        rounded = torch.from_numpy(rounding_by_hand(x.float().numpy(), 0.2, 5, 4)).to(dtype)
        assert 10 < len(rounded.unique()) <= 16
        assert torch.equal(quantized(x), float_layer(layer, decode_by_hand(*contents), dtype)(rounded))

    @LAYERS
    def test_under_autocast(self, layer):
        quantized, contents = random_layer(layer, activation_bits=8)
        quantized.set_input_range(0.05, 100)
        x = inputs(layer)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = torch.from_numpy(rounding_by_hand(x.numpy(), 0.05, 100, 8))
            expected = float_layer(layer, decode_by_hand(*contents))(rounded)
            assert torch.equal(quantized(x), expected) and expected.dtype == torch.bfloat16

    def test_outputs_are_nan_until_the_range_is_set(self):
        quantized, _ = random_layer(LINEAR, activation_bits=8)
        assert quantized(inputs(LINEAR)).isnan().all()
        with pytest.raises(ValueError, match="^head.input_scale is nan, not positive"):
            quantized.check("head")

    @pytest.mark.parametrize(
        ("scale", "zero_point", "message"),
        [
            (0.0, 0, "^scale must be positive and finite in float32, got 0.0"),
            (-1.0, 0, "^scale must be positive"),
            (float("nan"), 0, "^scale must be positive"),
            (1e39, 0, r"^scale must be positive and finite in float32, got 1e\+39"),
            (1e-50, 0, "^scale must be positive and finite in float32, got 1e-50"),
            (1.0, -1, "^zero_point must be an integer from 0 to 15, got -1"),
            (1.0, 16, "^zero_point must be an integer from 0 to 15, got 16"),
            (1.0, 0.5, "^zero_point must be an integer from 0 to 15, got 0.5"),
        ],
    )
    def test_impossible_ranges_are_refused(self, scale, zero_point, message):
        quantized, _ = random_layer(LINEAR, activation_bits=4)
        quantized.set_input_range(0.5, 15)
        with pytest.raises(ValueError, match=message):
            quantized.set_input_range(scale, zero_point)
        assert (quantized.input_scale.item(), quantized.input_zero_point.item()) == (0.5, 15)

    def test_a_layer_without_activation_bits_has_no_range(self):
        quantized, _ = random_layer(LINEAR)
        with pytest.raises(ValueError, match="input is not quantized: set activation_bits"):
            quantized.set_input_range(1.0)

    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
    @LAYERS
    def test_a_layer_rounds_its_output(self, layer, dtype):
        plain, _ = random_layer(layer, activation_bits=4)
        quantized, _ = random_layer(layer, activation_bits=4, rounds_output=True)
        for some in (plain, quantized):
            some.to(dtype).set_input_range(0.2, 5)
        assert quantized.state_dict().keys() - plain.state_dict().keys() == {"output_scale", "output_zero_point"}
        assert quantized(inputs(layer, dtype)).isnan().all()
        with pytest.raises(ValueError, match="^head.output_scale is nan, not positive"):
            quantized.check("head")
        quantized.set_output_range(0.7, 9)
        quantized.check("head")
        y = plain(inputs(layer, dtype)).detach()
        rounded = torch.from_numpy(rounding_by_hand(y.float().numpy(), 0.7, 9, 4)).to(dtype)
        assert 8 < len(rounded.unique()) <= 16 and not torch.equal(rounded, y)
        assert torch.equal(quantized(inputs(layer, dtype)), rounded)
        quantized.output_zero_point.fill_(16)
        with pytest.raises(ValueError, match="^head.output_zero_point is 16, and 4 bits end at 15"):
            quantized.check("head")

    def test_a_layer_that_leaves_its_output_has_no_range_of_it(self):
        quantized, _ = random_layer(LINEAR, activation_bits=4)
        with pytest.raises(ValueError, match="output is not quantized: set quantize_last_map"):
            quantized.set_output_range(1.0)
