"""Telling how sure an accuracy is that was measured on so many images, and whether two models differ."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

MOST = 3.0  # percentage points: a larger drop is never put down to chance, however few the images are
Z = 1.959964  # standard deviations on both sides of the mean of a normal distribution that hold 95 % of it


def wilson_interval(right: float, images: int) -> tuple[float, float]:
    """Return the 95 % interval, in percent, of the accuracy that a model has of which `right` of `images` are right.

    Wilson's score interval, which is sensible for few images and near 0 and 100 percent, too.
    """
    share = right / images
    center = (share + Z**2 / (2 * images)) / (1 + Z**2 / images)
    half = Z / (1 + Z**2 / images) * math.sqrt(share * (1 - share) / images + Z**2 / (4 * images**2))
    return 100 * max(center - half, 0.0), 100 * min(center + half, 1.0)


@dataclass(frozen=True)
class PairedDrop:
    """The accuracy that a model loses against another one on the same images.

    Images that both get right, or both wrong, say nothing about the difference, so this is surer than the intervals of
    the two accuracies.

    Attributes:
        images (`int`): number of images.
        lost (`int`): how many of them the first model alone gets right.
        won (`int`): how many the second one alone gets right.
    """

    images: int
    lost: int
    won: int

    @classmethod
    def of(cls, before: Sequence[bool], after: Sequence[bool]) -> "PairedDrop":
        """Compare two models, of which each is right or wrong on the same images in the same order."""
        pairs = list(zip(before, after, strict=True))
        return cls(len(pairs), sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs))

    @property
    def points(self) -> float:
        """The drop in percentage points, negative for a gain."""
        return 100 * (self.lost - self.won) / self.images

    @property
    def chance(self) -> float:
        """The largest drop in percentage points that chance explains, by McNemar's test at 5 %, approximated."""
        changed = self.lost + self.won
        return 100 * min(Z * math.sqrt(changed), changed) / self.images

    def is_small(self, tolerance: float) -> bool:
        """Tell whether the drop is at most `tolerance` percentage points, or no more than chance explains.

        Chance excuses at most 3 points: of few images it would explain anything.
        """
        return self.points <= max(tolerance, min(self.chance, MOST))


def recommend(drops: Sequence[PairedDrop], sizes: Sequence[int], tolerance: float) -> int | None:
    """Return the place of the smallest model whose drop is small, see [`PairedDrop`]; `None` if none is."""
    small = [place for place, drop in enumerate(drops) if drop.is_small(tolerance)]
    return min(small, key=lambda place: (sizes[place], drops[place].points), default=None)
