"""Finding the range in which a layer's input is quantized, from a histogram of the values that it takes.

A range is a scale and a zero point: the integers q from 0 to `2**bits - 1` stand for `scale * (q - zero_point)`.
"""

import math
from collections.abc import Callable

import torch

PIECE = 2**20  # values that are counted at once: they bound the memory and fit the cache
MIN_EXPONENT = -126  # of a bin's width: smaller ones are no normal float32
CANDIDATES_AT_ONCE = 128
METHODS = ("minmax", "mse")


class RangeObserver:
    """A histogram of all values that [`update`] saw, with their exact minimum and maximum.

    Its bins reach from the minimum to the maximum and to zero. They are as narrow as a power of two can be with at
    most `bins` of them, and their edges are its multiples. So when the range grows bins merge exactly, and the
    histogram does not depend on how the values were split into batches. Zeros are counted apart: every range
    represents them exactly.
    """

    def __init__(self, bins: int = 2048):
        if bins < 2:
            raise ValueError(f"bins must be at least 2, got {bins}.")
        self.bins = bins
        self.min, self.max = math.inf, -math.inf
        self.zeros = 0
        # counts[i]: values from (first + i) * 2**exponent to (first + i + 1) * 2**exponent
        self.exponent, self.first = MIN_EXPONENT, 0
        self.counts = torch.zeros(1, dtype=torch.int64)

    @torch.no_grad()
    def update(self, x: torch.Tensor) -> None:
        """Count the values of `x`, a tensor of any shape. Raises `ValueError` if some are NaN or infinite."""
        if x.numel() == 0:
            return
        low, high = (end.float().item() for end in x.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(
                f"The observed {list(x.shape)} tensor has NaN or infinite values: check the images and the weights."
            )
        self.min, self.max = min(self.min, low), max(self.max, high)
        self._grow(min(self.min, 0), max(self.max, 0))
        rows = x.reshape(1) if x.dim() == 0 else x
        for piece in rows.split(max(1, PIECE * len(rows) // rows.numel())):
            values = piece.reshape(-1).float()
            index = (values * 2.0**-self.exponent).floor_().sub_(self.first).int()
            zeros = (values == 0).sum(dtype=torch.int32).item()
            self.counts += index.bincount(minlength=len(self.counts)).cpu()
            self.counts[-self.first] -= zeros
            self.zeros += zeros

    def _grow(self, low: float, high: float) -> None:
        """Merge and add bins until they reach from `low` to `high`."""
        exponent = self.exponent
        while math.floor(high * 2.0**-exponent) - math.floor(low * 2.0**-exponent) >= self.bins:
            exponent += 1
        first, last = math.floor(low * 2.0**-exponent), math.floor(high * 2.0**-exponent)
        if (exponent, first, last - first + 1) != (self.exponent, self.first, len(self.counts)):
            # rounded down, also for negative numbers; a larger shift would say no more
            moved = (self.first + torch.arange(len(self.counts))) >> min(exponent - self.exponent, 62)
            self.counts = torch.zeros(last - first + 1, dtype=torch.int64).index_add_(0, moved - first, self.counts)
            self.exponent, self.first = exponent, first

    def quantization(self, bits: int, method: str = "mse", symmetric: bool = False) -> tuple[float, int]:
        """Return the `(scale, zero_point)` for integers of `bits` bits, 2 to 8; the scale is a normal float32 number.

        `method` chooses the range: from the minimum to the maximum (`"minmax"`), or the one with the least squared
        error of the rounded values (`"mse"`). The range includes zero, and begins with it (zero point 0) if no value
        was negative; with `symmetric` the zero point is the middle, `2**(bits - 1)`, whatever the values are. If all
        were zero the scale is `1 / (2**bits - 1)`. Raises `ValueError` if nothing was observed or an argument is
        unknown.
        """
        if type(bits) is not int or not 2 <= bits <= 8:
            raise ValueError(f"bits must be an integer from 2 to 8, got {bits!r}.")
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
        if self.min > self.max:
            raise ValueError("No values were observed: call update() with a layer's inputs first.")
        if self.min == self.max == 0:
            return torch.tensor(1 / (2**bits - 1), dtype=torch.float32).item(), 2 ** (bits - 1) if symmetric else 0
        ends = _symmetric if symmetric else _affine
        if method == "minmax":
            scale, zero_point = ends(*torch.tensor([self.min, self.max], dtype=torch.float64), bits)
        else:
            scale, zero_point = self._least_squared_error(bits, ends)
        return scale.item(), int(zero_point.item())

    def _least_squared_error(self, bits: int, ends: Callable) -> tuple[torch.Tensor, torch.Tensor]:
        """Search the range of least squared error among those whose ends are fractions of the minimum and maximum.

        `ends` makes scale and zero point of them: [`_affine`] or [`_symmetric`].
        """
        occupied = self.counts > 0
        centers = ((self.first + torch.arange(len(self.counts)))[occupied].float() + 0.5).double() * 2.0**self.exponent
        counts = self.counts[occupied].double()
        low, high = torch.tensor([min(self.min, 0), max(self.max, 0)], dtype=torch.float64)
        # fractions of the extremes that are tried for the ends of the range, then around the best
        coarse = torch.logspace(0, -2, 48, dtype=torch.float64)
        fine = coarse[1] ** torch.linspace(-1, 1, 15, dtype=torch.float64)
        for fractions in (coarse, fine):
            lows = low * fractions.clamp_max(self.min / low) if low < 0 else low[None]
            highs = high * fractions.clamp_max(self.max / high) if high > 0 else high[None]
            lows, highs = lows.repeat_interleave(len(highs)), highs.repeat(len(lows))
            scale, zero_point = ends(lows, highs, bits)
            pieces = zip(scale[:, None].split(CANDIDATES_AT_ONCE), zero_point[:, None].split(CANDIDATES_AT_ONCE))
            best = torch.cat([_squared_error(centers, counts, *piece, 2**bits - 1) for piece in pieces]).argmin()
            low, high = lows[best], highs[best]
        return scale[best], zero_point[best]


def _affine(low: torch.Tensor, high: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (scale, zero point) for ranges from `low` to `high`, widened to include zero.

    The scale is a normal float32 number.
    """
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = ((high - low) / (2**bits - 1)).float().clamp_min(torch.finfo(torch.float32).tiny).double()
    return scale, (-low / scale).round()


def _symmetric(low: torch.Tensor, high: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same for ranges whose zero point is the middle, and that take in `low` and `high`."""
    middle = 2 ** (bits - 1)
    scale = torch.maximum(-low / middle, high / (middle - 1)).float().clamp_min(torch.finfo(torch.float32).tiny)
    return scale.double(), torch.full_like(low, middle)


def _squared_error(centers, counts, scale, zero_point, highest) -> torch.Tensor:
    """Sum the squared error of `counts` `[n]` values at `centers` `[n]` for candidates `[c, 1]`; returns `[c]`."""
    integers = ((centers / scale).round() + zero_point).clamp(0, highest)
    return ((integers - zero_point) * scale - centers).square() @ counts
