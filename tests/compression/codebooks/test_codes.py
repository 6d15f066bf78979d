"""Encoding, decoding and sums by code, against searches and sums over all entries."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.nn.functional import pad

from repvgg_hf.compression.codebooks import codes as codes_module
from repvgg_hf.compression.codebooks.codes import (
    decode,
    encode,
    from_rows,
    make_bins,
    round_to_codebook,
    sums_by_code,
    to_rows,
)


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (6, 4, 1, 1), (6, 5)])
def test_rows_and_back(shape, generator):
    kernel = torch.randn(shape, generator=generator)
    for layout in (kernel, kernel.contiguous(memory_format=torch.channels_last)) if len(shape) == 4 else (kernel,):
        assert torch.equal(from_rows(to_rows(layout), kernel.shape), kernel)


@pytest.mark.parametrize("size", [20, 500, 12000], ids=["few", "some", "many"])
@pytest.mark.parametrize("k", [2, 3, 4, 16, 200, 256])
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_nearest_entries_and_ties(groups, k, size, generator):
    rows = torch.randn(6, size, generator=generator)
    codebook = torch.randn(groups, k, generator=generator).sort(dim=1).values
    if k > 2:
        codebook[0, 1] = codebook[0, 2]  # an entry twice
    rows[0, :5] = (codebook[0, 0] + codebook[0, 1]) / 2
    scale = 0.5 + torch.rand(6, generator=generator)
    for some in (None, scale):
        values = rows if some is None else rows * some.reciprocal()[:, None]
        middles = (codebook[:, 1:] + codebook[:, :-1]) / 2
        expected = torch.searchsorted(middles, values.reshape(groups, -1)).view_as(rows)
        codes = encode(rows, codebook, some)
        assert codes.dtype == torch.uint8 and torch.equal(codes.long(), expected)
        entries = codebook.repeat_interleave(6 // groups, dim=0).gather(1, expected)
        decoded = entries if some is None else entries * some[:, None]
        assert torch.equal(decode(codes, codebook, some), decoded)
        assert torch.equal(round_to_codebook(rows, codebook, some), decoded)


half_integers = st.integers(-40, 40).map(lambda value: value / 2)


@given(st.lists(half_integers, min_size=1, max_size=30), st.lists(half_integers, min_size=2, max_size=16))
def test_a_value_in_the_middle_takes_the_lower_entry(values, entries):
    # multiples of 1/2: the middles are exact
    entries = sorted(entries)
    nearest = [min(entries, key=lambda entry: (abs(value - entry), entry)) for value in values]
    for groups in (1, 3):
        codes = encode(torch.tensor([values] * groups), torch.tensor([entries] * groups))
        for row in codes.tolist():
            assert [entries[code] for code in row] == nearest


def test_no_other_entry_is_nearer(generator):
    values, codebook = torch.randn(5, 800, generator=generator), torch.randn(5, 256, generator=generator)
    codebook = codebook.sort(dim=1).values
    distance = (values - decode(encode(values, codebook), codebook)).abs()
    assert (distance <= (values[:, :, None] - codebook[:, None, :]).abs().amin(dim=2) + 1e-6).all()


@given(
    hnp.arrays(np.float32, st.sampled_from([2, 4, 8, 11]), elements=st.floats(-1, 1, width=32), unique=True),
    st.floats(-3, 3, width=32),
)
def test_many_weights_of_one_codebook_are_exact_on_and_beside_borders(entries, anything):
    codebook = torch.from_numpy(np.sort(entries))[None]
    borders = (codebook[:, 1:] + codebook[:, :-1]) / 2
    infinity = torch.full_like(borders, float("inf"))
    beside = torch.cat([borders, borders.nextafter(infinity), borders.nextafter(-infinity)], dim=1)
    values = pad(beside, (0, 4096 - beside.shape[1]), value=anything).view(4, 1024)
    assert torch.equal(encode(values, codebook).long(), torch.searchsorted(borders[0], values))


@pytest.mark.parametrize("k", [2, 8])
def test_values_far_outside_the_codebook(k):
    values = torch.tensor([[-3e38, -1e20, 1e20, 3e38]]).repeat(1, 1024)
    assert encode(values, torch.linspace(-1e-3, 1e-3, k)[None])[0, :4].tolist() == [0, 0, k - 1, k - 1]
    assert not encode(torch.full((1, 4096), 1e30), torch.full((1, k), 1e30)).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (6, 5)])
def test_decoding_a_stored_codebook(shape, dtype, generator):
    codes = torch.randint(8, shape, generator=generator, dtype=torch.uint8)
    codebook = (100 * torch.randn(2, 8, generator=generator)).to(dtype)
    scale = torch.rand(6, generator=generator)
    for layout in (codes, codes.transpose(0, 1).contiguous().transpose(0, 1)):
        decoded = decode(layout, codebook, scale)
        assert decoded.dtype == torch.float32 and decoded.is_contiguous()
        for channel in range(6):
            entries = codebook[channel // 3].float()[codes[channel].long()]
            assert torch.equal(decoded[channel], entries * scale[channel])


def test_pieces_change_nothing(generator, monkeypatch):
    rows, codebook = torch.randn(7, 10, generator=generator), torch.linspace(-1, 1, 8)[None]
    bins, scale = make_bins(codebook), 0.5 + torch.rand(7, generator=generator)

    def results():
        codes = encode(rows, codebook, scale)
        rounded = [round_to_codebook(rows, codebook, scale, some) for some in (None, bins)]
        return [
            codes,
            encode(rows, codebook, scale, bins),
            *rounded,
            decode(codes, codebook),
            sums_by_code([rows], codes, 8)[0],
        ]

    expected = results()
    monkeypatch.setattr(codes_module, "PIECE", 30)
    assert all(torch.equal(one, other) for one, other in zip(results(), expected))


def test_sums_by_code(generator):
    rows, other = torch.randn(2, 7, 1000, generator=generator)
    codes = torch.randint(8, (7, 1000), generator=generator, dtype=torch.uint8)
    for values, sums in zip((rows, other), sums_by_code([rows, other], codes, 8)):
        by_hand = torch.stack([(values * (codes == code)).sum(dim=1) for code in range(8)], dim=1)
        torch.testing.assert_close(sums, by_hand, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("k", [2, 4, 16, 256])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_prepared_bins_find_the_nearest_entries_to_half_a_bin(k, scaled, generator):
    rows = 2 * torch.randn(6, 5000, generator=generator)
    codebook = torch.randn(1, k, generator=generator).sort(dim=1).values
    scale = 0.5 + torch.rand(6, generator=generator) if scaled else None
    bins = make_bins(codebook)
    codes, rounded = encode(rows, codebook, scale, bins), round_to_codebook(rows, codebook, scale, bins)
    nearest = round_to_codebook(rows, codebook, scale)
    factor = torch.ones(6, 1) if scale is None else scale[:, None]
    assert torch.equal(rounded, codebook[0][codes.long()] * factor)
    bin_width = (codebook[0, -1] - codebook[0, 0]) / (256 * k - 1)
    excess = ((rows - rounded).abs() - (rows - nearest).abs()) / factor
    assert 0 <= excess.max() <= bin_width * 1.01  # a border may be off by half of that, which counts twice
    assert (rounded != nearest).float().mean() < 0.01


def test_prepared_bins_for_what_is_no_number_and_of_a_constant_codebook():
    codebook = torch.tensor([[-1.0, 0.0, 1.0, 2.0]])
    rows = torch.tensor([[float("nan"), -1e6, 1e6, 0.4]])
    assert round_to_codebook(rows, codebook, bins=make_bins(codebook)).tolist() == [[-1.0, -1.0, 2.0, 0.0]]
    constant = torch.full((1, 4), 0.5)
    assert (round_to_codebook(rows, constant, bins=make_bins(constant)) == 0.5).all()
