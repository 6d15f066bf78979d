"""Choosing codes and codebooks that minimize a layer's output error on calibration data, not its weights' error.

A weight is stored as *codes*, indices of a few bits into a *codebook*: a short table of values, which a run of output
channels shares (a group) and a *channel scale* multiplies for each of them, if there is one.

With second moments `H = E[x x^T]` of a layer's inputs `x` (a convolution's are unfolded patches), the mean squared
error of its outputs is `tr((W - Q) H (W - Q)^T)`. Codes are first assigned column by column, each column's error
compensated in the columns that follow (GPTQ, arXiv 2210.17323), then by coordinate descent (QuantEase, arXiv
2309.01885), in turn with the least squares codebook and scales for these codes.
"""

from dataclasses import replace

import torch

from ...runtime.quantization_cluster import ClusterConfig
from ..codebooks.codes import decode
from ..codebooks.weights import QuantizedWeight

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
        # inputs that are always zero would make it singular, also those of a whole group
        size = diagonal.mean(dim=1, keepdim=True)
        damp = damping * torch.where(size > 0, size, size.mean())
        self.moments.diagonal(dim1=1, dim2=2).add_(damp)

    def rows(self, values: torch.Tensor) -> torch.Tensor:
        """Return `values` `[out, ...]` as `[G, out / G, d]` in the order of the columns."""
        return values.reshape(self.conv_groups, -1, self.width)[:, :, self.order]

    def unrows(self, rows: torch.Tensor) -> torch.Tensor:
        """Undo [`rows`]."""
        return rows[:, :, self.order.argsort()].reshape(self.shape)

    def error(self, quantized: torch.Tensor) -> torch.Tensor:
        """Return the output error of the quantized weight `[out, ...]`, 0-dim."""
        difference = self.target - self.rows(quantized)
        return ((difference @ self.moments) * difference).sum()


def channel_entries(weight: QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the values of each channel's codes, `[out, k]` ascending, and the borders between them, `[out, k - 1]`."""
    out, groups = weight.codes.shape[0], weight.codebook.shape[0]
    entries = weight.codebook.float().repeat_interleave(out // groups, dim=0)
    if weight.scale is not None:
        entries = entries * weight.scale[:, None]
    return entries, ((entries[:, 1:] + entries[:, :-1]) / 2).contiguous()


def compensate(problem: LayerProblem, weight: QuantizedWeight) -> torch.Tensor:
    """Choose codes by GPTQ for the codebook and scale of `weight`; returns uint8 of the weight's shape."""
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
    """Sweep once over the columns by coordinate descent: each takes its best codes given all others."""
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
    """Quantize `weight` for the least error of the layer's output, beginning from what has the least weight error.

    Args:
        weight (`torch.Tensor`): the float weight, `[out, ...]`.
        start ([`QuantizedWeight`]): the same quantized for the least weight error.
        moments (`torch.Tensor`): second moments of the inputs for each group of the convolution, `[G, d, d]`.
        config ([`ClusterConfig`]): how the weight is quantized; its method fits the codebook anew.
        damping (`float`): what is added to the diagonal of `moments`, as a share of its mean.
    """
    problem = LayerProblem(weight, moments, damping)
    # with few inputs per channel the nearest entries can be the better start
    starts = [replace(start, codes=compensate(problem, start)), start]
    least, best = min(((problem.error(weight.decoded()), weight) for weight in starts), key=lambda pair: pair[0])
    for _ in range(ROUNDS):
        candidate = config.quantization_method.refit(problem, best, config)
        candidate = replace(candidate, codes=descend(problem, candidate))
        error = problem.error(candidate.decoded())
        if not error < least:
            break
        best, least = candidate, error
    return best


def refit_codebook(problem: LayerProblem, weight: QuantizedWeight, config: ClusterConfig) -> QuantizedWeight:
    """Fit the codebook (of floats: integers stay) and scale for the least output error with the present codes."""
    if weight.codebook.is_floating_point():
        weight = weight.with_codebook(fit_codebook(problem, weight))
    return weight if weight.scale is None else _refit_scale(problem, weight)


def refit_step(problem: LayerProblem, weight: QuantizedWeight, config: ClusterConfig) -> QuantizedWeight:
    """Fit the step of an evenly spaced grid, of each channel or of each codebook, for the least output error."""
    if weight.scale is not None:
        return _refit_scale(problem, weight)
    groups = len(weight.codebook)
    numerator, denominator = (part.view(groups, -1).sum(dim=1) for part in output_products(problem, weight))
    codebook = weight.codebook * _factor(numerator, denominator)[:, None]
    return replace(weight, codebook=codebook.to(weight.codebook.dtype))


def _refit_scale(problem: LayerProblem, weight: QuantizedWeight) -> QuantizedWeight:
    return replace(weight, scale=weight.scale * _factor(*output_products(problem, weight)))


def _factor(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    return torch.where(numerator > 0, numerator / denominator.clamp_min(1e-30), 1.0)


def fit_codebook(problem: LayerProblem, weight: QuantizedWeight) -> torch.Tensor:
    """Return the codebook `[groups, k]`, float32, with the least output error for the present codes and scale.

    It is found by conjugate gradients on the normal equations, from the present codebook.
    """
    groups, k = weight.codebook.shape
    out = weight.codes.shape[0]
    group = torch.arange(out, device=weight.codes.device) * groups // out
    index = (weight.codes.reshape(out, -1).long() + group[:, None] * k).view(-1)
    scale = weight.codebook.new_ones(out, dtype=torch.float32) if weight.scale is None else weight.scale

    def values_of(codebook):
        return problem.rows(decode(weight.codes, codebook, scale))

    def gather(rows):  # the adjoint of values_of
        values = problem.unrows(rows).reshape(out, -1) * scale[:, None]
        return torch.bincount(index, values.reshape(-1).double(), groups * k).view(groups, k).float()

    codebook = weight.codebook.float()
    residual = gather((problem.target - values_of(codebook)) @ problem.moments)
    direction, norm = residual, residual.square().sum(dim=1, keepdim=True)
    for _ in range(CODEBOOK_STEPS):
        image = gather(values_of(direction) @ problem.moments)
        # codebooks are independent of each other: each has its step length
        length = norm / (direction * image).sum(dim=1, keepdim=True).clamp_min(1e-30)
        codebook = codebook + length * direction
        residual = residual - length * image
        previous, norm = norm, residual.square().sum(dim=1, keepdim=True)
        direction = residual + norm / previous.clamp_min(1e-30) * direction
    return codebook


def output_products(problem: LayerProblem, weight: QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the means of float times quantized output and of the quantized one's square, both `[out]`."""
    values = problem.rows(weight.decoded())
    image = values @ problem.moments
    return (image * problem.target).sum(dim=2).reshape(-1), (image * values).sum(dim=2).reshape(-1)
