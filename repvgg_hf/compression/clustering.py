"""One-dimensional weighted k-means, batched over groups.

On sorted values a cluster is an interval, so prefix sums give any cluster's mass, mean and error in constant time: a
Lloyd step costs `k * log(n)`, whatever the number of weights. The start is the optimum by dynamic programming over a
few hundred candidate cuts, improved by moving entries and cuts, which spares the restarts that k-means else needs.
"""

import torch

LLOYD_STEPS = 300
ROUNDS = 3  # of moving entries to where they pay most, then all cuts a little
REFINEMENT = (0.9, 0.4, 0.15, 0.06, 0.02)  # reaches of successive refinements in a round
REFINEMENT_OFFSETS = (-1.0, -0.6, -0.3, -0.1, 0.0, 0.1, 0.3, 0.6, 1.0)
SPLIT_FRACTIONS = (0.03, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)
DYNAMIC_PROGRAM_CLUSTERS = 32  # more than these start from the asymptotically best cuts
DYNAMIC_PROGRAM_CUTS = (512, 192)  # candidates with one group, and with many
GROUPS_A_CHUNK = 96  # bounds the memory of the cost matrices to 14 MB each


class SortedGroups:
    """Groups of values, sorted, with prefix sums of their mass and first two moments.

    Args:
        values: `[groups, n]`, any float dtype.
        weights: `[groups, n]`, the importance of each value, not negative; `None` for equal ones.
    """

    def __init__(self, values: torch.Tensor, weights: torch.Tensor | None = None):
        self.values, order = values.float().sort(dim=1)
        # float64 and centred: a cluster's error is a difference of large sums
        self.centre = self.values.double().mean(dim=1, keepdim=True)
        centred = self.values.double() - self.centre
        mass = torch.ones_like(centred) if weights is None else weights.double().gather(1, order)
        moments = torch.stack([mass, mass * centred, mass * centred.square()])
        self.prefix = torch.nn.functional.pad(moments.cumsum(dim=2), (1, 0))  # [3, groups, n + 1]

    def cuts(self, codebook: torch.Tensor) -> torch.Tensor:
        """Where the intervals of an ascending `codebook` `[groups, k]`'s entries begin and end, `[groups, k + 1]`."""
        middles = (codebook[:, 1:] + codebook[:, :-1]) / 2
        inner = torch.searchsorted(self.values, middles.contiguous(), right=True)
        return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=self.values.shape[1])

    def interval_moments(self, cuts: torch.Tensor) -> torch.Tensor:
        """Mass, first and second moment about `centre` between the `cuts` `[groups, k + 1]`, `[3, groups, k]`."""
        at_cuts = self.prefix.gather(2, cuts.expand(3, -1, -1))
        return at_cuts.diff(dim=2)

    def means(self, cuts: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
        """Mean of each interval; that of `empty` `[groups, k]` where an interval has no mass."""
        mass, first, _ = self.interval_moments(cuts)
        return torch.where(mass > 0, first / mass.clamp_min(1e-300) + self.centre, empty.double()).float()

    def error(self, codebook: torch.Tensor) -> torch.Tensor:
        """Weighted sum of squared errors of the nearest entry of an ascending `codebook`, `[groups]`, float64."""
        mass, first, second = self.interval_moments(self.cuts(codebook))
        entry = codebook.double() - self.centre
        return (second - 2 * entry * first + entry.square() * mass).sum(dim=1)


def _candidate_cuts(groups: SortedGroups, count: int) -> torch.Tensor:
    """Ascending positions to cut the sorted values at, `[groups, count + 1]`: everywhere if there are at most `count`.

    Else as densely as the best quantiser with many entries would (Panter and Dite), the cube root of the density. It
    resolves the bulk of a distribution and its tails alike.
    """
    number, n = groups.values.shape
    if n <= count:
        return torch.arange(n + 1, device=groups.values.device).expand(number, -1)
    mass = groups.prefix[0].diff(dim=1)
    # density^(1/3) * gap, with mass / gap for the density
    steps = ((mass[:, 1:] + mass[:, :-1]) * groups.values.double().diff(dim=1).square()).pow(1 / 3)
    position = torch.nn.functional.pad(steps.cumsum(dim=1), (1, 0))  # [groups, n]
    fractions = torch.arange(1, count, device=position.device) / count
    inner = torch.searchsorted(position, position[:, -1:] * fractions)
    return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=n)


def _optimal_cuts(groups: SortedGroups, cuts: torch.Tensor, k: int) -> torch.Tensor:
    """The best `k` intervals that can be formed from candidate `cuts` `[groups, m + 1]`, as `[groups, k + 1]`."""
    mass, first, second = groups.prefix.gather(2, cuts.expand(3, -1, -1))  # each [groups, m + 1]
    m = cuts.shape[1]

    def between(prefix):  # [groups, from, to]
        return prefix[:, None, :] - prefix[:, :, None]

    cost = between(second) - between(first).square() / between(mass).clamp_min(1e-300)
    backwards = torch.ones(m, m, dtype=torch.bool, device=cuts.device).tril(-1)
    cost = cost.clamp_min(0).masked_fill(backwards, float("inf")).float()
    best, choices = cost[:, 0, :], []
    for _ in range(k - 1):
        best, choice = (best[:, :, None] + cost).min(dim=1)
        choices.append(choice)
    position = torch.full((cuts.shape[0], 1), m - 1, device=cuts.device)
    path = [position]
    for choice in reversed(choices):
        position = choice.gather(1, position)
        path.append(position)
    path.append(torch.zeros_like(position))
    return cuts.gather(1, torch.cat(path[::-1], dim=1))


def _search_cuts(groups: SortedGroups, k: int) -> torch.Tensor:
    """Near-optimal cuts into `k` intervals, `[groups, k + 1]`."""
    number, n = groups.values.shape
    if k <= DYNAMIC_PROGRAM_CLUSTERS:
        cuts = _optimal_cuts(groups, _candidate_cuts(groups, DYNAMIC_PROGRAM_CUTS[number > 1]), k)
    else:
        cuts = _candidate_cuts(groups, k)
    for _ in range(ROUNDS):
        cuts = _exchange(groups, cuts)
        for reach in REFINEMENT:
            cuts = _refine(groups, cuts, reach)
    return cuts


def _error(moments: torch.Tensor) -> torch.Tensor:
    """Squared error about the mean of intervals with these moments `[3, ...]`."""
    mass, first, second = moments
    return second - first.square() / mass.clamp_min(1e-300)


def _exchange(groups: SortedGroups, cuts: torch.Tensor) -> torch.Tensor:
    """Merge the two neighbours that lose least and split the interval that gains most, as long as that pays.

    This takes an entry from anywhere to anywhere, which no shifting of cuts does. An interval without values costs
    nothing to merge, so none is left.
    """
    k = cuts.shape[1] - 1
    fractions = torch.tensor(SPLIT_FRACTIONS, device=cuts.device)
    intervals = torch.arange(k, device=cuts.device)
    for _ in range(k):
        at_cuts = groups.prefix.gather(2, cuts.expand(3, -1, -1))
        error = _error(at_cuts.diff(dim=2))  # [groups, k]
        loss = _error(at_cuts[:, :, 2:] - at_cuts[:, :, :-2]) - error[:, 1:] - error[:, :-1]  # [groups, k - 1]

        middles = cuts[:, :-1, None] + (cuts.diff(dim=1)[:, :, None] * fractions).round().long()
        at_middles = groups.prefix.gather(2, middles.flatten(1).expand(3, -1, -1)).view(3, *middles.shape)
        split = _error(at_middles - at_cuts[:, :, :-1, None]) + _error(at_cuts[:, :, 1:, None] - at_middles)
        split, where = split.min(dim=2)
        gain, interval = (error - split).max(dim=1)
        touches = (intervals[:-1] == interval[:, None]) | (intervals[:-1] == interval[:, None] - 1)
        loss, merged = loss.masked_fill(touches, float("inf")).min(dim=1)

        pays = gain > loss + 1e-9 * error.sum(dim=1)
        if not pays.any():
            break
        best_middles = middles.gather(2, where[:, :, None])[:, :, 0]
        new_cut = best_middles.gather(1, interval[:, None])
        moved = cuts.scatter(1, merged[:, None] + 1, new_cut).sort(dim=1).values
        cuts = torch.where(pays[:, None], moved, cuts)
    return cuts


def _refine(groups: SortedGroups, cuts: torch.Tensor, reach: float) -> torch.Tensor:
    """The best intervals with every cut moved by at most `reach` of the way to its neighbours, `[groups, k + 1]`.

    Each cut has a few candidates, the present position among them, and dynamic programming finds their best
    combination. So cuts can move together, where Lloyd's iteration gets stuck as soon as no single value changes its
    side.
    """
    fractions = reach * torch.tensor(REFINEMENT_OFFSETS, device=cuts.device)
    gaps = cuts.diff(dim=1)  # [groups, k]
    gap_below, gap_above = gaps[:, :-1, None], gaps[:, 1:, None]
    offsets = torch.where(fractions < 0, gap_below * fractions, gap_above * fractions)
    inner = cuts[:, 1:-1, None] + offsets.round().long()  # [groups, k - 1, candidates]
    ends = cuts[:, [0, -1], None].expand(-1, -1, len(fractions))
    candidates = torch.cat([ends[:, :1], inner, ends[:, 1:]], dim=1)  # [groups, k + 1, candidates]

    at_cuts = groups.prefix.gather(2, candidates.flatten(1).expand(3, -1, -1)).view(3, *candidates.shape)
    mass, first, second = at_cuts[:, :, 1:, None, :] - at_cuts[:, :, :-1, :, None]  # [groups, k, from, to]
    cost = _error(torch.stack([mass, first, second]))
    cost = cost.masked_fill(candidates[:, 1:, None, :] < candidates[:, :-1, :, None], float("inf"))
    best, choices = cost[:, 0, 0], []
    for step in range(1, cost.shape[1]):
        best, choice = (best[:, :, None] + cost[:, step]).min(dim=1)
        choices.append(choice)
    position = torch.zeros_like(candidates[:, 0, :1])
    path = [position]
    for choice in reversed(choices):
        position = choice.gather(1, position)
        path.append(position)
    inner_choice = torch.cat([torch.zeros_like(position), *path[::-1]], dim=1)  # [groups, k + 1]
    return candidates.gather(2, inner_choice[:, :, None])[:, :, 0]


def _distinct_codebook(groups: SortedGroups, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(the first `k` distinct values, the last one repeated; whether these are all), `[groups, k]` and `[groups]`."""
    values = groups.values
    rank = torch.nn.functional.pad((values.diff(dim=1) != 0).long().cumsum(dim=1), (1, 0))
    codebook = values[:, -1:].repeat(1, k + 1)
    codebook.scatter_(1, rank.clamp_max(k), values)  # everything beyond the first k lands in the extra column
    return codebook[:, :k], rank[:, -1] < k


def kmeans_1d(values: torch.Tensor, k: int, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Ascending codebooks `[groups, k]`, float32, near the least weighted squared error on `values` `[groups, n]`.

    A group with at most `k` distinct values gets exactly these, the last one repeated; one of at most 192 values gets
    the optimum for up to 32 clusters. Else the error is up to 1.0002 times the optimum for one group, 1.005 on average
    for many, and 1.05 for 64 to 256 clusters, as tests/compression/test_clustering.py measures it. Deterministic.
    """
    number, n = values.shape
    if number > GROUPS_A_CHUNK:
        value_chunks = values.split(GROUPS_A_CHUNK)
        weight_chunks = [None] * len(value_chunks) if weights is None else weights.split(GROUPS_A_CHUNK)
        return torch.cat([kmeans_1d(chunk, k, weight) for chunk, weight in zip(value_chunks, weight_chunks)])
    groups = SortedGroups(values, weights)
    exact, few = _distinct_codebook(groups, k)
    if few.all():
        return exact
    cuts = _search_cuts(groups, k)
    codebook = groups.means(cuts, groups.values.gather(1, cuts[:, :-1].clamp_max(n - 1)))
    for _ in range(LLOYD_STEPS):
        previous, cuts = cuts, groups.cuts(codebook)
        if torch.equal(previous, cuts):
            break
        codebook = groups.means(cuts, codebook)
    return torch.where(few[:, None], exact, codebook.sort(dim=1).values)


def assign(values: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Index of the nearest entry of each ascending codebook: `values` `[groups, n]`, `codebook` `[groups, k]`.

    Returns uint8 `[groups, n]`; a value in the middle takes the lower entry.
    """
    middles = ((codebook[:, 1:] + codebook[:, :-1]) / 2).contiguous()
    if codebook.shape[0] == 1:
        return torch.bucketize(values, middles[0], out_int32=True).to(torch.uint8)
    return torch.searchsorted(middles, values.contiguous(), out_int32=True).to(torch.uint8)
