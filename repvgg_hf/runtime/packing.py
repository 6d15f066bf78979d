"""Bit-packing of codes, and decoding them.

A *code* is a number of 1 to 8 bits that selects an entry of a *codebook*, a table of `2**bits` values. Code i takes
bits `i * bits` to `(i + 1) * bits - 1` of a little-endian bit stream. Three codes a, b, c of 3 bits:

    byte 0              byte 1
    c1 c0 b2 b1 b0 a2 a1 a0   .. .. .. .. .. .. .. c2
    7                   0     7                    0

The last byte is padded with zeros.
"""

import math

import torch

from .tensors import has_memory


def packed_size(numel: int, bits: int) -> int:
    """Return the number of bytes that `numel` codes of `bits` bits take."""
    return (numel * bits + 7) // 8


def _word(bits: int) -> tuple[int, int, torch.dtype]:
    """Return the shortest run of codes that fills whole bytes, as (codes, bytes, a dtype that holds it)."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"bits must be an integer from 1 to 8, got {bits!r}.")
    word_bits = math.lcm(bits, 8)
    dtype = torch.uint8 if word_bits == 8 else torch.int32 if word_bits < 32 else torch.int64
    return word_bits // bits, word_bits // 8, dtype


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 `codes` of any shape, in row-major order, into a uint8 tensor `[ceil(numel * bits / 8)]`.

    Raises `ValueError` if `bits` is not 1 to 8, `codes` is not uint8, or a code does not fit.
    """
    codes_a_word, bytes_a_word, dtype = _word(bits)
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes must be uint8, got {codes.dtype}.")
    if codes.numel() and codes.max().item() >= 2**bits:
        raise ValueError(f"A code is {codes.max().item()}, but {bits} bits hold at most {2**bits - 1}.")
    size = packed_size(codes.numel(), bits)
    codes = torch.nn.functional.pad(codes.reshape(-1), (0, -codes.numel() % codes_a_word)).view(-1, codes_a_word)
    word = torch.zeros(codes.shape[0], dtype=dtype, device=codes.device)
    for i in range(codes_a_word):
        word |= codes[:, i].to(dtype) << (i * bits)
    packed = torch.stack([(word >> (8 * j) & 255).to(torch.uint8) for j in range(bytes_a_word)], dim=1)
    return packed.view(-1)[:size].clone()  # no padding kept alive, and none saved


def unpack_codes(packed: torch.Tensor, bits: int, numel: int) -> torch.Tensor:
    """Return the first `numel` codes, uint8 `[numel]`, of what [`pack_codes`] made.

    Raises `ValueError` if `packed` is not a uint8 vector of the length that `numel` codes take.
    """
    codes_a_word, bytes_a_word, dtype = _word(bits)
    if packed.dtype != torch.uint8 or packed.shape != (packed_size(numel, bits),):
        raise ValueError(
            f"{numel} codes of {bits} bits take a uint8 tensor of shape [{packed_size(numel, bits)}], "
            f"got {packed.dtype} {list(packed.shape)}."
        )
    packed = torch.nn.functional.pad(packed, (0, -packed.numel() % bytes_a_word)).view(-1, bytes_a_word)
    word = packed[:, 0].to(dtype)
    for j in range(1, bytes_a_word):
        word |= packed[:, j].to(dtype) << (8 * j)
    mask = 2**bits - 1
    codes = torch.stack([(word >> (i * bits) & mask).to(torch.uint8) for i in range(codes_a_word)], dim=1)
    return codes.view(-1)[:numel]


def lookup_packed(packed: torch.Tensor, codebook: torch.Tensor, bits: int, numel: int) -> torch.Tensor:
    """Look up the `numel` packed codes in the float32 `codebook` `[groups, 2**bits]`; returns float32 `[numel]`.

    Group g's codebook is for the codes `g * numel / groups` to `(g + 1) * numel / groups - 1`.
    """
    groups = codebook.shape[0]
    whole_bytes = 8 % bits == 0 and numel * bits % (8 * groups) == 0
    if whole_bytes and 4 * groups * 2048 // bits <= numel:
        # a byte at a time, in a table of the entries that each byte stands for: small beside so many codes
        every_byte = torch.arange(256, dtype=torch.uint8, device=packed.device)
        table = codebook[:, unpack_codes(every_byte, bits, 2048 // bits).view(256, -1).int()]
        index = packed
    else:
        table, index = codebook[:, :, None], unpack_codes(packed, bits, numel)
    index = index.view(groups, -1).int()
    if groups > 1:
        index += table.shape[1] * torch.arange(groups, dtype=torch.int32, device=index.device)[:, None]
    table = table.flatten(0, 1)  # [groups * rows, codes per row]
    if table.shape[1] == 2 and (torch.compiler.is_compiling() or has_memory(table)):  # `vmap` has no `view(dtype)`
        # numbers are gathered several times as fast as rows of two
        return table.contiguous().view(torch.int64).view(-1).index_select(0, index.view(-1)).view(torch.float32)
    return table.squeeze(1).index_select(0, index.view(-1)).view(-1)


__all__ = ["lookup_packed", "pack_codes", "packed_size", "unpack_codes"]
