"""Accuracies against a count by hand and scikit-learn's."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import top_k_accuracy_score

from repvgg_hf.analysis.uncertainty import wilson_interval
from repvgg_hf.training.metrics import accuracies, trainer_accuracies


def test_against_scikit_learn():
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(200, 10)).astype("float32"), generator.integers(0, 10, 200)
    found = accuracies(logits, labels)
    for name, k in (("top1", 1), ("top5", 5)):
        assert found[name] == pytest.approx(100 * top_k_accuracy_score(labels, logits, k=k, labels=np.arange(10)))
    assert trainer_accuracies(SimpleNamespace(predictions=logits, label_ids=labels)) == found


def test_equal_logits_and_few_classes():
    logits = np.array([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0]], dtype="float32")
    assert accuracies(logits, np.array([0, 2])) == {"top1": 50.0, "top5": 100.0}  # the lower class is the guess


@pytest.mark.parametrize(("right", "images"), [(0, 7), (7, 7), (3, 10), (260, 300), (1, 2)])
def test_the_interval_is_scipys(right, images):
    expected = binomtest(right, images).proportion_ci(method="wilson")
    assert wilson_interval(right, images) == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-4)
