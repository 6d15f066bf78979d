"""Training with k-means codebooks against a lookup that is written out and an update weight by weight."""

import copy

import pytest
import torch
from torch import nn

from repvgg_hf import ClusterConfig, QATConfig
from repvgg_hf.compression.codebooks.weights import QuantizedWeight, quantize_weight
from repvgg_hf.compression.qat.cluster import ClusterFakeQuantize

FLOAT32 = ClusterConfig(codebook_dtype="float32")


def quantizer(kernel, bits=2, groups=1, **options) -> ClusterFakeQuantize:
    """A fake quantizer that starts at the least squared error for `kernel`."""
    config = ClusterConfig(bits=bits, **options)
    return ClusterFakeQuantize(quantize_weight(kernel, bits, groups, config), config, QATConfig())


def test_a_changed_codebook_is_noticed(generator):
    """However it was changed: what is prepared between two updates follows."""
    kernel = torch.randn(8, 64, 3, 3, generator=generator)
    layer = quantizer(kernel)
    before = layer(kernel)
    assert torch.equal(layer(kernel), before)
    layer.codebook.mul_(2)
    assert layer(kernel).abs().max() > 1.5 * before.abs().max()
    layer.scale.mul_(0.5)
    torch.testing.assert_close(layer(kernel), copy.deepcopy(layer)(kernel))
    state = copy.deepcopy(layer.state_dict())
    layer.codebook.zero_()
    assert (layer(kernel) == 0).all()
    layer.load_state_dict(state)
    assert torch.equal(layer(kernel), layer.quantized(kernel).decoded())
    assert layer.double()(kernel.double()).dtype == torch.float64


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("groups", [1, 3])
def test_forward_is_a_lookup_and_its_gradient_passes_straight_through(groups, scaled, generator):
    kernel = torch.randn(6, 4, 3, 3, generator=generator)
    codebook = torch.randn(groups, 4, generator=generator).sort(dim=1).values
    scale = 0.01 * (0.5 + torch.rand(6, generator=generator)) if scaled else None
    factor = torch.ones(6) if scale is None else scale
    kernel = kernel * factor.view(-1, 1, 1, 1)
    layer = ClusterFakeQuantize(QuantizedWeight(torch.zeros(6, 36), codebook, scale), FLOAT32, QATConfig())
    entries = codebook.repeat_interleave(6 // groups, dim=0)
    values = entries * factor[:, None]  # [out, k]
    codes = (kernel.flatten(1)[:, :, None] - values[:, None]).abs().argmin(dim=2)
    expected = (entries.gather(1, codes) * factor[:, None]).view_as(kernel)

    leaf = kernel.clone().requires_grad_()
    direction = torch.randn(kernel.shape, generator=generator)
    output = layer(leaf)
    assert torch.equal(output, expected)
    assert torch.equal(layer.quantized(kernel).codes.flatten(1).long(), codes)
    (output * direction).sum().backward()
    assert torch.equal(leaf.grad, direction)
    assert not list(layer.parameters())


def test_a_linear_layer_has_rows_of_its_own(generator):
    layer = nn.Linear(20, 6)
    config = ClusterConfig(bits=2, granularity="per_channel")
    weight = quantize_weight(layer.weight, 2, 6, config)
    fake = ClusterFakeQuantize(weight, config, QATConfig())
    assert torch.equal(fake(layer.weight), weight.decoded())


def update_by_hand(kernel, codebook, scale, momentum):
    """The codebook and the scale after one step, weight by weight."""
    rows = [row.tolist() for row in kernel.flatten(1)]
    books, scales = codebook.tolist(), [1.0] * len(rows) if scale is None else scale.tolist()
    group_of = [channel * len(books) // len(rows) for channel in range(len(rows))]

    def code(weight, channel):
        return min(
            range(len(books[0])), key=lambda entry: abs(weight - scales[channel] * books[group_of[channel]][entry])
        )

    segments = {}  # (group, entry) to its (weight, scale, channel)
    for channel, row in enumerate(rows):
        for weight in row:
            segment = segments.setdefault((group_of[channel], code(weight, channel)), [])
            segment.append((weight, scales[channel], channel))
    means, errors = {}, {}
    for key, segment in segments.items():
        total = sum(s * s for _, s, _ in segment)
        means[key] = sum(s * w for w, s, _ in segment) / total
        errors[key] = (sum((w - s * means[key]) ** 2 for w, s, _ in segment), total)
    new = [[momentum * entry for entry in book] for book in books]
    for group, book in enumerate(new):
        for entry in range(len(book)):
            book[entry] += (1 - momentum) * means.get((group, entry), books[group][entry])
    fitted = []
    for channel in range(len(rows)):
        pairs = [
            (weight, new[group][entry])
            for (group, entry), segment in segments.items()
            for weight, _, owner in segment
            if owner == channel
        ]
        fit = sum(weight * entry for weight, entry in pairs) / sum(entry**2 for _, entry in pairs)
        fitted.append(momentum * scales[channel] + (1 - momentum) * fit)
    for group, book in enumerate(new):  # the first unused entry splits the worst segment
        unused = [entry for entry in range(len(book)) if (group, entry) not in segments]
        worst = max((key for key in segments if key[0] == group), key=lambda key: errors[key][0])
        book[unused[0]] = means[worst] + (errors[worst][0] / errors[worst][1]) ** 0.5
    return torch.tensor([sorted(book) for book in new]), None if scale is None else torch.tensor(fitted)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_an_update_is_one_step_of_k_means(groups, scaled, momentum, generator):
    kernel = torch.randn(6, 4, 3, 3, generator=generator)
    codebook = torch.randn(groups, 8, generator=generator).sort(dim=1).values
    codebook[:, -1] = 50  # nearest to nothing
    scale = 0.5 + torch.rand(6, generator=generator) if scaled else None
    weight = QuantizedWeight(torch.zeros(6, 1), codebook, scale)
    qat_config = QATConfig(codebook_momentum=momentum, codebook_update_every=1)
    layer = ClusterFakeQuantize(weight, FLOAT32, qat_config)
    expected_codebook, expected_scale = update_by_hand(kernel, codebook, scale, momentum)
    layer.update(kernel)
    codebook, scale = layer.codebook, layer.scale
    torch.testing.assert_close(codebook, expected_codebook, rtol=1e-5, atol=1e-6)
    if scaled:
        torch.testing.assert_close(scale, expected_scale, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_updates_go_as_far_together_as_one_by_one(scaled, generator):
    """As long as no weight changes its entry: here they are far from the borders."""
    codebook = torch.tensor([[-1.0, 0.0, 1.0, 2.0]])
    scale = torch.ones(6) if scaled else None
    kernel = codebook[0][torch.arange(6 * 36) % 4].view(6, 4, 3, 3) + 0.1 * torch.rand(6, 4, 3, 3, generator=generator)
    weight = QuantizedWeight(torch.zeros(6, 36), codebook, scale)
    every, often = (ClusterFakeQuantize(weight, FLOAT32, QATConfig(codebook_update_every=n)) for n in (5, 1))
    for _ in range(5):
        every.step(lambda: kernel)
        often.step(lambda: kernel)
    assert not torch.equal(every.codebook, codebook)
    # the scales are fitted to codebooks that have not come as far
    torch.testing.assert_close(every.codebook, often.codebook, rtol=0, atol=0.02 if scaled else 1e-6)


def test_fewer_distinct_weights_than_entries_leave_entries_unused(generator):
    kernel = torch.tensor([-1.0, 0.5, 2.0])[torch.randint(0, 3, (4, 2, 3, 3), generator=generator)]
    codebook = torch.tensor([[-1.0, 0.5, 2.0, 50.0]])
    weight = QuantizedWeight(torch.zeros(4, 18), codebook, None)
    layer = ClusterFakeQuantize(weight, FLOAT32, QATConfig(codebook_update_every=1))
    layer.update(kernel)
    torch.testing.assert_close(layer.codebook, codebook, rtol=1e-6, atol=0)
    assert torch.equal(layer(kernel), kernel)


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_no_step_waits_for_the_device(scaled):
    """Nothing asks for a value: it runs without values."""
    with torch.device("meta"):
        weight = QuantizedWeight(torch.zeros(64, 288), torch.zeros(1, 4), torch.ones(64) if scaled else None)
        layer = ClusterFakeQuantize(weight, ClusterConfig(bits=2), QATConfig(codebook_update_every=1, blend_steps=3))
        kernel = torch.zeros(64, 32, 3, 3, requires_grad=True)
        layer.known_steps = 0  # counted on from a value that is known
        for _ in range(5):
            layer(kernel).sum().backward()
            layer.step(lambda: kernel)
    assert layer.steps_taken() == 5 and kernel.grad.shape == kernel.shape
