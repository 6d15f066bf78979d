"""Codebooks whose entries are numbers of the dtype that stores them (float16, int8), optimized as such.

Rounding the best codebook does not give the best rounded codebook: the clusters should follow the rounded entries, and
where two entries become one, another is free.
"""

import torch
from torch.nn.functional import pad

from .sorted_groups import SortedGroups

LLOYD_STEPS = 100
CHUNK_LEVELS = 2048  # of all groups at a time, which bounds the memory of the dynamic program to some ten MB


def lloyd(groups: SortedGroups, codebook: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Run Lloyd's iteration from an ascending `codebook` `[groups, k]`, with each mean rounded to `dtype`; float32.

    The rounded mean is the best entry of that dtype for an interval, so the error never grows.
    """
    for _ in range(LLOYD_STEPS):
        moved = groups.means(groups.cuts(codebook), codebook).to(dtype).float().sort(dim=1).values
        if torch.equal(moved, codebook):
            break
        codebook = moved
    return codebook


def fit_grid(groups: SortedGroups, codebook: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Find an ascending codebook of `dtype`, as float32, that is no worse than the rounded `codebook` `[groups, k]`.

    No entry comes twice as long as another number instead would reduce the error.
    """
    codebook = lloyd(groups, codebook.to(dtype).float(), dtype)
    for _ in range(codebook.shape[1]):
        repeated = pad(codebook.diff(dim=1) == 0, (1, 0))
        if not repeated.any():
            break
        entry, gain = _most_useful_entry(groups, codebook, dtype)
        pays = repeated.any(dim=1) & (gain > 0)
        if not pays.any():
            break
        replaced = codebook.scatter(1, repeated.int().argmax(dim=1, keepdim=True), entry[:, None]).sort(dim=1).values
        codebook = lloyd(groups, torch.where(pays[:, None], replaced, codebook), dtype)
    return codebook


def _most_useful_entry(groups: SortedGroups, codebook: torch.Tensor, dtype: torch.dtype):
    """Find a number of `dtype` to add to each `codebook` `[groups, k]`, and by how much it reduces the error.

    Both are `[groups]`. Tried are the neighbors of every entry, and the means of what it stands for on either side.
    """
    cuts = groups.cuts(codebook)
    ends = cuts.unfold(1, 2, 1)  # [groups, k, 2]
    inside = torch.searchsorted(groups.values, codebook)[:, :, None].clamp(ends[:, :, :1], ends[:, :, 1:])
    halves = torch.cat([ends[:, :, :1], inside], dim=2).flatten(1)
    mass, first = groups.moments(torch.cat([halves, cuts[:, -1:]], dim=1))
    entry = codebook[:, :, None]  # [groups, k, 1]
    means = first / mass.clamp_min(1e-300) + groups.center
    means = torch.where(mass > 0, means, entry.expand(-1, -1, 2).flatten(1).double()).view(*entry.shape[:2], 2)
    stored = codebook.to(dtype)
    limit = torch.full_like(stored, torch.finfo(dtype).max)
    neighbors = [torch.nextafter(stored, -limit), torch.nextafter(stored, limit)]
    tried = torch.cat([means.to(dtype), torch.stack(neighbors, dim=2)], dim=2).float()  # [groups, k, 4]

    middles = ((tried + entry) / 2).flatten(1)
    middles = torch.searchsorted(groups.values, middles, right=True).view(tried.shape)
    middles = middles.clamp(ends[:, :, :1], ends[:, :, 1:])
    outer = torch.where(tried > entry, ends[:, :, 1:], ends[:, :, :1])
    cut = torch.stack([torch.minimum(middles, outer), torch.maximum(middles, outer)]).flatten(2)
    mass = groups.mass.gather(1, cut[1]) - groups.mass.gather(1, cut[0])
    first = groups.first.gather(1, cut[1]) - groups.first.gather(1, cut[0])
    centered, tried = (tried + entry).flatten(1) - 2 * groups.center, tried.flatten(1)
    gain = (tried - entry.expand(-1, -1, 4).flatten(1)) * (2 * first - centered * mass)
    gain, best = gain.max(dim=1)
    return tried.gather(1, best[:, None])[:, 0], gain


def best_integers(mass: torch.Tensor, first: torch.Tensor, lowest: int, k: int) -> torch.Tensor:
    """Find the `k` integers from `lowest` that have the least squared error as a codebook, float32 `[groups, k]`.

    A value's nearest integer of any choice depends only on the half-integers between which it lies, so that is all that
    needs to be known of the values, and dynamic programming over the levels is exact.

    Args:
        mass, first: float64 `[groups, 2 * levels]`, mass and first moment (about 0) of the values up to `lowest`, from
            each half-integer to the next, and above the highest level.
    """
    chunk = max(1, CHUNK_LEVELS // (mass.shape[1] // 2))
    chunks = zip(mass.split(chunk), first.split(chunk))
    return torch.cat([_best_integers(*part, lowest, k) for part in chunks])


def _best_integers(mass, first, lowest, k):
    levels = mass.shape[1] // 2
    index = torch.arange(levels, device=mass.device)
    level = (lowest + index).double()
    # values between two half-integers stay together: their own spread is left out
    second = first.square() / mass.clamp_min(1e-300)
    mass, first, second = (moment.cumsum(dim=1) for moment in (mass, first, second))  # up to every half-integer
    # errors of everything up to each level if it became that level, and of what is above it
    below = second[:, ::2] + level * (level * mass[:, ::2] - 2 * first[:, ::2])
    above = second[:, -1:] + level * (level * mass[:, -1:] - 2 * first[:, -1:]) - below
    # and of what is between two levels, each half becoming the nearer one, [groups, to, from]
    lower, upper = level, level[:, None]
    cost = mass.unfold(1, levels, 1)[:, :levels] * (lower + upper)
    cost = cost.sub_(first.unfold(1, levels, 1)[:, :levels], alpha=2).mul_(lower - upper)
    cost += below[:, :, None] - below[:, None, :]

    cost = cost.clamp_min_(0).masked_fill_(index >= index[:, None], float("inf")).float()
    best = [below.float()]  # that end at a level, of one entry, two, ...
    for _ in range(k - 1):
        best.append((best[-1][:, None, :] + cost).amin(dim=2))
    choice = (best[-1] + above.float()).argmin(dim=1, keepdim=True)
    path = [choice]
    for previous in best[-2::-1]:
        to_choice = cost.gather(1, choice[:, :, None].expand(-1, -1, levels))[:, 0]
        choice = (previous + to_choice).argmin(dim=1, keepdim=True)
        path.append(choice)
    return (lowest + torch.cat(path[::-1], dim=1)).float()
