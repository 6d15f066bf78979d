"""Paired comparison of two models, against scipy's and brute force, and which model of a family it recommends."""

import pytest
from scipy.stats import norm

from repvgg_hf.analysis.uncertainty import PairedDrop, recommend


def test_drop_is_counted_image_by_image():
    drop = PairedDrop.of([True, True, True, False, False], [True, False, False, True, False])
    assert (drop.images, drop.lost, drop.won, drop.points) == (5, 2, 1, 20.0)
    assert PairedDrop.of([False], [True]).points == -100.0
    with pytest.raises(ValueError):
        PairedDrop.of([True], [True, False])


@pytest.mark.parametrize(("lost", "won"), [(3, 0), (4, 0), (1, 0), (20, 8), (20, 10), (0, 9)])
def test_chance_is_mcnemars(lost, won):
    """Its statistic (lost - won) / sqrt(lost + won) is standard normal if the models are equally good."""
    drop = PairedDrop(1000, lost, won)
    significant = norm.sf((lost - won) / (lost + won) ** 0.5) < 0.025
    assert drop.is_small(0) == (not significant)
    assert drop.is_small(0) == (drop.points <= drop.chance)


def test_few_images_excuse_no_large_drop():
    drop = PairedDrop(10, 3, 0)
    assert drop.points == 30 and drop.chance == 30 and not drop.is_small(1.0)


def test_the_smallest_whose_drop_is_small():
    drops = [PairedDrop(1000, 0, 0), PairedDrop(1000, 12, 4), PairedDrop(1000, 60, 10), PairedDrop(1000, 30, 24)]
    sizes = [800, 400, 200, 300]
    assert recommend(drops, sizes, tolerance=0.0) == 3  # 0.6 points, chance explains 1.4
    assert recommend(drops[:3], sizes[:3], tolerance=1.0) == 1  # 0.8 points: more than chance, within the tolerance
    assert recommend(drops[:3], sizes[:3], tolerance=0.5) == 0
    assert recommend(drops, sizes, tolerance=5.0) == 2
    assert recommend(drops[2:3], sizes[2:3], tolerance=1.0) is None
