"""Top-1 and top-5 accuracy.

In numpy and not from the `evaluate` library: that one only passes predictions through to such lines, downloads its own
metrics, and cannot be imported in a process that runs `recipes/evaluate.py`, whose folder comes first on Python's path.
"""

import numpy as np


def accuracies(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The shares of images, in percent, whose label is the model's first guess and among its first five.

    Args:
        logits: floating `[images, classes]`. Of equal logits, the one of the lower class counts as the larger.
        labels: integer `[images]`.

    Returns `{"top1": ..., "top5": ...}`.
    """
    guesses = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    hits = guesses == labels[:, None]
    return {"top1": 100 * hits[:, 0].mean().item(), "top5": 100 * hits.any(axis=1).mean().item()}


def trainer_accuracies(predictions) -> dict[str, float]:
    """[`accuracies`] in the form of `Trainer`'s `compute_metrics`."""
    return accuracies(predictions.predictions, predictions.label_ids)
