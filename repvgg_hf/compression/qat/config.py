"""How quantization-aware training moves codebooks, ranges and statistics."""

from dataclasses import dataclass

from .fake_quantize import CODEBOOK_UPDATES

_CHOICES = {
    "codebook_update": CODEBOOK_UPDATES,
    "activation_update": ("gradient", "moving_average"),
    "start": ("kernel", "decoded"),
}


@dataclass
class QATOptions:
    """The keyword arguments of `prepare_qat` beyond those of `ClusterConfig`; stored with the checkpoint.

    Args:
        codebook_update: how the codebooks of `method="cluster"` move: `"gradient"`: entries and channel scales are
            parameters; `"kmeans"`: towards the means of their weights; `"both"`. The steps of `method="uniform"` are
            always parameters.
        momentum: of the k-means codebook's moving average over optimizer steps, 0 to below 1.
        update_every: optimizer steps between k-means updates, and between revivals of entries that no weight uses.
        batch_norm_every: optimizer steps between re-estimations of the batch norm statistics, in which a training step
            runs the branches too; 0 leaves them frozen.
        activation_update: with `activation_bits`: `"gradient"` learns the scale of each layer's input (LSQ),
            `"moving_average"` follows the least and the largest value of a batch.
        activation_momentum: of that moving average over batches.
        freeze_threshold: freeze weights whose code oscillates more often than in this share of steps (0.01 to 0.1 are
            usual); `None` freezes none.
        freeze_momentum: of the moving average of that share.
        blend_steps: optimizer steps in which training goes over from the float kernels to the quantized ones, as a mix
            of both: for one bit, which a network that was trained with float weights does not survive at once.
        start: with `calibration`: `"kernel"` keeps the float kernels, with the calibrated codebooks and biases;
            `"decoded"` also moves the kernels onto their calibrated values, so that training begins with exactly the
            calibrated model. Then no code changes until many change at once, which a large learning rate makes of it:
            for small ones.

    Raises `ValueError` that names the argument and what it accepts.
    """

    codebook_update: str = "kmeans"
    momentum: float = 0.9
    update_every: int = 10
    batch_norm_every: int = 0
    activation_update: str = "gradient"
    activation_momentum: float = 0.99
    freeze_threshold: float | None = None
    freeze_momentum: float = 0.99
    blend_steps: int = 0
    start: str = "kernel"

    def __post_init__(self):
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        for name in ("momentum", "activation_momentum", "freeze_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and less than 1, got {getattr(self, name)!r}.")
        for name, least in {"update_every": 1, "batch_norm_every": 0, "blend_steps": 0}.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")
        if self.freeze_threshold is not None and not 0 < self.freeze_threshold < 1:
            raise ValueError(
                f"freeze_threshold must be None or a share of steps between 0 and 1, got {self.freeze_threshold!r}."
            )
