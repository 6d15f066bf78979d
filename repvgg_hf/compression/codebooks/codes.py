"""Codes of a kernel's weights and back, quick enough to run in every training step.

A kernel `[out, ...]` is handled as rows `[out, n]`, in the order in which its weights lie in memory with the channels
last: convolutions want that layout, and what is done to a row here does not depend on the order in it.
"""

import torch

PIECE = 2**17  # weights at once on a CPU: half a megabyte
LANES = 4
BINS_AN_ENTRY = 256


def to_rows(kernel: torch.Tensor) -> torch.Tensor:
    """`kernel` `[out, ...]` as `[out, n]`; a view if its channels are last in memory."""
    if kernel.dim() == 4:
        kernel = kernel.permute(0, 2, 3, 1)
    return kernel.reshape(kernel.shape[0], -1)


def from_rows(rows: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The reverse of [`to_rows`]; a kernel has its channels last in memory."""
    if len(shape) != 4:
        return rows.view(shape)
    out, channels, height, width = shape
    return rows.view(out, height, width, channels).permute(0, 3, 1, 2)


def pieces(rows: torch.Tensor) -> list[slice]:
    """Slices of the rows to work on one after the other: on a CPU what fits the cache, else all.

    In pieces it is several times as fast on a CPU, which otherwise waits for the memory of every intermediate result.
    """
    out, n = rows.shape
    whole = rows.device.type != "cpu" or torch.compiler.is_compiling()
    size = out if whole else max(1, PIECE // n)
    return [slice(start, min(start + size, out)) for start in range(0, out, size)]


def row_tables(table: torch.Tensor, out: int) -> torch.Tensor:
    """A `table` `[groups, size]` for each of `out` rows, `[out, size]`; the only one as it is, `[1, size]`."""
    return table if len(table) in (1, out) else table.repeat_interleave(out // len(table), dim=0)


def own(table: torch.Tensor, piece: slice) -> torch.Tensor:
    """The rows of a table of [`row_tables`] for a piece of the rows."""
    return table if len(table) == 1 else table[piece]


def take(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`table[o, index[o, i]]`, or `table[0, index[o, i]]` if it has one row, for int32 `index` `[out, n]`.

    By `gather`, as `index_select` uses one core only.
    """
    return table.expand(len(index), -1).gather(1, index)


def tree_of_borders(codebook: torch.Tensor, out: int) -> list[torch.Tensor]:
    """The borders between the entries of a codebook, level by level of a binary tree, each `[1 or out, 2**level]`."""
    middles = row_tables((codebook[:, 1:] + codebook[:, :-1]) / 2, out)
    levels, step = [], codebook.shape[1] // 2
    while step:
        levels.append(middles[:, step - 1 :: 2 * step].contiguous())
        step //= 2
    return levels


def descend(values: torch.Tensor, levels: list[torch.Tensor]) -> torch.Tensor:
    """int32 codes of `values` `[out, n]` by a binary search in which all go down the tree together.

    On a CPU it is several times as fast as `torch.bucketize`, whose branches nobody can predict. Comparisons are in
    place, as those with a bool result are not vectorized.
    """
    code = values.clone().gt_(levels[0]).int()
    for borders in levels[1:]:
        above = take(borders, code).lt_(values)
        code.mul_(2).add_(above.int())
    return code


def quantize_rows(
    rows: torch.Tensor, codebook: torch.Tensor, scale: torch.Tensor | None, with_decoded: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The nearest entries of the ascending `codebook` `[groups, 2**bits]` for `rows` `[out, n]`.

    Returns `(codes, decoded)`, uint8 and float32 `[out, n]`; decoded by the same operations as a `ClusterLayer`'s. A
    weight in the middle takes the lower entry.
    """
    out = len(rows)
    levels, table = tree_of_borders(codebook, out), row_tables(codebook, out)
    reciprocal = None if scale is None else scale.reciprocal()[:, None]
    codes = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
    decoded = torch.empty(rows.shape, dtype=codebook.dtype, device=rows.device) if with_decoded else None

    for piece in pieces(rows):
        values = rows[piece] if reciprocal is None else rows[piece] * reciprocal[piece]
        code = descend(values, [own(borders, piece) for borders in levels])
        codes[piece] = code
        if with_decoded:
            values = take(own(table, piece), code)
            decoded[piece] = values if scale is None else values.mul_(scale[piece, None])
    return codes, decoded


def lookup_table(codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What [`lookup_rows`] looks up: bins of equal width from the first to the last entry of a codebook `[1, k]`.

    Returns `(codes, entries, shift, bins)`: the uint8 codes `[256 * k]` nearest to the bins' middles and their entries,
    the number of the bin that zero would be in, plus a half, and bins a unit, both 0-dim.
    """
    entries = codebook[0]
    size = BINS_AN_ENTRY * len(entries)
    low = entries[0]
    bins = (size - 1) / (entries[-1] - low).clamp_min(1e-20)
    first_above = (((entries[1:] + entries[:-1]) / 2 - low) * bins).long() + 1  # the first bin beyond each border
    steps = torch.zeros(size, dtype=torch.int64, device=codebook.device)
    steps.scatter_add_(0, first_above.clamp_(max=size - 1), torch.ones_like(first_above))
    codes = steps.cumsum(dim=0)
    return codes.to(torch.uint8), entries[codes], 0.5 - low * bins, bins


def lookup_rows(rows: torch.Tensor, scale: torch.Tensor | None, table: tuple, decode: bool = False) -> torch.Tensor:
    """uint8 codes of `rows` `[out, n]`, or what they stand for, by the `table` of one codebook ([`lookup_table`]).

    As [`quantize_rows`], in a third of the time. Borders between entries are exact to half a bin, 1/512 of the mean
    distance between entries.
    """
    codes, entries, shift, bins = table
    looked_up = entries if decode else codes
    factor = bins.expand(len(rows), 1) if scale is None else (bins / scale)[:, None]
    result = torch.empty(rows.shape, dtype=looked_up.dtype, device=rows.device)
    for piece in pieces(rows):
        # clamped as integers, where a NaN is one too
        index = (rows[piece] * factor[piece]).add_(shift).int().clamp_(0, len(codes) - 1)
        found = take(looked_up[None], index)
        if decode and scale is not None:
            torch.mul(found, scale[piece, None], out=result[piece])
        else:
            result[piece] = found
    return result


def nearest_codes(rows: torch.Tensor, codebook: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """The codes of [`quantize_rows`] alone; for many weights of one codebook in half of the time."""
    size = BINS_AN_ENTRY * codebook.shape[1]
    if len(codebook) > 1 or rows.numel() < size:
        return quantize_rows(rows, codebook, scale, with_decoded=False)[0]
    entries = codebook[0]
    borders = (entries[1:] + entries[:-1]) / 2
    bins = (size - 1) / (entries[-1] - entries[0]).clamp_min(1e-20)
    shift = -entries[0] * bins

    def bin_of(values):  # the bin of a larger value is never a lower one, so borders in other bins need no comparison
        return (values * bins).add_(shift).clamp_(0, size - 1).int()

    # with entries too large for a bin's number, or two borders in a bin
    if not shift.isfinite() or ((border_bins := bin_of(borders)).diff() == 0).any():
        return quantize_rows(rows, codebook, scale, with_decoded=False)[0]
    border = torch.full((1, size), float("inf"), device=rows.device).index_copy_(1, border_bins.long(), borders[None])
    has_border = (border < float("inf")).int()
    below = has_border.cumsum(dim=1, dtype=torch.int32) - has_border  # how many borders are in lower bins
    codes = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
    reciprocal = None if scale is None else scale.reciprocal()[:, None]
    for piece in pieces(rows):
        values = rows[piece] if reciprocal is None else rows[piece] * reciprocal[piece]
        index = bin_of(values)
        codes[piece] = take(border, index).lt_(values).int().add_(take(below, index))
    return codes


def decode_rows(codes: torch.Tensor, codebook: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """What uint8 `codes` `[out, n]` stand for, by the same operations as a `ClusterLayer`'s."""
    table = row_tables(codebook, len(codes))
    decoded = torch.empty(codes.shape, dtype=codebook.dtype, device=codes.device)
    for piece in pieces(codes):
        values = take(own(table, piece), codes[piece].int())
        decoded[piece] = values if scale is None else values.mul_(scale[piece, None])
    return decoded


def sums_by_code(values: list[torch.Tensor], codes: torch.Tensor, k: int) -> list[torch.Tensor]:
    """For each row of each of some `values` `[out, n]` the sums by code, `[out, k]`."""
    out, n = codes.shape
    # neighbors add to different sums, so that none waits for the other
    lanes = torch.arange(n, device=codes.device, dtype=torch.int32) % LANES * k
    sums = [rows.new_zeros(out, LANES * k) for rows in values]
    for piece in pieces(codes):
        index = codes[piece].int().add_(lanes)
        for rows, total in zip(values, sums):
            total[piece].scatter_add_(1, index, rows[piece])
    return [total.view(out, LANES, k).sum(dim=1) for total in sums]
