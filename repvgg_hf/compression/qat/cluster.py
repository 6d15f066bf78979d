"""Training with k-means codebooks, which follow the kernels."""

import torch

from ...runtime.quantization_cluster import ClusterConfig
from ..codebooks.codes import (
    BINS_PER_ENTRY,
    Bins,
    encode,
    from_rows,
    make_bins,
    round_to_codebook,
    sums_by_code,
    to_rows,
)
from ..codebooks.weights import QuantizedWeight
from .config import QATConfig
from .fake_quantize import FakeQuantize


class _StraightThrough(torch.autograd.Function):
    """The `decoded` rows `[out, n]` as the quantized value of `kernel` `[out, ...]`.

    The gradient of the kernel is that of its quantized value, also outside the codebook's range: a weight there can
    come back.
    """

    @staticmethod
    def forward(ctx, kernel, decoded):
        return from_rows(decoded, kernel.shape).to(kernel.dtype)

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output, None


class ClusterFakeQuantize(FakeQuantize):
    """Maps a kernel `[out, ...]` to its quantized value, with codebooks that follow it by k-means as it trains.

    Args:
        weight: how post-training quantization codes the kernel; its codebook and scale are the start.
        config: how weights are quantized.
        qat_config: how far and how often [`update`] moves codebooks and scales.

    The float32 codebook `[groups, 2**bits]`, ascending, and the scale `[out]` are persistent buffers.
    """

    def __init__(self, weight: QuantizedWeight, config: ClusterConfig, qat_config: QATConfig):
        super().__init__(config, qat_config)
        self.momentum, self.update_every = qat_config.codebook_momentum, qat_config.codebook_update_every
        self.weights = weight.codes.numel()
        self.largest = config.largest_integer(weight.codebook.shape[1].bit_length() - 1)  # of int8 entries
        self._prepared = None  # what prepared() returned last
        self.register_buffer("codebook", weight.codebook.float().clone())
        self.register_buffer("scale", None if weight.scale is None else weight.scale.clone())

    @torch.no_grad()
    def stored(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        codebook = self.codebook
        if self.codebook_dtype == torch.int8:
            codebook = codebook.round().clamp(-self.largest, self.largest)
        return codebook.to(self.codebook_dtype), self.scale

    @torch.no_grad()
    def prepared(self) -> tuple[torch.Tensor, torch.Tensor | None, Bins | None]:
        """What every step needs between two updates: codebook and scale as [`stored`], in float32, and the bins.

        It is computed again when codebook or scale changed, by an update or otherwise.
        """
        state = [self.codebook] if self.scale is None else [self.codebook, self.scale]
        known = not torch.compiler.is_compiling() and not self.codebook.is_inference()
        versions = [(tensor, tensor._version) for tensor in state] if known else None
        if known and self._prepared is not None and _are_same(versions, self._prepared[0]):
            return self._prepared[1]
        codebook, scale = self.stored()
        codebook = codebook.float()
        prepared = codebook, scale, self.bins(codebook)
        self._prepared = (versions, prepared) if known else None
        return prepared

    def bins(self, codebook: torch.Tensor) -> Bins | None:
        """The [`make_bins`] of a float32 `codebook`; `None` if comparing weights with the borders is quicker."""
        groups, k = codebook.shape
        return make_bins(codebook) if groups == 1 and self.weights >= BINS_PER_ENTRY * k else None

    def codes(self, rows: torch.Tensor) -> torch.Tensor:
        return encode(rows, *self.prepared())

    def fake_quantize(self, kernel: torch.Tensor) -> torch.Tensor:
        rows = to_rows(kernel.detach()).float()
        return _StraightThrough.apply(kernel, round_to_codebook(rows, *self.prepared()))

    @property
    def needs_steps(self) -> bool:
        return True

    def is_due(self) -> bool:
        return (self.steps_taken() + 1) % self.update_every == 0

    @torch.no_grad()
    def update(self, kernel: torch.Tensor) -> None:
        """Take one k-means step on `kernel`: move the entries towards the means of their weights, then the scales.

        An entry that stands for no weight gets half of the weights of the entry with the largest squared error.
        """
        rows = to_rows(kernel.detach())
        codebook, scale = self.codebook, self.scale
        (out, _), (groups, k) = rows.shape, codebook.shape
        codes = encode(rows.float(), codebook, scale, self.bins(codebook))
        rows = rows.double()  # as a GPU adds in any order and ranks should agree
        ones = rows.new_ones(1, 1).expand(rows.shape)
        # the squares are for unused entries; asking first whether there are any would wait for the device
        counts, sums, squares = sums_by_code([ones, rows, rows.square()], codes, k)  # [out, k]
        factor = rows.new_ones(out, 1) if scale is None else scale.double()[:, None]

        def by_group(values):
            return values.view(groups, -1, k).sum(dim=1)

        # the least squares entry of sum_i (w_i - s_i c)^2
        mass = by_group(factor.square() * counts)
        means = torch.where(mass > 0, by_group(factor * sums) / mass.clamp_min(1e-300), codebook.double())
        share = 1 - self.momentum**self.update_every
        codebook = codebook + (means.float() - codebook) * share
        if scale is not None:
            entries = codebook.double().repeat_interleave(out // groups, dim=0)
            fitted = (sums * entries).sum(dim=1) / (counts * entries.square()).sum(dim=1).clamp_min(1e-300)
            self.scale.copy_(torch.where(fitted > 0, scale.lerp(fitted.float(), share), scale))
        codebook = _revive(codebook, means, mass, by_group(squares))
        self.codebook.copy_(codebook.sort(dim=1).values)  # a revived entry is out of order

    def extra_repr(self) -> str:
        scale = ", channel_scale" if self.scale is not None else ""
        return f"codebooks={list(self.codebook.shape)}{scale}, momentum={self.momentum}"


def _are_same(versions: list[tuple[torch.Tensor, int]], others: list[tuple[torch.Tensor, int]]) -> bool:
    """Whether these are the same tensors, unchanged."""
    return all(a is c and b == d for (a, b), (c, d) in zip(versions, others))


def _revive(codebook: torch.Tensor, means: torch.Tensor, mass: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """The `codebook` with one unused entry of each group a standard deviation above the mean of the worst entry.

    All arguments are `[groups, k]`: for each entry the mean, the mass (zero if it is unused) and the summed squares of
    the weights that it stands for.
    """
    errors = squares - means.square() * mass
    error, worst = errors.max(dim=1, keepdim=True)
    unused = mass == 0
    first = unused & (unused.cumsum(dim=1) == 1)
    # less than rounding makes is no error: an entry for each distinct weight has none
    first &= error > 1e-10 * squares.sum(dim=1, keepdim=True)
    deviation = (error.clamp_min(0) / mass.gather(1, worst).clamp_min(1e-300)).sqrt()
    target = means.gather(1, worst) + deviation
    return torch.where(first, codebook + (target - codebook).float(), codebook)
