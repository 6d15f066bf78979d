"""The options of quantization-aware training."""

from dataclasses import dataclass, field

from ...runtime.options import suggest_options
from ...runtime.quantization_cluster import QuantizationOptions
from ...runtime.quantization_methods import METHODS


@suggest_options
@dataclass
class QATConfig:
    """How a model trains after `prepare_qat(qat_config=...)`; stored with its checkpoints. Recipes take it as options.

    Args:
        codebook_momentum: momentum per optimizer step of the moving average that k-means codebooks and channel scales
            are, 0 to below 1. For `method="cluster"` only, as the steps of uniform grids learn by gradients.
        codebook_update_every: optimizer steps between two updates of the k-means codebooks, each of which is as large
            as that many would be together. For `method="cluster"` only.
        blend_steps: optimizer steps in which training goes over from the float kernels to the quantized ones, as a mix
            of both (alpha-blending, arXiv 1903.01061): for one bit, which a network that was trained with float weights
            does not survive at once. 0 for none.

    Raises `ValueError` that names the argument and what it accepts, `TypeError` for an unknown one.

    Example:
    ```python
    >>> from repvgg_hf import QATConfig

    >>> QATConfig(blend_steps=500)
    QATConfig(codebook_momentum=0.9, codebook_update_every=10, blend_steps=500)
    ```"""

    codebook_momentum: float = field(
        default=0.9,
        metadata={"help": "For --method cluster: momentum of its codebooks per optimizer step, 0 to below 1."},
    )
    codebook_update_every: int = field(
        default=10, metadata={"help": "For --method cluster: optimizer steps between two updates of its codebooks."}
    )
    blend_steps: int = field(
        default=0,
        metadata={"help": "Optimizer steps in which training goes over from float weights to quantized ones."},
    )

    def __post_init__(self):
        if not 0 <= self.codebook_momentum < 1:
            raise ValueError(f"codebook_momentum must be at least 0 and less than 1, got {self.codebook_momentum!r}.")
        for name, least in {"codebook_update_every": 1, "blend_steps": 0}.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")


def check_qat_options(config: QuantizationOptions, qat_config: QATConfig) -> None:
    """Raise `ValueError` for what `qat_config` sets that the method of `config` does not have."""
    defaults = QATConfig()
    for method in METHODS.values():
        for name in method.qat_options:
            value = getattr(qat_config, name)
            if method.name != config.method and value != getattr(defaults, name):
                raise ValueError(
                    f"{name}={value!r} is an option of method={method.name!r}, not of {config.method!r}: leave it out, "
                    "or choose that method."
                )
