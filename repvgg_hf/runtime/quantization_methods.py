"""The methods that choose codebooks: each is one object with all that distinguishes it from the others.

A *codebook* is the table of values that the codes of a quantized weight select from; a *channel scale* is one more
factor for each output channel.

Loading and running a quantized model needs none of their functions, so these are set by the package's `compression`,
in one place, and this file can be copied into a Hub repository without it.
"""

from collections.abc import Callable


class QuantizationMethod:
    """A way to choose codebooks.

    Attributes:
        name (`str`): the value of `ClusterConfig.method`.
        title (`str`): what its codebooks are called on cards.
        options (`dict`): the fields of `ClusterConfig` that only this method has, with their defaults.
        qat_options (`tuple`): the fields of `QATConfig` that only this method has.
        evenly_spaced (`bool`): whether the entries of its codebooks are integers times a step.
        fit: `fit(rows, k, groups, config, importance) -> (codebook, scale)`, for the least weight error; see
            `compression/codebooks/weights.py`.
        refit: `refit(problem, weight, config) -> weight`, for the least output error with given codes; see
            `compression/ptq/gptq.py`.
        fake_quantizer: `fake_quantizer(weight, config, qat_config) -> module`, which quantizes a kernel that trains;
            see `compression/qat/fake_quantize.py`.
    """

    name: str
    title: str
    options: dict[str, object] = {}
    qat_options: tuple[str, ...] = ()
    evenly_spaced = False
    fit: Callable | None = None
    refit: Callable | None = None
    fake_quantizer: Callable | None = None

    def implement(self, fit: Callable, refit: Callable, fake_quantizer: Callable) -> None:
        """Set the functions that make models."""
        self.fit, self.refit, self.fake_quantizer = fit, refit, fake_quantizer

    def default_channel_scale(self, config) -> bool:
        """Tell whether each output channel gets a scale if `config.channel_scale` is `None`."""
        raise NotImplementedError

    def shares_codebook(self, config) -> bool:
        """Tell whether channels with a codebook each all have the same one, so that it is stored once."""
        return False

    def validate(self, config) -> None:
        """Raise `ValueError` for options of `config` that don't fit this method."""


class ClusterMethod(QuantizationMethod):
    """The method that finds codebooks by one-dimensional k-means."""

    name, title = "cluster", "k-means codebooks"
    qat_options = ("codebook_momentum", "codebook_update_every")

    def default_channel_scale(self, config) -> bool:
        # with one codebook for a tensor it costs 0.01 to 0.04 bits per weight
        return config.codebook_dtype == "int8" or config.granularity == "per_tensor"


class UniformMethod(QuantizationMethod):
    """The method whose codebooks are evenly spaced: the usual integer quantization."""

    name, title = "uniform", "evenly spaced codebooks"
    options = {"symmetric": True, "range_method": "mse"}
    evenly_spaced = True

    def default_channel_scale(self, config) -> bool:
        # a symmetric grid for a channel is integers times a step
        return config.codebook_dtype == "int8" or (config.granularity == "per_channel" and config.symmetric)

    def shares_codebook(self, config) -> bool:
        return config.channel_scale

    def validate(self, config) -> None:
        if not isinstance(config.symmetric, bool):
            raise ValueError(f"symmetric must be True or False, got {config.symmetric!r}.")
        if config.range_method not in ("minmax", "mse"):
            raise ValueError(f"range_method must be one of minmax, mse, got {config.range_method!r}.")
        if config.channel_scale and not config.symmetric:
            raise ValueError(
                "A uniform grid with channel_scale has no offset: set symmetric=True or channel_scale=False."
            )


METHODS: dict[str, QuantizationMethod] = {method.name: method for method in (ClusterMethod(), UniformMethod())}

__all__ = ["METHODS", "QuantizationMethod"]
