"""Fake quantizers against formulas, torch's own learnable fake quantization and brute force."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn
from torch.nn.functional import pad

from repvgg_hf import ClusterConfig
from repvgg_hf.compression.codebooks.codes import (
    from_rows,
    lookup_rows,
    lookup_table,
    nearest_codes,
    quantize_rows,
    sums_by_code,
    to_rows,
)
from repvgg_hf.compression.qat.distillation import Distillation, distillation_loss, feature_loss
from repvgg_hf.compression.qat.fake_quantize import ClusterFakeQuantize
from repvgg_hf.compression.qat.inputs import InputFakeQuantize
from repvgg_hf.compression.qat.oscillation import OscillationFreezing
from repvgg_hf.compression.qat.uniform import UniformFakeQuantize
from repvgg_hf.compression.codebooks.weights import QuantizedWeight, quantize_weight


@pytest.mark.parametrize("k", [2, 4, 16, 256])
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_nearest_entries_and_ties(k, groups, generator):
    rows = torch.randn(6, 500, generator=generator)
    codebook = torch.randn(groups, k, generator=generator).sort(dim=1).values
    if k > 2:
        codebook[0, 1] = codebook[0, 2]  # an entry twice
    rows[0, :5] = (codebook[0, 0] + codebook[0, 1]) / 2
    scale = 0.5 + torch.rand(6, generator=generator)
    for some in (None, scale):
        values = rows if some is None else rows * some.reciprocal()[:, None]
        middles = (codebook[:, 1:] + codebook[:, :-1]) / 2
        expected = torch.searchsorted(middles, values.reshape(groups, -1)).view_as(rows)
        codes, decoded = quantize_rows(rows, codebook, some)
        assert torch.equal(codes.long(), expected)
        assert torch.equal(nearest_codes(rows, codebook, some), codes)
        entries = codebook.repeat_interleave(6 // groups, dim=0).gather(1, expected)
        assert torch.equal(decoded, entries if some is None else entries * some[:, None])


@given(
    hnp.arrays(np.float32, st.sampled_from([2, 4, 8]), elements=st.floats(-1, 1, width=32), unique=True),
    st.floats(-3, 3, width=32),
)
def test_codes_by_bins_are_exact_on_and_beside_borders(entries, anything):
    codebook = torch.from_numpy(np.sort(entries))[None]
    borders = (codebook[:, 1:] + codebook[:, :-1]) / 2
    infinity = torch.full_like(borders, float("inf"))
    beside = torch.cat([borders, borders.nextafter(infinity), borders.nextafter(-infinity)], dim=1)
    values = pad(beside, (0, 4096 - beside.shape[1]), value=anything).view(4, 1024)
    assert torch.equal(nearest_codes(values, codebook, None).long(), torch.searchsorted(borders[0], values))


def test_codes_by_bins_of_values_far_outside():
    values = torch.tensor([[-3e38, -1e20, 1e20, 3e38]]).repeat(1, 1024)
    assert nearest_codes(values, torch.tensor([[-1e-3, 1e-3]]), None)[0, :4].tolist() == [0, 0, 1, 1]
    assert not nearest_codes(torch.full((1, 1024), 1e30), torch.full((1, 2), 1e30), None).any()


def test_pieces_change_nothing(generator, monkeypatch):
    rows, codebook = torch.randn(7, 10, generator=generator), torch.linspace(-1, 1, 8)[None]
    expected = quantize_rows(rows, codebook, None), sums_by_code([rows], quantize_rows(rows, codebook, None)[0], 8)[0]
    monkeypatch.setattr("repvgg_hf.compression.codebooks.codes.PIECE", 30)
    codes, decoded = quantize_rows(rows, codebook, None)
    assert torch.equal(codes, expected[0][0]) and torch.equal(decoded, expected[0][1])
    (sums,) = sums_by_code([rows], codes, 8)
    assert torch.equal(sums, expected[1])
    by_hand = torch.stack([(rows * (codes == code)).sum(dim=1) for code in range(8)], dim=1)
    torch.testing.assert_close(sums, by_hand)


@pytest.mark.parametrize("k", [2, 4, 16, 256])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_looked_up_entries_are_the_nearest_to_half_a_bin(k, scaled, generator):
    rows = 2 * torch.randn(6, 5000, generator=generator)
    codebook = torch.randn(1, k, generator=generator).sort(dim=1).values
    scale = 0.5 + torch.rand(6, generator=generator) if scaled else None
    table = lookup_table(codebook)
    codes, decoded = lookup_rows(rows, scale, table), lookup_rows(rows, scale, table, decode=True)
    _, nearest = quantize_rows(rows, codebook, scale)
    factor = torch.ones(6, 1) if scale is None else scale[:, None]
    assert torch.equal(decoded, codebook[0][codes.long()] * factor)
    bin_width = (codebook[0, -1] - codebook[0, 0]) / (256 * k - 1)
    excess = ((rows - decoded).abs() - (rows - nearest).abs()) / factor
    assert 0 <= excess.max() <= bin_width * 1.01  # a border may be off by half of that, which counts twice
    assert (decoded != nearest).float().mean() < 0.01


def test_lookup_of_what_is_no_number_and_of_a_constant_codebook():
    codebook = torch.tensor([[-1.0, 0.0, 1.0, 2.0]])
    rows = torch.tensor([[float("nan"), -1e6, 1e6, 0.4]])
    assert lookup_rows(rows, None, lookup_table(codebook), decode=True).tolist() == [[-1.0, -1.0, 2.0, 0.0]]
    constant = torch.full((1, 4), 0.5)
    assert (lookup_rows(rows, None, lookup_table(constant), decode=True) == 0.5).all()


def test_a_changed_codebook_is_noticed(generator):
    """However it was changed: the constants that are kept between updates follow."""
    kernel = torch.randn(8, 64, 3, 3, generator=generator)
    layer = ClusterFakeQuantize(quantize_weight(kernel, 2, 1, ClusterConfig(bits=2)), torch.float16)
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


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (6, 4, 1, 1), (6, 5)])
def test_rows_and_back(shape, generator):
    kernel = torch.randn(shape, generator=generator)
    for layout in (kernel, kernel.contiguous(memory_format=torch.channels_last)) if len(shape) == 4 else (kernel,):
        assert torch.equal(from_rows(to_rows(layout), kernel.shape), kernel)


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("groups", [1, 3])
def test_codebook_gradients_by_hand(groups, scaled, generator):
    """Autograd on a lookup that is written out, times the factors that the documentation gives."""
    kernel = torch.randn(6, 4, 3, 3, generator=generator)
    codebook = torch.randn(groups, 4, generator=generator).sort(dim=1).values
    scale = 0.01 * (0.5 + torch.rand(6, generator=generator)) if scaled else None
    kernel = kernel if scale is None else kernel * scale.view(-1, 1, 1, 1)
    layer = ClusterFakeQuantize(QuantizedWeight(torch.zeros(6, 1), codebook, scale), torch.float32, "gradient")
    direction = torch.randn(kernel.shape, generator=generator)
    leaf = kernel.clone().requires_grad_()
    (layer(leaf) * direction).sum().backward()
    assert torch.equal(leaf.grad, direction)

    codes = layer.quantized(kernel).codes.long()
    book, factor = codebook.clone().requires_grad_(), (torch.ones(6) if scale is None else scale).requires_grad_()
    entries = book.repeat_interleave(6 // groups, dim=0)
    decoded = entries.gather(1, codes.flatten(1)).view_as(kernel) * factor.view(-1, 1, 1, 1)
    assert torch.equal(layer(kernel), decoded)
    (decoded * direction).sum().backward()
    unit = 1.0 if scale is None else layer.unit[:, None]
    weights_an_entry = kernel.numel() / (4 * groups)
    torch.testing.assert_close(layer.codebook.grad, book.grad / unit / weights_an_entry)
    if scaled:
        square = (entries * factor[:, None]).square().mean(dim=1)
        expected = factor.grad / (square * 36) * layer.channel_unit()
        torch.testing.assert_close(layer.scale.grad, expected.detach(), rtol=1e-4, atol=1e-4)


def test_units_make_the_split_between_entries_and_scale_irrelevant(generator):
    kernel = 0.02 * torch.randn(6, 4, 3, 3, generator=generator)
    start = quantize_weight(kernel, 2, 1, ClusterConfig(bits=2))
    other = QuantizedWeight(start.codes, start.codebook.float() * 64, start.scale / 64)  # as for int8
    direction, results = torch.randn(kernel.shape, generator=generator), []
    for weight in (start, other):
        layer = ClusterFakeQuantize(weight, torch.float32, "gradient")
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            (layer(kernel) * direction).sum().backward()
            optimizer.step()
        results.append(layer(kernel).detach())
    torch.testing.assert_close(*results)
    assert not torch.equal(results[0], start.decoded())


def test_an_entry_out_of_order_or_a_negative_scale_does_no_harm(generator):
    kernel = torch.randn(4, 8, generator=generator)
    layer = ClusterFakeQuantize(quantize_weight(kernel, 2, 1, ClusterConfig(bits=2)), torch.float16, "gradient")
    expected = layer(kernel).detach()
    with torch.no_grad():
        layer.codebook.copy_(layer.codebook.flip(1))
    assert torch.equal(layer(kernel), expected)
    with torch.no_grad():
        layer.scale[0] = -1.0
    weight = layer.quantized(kernel)
    assert (weight.scale > 0).all() and (weight.codebook.diff(dim=1) >= 0).all() and layer(kernel).isfinite().all()


@pytest.mark.parametrize("update", ["kmeans", "gradient", "both"])
@pytest.mark.parametrize("options", [{"symmetric": True}, {"preserve_zero": True}], ids=str)
def test_symmetry_and_zero_are_kept(options, update, generator):
    kernel = 0.3 + torch.randn(4, 8, 3, 3, generator=generator)
    codebook = (
        torch.tensor([[-2.0, -0.5, 0.5, 2.0]]) if "symmetric" in options else torch.tensor([[-1.0, 0.0, 1.0, 2.0]])
    )
    weight = QuantizedWeight(torch.zeros(4, 1), codebook, None)
    layer = ClusterFakeQuantize(weight, torch.float16, update, update_every=2, **options)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01, momentum=0.9) if update != "kmeans" else None
    for _ in range(4):
        if optimizer:
            (layer(kernel) * kernel).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        layer.step(lambda: kernel)
    stored = layer.stored()[0]
    assert not torch.equal(stored.float(), codebook)
    assert torch.equal(stored, -stored.flip(1)) if "symmetric" in options else (stored == 0).any()


@pytest.mark.parametrize("method", ["cluster", "uniform"])
def test_blending_goes_from_the_kernel_to_its_quantized_value(method, generator):
    kernel = torch.randn(8, 4, 3, 3, generator=generator)
    weight = quantize_weight(kernel, 2, 1, ClusterConfig(method=method, bits=2))
    make = {"cluster": ClusterFakeQuantize, "uniform": UniformFakeQuantize}[method]
    layer = make(weight, torch.float16, update_every=100, blend_steps=4)
    for step in range(6):
        share = min(1, step / 4)
        leaf = kernel.clone().requires_grad_()
        output = layer(leaf)
        quantized = layer.eval()(kernel)
        torch.testing.assert_close(output, (1 - share) * kernel + share * quantized)
        assert torch.equal(quantized, layer.train().quantized(kernel).decoded())
        output.sum().backward()
        assert share < 1 or torch.equal(output, quantized)
        if method == "cluster":
            torch.testing.assert_close(leaf.grad, torch.ones_like(kernel))
        restored = make(weight, torch.float16, update_every=100, blend_steps=4)
        restored.load_state_dict(layer.state_dict())
        assert torch.equal(restored(kernel), output)
        layer.step(lambda: kernel)


def lsq_by_formula(weight, step, offset, low, high, spacing):
    """LSQ as its paper writes it, with straight-through rounding, in autograd operations."""
    values = (weight - offset) / step

    def rounded(v):
        return v + (((v - low) / spacing).round() * spacing + low - v).detach()

    inside = (values >= low - spacing / 2) & (values <= high + spacing / 2)
    integers = torch.where(inside, rounded(values), values.detach().clamp(low, high))
    return integers * step + offset


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("symmetric, channel_scale", [(True, True), (True, False), (False, False)])
def test_learned_steps_are_lsq(symmetric, channel_scale, bits, generator):
    kernel = 0.1 * torch.randn(6, 4, 3, 3, generator=generator)
    config = ClusterConfig(
        method="uniform", bits=bits, channel_scale=channel_scale, symmetric=symmetric, codebook_dtype="float32"
    )
    weight = quantize_weight(kernel, bits, 1, config)
    layer = UniformFakeQuantize(weight, torch.float32, symmetric)
    direction = torch.randn(kernel.shape, generator=generator)
    leaf = kernel.clone().requires_grad_()
    torch.testing.assert_close(layer(leaf), weight.decoded())  # it starts there
    (layer(leaf) * direction).sum().backward()

    low, high, spacing = (-1, 1, 2) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 1)
    if not symmetric:
        low, high, spacing = 0, 2**bits - 1, 1
    expected = kernel.clone().requires_grad_()
    step = layer.step_size().detach().clone().requires_grad_()
    offset = torch.zeros(1) if symmetric else layer.offset.detach().clone().requires_grad_()
    shape = (-1, 1, 1, 1) if channel_scale else (1, 1, 1, 1)
    output = lsq_by_formula(expected, step.view(shape), offset.view(-1, 1, 1, 1), low, high, spacing)
    torch.testing.assert_close(layer(kernel), output, rtol=1e-4, atol=1e-6)
    (output * direction).sum().backward()
    weights = kernel.numel() // len(step)
    factor = (weights * max(1, high)) ** -0.5
    torch.testing.assert_close(leaf.grad, expected.grad)
    torch.testing.assert_close(layer.scale.grad, step.grad * factor / layer.unit, rtol=1e-3, atol=1e-5)
    if not symmetric:
        torch.testing.assert_close(layer.offset.grad, offset.grad * factor, rtol=1e-3, atol=1e-5)


def test_learned_input_scale_is_that_of_torch(generator):
    """torch's learnable fake quantization has LSQ's gradients too; `grad_factor` is given to it."""
    x = torch.randn(3, 4, 5, 5, generator=generator)
    layer = InputFakeQuantize(4, 0.2, 6)
    direction = torch.randn(x.shape, generator=generator)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    (layer(ours) * direction).sum().backward()
    scale, zero_point = torch.tensor([0.2], requires_grad=True), torch.tensor([6.0])
    factor = (x.numel() * 15) ** -0.5
    output = torch._fake_quantize_learnable_per_tensor_affine(theirs, scale, zero_point, 0, 15, factor)
    torch.testing.assert_close(layer(x), output)
    (output * direction).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(layer.scale.grad, scale.grad.squeeze() / layer.unit)


def test_moving_average_of_the_input_range():
    layer = InputFakeQuantize(8, 1.0, 0, "moving_average", momentum=0.5)
    assert not list(layer.parameters())
    low, high = 0.0, 255.0
    for values in ([-1.0, 3.0], [0.5, 7.0], [-4.0, -2.0]):
        layer.train()(torch.tensor(values))
        low, high = (low + min(0, *values)) / 2, (high + max(0, *values)) / 2
    scale, zero_point = layer.range()
    assert scale == pytest.approx((high - low) / 255) and zero_point == round(-low / scale)
    layer.eval()(torch.tensor([-100.0, 100.0]))
    assert layer.range() == (scale, zero_point)


def test_oscillating_weights_are_frozen_at_their_usual_code():
    """The first weight moves to and fro, the second moves once, the third always onwards."""
    codes = torch.tensor([[1, 0, 0]], dtype=torch.uint8)
    freezing = OscillationFreezing(codes, threshold=0.3, momentum=0.9)
    for step in range(12):
        code = torch.tensor([[2 if step % 3 else 1, 1, step]], dtype=torch.uint8)
        freezing.observe(code)
    assert freezing.frozen.tolist() == [[True, False, False]]
    assert freezing(torch.tensor([[0, 3, 9]], dtype=torch.uint8))[0, 1:].tolist() == [3, 9]
    kept = freezing.last[0, 0].item()
    freezing.observe(torch.tensor([[3, 1, 12]], dtype=torch.uint8))
    assert freezing(torch.tensor([[3, 1, 12]], dtype=torch.uint8))[0, 0] == kept and kept in (1, 2)


def test_distillation_loss_is_the_divergence(generator):
    student, teacher = torch.randn(2, 5, 7, generator=generator)
    for temperature in (1.0, 3.0):
        p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
        expected = (p * (p / q).log()).sum(dim=1).mean() * temperature**2
        torch.testing.assert_close(distillation_loss(student, teacher, temperature), expected)
    assert distillation_loss(teacher, teacher) == pytest.approx(0, abs=1e-6)
    assert feature_loss((2 * teacher,), (teacher,)) == pytest.approx(1)


def test_the_teacher_is_the_float_model_and_stays_it(make_model, batch):
    model = make_model().train()
    distillation = Distillation(model, weight=1.0, temperature=1.0, features=0.5)
    before = copy.deepcopy(distillation.teacher.state_dict())
    model.eval()
    outputs = model(**batch, output_hidden_states=True)
    assert distillation(outputs, batch["pixel_values"]).item() == pytest.approx(0, abs=1e-5)
    model.prepare_qat(bits=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for _ in range(10):
        loss = distillation(model(**batch, output_hidden_states=True), batch["pixel_values"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in distillation.teacher.state_dict().items())
    assert not any("teacher" in name for name in model.state_dict())


def test_distillation_options(make_model, batch):
    model = make_model()
    with pytest.raises(ValueError, match="weight must be from 0 .* got 2"):
        Distillation(model, weight=2)
    with pytest.raises(ValueError, match="temperature must be positive"):
        Distillation(model, temperature=0)
    distillation = Distillation(model)
    outputs = model(**batch)
    outputs.logits = outputs.logits[:, :3]
    with pytest.raises(ValueError, match="The teacher has 4 classes, the student 3"):
        distillation(outputs, batch["pixel_values"])


def test_state_of_other_bits_is_refused(make_model):
    state = make_model().prepare_qat(bits=3).state_dict()
    with pytest.raises(
        ValueError, match=r"weight_fake_quant.codebook of the checkpoint is \[1, 8\], the model's \[1, 4\]"
    ):
        make_model().prepare_qat(bits=2).load_state_dict(state)


def test_a_linear_layer_has_rows_of_its_own(generator):
    layer = nn.Linear(20, 6)
    weight = quantize_weight(layer.weight, 2, 6, ClusterConfig(bits=2, granularity="per_channel"))
    fake = ClusterFakeQuantize(weight, torch.float16, "gradient")
    assert torch.equal(fake(layer.weight), weight.decoded())
