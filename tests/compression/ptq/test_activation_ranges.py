"""Ranges of activations against exhaustive searches on the values themselves, in NumPy."""

import math

import numpy as np
import pytest
import torch

from repvgg_hf.compression.ptq import activation_ranges
from repvgg_hf.compression.ptq.activation_ranges import METHODS, RangeObserver

SAMPLES = 20_000


def samples(name: str) -> np.ndarray:
    random = np.random.default_rng(0)
    return {
        "relu": lambda: random.normal(size=SAMPLES).clip(0),
        "relu with outliers": lambda: np.append(random.normal(size=SAMPLES - 3).clip(0), [25, 30, 60]),
        "exponential": lambda: random.exponential(size=SAMPLES) * 1e-3,
        "far from zero": lambda: random.uniform(5, 6, SAMPLES),
        "image": lambda: random.uniform(-2.1, 2.6, SAMPLES),
        "laplace": lambda: random.laplace(0.5, size=SAMPLES),
        "negative": lambda: -random.exponential(size=SAMPLES),
        "lopsided": lambda: np.append(random.exponential(size=SAMPLES // 2) * 100, -random.random(SAMPLES // 2)),
    }[name]().astype(np.float32)


UNSIGNED = ["relu", "relu with outliers", "exponential", "far from zero"]
SIGNED = ["image", "laplace", "negative", "lopsided"]


def observe(x, bins=2048, **kwargs) -> RangeObserver:
    observer = RangeObserver(bins)
    observer.update(torch.as_tensor(x))
    return observer


def rounded(x: np.ndarray, scale, zero_point, bits: int) -> np.ndarray:
    """ONNX QuantizeLinear, then DequantizeLinear."""
    scale = np.float32(scale)
    integers = np.clip(np.rint(x / scale) + zero_point, 0, 2**bits - 1)
    return (integers - zero_point).astype(np.float32) * scale


def affine(low: float, high: float, bits: int) -> tuple[float, int]:
    """The textbook's scale and zero point."""
    low, high = min(float(low), 0), max(float(high), 0)
    scale = np.float32((high - low) / (2**bits - 1))
    return float(scale), round(-low / float(scale))


def candidate_ranges(x: np.ndarray, count: int):
    """Many more ends than the observer tries, and other ones, for each end that isn't zero."""
    ratios = np.geomspace(1, 0.005, count)
    for low in min(x.min(), 0) * ratios if x.min() < 0 else [0.0]:
        for high in max(x.max(), 0) * ratios if x.max() > 0 else [0.0]:
            yield low, high


class TestHistogram:
    @pytest.mark.parametrize("name", UNSIGNED + SIGNED)
    @pytest.mark.parametrize("bins", [2048, 100])
    def test_counts_are_numpys(self, name, bins):
        x = samples(name)
        observer = observe(x, bins)
        width = 2.0**observer.exponent
        edges = (observer.first + np.arange(len(observer.counts) + 1)) * width
        assert edges[0] <= x.min() and x.max() < edges[-1] and 0 in edges
        counts, _ = np.histogram(x[x != 0], edges)
        assert np.array_equal(observer.counts.numpy(), counts)
        assert observer.zeros == (x == 0).sum()
        assert (observer.min, observer.max) == (x.min(), x.max())
        # half the width would take too many bins
        assert (
            len(counts) <= bins < math.floor(max(x.max(), 0) / width * 2) - math.floor(min(x.min(), 0) / width * 2) + 1
        )

    def test_batches_in_any_order_and_layout_give_the_same(self, monkeypatch):
        x = torch.from_numpy(samples("lopsided")).view(10, 4, 25, 20)
        expected = observe(x)
        batches = x.sort(dim=0).values
        for order in (batches, batches.flip(0), batches.to(memory_format=torch.channels_last), batches.double()):
            observer = RangeObserver()
            for batch in order.split([1, 1, 3, 5]):
                observer.update(batch)
            assert vars(observer).keys() == vars(expected).keys()
            for name, value in vars(expected).items():
                assert (
                    torch.equal(getattr(observer, name), value)
                    if name == "counts"
                    else getattr(observer, name) == value
                )
            monkeypatch.setattr(activation_ranges, "PIECE", 100)

    def test_shapes(self):
        observer = RangeObserver()
        for x in (torch.tensor(2.0), torch.zeros(0, 3), torch.tensor([[-1.0], [0.0]]), torch.tensor([3]).bfloat16()):
            observer.update(x)
        assert (observer.min, observer.max, observer.zeros, observer.counts.sum()) == (-1, 3, 1, 3)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_values_that_are_no_numbers_are_refused(self, value):
        observer = observe([1.0, 2.0])
        before = observer.quantization(8)
        with pytest.raises(ValueError, match=r"observed \[2, 2\] tensor has NaN or infinite values"):
            observer.update(torch.tensor([[0.0, 100.0], [value, 1.0]]))
        assert observer.quantization(8) == before


class TestQuantization:
    @pytest.mark.parametrize("bits", [8, 4, 2])
    @pytest.mark.parametrize("name", UNSIGNED + SIGNED)
    def test_minmax(self, name, bits):
        x = samples(name)
        scale, zero_point = observe(x).quantization(bits, "minmax")
        assert (scale, zero_point) == affine(x.min(), x.max(), bits)
        assert np.abs(rounded(x, scale, zero_point, bits) - x).max() <= 0.501 * scale

    @pytest.mark.parametrize("bits", [8, 4, 2])
    @pytest.mark.parametrize("name", UNSIGNED + SIGNED)
    def test_mse_is_that_of_the_best_range(self, name, bits):
        x = samples(name)

        def error(scale, zero_point):
            return np.square(rounded(x, scale, zero_point, bits).astype(np.float64) - x).mean()

        best = min(error(*affine(*ends, bits)) for ends in candidate_ranges(x, 400 if name in UNSIGNED else 25))
        assert error(*observe(x).quantization(bits, "mse")) <= 1.02 * best

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("name", UNSIGNED + SIGNED)
    def test_what_a_range_is(self, name, method):
        for bits in (2, 5, 8):
            scale, zero_point = observe(samples(name), 512).quantization(bits, method)
            assert type(scale) is float and np.float32(scale) == scale > 0
            assert type(zero_point) is int and 0 <= zero_point < 2**bits
            assert name in SIGNED or zero_point == 0
            assert rounded(np.zeros(1, np.float32), scale, zero_point, bits) == 0

    @pytest.mark.parametrize("bits", [8, 4, 2])
    @pytest.mark.parametrize("name", UNSIGNED + SIGNED)
    def test_symmetric_ranges(self, name, bits):
        """The zero point is the middle; the scale takes in all values, or has the least error of a fine search."""
        x, middle = samples(name), 2 ** (bits - 1)
        scale, zero_point = observe(x).quantization(bits, "minmax", symmetric=True)
        assert zero_point == middle and type(zero_point) is int
        assert scale == pytest.approx(max(-x.min() / middle, x.max() / (middle - 1)), rel=1e-6)

        def error(scale):
            return np.square(rounded(x, scale, middle, bits).astype(np.float64) - x).mean()

        best = min(error(scale * share) for share in np.geomspace(0.01, 1, 300))
        found, zero_point = observe(x).quantization(bits, "mse", symmetric=True)
        assert zero_point == middle and error(found) <= 1.03 * best
        assert observe(np.zeros(5, np.float32)).quantization(bits, symmetric=True) == (
            np.float32(1 / (2**bits - 1)),
            middle,
        )

    def test_outliers_stretch_only_minmax(self):
        observer = observe(samples("relu with outliers"))
        highest = {method: 15 * observer.quantization(4, method)[0] for method in METHODS}
        assert highest.pop("minmax") == pytest.approx(60)
        assert all(2 < high < 30 for high in highest.values()), highest

    @pytest.mark.parametrize("method", METHODS)
    def test_extreme_inputs(self, method):
        assert observe(torch.zeros(4, 5)).quantization(8, method) == (np.float32(1 / 255), 0)
        for value in (1e-30, 3.0, 1e37, -2.0):
            x = np.full(100, value, np.float32)
            scale, zero_point = observe(x).quantization(4, method)
            assert rounded(x, scale, zero_point, 4) == pytest.approx(x, rel=0.05)
        # smaller than a normal scale can represent, and larger than the difference of two float32 numbers
        assert observe([0.0, 1e-42]).quantization(8, method)[0] == np.finfo(np.float32).tiny
        assert 0 < observe([-3e38, 3e38]).quantization(8, method)[0] < math.inf
        # nearly nothing but zeros
        rare = observe(torch.cat([torch.zeros(10**6), torch.tensor([4.0])]))
        assert 255 * rare.quantization(8, method)[0] == pytest.approx(4, rel=0.01)

    @pytest.mark.parametrize("bits", [1, 9, 8.0, True])
    def test_bits_out_of_range(self, bits):
        with pytest.raises(ValueError, match="^bits must be an integer from 2 to 8, got"):
            observe([1.0]).quantization(bits)

    def test_other_arguments(self):
        for method in ("max", "percentile", "entropy"):
            with pytest.raises(ValueError, match=f"^method must be one of minmax, mse, got '{method}'"):
                observe([1.0]).quantization(8, method)
        with pytest.raises(ValueError, match=r"^No values were observed: call update\(\)"):
            RangeObserver().quantization(8)
        with pytest.raises(ValueError, match="^bins must be at least 2, got 1"):
            RangeObserver(bins=1)
