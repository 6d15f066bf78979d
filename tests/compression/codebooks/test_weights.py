"""Quantizing one tensor, against formulas, torch's fake quantization and brute force."""

import pytest
import torch

from repvgg_hf import ClusterConfig
from repvgg_hf.compression.codebooks.weights import quantize_weight
from repvgg_hf.compression.layers import quantize_layer

GROUPS = {"per_tensor": 1, "per_channel": 12, "per_group": 3}
STORED = [(scale, dtype) for scale in (False, True) for dtype in ("float16", "float32")] + [(True, "int8")]
STORED_IDS = [f"{dtype}, scaled" if scale else dtype for scale, dtype in STORED]


def config_of(granularity="per_tensor", **options) -> ClusterConfig:
    return ClusterConfig(granularity=granularity, group_size=4 if granularity == "per_group" else None, **options)


def quantize(weight, granularity="per_tensor", importance=None, **options):
    config = config_of(granularity, **options)
    return quantize_weight(weight, config.bits, config.groups_of("layer", 12), config, importance)


def squared_error(weight, quantized, importance=1.0) -> float:
    return ((quantized.decoded().double() - weight.double()).square() * importance).sum().item()


@pytest.fixture(params=["normal", "varied", "outliers"])
def weight(request, generator):
    """`[12, 6, 3, 3]`: channels alike, of different sizes, or with a few weights of the same large size."""
    weight = 0.05 * torch.randn(12, 6, 3, 3, generator=generator)
    if request.param == "varied":
        weight *= torch.rand(12, 1, 1, 1, generator=generator).mul(3).exp()
    if request.param == "outliers":
        weight.view(-1)[::37] += 1
    return weight


@pytest.mark.parametrize("important", [False, True], ids=["equal", "important"])
@pytest.mark.parametrize("channel_scale", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("granularity", GROUPS)
@pytest.mark.parametrize("method", ["cluster", "uniform"])
def test_layout_in_memory_changes_nothing(method, granularity, channel_scale, important, weight, generator):
    options = {"method": method, "channel_scale": channel_scale, "bits": 3}
    if important:
        options["importance"] = torch.rand(1, *weight.shape[1:], generator=generator)
    expected = quantize(weight, granularity, **options)
    for other in (weight.contiguous(memory_format=torch.channels_last), weight.transpose(0, 2).clone().transpose(0, 2)):
        quantized = quantize(other, granularity, **options)
        assert quantized.codes.is_contiguous() and torch.equal(quantized.codes, expected.codes)
        assert torch.equal(quantized.codebook, expected.codebook)
        assert quantized.scale is expected.scale is None or torch.equal(quantized.scale, expected.scale)


@pytest.mark.parametrize("channel_scale, codebook_dtype", STORED, ids=STORED_IDS)
@pytest.mark.parametrize("granularity", GROUPS)
@pytest.mark.parametrize("method", ["cluster", "uniform"])
def test_decoded_is_the_formula(method, granularity, channel_scale, codebook_dtype, generator):
    weight = torch.randn(12, 2, 3, 3, generator=generator)
    options = {"bits": 3, "method": method, "channel_scale": channel_scale, "codebook_dtype": codebook_dtype}
    quantized = quantize(weight, granularity, **options)
    assert quantized.codes.dtype == torch.uint8 and quantized.codes.shape == weight.shape
    assert quantized.codebook.dtype == getattr(torch, codebook_dtype)
    groups = GROUPS[granularity]
    if method == "uniform" and channel_scale and granularity == "per_channel":
        groups = 1  # the same integers for every channel
    assert quantized.codebook.shape == (groups, 8)
    assert (quantized.codebook.float().diff(dim=1) >= 0).all()
    assert quantized.codes.max() < 8
    decoded = quantized.decoded()
    assert decoded.dtype == torch.float32
    for channel in range(12):
        codebook = quantized.codebook[channel * groups // 12].float()
        scale = quantized.scale[channel] if channel_scale else torch.tensor(1.0)
        assert torch.equal(decoded[channel], codebook[quantized.codes[channel].long()] * scale)
        # and no entry would be nearer
        distance = (weight[channel, ..., None] - codebook * scale).abs().min(dim=-1).values
        assert torch.allclose((weight[channel] - decoded[channel]).abs(), distance, rtol=0, atol=1e-6)


@pytest.mark.parametrize("channel_scale, codebook_dtype", STORED, ids=STORED_IDS)
@pytest.mark.parametrize("granularity", GROUPS)
@pytest.mark.parametrize("method", ["cluster", "uniform"])
def test_more_bits_never_hurt(method, granularity, channel_scale, codebook_dtype, weight):
    options = {"method": method, "channel_scale": channel_scale}
    errors = [
        squared_error(weight, quantize(weight, granularity, bits=bits, codebook_dtype=codebook_dtype, **options))
        for bits in (1, 2, 3, 5, 8)
    ]
    # below a millionth of the energy, only the rounding of the codebook is left; int8 entries reach theirs earlier
    floor = 1e-6 * weight.square().sum().item()
    slack = 1.15 if codebook_dtype == "int8" else 1
    assert all(more <= max(slack * fewer, floor) for fewer, more in zip(errors, errors[1:])), errors
    assert errors[0] > 20 * errors[-1]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("granularity", GROUPS)
@pytest.mark.parametrize("method", ["cluster", "uniform"])
def test_a_channel_scale_never_hurts(method, granularity, bits, weight):
    options = {"method": method, "bits": bits, "codebook_dtype": "float32"}
    plain = squared_error(weight, quantize(weight, granularity, channel_scale=False, **options))
    scaled = squared_error(weight, quantize(weight, granularity, channel_scale=True, **options))
    assert scaled <= 1.0001 * plain + 1e-9


def test_a_channel_scale_pays_where_channels_differ(generator):
    weight = torch.randn(12, 6, 3, 3, generator=generator) * 2.0 ** torch.arange(12).view(-1, 1, 1, 1)
    plain, scaled = (quantize(weight, bits=3, channel_scale=scale, codebook_dtype="float32") for scale in (False, True))
    relative = [
        ((quantized.decoded() - weight).square().sum(dim=(1, 2, 3)) / weight.square().sum(dim=(1, 2, 3)))
        for quantized in (plain, scaled)
    ]
    assert relative[0][0] > 0.5  # the smallest channel all but vanishes
    assert relative[1].max() < 0.06


@pytest.mark.parametrize("bits", [1, 3, 7, 8])
@pytest.mark.parametrize("granularity", GROUPS)
@pytest.mark.parametrize("method", ["cluster", "uniform"])
def test_int8_codebooks_make_int8_weights(method, granularity, bits, weight):
    quantized = quantize(weight, granularity, bits=bits, method=method, codebook_dtype="int8")
    integers = quantized.decoded() / quantized.scale.view(-1, 1, 1, 1)
    assert torch.allclose(integers, integers.round(), rtol=0, atol=1e-4)
    assert integers.round().min() >= -128 and integers.round().max() <= 127
    if bits < 8:
        assert integers.round().min() >= -127


def test_int8_clusters_are_no_worse_than_uniform_int8(weight):
    for bits in range(2, 9):
        cluster, uniform = (
            squared_error(weight, quantize(weight, bits=bits, method=method, codebook_dtype="int8"))
            for method in ("cluster", "uniform")
        )
        assert cluster <= uniform


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_symmetric_minmax_is_torchs_fake_quantization(granularity, bits, weight):
    options = {"method": "uniform", "range_method": "minmax", "codebook_dtype": "float32"}
    quantized = quantize(weight, granularity, bits=bits, **options)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if granularity == "per_tensor":
        step = weight.abs().max().item() / high
        expected = torch.fake_quantize_per_tensor_affine(weight, step, 0, low, high)
    else:
        step = weight.abs().amax(dim=(1, 2, 3)) / high
        zeros = torch.zeros(12, dtype=torch.int32)
        expected = torch.fake_quantize_per_channel_affine(weight, step, zeros, 0, low, high)
    assert torch.allclose(quantized.decoded(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("range_method", ["mse", "minmax"])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_symmetric_grids_per_channel_are_one_codebook_of_integers(bits, range_method, weight):
    options = {"method": "uniform", "bits": bits, "range_method": range_method, "codebook_dtype": "float32"}
    shared = quantize(weight, "per_channel", **options)
    assert shared.codebook.shape == (1, 2**bits) and torch.equal(shared.codebook, shared.codebook.round())
    apart = quantize(weight, "per_channel", channel_scale=False, **options)
    assert apart.codebook.shape == (12, 2**bits) and apart.scale is None
    assert torch.allclose(apart.codebook, shared.codebook * shared.scale[:, None], rtol=1e-6)
    assert squared_error(weight, shared) == pytest.approx(squared_error(weight, apart), rel=1e-4)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_affine_minmax_goes_from_low_to_high(bits, generator):
    weight = torch.rand(12, 2, 3, 3, generator=generator) + 3  # no zero in sight
    options = {"method": "uniform", "range_method": "minmax", "symmetric": False, "codebook_dtype": "float32"}
    quantized = quantize(weight, "per_group", bits=bits, **options)
    for group in range(3):
        channels = weight[4 * group : 4 * group + 4]
        low, step = channels.min(), (channels.max() - channels.min()) / (2**bits - 1)
        expected = low + ((channels - low) / step).round() * step
        assert torch.allclose(quantized.decoded()[4 * group : 4 * group + 4], expected, rtol=0, atol=1e-6)


def test_one_bit_is_the_sign_times_the_mean_magnitude(weight):
    quantized = quantize(weight, "per_channel", bits=1, method="uniform", codebook_dtype="float32")
    mean = weight.abs().mean(dim=(1, 2, 3), keepdim=True)
    best = squared_error(weight, quantized)
    assert best <= 1.001 * (weight.sign() * mean - weight).double().square().sum().item()
    assert torch.equal(quantized.decoded().sign(), weight.sign())


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "affine"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_mse_ranges_are_better_than_the_whole_range(bits, symmetric, weight):
    options = {"method": "uniform", "bits": bits, "symmetric": symmetric, "codebook_dtype": "float32"}
    whole, mse = (squared_error(weight, quantize(weight, range_method=how, **options)) for how in ("minmax", "mse"))
    assert mse <= whole
    assert bits > 4 or mse <= 0.95 * whole


METHODS = {
    "clusters": {"channel_scale": False},
    "clusters, scaled": {"channel_scale": True},
    "int8 clusters": {"channel_scale": True, "codebook_dtype": "int8"},
    "8 bit int8": {"channel_scale": True, "codebook_dtype": "int8", "bits": 8},
    "symmetric": {"method": "uniform"},
    "symmetric, scaled": {"method": "uniform", "channel_scale": True},
    "affine": {"method": "uniform", "symmetric": False},
}


@pytest.mark.parametrize("granularity", GROUPS)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_important_loses_less(method, granularity, weight, generator):
    importance = torch.randn(weight.shape, generator=generator).mul(2).exp()
    options = {"bits": 3} | METHODS[method]
    equal, weighted = (quantize(weight, granularity, some, **options) for some in (None, importance))
    assert squared_error(weight, weighted, importance) <= 1.001 * squared_error(weight, equal, importance)
    assert squared_error(weight, equal) <= 1.001 * squared_error(weight, weighted)
    scaled = quantize(weight, granularity, 1e-12 * importance, **options)  # only its ratios matter
    assert squared_error(weight, scaled, importance) <= 1.02 * squared_error(weight, weighted, importance)


@pytest.mark.parametrize("method", METHODS)
def test_one_importance_for_all_channels(method, weight, generator):
    importance = torch.rand(1, *weight.shape[1:], generator=generator)
    options = {"bits": 2} | METHODS[method]
    repeated = importance.expand(12, -1, -1, -1)
    one, each = (quantize(weight, importance=some, **options) for some in (importance, repeated))
    assert torch.equal(one.codes, each.codes) and torch.equal(one.codebook, each.codebook)


@pytest.mark.parametrize("method", METHODS)
def test_where_nothing_is_important_all_weights_are_alike(method, weight, generator):
    importance = torch.rand(weight.shape, generator=generator)
    importance[4:8] = 0  # the second of three groups
    options = {"bits": 2} | METHODS[method]
    weighted, equal = (quantize(weight, "per_group", some, **options) for some in (importance, None))
    middle = slice(4, 8)
    assert torch.equal(weighted.decoded()[middle], equal.decoded()[middle])
    assert squared_error(weight, weighted, importance) < squared_error(weight, equal, importance)


def test_a_channel_without_importance_is_still_decoded_to_something_like_it(weight):
    importance = torch.ones_like(weight)
    importance[5] = 0
    for method in ("clusters, scaled", "int8 clusters"):
        decoded = quantize(weight, importance=importance, bits=4, **METHODS[method]).decoded()
        assert (decoded[5] - weight[5]).square().sum() < 0.15 * weight[5].square().sum()


@pytest.mark.parametrize(
    "importance, message",
    [
        (torch.ones(12, 6, 3), r"shape \(12, 6, 3, 3\) or 1 in place of 12, got \(12, 6, 3\)"),
        (torch.ones(6, 6, 3, 3), r"got \(6, 6, 3, 3\)"),
        (torch.full((12, 6, 3, 3), float("nan")), "NaN, infinite or negative"),
        (-torch.ones(12, 6, 3, 3), "NaN, infinite or negative"),
    ],
    ids=["shape", "channels", "nan", "negative"],
)
def test_importance_that_makes_no_sense(importance, message, weight):
    with pytest.raises(ValueError, match=message):
        quantize(weight, importance=importance)


@pytest.mark.parametrize("method", ["cluster", "uniform"])
@pytest.mark.parametrize("codebook_dtype", ["float16", "float32", "int8"])
def test_all_zero_channels_stay_zero_and_cost_the_others_nothing(codebook_dtype, method, generator):
    weight = 0.02 * torch.randn(12, 6, 3, 3, generator=generator)
    weight[3], weight[7] = 0, 0
    others = [channel for channel in range(12) if channel not in (3, 7)]
    options = {"bits": 2, "method": method, "channel_scale": True, "codebook_dtype": codebook_dtype}
    quantized = quantize(weight, **options)
    assert quantized.decoded()[[3, 7]].abs().max() < 1e-20
    alone = quantize_weight(weight[others], 2, 1, config_of(**options))
    assert squared_error(weight, quantized) <= 1.001 * squared_error(weight[others], alone)


@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
@pytest.mark.parametrize("granularity", GROUPS)
@pytest.mark.parametrize("channel_scale", [False, True], ids=["no scale", "scale"])
def test_a_constant_weight_is_kept(channel_scale, granularity, value):
    weight = torch.full((12, 2, 3, 3), value)
    for bits in (1, 4, 8):
        quantized = quantize(weight, granularity, bits=bits, channel_scale=channel_scale)
        assert torch.allclose(quantized.decoded(), weight, rtol=1e-6, atol=1e-20)


def test_uniform_quantization_of_nothing_is_nothing():
    for symmetric in (True, False):
        for range_method in ("minmax", "mse"):
            for bits in (1, 2, 8):
                options = {"method": "uniform", "symmetric": symmetric, "range_method": range_method, "bits": bits}
                quantized = quantize(torch.zeros(12, 2, 3, 3), **options)
                assert quantized.decoded().abs().max() < 1e-20


def test_a_codebook_that_float16_cannot_hold():
    layer = torch.nn.Linear(8, 12)
    torch.nn.init.uniform_(layer.weight, -1e6, 1e6)
    with pytest.raises(ValueError, match=r"'head' can't be quantized.*does not fit float16: set channel_scale=True or"):
        quantize_layer("head", layer, config_of(channel_scale=False))
    for fix in ({"channel_scale": True}, {"channel_scale": False, "codebook_dtype": "float32"}):
        weight = quantize_layer("head", layer, config_of(bits=8, **fix)).decoded()
        assert (weight - layer.weight).abs().max() < 2e4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights_are_quantized_in_float32(dtype, generator):
    weight = torch.randn(12, 6, 3, 3, generator=generator).to(dtype)
    quantized, expected = quantize(weight, bits=4), quantize(weight.float(), bits=4)
    assert torch.equal(quantized.codes, expected.codes) and torch.equal(quantized.codebook, expected.codebook)
    assert quantized.scale.dtype == torch.float32 and torch.equal(quantized.scale, expected.scale)


def test_more_codes_than_weights_lose_nothing_and_say_so(generator, caplog):
    layer = torch.nn.Conv2d(2, 12, 1)
    with caplog.at_level("WARNING"):
        quantized = quantize_layer("narrow", layer, config_of("per_channel", bits=4, codebook_dtype="float32"))
    assert torch.equal(quantized.decoded(), layer.weight)
    assert "narrow has 2 weights for each codebook of 16 entries: fewer bits" in caplog.text
