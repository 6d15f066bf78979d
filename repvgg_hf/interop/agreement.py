"""How far an engine's logits agree with those of the simulation in PyTorch."""

import math
from collections.abc import Callable, Sequence

import numpy as np

NEAR = 1e-5  # standard deviations of logits: what sums of float32 in another order differ by


def agreement(logits: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Compare an engine's logits `[images, classes]` with those of the simulation in PyTorch.

    Returns `agreement`, the share of images in percent that have the same first class; `near`, the share in percent
    whose logits are all within 1e-5 standard deviations of the simulation's logits; and `largest_difference` in such
    standard deviations.
    """
    deviation = float(expected.astype(np.float64).std()) or math.inf
    differences = np.abs(logits.astype(np.float64) - expected).max(axis=1) / deviation
    return {
        "agreement": 100 * float((logits.argmax(1) == expected.argmax(1)).mean()),
        "near": 100 * float((differences < NEAR).mean()),
        "largest_difference": float(differences.max()),
    }


def in_batches(
    engine: Callable[[np.ndarray], np.ndarray], images: Sequence[np.ndarray] | np.ndarray, size: int
) -> np.ndarray:
    """Return the logits of many images, of which the engine gets at most `size` in a call."""
    return np.concatenate([engine(images[first : first + size]) for first in range(0, len(images), size)])


__all__ = ["NEAR", "agreement", "in_batches"]
