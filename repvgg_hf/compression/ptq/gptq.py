"""Codes and codebooks that minimize a layer's output error on calibration data, instead of its weights' error.

With second moments `H = E[x x^T]` of a layer's inputs `x` (a convolution's are unfolded patches), the mean squared
error of its outputs is `tr((W - Q) H (W - Q)^T)`. Codes are first assigned column by column, each column's error
compensated in the columns that follow (GPTQ, arXiv 2210.17323), then by coordinate descent (QuantEase, arXiv
2309.01885), in turn with the least squares codebook and scales for these codes.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from ...runtime.quantization_cluster import ClusterConfig
from ..codebooks.weights import QuantizedWeight, lookup

COLUMNS_A_BLOCK = 128
ROUNDS = 3  # of fitting the codebook and descending
CODEBOOK_STEPS = 12  # of conjugate gradients


class LayerProblem:
    """The quadratic problem of one layer: `weight` `[out, ...]` to approximate under `moments` `[G, d, d]`.

    `G` is the number of groups of the convolution, `d` the number of inputs of an output (`in / G * k * k`). Columns
    are ordered by decreasing moment, those with most weight are decided first. Rows are `[G, out / G, d]`.
    """

    def __init__(self, weight: torch.Tensor, moments: torch.Tensor, damping: float):
        self.conv_groups, self.width = moments.shape[:2]
        self.shape = weight.shape
        diagonal = moments.diagonal(dim1=1, dim2=2)
        self.order = diagonal.mean(dim=0).argsort(descending=True, stable=True)
        self.target = self.rows(weight.float())
        self.moments = moments[:, self.order][:, :, self.order].clone()
        # inputs that are always zero would make it singular
        damp = damping * diagonal.mean(dim=1, keepdim=True)
        self.moments.diagonal(dim1=1, dim2=2).add_(damp)

    def rows(self, values: torch.Tensor) -> torch.Tensor:
        """`[out, ...]` as `[G, out / G, d]` in the order of the columns."""
        return values.reshape(self.conv_groups, -1, self.width)[:, :, self.order]

    def unrows(self, rows: torch.Tensor) -> torch.Tensor:
        """The reverse of [`rows`]."""
        return rows[:, :, self.order.argsort()].reshape(self.shape)

    def error(self, quantized: torch.Tensor) -> torch.Tensor:
        """The output error of the quantized `[out, ...]`, 0-dim."""
        difference = self.target - self.rows(quantized)
        return ((difference @ self.moments) * difference).sum()


def channel_entries(weight: QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """What each channel's codes stand for, `[out, k]` ascending, and the borders between them, `[out, k - 1]`."""
    out, groups = weight.codes.shape[0], weight.codebook.shape[0]
    entries = weight.codebook.float().repeat_interleave(out // groups, dim=0)
    if weight.scale is not None:
        entries = entries * weight.scale[:, None]
    return entries, ((entries[:, 1:] + entries[:, :-1]) / 2).contiguous()


def compensate(problem: LayerProblem, weight: QuantizedWeight) -> torch.Tensor:
    """Codes by GPTQ for the codebook and scale of `weight`, uint8 of the weight's shape."""
    factor = torch.linalg.cholesky(problem.moments.double())
    inverse = torch.cholesky_inverse(factor)
    upper = torch.linalg.cholesky(inverse, upper=True).float()  # [G, d, d]
    entries, borders = channel_entries(weight)
    rows = problem.target.clone()
    per_group = rows.shape[1]
    codes = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
    for start in range(0, problem.width, COLUMNS_A_BLOCK):
        stop = min(start + COLUMNS_A_BLOCK, problem.width)
        block, errors = rows[:, :, start:stop].clone(), torch.empty_like(rows[:, :, start:stop])
        within = upper[:, start:stop, start:stop]
        for column in range(stop - start):
            wanted = block[:, :, column].reshape(-1, 1)  # [out, 1]
            code = torch.searchsorted(borders, wanted.contiguous())
            decided = entries.gather(1, code).view(-1, per_group)
            codes[:, :, start + column] = code.view(-1, per_group).to(torch.uint8)
            error = (block[:, :, column] - decided) / within[:, column, column, None]
            block[:, :, column:] -= error[:, :, None] * within[:, None, column, column:]
            errors[:, :, column] = error
        rows[:, :, stop:] -= errors @ upper[:, start:stop, stop:]
    return problem.unrows(codes)


def descend(problem: LayerProblem, weight: QuantizedWeight) -> torch.Tensor:
    """One sweep of coordinate descent over the columns: each takes its best codes given all others."""
    entries, borders = channel_entries(weight)
    values = problem.rows(weight.decoded())
    codes = problem.rows(weight.codes).clone()
    per_group = values.shape[1]
    gradient = (problem.target - values) @ problem.moments  # [G, out / G, d]
    diagonal = problem.moments.diagonal(dim1=1, dim2=2)
    for start in range(0, problem.width, COLUMNS_A_BLOCK):
        stop = min(start + COLUMNS_A_BLOCK, problem.width)
        within = problem.moments[:, start:stop, start:stop]
        block, changes = gradient[:, :, start:stop].clone(), torch.zeros_like(gradient[:, :, start:stop])
        for column in range(stop - start):
            present = values[:, :, start + column]
            wanted = present + block[:, :, column] / diagonal[:, None, start + column]
            code = torch.searchsorted(borders, wanted.reshape(-1, 1))
            change = entries.gather(1, code).view(-1, per_group) - present
            codes[:, :, start + column] = code.view(-1, per_group).to(torch.uint8)
            block -= change[:, :, None] * within[:, None, column, :]
            changes[:, :, column] = change
        gradient -= changes @ problem.moments[:, start:stop, :]
    return problem.unrows(codes)


def compensated_weight(
    weight: torch.Tensor, start: QuantizedWeight, moments: torch.Tensor, config: ClusterConfig, damping: float
) -> QuantizedWeight:
    """`start` with codes, codebook and scale for the least output error of `weight` on inputs with these `moments`.

    Args:
        weight: `[out, ...]`, the float weight.
        start: the same quantized for the least weight error.
        moments: `[G, d, d]`, second moments of the inputs for each group of the convolution.
        config: what the codebook must keep to.
        damping: added to the diagonal of `moments`, as a share of its mean.
    """
    problem = LayerProblem(weight, moments, damping)
    # with few inputs a channel the nearest entries can be the better start
    starts = [replace(start, codes=compensate(problem, start)), start]
    least, best = min(((problem.error(weight.decoded()), weight) for weight in starts), key=lambda pair: pair[0])
    for _ in range(ROUNDS):
        candidate = refit(problem, best, config)
        candidate = replace(candidate, codes=descend(problem, candidate))
        error = problem.error(candidate.decoded())
        if not error < least:
            break
        best, least = candidate, error
    return best


def refit(problem: LayerProblem, weight: QuantizedWeight, config: ClusterConfig) -> QuantizedWeight:
    """The codebook and scale with the least output error for given codes, as far as `config` leaves them free."""
    if config.method == "cluster" and config.codebook_dtype != "int8":
        codebook = fit_codebook(problem, weight, config)
        rank = codebook.argsort(dim=1).argsort(dim=1)  # where each entry goes
        codes = lookup(weight.codes, rank.float(), None).to(torch.uint8)
        weight = QuantizedWeight(codes, codebook.sort(dim=1).values.to(weight.codebook.dtype), weight.scale)
    numerator, denominator = output_products(problem, weight)
    if weight.scale is not None:
        return replace(weight, scale=weight.scale * _factor(numerator, denominator))
    if config.method == "uniform":  # a step for each codebook
        groups = len(weight.codebook)
        factor = _factor(numerator.view(groups, -1).sum(dim=1), denominator.view(groups, -1).sum(dim=1))
        return replace(weight, codebook=(weight.codebook * factor[:, None]).to(weight.codebook.dtype))
    return weight


def _factor(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    return torch.where(numerator > 0, numerator / denominator.clamp_min(1e-30), 1.0)


def free_directions(codebook: torch.Tensor, config: ClusterConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """The projection of a step `[groups, k]` of `codebook` to one that keeps zeros and symmetry where `config` asks."""
    free = codebook != 0 if config.preserve_zero else torch.ones_like(codebook, dtype=torch.bool)

    def project(step: torch.Tensor) -> torch.Tensor:
        return (step - step.flip(1)) / 2 * free if config.symmetric else step * free

    return project


def fit_codebook(problem: LayerProblem, weight: QuantizedWeight, config: ClusterConfig) -> torch.Tensor:
    """The codebook `[groups, k]`, float32, with the least output error for given codes and scale.

    Conjugate gradients on the normal equations, from the present codebook, in the directions that keep to `config`.
    """
    groups, k = weight.codebook.shape
    out = weight.codes.shape[0]
    group = torch.arange(out, device=weight.codes.device) * groups // out
    index = (weight.codes.reshape(out, -1).long() + group[:, None] * k).view(-1)
    scale = torch.ones(out, device=weight.codes.device) if weight.scale is None else weight.scale

    def decode(codebook):
        return problem.rows(lookup(weight.codes, codebook, scale))

    def gather(rows):  # the adjoint of decode
        values = problem.unrows(rows).reshape(out, -1) * scale[:, None]
        return torch.bincount(index, values.reshape(-1).double(), groups * k).view(groups, k).float()

    codebook = weight.codebook.float()
    project = free_directions(codebook, config)
    residual = project(gather((problem.target - decode(codebook)) @ problem.moments))
    direction, norm = residual, residual.square().sum(dim=1, keepdim=True)
    for _ in range(CODEBOOK_STEPS):
        image = project(gather(decode(direction) @ problem.moments))
        # codebooks are independent of each other: a step length each
        length = norm / (direction * image).sum(dim=1, keepdim=True).clamp_min(1e-30)
        codebook = codebook + length * direction
        residual = residual - length * image
        previous, norm = norm, residual.square().sum(dim=1, keepdim=True)
        direction = residual + norm / previous.clamp_min(1e-30) * direction
    return codebook


def output_products(problem: LayerProblem, weight: QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """(product of the float and the quantized output, the latter's square), each channel's mean, `[out]`."""
    values = problem.rows(weight.decoded())
    image = values @ problem.moments
    return (image * problem.target).sum(dim=2).reshape(-1), (image * values).sum(dim=2).reshape(-1)
