import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from repvgg_hf.runtime.packing import lookup_packed, pack_codes, packed_size, unpack_codes


def bytes_of(codes: list[int], bits: int) -> list[int]:
    """The format in text: every code as binary digits, the first code rightmost, cut into bytes from the right."""
    digits = "".join(format(code, f"0{bits}b") for code in reversed(codes))
    digits = "0" * (-len(digits) % 8) + digits
    return [int(digits[end - 8 : end], 2) for end in range(len(digits), 0, -8)]


@st.composite
def bits_and_codes(draw):
    bits = draw(st.integers(1, 8))
    return bits, draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))


@given(bits_and_codes())
def test_packs_the_little_endian_bit_stream(case):
    bits, codes = case
    packed = pack_codes(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.tolist() == bytes_of(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (packed_size(len(codes), bits),)
    assert unpack_codes(packed, bits, len(codes)).tolist() == codes


def test_the_picture_in_the_module():
    # a = 0b001, b = 0b010, c = 0b111: byte 0 is c1 c0 b b b a a a, byte 1 ends in c2
    assert pack_codes(torch.tensor([0b001, 0b010, 0b111], dtype=torch.uint8), 3).tolist() == [0b11_010_001, 0b1]


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_large_tensor_of_any_shape_is_packed_row_by_row(bits):
    codes = torch.randint(2**bits, (5, 3, 7, 11), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.tolist() == bytes_of(codes.flatten().tolist(), bits)
    assert torch.equal(unpack_codes(packed, bits, codes.numel()).view(codes.shape), codes)
    # the transposed view has other strides and another row-major order
    assert torch.equal(pack_codes(codes.mT, bits), pack_codes(codes.mT.contiguous(), bits))


@pytest.mark.parametrize("bits", range(1, 9))
def test_nothing_beyond_the_packed_bytes_is_kept_alive(bits):
    packed = pack_codes(torch.zeros(13, dtype=torch.uint8), bits)
    assert packed.untyped_storage().nbytes() == packed_size(13, bits)


@pytest.mark.parametrize("bits", [0, 9, -1, 2.0, True, "2", None])
def test_bits_must_be_an_integer_from_1_to_8(bits):
    codes = torch.zeros(8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="bits must be an integer from 1 to 8, got"):
        pack_codes(codes, bits)
    with pytest.raises(ValueError, match="bits must be an integer from 1 to 8, got"):
        unpack_codes(codes, bits, 8)


@pytest.mark.parametrize("bits", range(1, 8))
def test_a_code_too_large_is_refused(bits):
    codes = torch.tensor([0, 2**bits], dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"A code is {2**bits}, but {bits} bits hold at most {2**bits - 1}"):
        pack_codes(codes, bits)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float32, torch.bool])
def test_only_uint8_is_packed_and_unpacked(dtype):
    with pytest.raises(ValueError, match="codes must be uint8, got"):
        pack_codes(torch.zeros(8, dtype=dtype), 4)
    with pytest.raises(ValueError, match=r"8 codes of 4 bits take a uint8 tensor of shape \[4\], got"):
        unpack_codes(torch.zeros(4, dtype=dtype), 4, 8)


@pytest.mark.parametrize("shape", [(3,), (5,), (0,), (2, 2)], ids=str)
def test_packed_codes_of_another_length_are_refused(shape):
    with pytest.raises(ValueError, match=r"8 codes of 4 bits take a uint8 tensor of shape \[4\], got"):
        unpack_codes(torch.zeros(shape, dtype=torch.uint8), 4, 8)


# few and many codes a codebook, whole bytes of them or not: each of them has its own way through the lookup
@pytest.mark.parametrize("numel", [30, 12 * 1024, 12 * 1024 + 3], ids=str)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("bits", range(1, 9))
def test_looking_up_entries(bits, groups, numel):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (groups, numel // groups), generator=generator).to(torch.uint8)
    codebook = torch.randn(groups, 2**bits, generator=generator)
    values = lookup_packed(pack_codes(codes, bits), codebook, bits, codes.numel())
    assert values.dtype == torch.float32 and values.shape == (codes.numel(),)
    for group, entries in enumerate(values.view(groups, -1).tolist()):
        book = codebook[group].tolist()
        assert entries == [book[code] for code in codes[group].tolist()]


@pytest.mark.parametrize("numel", [30, 12 * 1024, 12 * 1024 + 3], ids=str)
@pytest.mark.parametrize("bits", range(1, 9))
def test_looking_up_the_entries_of_several_models_at_once(bits, numel, generator):
    codes = torch.randint(2**bits, (2, numel), generator=generator).to(torch.uint8)
    packed = torch.stack([pack_codes(row, bits) for row in codes])
    codebooks = torch.randn(2, 1, 2**bits, generator=generator)
    values = torch.vmap(lambda codes, codebook: lookup_packed(codes, codebook, bits, numel))(packed, codebooks)
    assert torch.equal(values, torch.stack([book[0, row.long()] for book, row in zip(codebooks, codes)]))
