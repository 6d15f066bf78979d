"""The objects that hold what distinguishes a method from another."""

import pytest

from repvgg_hf import ClusterConfig
from repvgg_hf.runtime.quantization_methods import METHODS, QuantizationMethod

GRANULARITIES = [{"granularity": "per_tensor"}, {"granularity": "per_channel"}, {"granularity": "per_group"}]
GRANULARITIES[2]["group_size"] = 2


def test_each_is_found_by_its_name():
    assert list(METHODS) == ["cluster", "uniform"]
    for name, method in METHODS.items():
        assert isinstance(method, QuantizationMethod) and method.name == name and method.title
        assert ClusterConfig(method=name).quantization_method is method


def test_options_of_a_method_have_its_defaults_and_others_none():
    assert METHODS["cluster"].options == {}
    assert METHODS["uniform"].options == {"symmetric": True, "range_method": "mse"}
    cluster, uniform = ClusterConfig(), ClusterConfig(method="uniform")
    assert (cluster.symmetric, cluster.range_method) == (None, None)
    assert (uniform.symmetric, uniform.range_method) == (True, "mse")
    given = ClusterConfig(method="uniform", symmetric=False, range_method="minmax")
    assert (given.symmetric, given.range_method) == (False, "minmax")


@pytest.mark.parametrize(
    "option, value", [("symmetric", True), ("symmetric", False), ("range_method", "mse"), ("range_method", "minmax")]
)
def test_options_of_another_method_are_refused_by_name(option, value):
    message = f"^{option}={value!r} is an option of method='uniform', not of 'cluster': leave it out, or choose that"
    with pytest.raises(ValueError, match=message):
        ClusterConfig(**{option: value})


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda options: options["granularity"])
def test_scales_by_default_where_they_cost_next_to_nothing(granularity):
    """Per tensor beside clusters, and where they take the place of a codebook for each channel."""
    name = granularity["granularity"]

    def scale(**options):
        return ClusterConfig(**granularity, **options).channel_scale

    assert scale() is (name == "per_tensor")
    assert scale(method="uniform") is (name == "per_channel")
    assert scale(method="uniform", symmetric=False) is False
    assert scale(codebook_dtype="int8") is scale(method="uniform", codebook_dtype="int8") is True


@pytest.mark.parametrize("method", METHODS)
def test_the_package_gives_each_its_functions(method):
    import repvgg_hf.compression  # noqa: F401  sets them

    assert all(callable(getattr(METHODS[method], slot)) for slot in ("fit", "refit", "fake_quantizer"))


def test_stored_options_of_both_come_back():
    for config in (ClusterConfig(), ClusterConfig(method="uniform", symmetric=False, granularity="per_channel")):
        assert ClusterConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
