"""One-dimensional weighted k-means for many groups of values at once, without random starts.

On sorted values a cluster is an interval between two *cuts*, positions in the order. So dynamic programming finds the
best clusters: first among some tens of candidate cuts, then with all cuts moving at once within ever narrower reach.
Lloyd's iteration ends it.

To be quick, the first search takes no cluster to be much wider than its share of the candidates. That holds for smooth
distributions. Beside far outliers, with many equal values or with peaks, one cluster can be best for most of the
candidates: groups that look so are searched again, more thoroughly.
"""

import torch
from torch.nn.functional import pad

from .grids import fit_grid, lloyd
from .sorted_groups import CHUNK_VALUES, SortedGroups

CANDIDATES_PER_CLUSTER = 6  # cuts to choose from at first, or one for so many values:
VALUES_PER_CANDIDATE, MOST_CANDIDATES = 64, 512  # at most that, and always for few groups, which can afford it
FEW_GROUPS = 8
SPAN, LEAST_SPAN = 4, 32  # a cluster takes in at most that multiple of its share of these, or that many
REFINEMENT = (0.3, 0.05)  # how far a cut can move, in widths of the intervals beside it
MOVES = 6  # positions either way to choose from
CHUNK_CANDIDATES = 12288  # of all groups at a time, which bounds the memory of the dynamic program to some MB

# what asks for the thorough search:
TIES, TIES_STEP = 1 / 32, 8  # that share of the values equal the next one, looked up for every 8th
FAR = 20.0  # standard deviations between the least and the largest value, or the root of that share of few values,
OUTLIER_SHARE, LEAST_FAR = 0.5, 100.0  # of which one cannot be so far off
EXCESS = 6e-5  # share of the error, times k, that is saved if one cluster moves elsewhere
# and that search, which tries intervals of any length
THOROUGH_PER_CLUSTER, LEAST_THOROUGH = 12, 256  # candidates
THOROUGH_REFINEMENT = (1.0, 0.3, 1.0, 0.3, 0.05)
CHUNK_INTERVALS = 2**19


def candidate_cuts(groups: SortedGroups, count: int, rounds: int = 2) -> torch.Tensor:
    """Choose ascending positions to cut the sorted values at, `[groups, count + 1]`.

    These are all positions if there are at most `count` values. Else they lie as densely as the entries of the best
    quantizer with many entries (Panter and Dite 1951), by the cube root of the density, but never more than about one
    in a gap between two values. That resolves the bulk of a distribution and its tails.
    """
    number, n = groups.values.shape
    if n <= count:
        return torch.arange(n + 1, device=groups.values.device).expand(number, -1)
    fractions = torch.arange(1, count, dtype=torch.float32, device=groups.values.device) / count

    def inner(mass, values):
        # (density^(1/3) * gap)^3, with mass / gap for the density, in units that suit float32
        mass = (mass[:, 2:] - mass[:, :-2]) / mass[:, -1:].clamp_min(1e-300)
        gap = values.diff(dim=1) / (values[:, -1:] - values[:, :1]).clamp_min(1e-37)
        steps = (mass.float() * gap.square_()).pow_(1 / 3)
        for _ in range(rounds):
            steps = torch.minimum(steps, steps.sum(dim=1, keepdim=True) / count)
        position = pad(steps.cumsum(dim=1, dtype=torch.float64), (1, 0))  # [groups, n]
        return torch.searchsorted(position, position[:, -1:] * fractions)

    chunk = max(1, CHUNK_VALUES // n)
    return groups.closed(
        torch.cat([inner(*rows) for rows in zip(groups.mass.split(chunk), groups.values.split(chunk))])
    )


def distinct_cuts(groups: SortedGroups, count: int) -> torch.Tensor:
    """Choose [`candidate_cuts`] for values of which many are equal: every change of value, if there are fewer.

    Values without mass are passed over. A group with fewer changes than another has its last cut several times.
    """
    n = groups.values.shape[1]
    weighty = groups.mass.diff(dim=1) > 0
    before = torch.where(weighty, groups.values, -float("inf")).cummax(dim=1).values
    changes = weighty[:, 1:] & (groups.values[:, 1:] != before[:, :-1])
    number = changes.sum(dim=1)
    most = int(number.clamp_max(count - 1).max())
    rank = torch.where(changes & (number < count)[:, None], changes.cumsum(dim=1) - 1, most).clamp_max(most)
    inner = torch.full((len(rank), most + 1), n, device=rank.device)
    inner.scatter_(1, rank, torch.arange(1, n, device=rank.device).expand(len(rank), -1))
    exact = groups.closed(inner[:, :most])
    if most < count - 1 or n <= count:
        return exact
    return torch.where((number < count)[:, None], exact, candidate_cuts(groups, count, rounds=4))


def candidate_count(number: int, n: int, k: int) -> int:
    """Return of how many intervals of their `n` values the `k` clusters of `number` groups are made at first."""
    if number <= FEW_GROUPS:
        return MOST_CANDIDATES
    return min(max(CANDIDATES_PER_CLUSTER * k, n // VALUES_PER_CANDIDATE), MOST_CANDIDATES)


def _spread(mass: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Return by how much less an interval with these moments spreads about its mean than about `center`.

    The arguments are overwritten: those of all intervals are the largest tensors there are.
    """
    return first.square_().div_(mass.clamp_min_(1e-300))


def usual_span(points: int, k: int) -> int:
    """Return how many candidates the first search for `k` clusters among `points` cuts lets one of them take in."""
    return min(points - 1, max(LEAST_SPAN, SPAN * -(-points // k)))


def best_intervals(groups: SortedGroups, cuts: torch.Tensor, k: int, span: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the best `k` intervals between candidate `cuts` `[groups, m + 1]`.

    Only intervals of up to `span` candidates are tried. Returns cuts `[groups, k + 1]`, and the widths of the
    intervals in candidates `[groups, k]`.
    """
    number, points = cuts.shape
    # groups last: what is compared lies side by side in memory
    mass, first = (prefix.gather(1, cuts).T.contiguous() for prefix in (groups.mass, groups.first))  # [points, groups]
    # what lies between two neighboring candidates stays together: its own spread is left out
    second = pad(_spread(mass.diff(dim=0), first.diff(dim=0)).cumsum(dim=0), (0, 0, 1, 0))

    def before(prefix, value=0.0):  # [from, to, groups]: the `span` points before each, and itself
        return pad(prefix, (0, 0, span, 0), value=value).unfold(0, span + 1, 1).permute(2, 0, 1)

    cost = second - before(second)
    cost -= _spread(mass - before(mass), first - before(first))
    cost = cost.clamp_min_(0).float()
    best = [torch.full_like(cost[0], float("inf"))]  # of no interval, one, ...
    best[0][0] = 0
    for _ in range(k):
        best.append((before(best[-1], float("inf")) + cost).amin(dim=0))

    position = torch.full((1, number), points - 1, device=cuts.device)
    path = [position]
    for previous in best[-2::-1]:
        at_position = position.expand(span + 1, 1, -1)
        total = before(previous, float("inf")).gather(1, at_position) + cost.gather(1, at_position)
        position = position - span + total[:, 0].argmin(dim=0, keepdim=True)
        path.append(position)
    path = torch.cat(path[::-1]).T
    return cuts.gather(1, path), path.diff(dim=1)


def refine(groups: SortedGroups, cuts: torch.Tensor, reach: float) -> torch.Tensor:
    """Find the best intervals with every cut moved by up to `reach` times the narrower interval beside it, as cuts.

    A cut has a few evenly spaced positions to choose from, at least one value apart. All cuts move together, where
    Lloyd's iteration gets stuck as soon as no single value changes its side.
    """
    k = cuts.shape[1] - 1
    gaps = cuts.diff(dim=1)
    stride = (torch.minimum(gaps[:, 1:], gaps[:, :-1]).float() * (reach / MOVES)).round().long().clamp_min(1)
    offsets = torch.arange(-MOVES, MOVES + 1, device=cuts.device)
    half = gaps[:, :, None] // 2  # two cuts never pass each other
    inner = cuts[:, 1:-1, None] + (stride[:, :, None] * offsets).clamp(-half[:, :-1], half[:, 1:])
    ends = cuts[:, [0, -1], None].expand(-1, -1, len(offsets))
    positions = torch.cat([ends[:, :1], inner, ends[:, 1:]], dim=1)  # [groups, k + 1, offsets]
    # groups last, as above: [k + 1, offsets, groups]
    mass, first = (
        prefix.gather(1, positions.flatten(1)).view(positions.shape).permute(1, 2, 0).contiguous()
        for prefix in (groups.mass, groups.first)
    )

    def gain(step, mass_to, first_to):  # of an interval up to positions of a cut, [from, to, groups]
        mass_between, first_between = mass_to - mass[step - 1, :, None], first_to - first[step - 1, :, None]
        return first_between.square_().div_(mass_between.add_(1e-300))

    best = [gain(1, mass[1], first[1])[0]]  # of the first interval, two, ...
    for step in range(2, k + 1):
        best.append(gain(step, mass[step], first[step]).add_(best[-1][:, None]).amax(dim=0))
    choice = torch.zeros_like(cuts[None, :, 0])  # [1, groups]; all positions of the last cut are the same
    path = [choice]
    for step in range(k, 1, -1):
        total = gain(step, mass[step].gather(0, choice), first[step].gather(0, choice))[:, 0] + best[step - 2]
        choice = total.argmax(dim=0, keepdim=True)
        path.append(choice)
    path.append(choice)
    return positions.gather(2, torch.cat(path[::-1]).T[:, :, None])[:, :, 0]


def few_distinct(values: torch.Tensor, k: int) -> torch.Tensor:
    """Return which rows of the sorted `values` `[groups, n]` have at most `k` distinct ones, bool `[groups]`."""
    some = torch.arange(k + 1, device=values.device) * (values.shape[1] - 1) // k
    if (values[:, some].diff(dim=1) > 0).all():
        return torch.zeros_like(values[:, 0], dtype=torch.bool)  # as a rule: no need to look at every value
    return (values.diff(dim=1) != 0).sum(dim=1) < k


def distinct_codebook(groups: SortedGroups, k: int) -> torch.Tensor:
    """Return the first `k` distinct values of each group, the last one repeated, `[groups, k]`."""
    rank = pad((groups.values.diff(dim=1) != 0).cumsum(dim=1), (1, 0))
    codebook = groups.values[:, -1:].repeat(1, k + 1)
    codebook.scatter_(1, rank.clamp_max(k), groups.values)  # everything beyond the first k lands in the extra column
    return codebook[:, :k]


def lumpy(groups: SortedGroups) -> torch.Tensor:
    """Tell which groups have many equal values or far outliers, bool `[groups]`."""
    some = slice(None, -1, TIES_STEP)
    equal = groups.values[:, some] == groups.values[:, 1::TIES_STEP]
    equal &= groups.mass[:, 1:][:, some] < groups.mass[:, 2::TIES_STEP]  # an empty bin repeats the one before it
    total, sum_of_all = groups.mass[:, -1].clamp_min(1e-300), groups.first[:, -1]
    spread = groups.second - sum_of_all.square() / total
    reach = groups.values[:, -1].double() - groups.values[:, 0]
    far = min(FAR**2, max(OUTLIER_SHARE * groups.values.shape[1], LEAST_FAR))
    return (equal.sum(dim=1) > TIES * equal.shape[1]) | (reach.square() * total > far * spread)


def _joining(mass: torch.Tensor, first: torch.Tensor, other_mass: torch.Tensor, other_first: torch.Tensor):
    """Return by how much the error grows when two intervals with these moments share one entry."""
    distance = first / mass.clamp_min(1e-300) - other_first / other_mass.clamp_min(1e-300)
    return distance.square() * mass * other_mass / (mass + other_mass).clamp_min(1e-300)


def uneven(groups: SortedGroups, codebook: torch.Tensor) -> torch.Tensor:
    """Tell where halving one cluster would gain clearly more than merging two neighbors would cost, bool `[groups]`.

    Then `codebook` `[groups, k]` is far from the best. Of evenly spread values it gains an eighth of that.
    """
    inside = torch.searchsorted(groups.values, codebook, right=True)
    parts = torch.cat([groups.cuts(codebook), inside], dim=1).sort(dim=1).values
    mass, first = groups.moments(parts)
    gain = _joining(mass[:, ::2], first[:, ::2], mass[:, 1::2], first[:, 1::2])
    mass, first = mass[:, ::2] + mass[:, 1::2], first[:, ::2] + first[:, 1::2]
    loss = _joining(mass[:, 1:], first[:, 1:], mass[:, :-1], first[:, :-1])
    error = groups.second - _spread(mass, first).sum(dim=1)
    return gain.amax(dim=1) - loss.amin(dim=1) > EXCESS * codebook.shape[1] * error.clamp_min(0)


def thorough_codebook(groups: SortedGroups, k: int) -> torch.Tensor:
    """Cluster groups of any distribution: slower than the first search, which knows what is usual; `[groups, k]`."""
    count = MOST_CANDIDATES
    if len(groups.values) > 1:
        count = min(max(THOROUGH_PER_CLUSTER * k, LEAST_THOROUGH), MOST_CANDIDATES)
    codebooks = []
    for part in groups.split(max(1, CHUNK_INTERVALS // count**2)):
        candidates = distinct_cuts(part, count)
        cuts, _ = best_intervals(part, candidates, k, candidates.shape[1] - 1)
        for reach in THOROUGH_REFINEMENT:
            cuts = refine(part, cuts, reach)
        codebooks.append(settled(part, cuts))
    return torch.cat(codebooks)


def settled(groups: SortedGroups, cuts: torch.Tensor) -> torch.Tensor:
    """Run Lloyd's iteration from `cuts` `[groups, k + 1]`, and return the codebooks `[groups, k]`."""
    start = groups.values.gather(1, cuts[:, :-1].clamp_max(groups.values.shape[1] - 1))  # of intervals without mass
    return lloyd(groups, groups.means(cuts, start).sort(dim=1).values, torch.float32)


def optimal_codebook(groups: SortedGroups, k: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Cluster all groups at once; see [`kmeans_1d`], which hands over as many as suit the memory."""
    n = groups.values.shape[1]
    few = few_distinct(groups.values, k)
    if few.all():
        return distinct_codebook(groups, k).to(dtype).float()
    candidates = candidate_cuts(groups, candidate_count(*groups.values.shape, k))
    span = usual_span(candidates.shape[1], k)
    cuts, widths = best_intervals(groups, candidates, k, span)
    limited = span < candidates.shape[1] - 1
    for reach in REFINEMENT:
        cuts = refine(groups, cuts, reach)
        if reach * n < 2 * MOVES * k:  # as a rule, every position was tried
            break
    codebook = settled(groups, cuts)
    if n > LEAST_SPAN:
        doubtful = lumpy(groups)
        if limited:
            doubtful |= uneven(groups, codebook) | (2 * widths.amax(dim=1) > span)
        if (doubtful & ~few).any():
            again = (doubtful & ~few).nonzero()[:, 0]
            part = groups.rows(again).from_median()
            other = thorough_codebook(part, k)
            better = part.error(other) < part.error(codebook[again])
            codebook[again] = torch.where(better[:, None], other, codebook[again])
    if dtype != torch.float32:
        codebook = fit_grid(groups, codebook, dtype)
    if few.any():
        codebook = torch.where(few[:, None], distinct_codebook(groups, k).to(dtype).float(), codebook)
    return codebook


def kmeans_1d(
    values: torch.Tensor,
    k: int,
    weights: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Cluster the values of each group into `k` clusters, near the least weighted squared error.

    Args:
        values: `[groups, n]`, finite, any float dtype.
        k: number of clusters, and so of entries of each codebook.
        weights: `[groups, n]`, the importance of each value, not negative; `None` for equal ones.
        dtype: the one that will store the codebook: its entries are numbers of that dtype, optimized as such.

    Returns the clusters' means, ascending codebooks `[groups, k]`, float32. A group with at most `k` distinct values
    gets exactly these, the last one repeated. The result does not depend on the order of the values.

    The error is found to be within 1.001 of the optimum for up to 64 clusters of up to 8 groups, also with outliers,
    peaks, many equal or pruned values and weights; on smooth distributions mostly within 1.0002. It is within 1.025 for
    256 clusters. Of more groups, each gets fewer candidates: within 1.02, and 1.003 on average. This is measured by
    tests/compression/codebooks/test_kmeans.py and test_kmeans_hard.py. Values should span less than 1e6 times the
    spread within a cluster, as sums are in float64, and be from 1e-15 to 1e15 in size, as errors are compared in
    float32.

    Example:
    ```python
    >>> import torch
    >>> from repvgg_hf.compression.codebooks.kmeans import kmeans_1d

    >>> kmeans_1d(torch.tensor([[0.0, 1.0, 10.0, 12.0]]), k=2)
    tensor([[ 0.5000, 11.0000]])
    ```"""
    number, n = values.shape
    chunk = max(1, min(CHUNK_CANDIDATES // candidate_count(number, n, k), 2 * CHUNK_VALUES // n))
    codebooks = []
    for start in range(0, number, chunk):
        part = None if weights is None else weights[start : start + chunk]
        codebooks.append(optimal_codebook(SortedGroups(values[start : start + chunk], part), k, dtype))
    return torch.cat(codebooks)
