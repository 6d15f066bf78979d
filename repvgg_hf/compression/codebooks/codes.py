"""Codes of a weight and back: finding the nearest entry of a codebook, decoding, sums by code.

A *codebook* is a short ascending table of float values, its entries. A *code* is the index of one, stored in `bits`
bits. A *group* is a run of output channels that share a codebook, and a *channel scale* is one more factor for each
output channel, so that a weight `w[o, i]` of the rows below becomes `scale[o] * codebook[group(o), code[o, i]]`.

A kernel `[out, ...]` is handled as rows `[out, n]`, in the order in which its weights lie in memory with the channels
last: convolutions want that layout, and what is done to a row here does not depend on the order in it. Everything here
is quick enough to run in every training step.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import pad

TINY = 1e-30  # least scale of a channel: one that is all zero decodes to nothing, whatever the codebook
PIECE = 2**17  # weights that are worked on at once on a CPU: half a megabyte
LANES = 4
BINS_PER_ENTRY = 256
MANY_ENTRIES = 8  # fewer are found as quickly without bins

# Codes, int32, of the values `[rows, n]` of a piece of the rows, which have been divided by their scale.
FindCodes = Callable[[torch.Tensor, slice], torch.Tensor]


def to_rows(kernel: torch.Tensor) -> torch.Tensor:
    """Return `kernel` `[out, ...]` as rows `[out, n]`; a view if its channels are last in memory."""
    if kernel.dim() == 4:
        kernel = kernel.permute(0, 2, 3, 1)
    return kernel.reshape(kernel.shape[0], -1)


def from_rows(rows: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Undo [`to_rows`] for a kernel of that `shape`, which then has its channels last in memory."""
    if len(shape) != 4:
        return rows.view(shape)
    out, channels, height, width = shape
    return rows.view(out, height, width, channels).permute(0, 3, 1, 2)


class Bins(NamedTuple):
    """The look-up that [`make_bins`] prepares: bins of equal width from the first to the last entry of one codebook.

    `codes` `[256 * k]`, uint8, are the entries nearest to the bins' middles, `entries` `[256 * k]` their values,
    `shift` and `bins_per_unit`, 0-dim, make a value's bin: the integer part of `value * bins_per_unit + shift`.
    """

    codes: torch.Tensor
    entries: torch.Tensor
    shift: torch.Tensor
    bins_per_unit: torch.Tensor


def make_bins(codebook: torch.Tensor) -> Bins:
    """Prepare the look-up of one ascending codebook `[1, k]` for [`encode`] and [`round_to_codebook`].

    With it these take a third of the time. Making it takes as long as coding some `256 * k` weights.
    """
    entries = codebook[0]
    size = BINS_PER_ENTRY * len(entries)
    low = entries[0]
    bins_per_unit = (size - 1) / (entries[-1] - low).clamp_min(1e-20)
    first_above = ((_borders(entries) - low) * bins_per_unit).long() + 1  # the first bin beyond each border
    steps = torch.zeros(size, dtype=torch.int64, device=codebook.device)
    steps.scatter_add_(0, first_above.clamp_(max=size - 1), torch.ones_like(first_above))
    codes = steps.cumsum(dim=0)
    return Bins(codes.to(torch.uint8), entries[codes], 0.5 - low * bins_per_unit, bins_per_unit)


def encode(
    rows: torch.Tensor, codebook: torch.Tensor, scale: torch.Tensor | None = None, bins: Bins | None = None
) -> torch.Tensor:
    """Find the nearest codebook entry of every weight; one in the middle between two takes the lower.

    Args:
        rows: finite, float32 `[out, n]`.
        codebook: ascending, float32 `[groups, k]` with `k` from 2 to 256; each is for `out / groups` consecutive rows.
        scale: positive, float32 `[out]`, of each row, or `None`.
        bins: of a single codebook by [`make_bins`]. Borders between entries are then exact only to half a bin, 1/512 of
            the mean distance between entries.

    Returns the codes, uint8 `[out, n]`.
    """
    if bins is not None:
        return _look_up(rows, scale, bins, bins.codes)
    groups, k = codebook.shape
    find = None
    if groups == 1 and k >= MANY_ENTRIES and rows.numel() >= BINS_PER_ENTRY * k:
        find = _exact_bins(codebook[0])
    find = find or _tree(codebook, len(rows))
    codes = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
    for piece, values in _scaled_pieces(rows, scale):
        codes[piece] = find(values, piece)
    return codes


@torch.no_grad()
def decode(codes: torch.Tensor, codebook: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """Return the weight that `codes` stand for, by the same operations as a `ClusterLayer`.

    Args:
        codes: uint8 `[out, ...]`.
        codebook: any dtype, `[groups, k]`.
        scale: float32 `[out]`, or `None`.

    Returns float32, contiguous, of the codes' shape.
    """
    rows = codes.flatten(1)
    entries = _by_channel(codebook.float(), len(rows))
    decoded = torch.empty(rows.shape, dtype=torch.float32, device=codes.device)
    for piece in _pieces(rows):
        index = rows[piece].long()
        values = torch.gather(_part(entries, piece).expand(len(index), -1), 1, index, out=decoded[piece])
        if scale is not None:
            values.mul_(scale[piece, None])
    return decoded.view(codes.shape)


def round_to_codebook(
    rows: torch.Tensor, codebook: torch.Tensor, scale: torch.Tensor | None = None, bins: Bins | None = None
) -> torch.Tensor:
    """Return what [`encode`] and then [`decode`] make of `rows`, float32 `[out, n]`, in one pass over them.

    This is what a training step needs. The arguments are those of [`encode`].
    """
    if bins is not None:
        return _look_up(rows, scale, bins, bins.entries)
    find, entries = _tree(codebook, len(rows)), _by_channel(codebook, len(rows))
    rounded = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    for piece, values in _scaled_pieces(rows, scale):
        values = _entries_at(_part(entries, piece), find(values, piece))
        rounded[piece] = values if scale is None else values.mul_(scale[piece, None])
    return rounded


def sums_by_code(values: list[torch.Tensor], codes: torch.Tensor, k: int) -> list[torch.Tensor]:
    """Sum each of some `values` `[out, n]` by the code of the weight, for every row: a list of `[out, k]`."""
    out, n = codes.shape
    # neighbors add to different sums, so that none waits for the other
    lanes = torch.arange(n, device=codes.device, dtype=torch.int32) % LANES * k
    sums = [rows.new_zeros(out, LANES * k) for rows in values]
    for piece in _pieces(codes):
        index = codes[piece].int().add_(lanes)
        for rows, total in zip(values, sums):
            total[piece].scatter_add_(1, index, rows[piece])
    return [total.view(out, LANES, k).sum(dim=1) for total in sums]


def _borders(codebook: torch.Tensor) -> torch.Tensor:
    """Return the borders of the codes: the middles between neighboring entries `[..., k]`, `[..., k - 1]`."""
    return (codebook[..., 1:] + codebook[..., :-1]) / 2


def _pieces(rows: torch.Tensor) -> list[slice]:
    """Return slices of the rows to work on one after the other: on a CPU what fits the cache, else all.

    In pieces it is several times as fast on a CPU, which otherwise waits for the memory of every intermediate result.
    """
    out, n = rows.shape
    whole = rows.device.type != "cpu" or torch.compiler.is_compiling()
    size = out if whole else max(1, PIECE // n)
    return [slice(start, min(start + size, out)) for start in range(0, out, size)]


def _scaled_pieces(rows: torch.Tensor, scale: torch.Tensor | None):
    """Yield the [`_pieces`], and with each its rows divided by their scale."""
    reciprocal = None if scale is None else scale.reciprocal()[:, None]
    for piece in _pieces(rows):
        yield piece, rows[piece] if reciprocal is None else rows[piece] * reciprocal[piece]


def _by_channel(table: torch.Tensor, out: int) -> torch.Tensor:
    """Repeat a `table` `[groups, size]` for each of `out` rows, `[out, size]`; the only one stays `[1, size]`."""
    return table if len(table) in (1, out) else table.repeat_interleave(out // len(table), dim=0)


def _part(table: torch.Tensor, piece: slice) -> torch.Tensor:
    """Return the rows of a table of [`_by_channel`] that belong to a piece of the rows."""
    return table if len(table) == 1 else table[piece]


def _entries_at(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return `table[o, index[o, i]]`, or `table[0, index[o, i]]` if it has one row, for int32 `index` `[out, n]`.

    It is done by `gather`, as `index_select` uses one core only.
    """
    return table.expand(len(index), -1).gather(1, index)


def _look_up(rows: torch.Tensor, scale: torch.Tensor | None, bins: Bins, table: torch.Tensor) -> torch.Tensor:
    """Look up the codes of `rows`, or what they decode to: `table` is `bins.codes` or `bins.entries`."""
    factor = bins.bins_per_unit.expand(len(rows), 1) if scale is None else (bins.bins_per_unit / scale)[:, None]
    found = torch.empty(rows.shape, dtype=table.dtype, device=rows.device)
    for piece in _pieces(rows):
        # clamped as integers, where a NaN is one too
        index = (rows[piece] * factor[piece]).add_(bins.shift).int().clamp_(0, len(table) - 1)
        values = _entries_at(table[None], index)
        if scale is not None and table is bins.entries:
            torch.mul(values, scale[piece, None], out=found[piece])
        else:
            found[piece] = values
    return found


def _tree(codebook: torch.Tensor, out: int) -> FindCodes:
    """Make a search for codes in which all values go down a tree of borders together, level by level.

    On a CPU it is several times as fast as `torch.bucketize`, whose branches nobody can predict. Comparisons are in
    place, as those with a bool result are not vectorized.
    """
    borders = _by_channel(_borders(codebook), out)
    depth = (codebook.shape[1] - 1).bit_length()
    if borders.shape[1] < 2**depth - 1:
        borders = pad(borders, (0, 2**depth - 1 - borders.shape[1]), value=float("inf"))
    # each [1 or out, 2**level]
    levels = [borders[:, 2**below - 1 :: 2 ** (below + 1)].contiguous() for below in reversed(range(depth))]

    def find(values: torch.Tensor, piece: slice) -> torch.Tensor:
        codes = values.clone().gt_(_part(levels[0], piece)).int()
        for level in levels[1:]:
            above = _entries_at(_part(level, piece), codes).lt_(values)
            codes.mul_(2).add_(above.int())
        return codes

    return find


def _exact_bins(entries: torch.Tensor) -> FindCodes | None:
    """Make a search for codes of one codebook `[k]` by bins with at most one border in each, to compare with.

    For many weights and entries it takes half of the time of a tree. Returns `None` if two borders share a bin, or if
    the entries are too large for a bin's number.
    """
    size = BINS_PER_ENTRY * len(entries)
    borders = _borders(entries)
    bins_per_unit = (size - 1) / (entries[-1] - entries[0]).clamp_min(1e-20)
    shift = -entries[0] * bins_per_unit

    def bin_of(values):  # the bin of a larger value is never a lower one, so borders in other bins need no comparison
        return (values * bins_per_unit).add_(shift).clamp_(0, size - 1).int()

    if not shift.isfinite() or ((border_bins := bin_of(borders)).diff() == 0).any():
        return None
    border = entries.new_full((1, size), float("inf"))  # of each bin
    border.index_copy_(1, border_bins.long(), borders[None])
    has_border = (border < float("inf")).int()
    lower = has_border.cumsum(dim=1, dtype=torch.int32) - has_border  # how many borders are in lower bins

    def find(values: torch.Tensor, piece: slice) -> torch.Tensor:
        index = bin_of(values)
        return _entries_at(border, index).lt_(values).int().add_(_entries_at(lower, index))

    return find
