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


def take(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`table[o, index[o, i]]`, or `table[0, index[o, i]]` if it has one row, for int32 `index` `[out, n]`."""
    if len(table) > 1:
        first = torch.arange(len(table), device=index.device, dtype=torch.int32) * table.shape[1]
        index = index + first[:, None]
    return table.reshape(-1).index_select(0, index.reshape(-1)).view(index.shape)


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

    On a CPU it is several times as fast as `torch.bucketize`, whose branches nobody can predict.
    """
    code = (values > levels[0]).view(torch.uint8).int()
    for borders in levels[1:]:
        above = (values > take(borders, code)).view(torch.uint8)
        code.mul_(2).add_(above)
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

    def own(table, piece):
        return table if len(table) == 1 else table[piece]

    for piece in pieces(rows):
        values = rows[piece] if reciprocal is None else rows[piece] * reciprocal[piece]
        code = descend(values, [own(borders, piece) for borders in levels])
        codes[piece] = code
        if with_decoded:
            values = take(own(table, piece), code)
            decoded[piece] = values if scale is None else values.mul_(scale[piece, None])
    return codes, decoded


def lookup_table(codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What [`lookup_rows`] looks up: bins of equal width from the first to the last entry of a codebook `[1, k]`.

    Returns `(codes, low, bins)`: the uint8 codes `[256 * k]` nearest to the bins' middles, the value in the middle of
    the first one, and bins a unit, both 0-dim.
    """
    entries = codebook[0]
    size = BINS_AN_ENTRY * len(entries)
    low = entries[0]
    bins = (size - 1) / (entries[-1] - low).clamp_min(1e-20)
    first_above = (((entries[1:] + entries[:-1]) / 2 - low) * bins).long() + 1  # the first bin beyond each border
    steps = torch.zeros(size, dtype=torch.int64, device=codebook.device)
    steps.scatter_add_(0, first_above.clamp_(max=size - 1), torch.ones_like(first_above))
    return steps.cumsum(dim=0).to(torch.uint8), low, bins


def lookup_rows(
    rows: torch.Tensor, codebook: torch.Tensor, scale: torch.Tensor | None, table: tuple, with_codes: bool = True
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """As [`quantize_rows`], in a third of the time, for one codebook `[1, k]` and its `table` from [`lookup_table`].

    Borders between entries are exact to half a bin, 1/512 of the mean distance between entries.
    """
    bin_codes, low, bins = table
    bin_values = codebook[0].index_select(0, bin_codes.int())
    factor = bins.expand(len(rows), 1) if scale is None else (bins / scale)[:, None]
    shift = 0.5 - low * bins
    codes = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device) if with_codes else None
    decoded = torch.empty(rows.shape, dtype=codebook.dtype, device=rows.device)
    for piece in pieces(rows):
        # clamped as integers, where a NaN is one too
        index = torch.addcmul(shift, rows[piece], factor[piece]).int().clamp_(0, len(bin_codes) - 1).view(-1)
        values = bin_values.index_select(0, index).view_as(rows[piece])
        decoded[piece] = values if scale is None else values.mul_(scale[piece, None])
        if with_codes:
            codes[piece] = bin_codes.index_select(0, index).view_as(rows[piece])
    return codes, decoded


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
        return torch.addcmul(shift, values, bins).clamp_(0, size - 1).int()

    # with entries too large for a bin's number, or two borders in a bin
    if not shift.isfinite() or ((border_bins := bin_of(borders)).diff() == 0).any():
        return quantize_rows(rows, codebook, scale, with_decoded=False)[0]
    border = torch.full((size,), float("inf"), device=rows.device).index_copy_(0, border_bins.long(), borders)
    has_border = (border < float("inf")).int()
    below = (has_border.cumsum(dim=0) - has_border).to(torch.uint8)  # how many borders are in lower bins
    codes = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
    reciprocal = None if scale is None else scale.reciprocal()[:, None]
    for piece in pieces(rows):
        values = (rows[piece] if reciprocal is None else rows[piece] * reciprocal[piece]).reshape(-1)
        index = bin_of(values)
        above = (values > border.index_select(0, index)).view(torch.uint8)
        codes[piece] = above.add_(below.index_select(0, index)).view_as(codes[piece])
    return codes


def decode_rows(codes: torch.Tensor, codebook: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """What uint8 `codes` `[out, n]` stand for, by the same operations as a `ClusterLayer`'s."""
    rows = take(row_tables(codebook, len(codes)), codes.int())
    return rows if scale is None else rows.mul_(scale[:, None])


def sums_by_code(values: torch.Tensor, codes: torch.Tensor, k: int) -> torch.Tensor:
    """For each row the sums of its `values` `[out, n]` by code, `[out, k]`."""
    out, n = values.shape
    # neighbours add to different sums, so that none waits for the other
    lanes = torch.arange(n, device=values.device) % LANES * k
    sums = values.new_zeros(out, LANES * k)
    for piece in pieces(values):
        sums[piece].scatter_add_(1, codes[piece] + lanes, values[piece])
    return sums.view(out, LANES, k).sum(dim=1)
