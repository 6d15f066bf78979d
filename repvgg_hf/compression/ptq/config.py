"""The options of calibration: choosing how weights and inputs are quantized from data that the model sees."""

from dataclasses import dataclass, field, fields

from ...runtime.options import suggest_options
from .activation_ranges import METHODS as ACTIVATION_RANGES

SENSITIVITIES = ("none", "fisher")
ORDERS = ("sequential", "one_pass")


@suggest_options
@dataclass
class CalibrationConfig:
    """Options for how `quantize(calibration=..., calibration_config=...)` uses its data; recipes take them too.

    Args:
        calibration_batch_size: examples per batch, if the data holds single ones.
        order: quantize each layer for the inputs that it gets from the layers quantized before (`"sequential"`), or all
            for the inputs that they get in the float model (`"one_pass"`). That is quicker for a network that is no
            chain of blocks, where each further layer takes another run of the network up to it, and less accurate.
        sensitivity: how much the error of each weight counts in clustering: `"none"` (all alike), or `"fisher"`, the
            squared gradient of the loss (SqueezeLLM, arXiv 2306.07629). Error compensation starts from there and makes
            up for it, so that it is of use mostly without that. The loss is the model's own if the data has labels;
            else a classifier takes what it predicts, and any other model how far its outputs move.
        equalization: scale channels between layers, which ReLU allows (batch norm in between is fused first, by
            `repvgg_hf.fuse` where a network is not of this package), so that one range suits all of a layer's inputs:
            from 0, for weights that are even, to 1, for inputs that are (SmoothQuant's alpha, arXiv 2211.10438; 0.5 is
            cross-layer equalization, 1906.04721). With `activation_bits` 0.3 wins much of what a network with batch
            norm on identities loses; `None` for none.
        error_compensation: choose codes and codebooks for the error of the layer's output (GPTQ with a codebook, arXiv
            2210.17323), not for that of its weight.
        bias_correction: move biases so that every layer's mean output is the float model's (arXiv 1906.04721), and
            scale its output channels, where they have a scale or a codebook each, to vary as with float weights.
        target_bits_per_weight: choose each layer's bits so that the whole model stores this many on average, codebooks
            and scales included; `bits` is then only the default for what comes later. `None` for the same bits in all.
        tuning_steps: steps of training, after all layers are quantized, in which codebooks, scales and biases of all of
            them follow the gradient of the float model's outputs, without labels; the codes stay (EfficientQAT, arXiv
            2407.11062). For 3 bits and less 300 are worth their time; 0 for none.
        tuning_learning_rate: of these steps, by Adam: the share of its size that a value moves by at most in a step.
        activation_range: with `activation_bits`, the range of a layer's input: the one with the least squared error
            (`"mse"`), or from the least to the largest value seen (`"minmax"`).
        damping: added to the diagonal of the inputs' second moments, as a share of its mean (GPTQ's term).
        activation_memory: GiB of memory for what a block puts out for all images, in both models; what is more goes to
            a temporary folder, which changes nothing but the time. In a network that is no chain of blocks nothing is
            kept of the layers' inputs but their second moments: this bounds those that are gathered in one pass.

    Raises `ValueError` that names the argument and what it accepts, `TypeError` for an unknown one.
    """

    calibration_batch_size: int = field(default=64, metadata={"help": "Calibration examples per batch."})
    order: str = field(
        default="sequential",
        metadata={
            "help": "Inputs to quantize a layer for: sequential (from the layers quantized before) or one_pass (those "
            "in the float model; quicker, less accurate)."
        },
    )
    sensitivity: str = field(
        default="none", metadata={"help": "What a weight's error counts in clustering: none (all alike) or fisher."}
    )
    equalization: float | None = field(
        default=None,
        metadata={
            "help": "Scale channels between layers so that one range suits a layer's inputs: 0 (even weights) to 1 "
            "(even inputs); 0.3 for --activation_bits on networks with batch norm."
        },
    )
    error_compensation: bool = field(
        default=True, metadata={"help": "Choose codes for the error of a layer's output: GPTQ with a codebook."}
    )
    bias_correction: bool = field(
        default=True, metadata={"help": "Keep mean (by biases) and spread of each layer's outputs."}
    )
    target_bits_per_weight: float | None = field(
        default=None, metadata={"help": "Choose each layer's bits so that the model stores this many on average."}
    )
    tuning_steps: int = field(
        default=0,
        metadata={
            "help": "Steps in which codebooks, scales and biases are trained for the float model's outputs: 300 for 3 "
            "bits and less; 0 for none."
        },
    )
    tuning_learning_rate: float = field(
        default=1e-3, metadata={"help": "Learning rate of --tuning_steps: the share by which a value moves in a step."}
    )
    activation_range: str = field(
        default="mse", metadata={"help": "Range of a layer's quantized input: mse (least squared error) or minmax."}
    )
    damping: float = field(
        default=0.01, metadata={"help": "Share of the mean added to the diagonal of the inputs' second moments (GPTQ)."}
    )
    activation_memory: float = field(
        default=4.0, metadata={"help": "GiB of memory for activations in calibration; what is more goes to disk."}
    )

    def __post_init__(self):
        choices_of = {"order": ORDERS, "sensitivity": SENSITIVITIES, "activation_range": ACTIVATION_RANGES}
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        strength = self.equalization
        if strength is not None and (type(strength) not in (int, float) or not 0 <= strength <= 1):
            raise ValueError(f"equalization must be None or from 0 to 1, such as 0.3, got {strength!r}.")
        for name in ("error_compensation", "bias_correction"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        if type(self.calibration_batch_size) is not int or self.calibration_batch_size < 1:
            raise ValueError(
                f"calibration_batch_size must be an integer of at least 1, got {self.calibration_batch_size!r}."
            )
        if type(self.tuning_steps) is not int or self.tuning_steps < 0:
            raise ValueError(f"tuning_steps must be an integer of at least 0, got {self.tuning_steps!r}.")
        if not isinstance(self.tuning_learning_rate, (int, float)) or not 0 < self.tuning_learning_rate < 1:
            raise ValueError(
                f"tuning_learning_rate must be above 0 and below 1, such as 0.001, got {self.tuning_learning_rate!r}."
            )
        if not isinstance(self.damping, (int, float)) or not self.damping > 0:
            raise ValueError(f"damping must be a positive number, got {self.damping!r}.")
        if not isinstance(self.activation_memory, (int, float)) or not self.activation_memory >= 0:
            raise ValueError(f"activation_memory must be a number of GiB, at least 0, got {self.activation_memory!r}.")
        target = self.target_bits_per_weight
        if target is not None and not (isinstance(target, (int, float)) and 1 <= target <= 8):
            raise ValueError(
                f"target_bits_per_weight must be from 1 to 8, got {target!r}: a code has at least one bit."
            )
        for name, (step, value) in OF_STEP.items():
            if not getattr(self, step) and getattr(self, name) != getattr(CalibrationConfig, name):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} does nothing without {step}: give {step}={value}, or leave {name} "
                    "out."
                )


# options of a step, that do nothing where it is off: (the step, a value of it that is on)
OF_STEP = {"tuning_learning_rate": ("tuning_steps", 300), "damping": ("error_compensation", True)}

# what `prepare_qat` uses of these options
IN_TRAINING = ("calibration_batch_size", "target_bits_per_weight", "activation_range", "activation_memory")


def check_use_of_ranges(options: CalibrationConfig, activations: bool) -> None:
    """Raise `ValueError` for the option of input ranges, if no `activations` are rounded, so that there are none."""
    if not activations and options.activation_range != CalibrationConfig.activation_range:
        raise ValueError(
            f"activation_range={options.activation_range!r} is for quantized activations, and activation_bits is "
            "None: set that to 8, say, or leave activation_range out."
        )


def check_use_in_training(options: CalibrationConfig, given: bool, activations: bool) -> None:
    """Raise `ValueError` for data or options that would do nothing in `prepare_qat`, where training finds the weights.

    `given` tells whether there is calibration data, `activations` whether inputs are rounded, whose ranges it finds.
    """
    for field_ in fields(CalibrationConfig):
        value = getattr(options, field_.name)
        if value != field_.default and field_.name not in IN_TRAINING:
            raise ValueError(
                f"{field_.name}={value!r} does nothing in prepare_qat(), where training finds the codes: leave it "
                "out, or give it to quantize() of the float model."
            )
    check_use_of_ranges(options, activations)
    if given and not activations and options.target_bits_per_weight is None:
        raise ValueError(
            "Calibration images only find input ranges (activation_bits) and each layer's bits "
            "(CalibrationConfig(target_bits_per_weight=...)) here, and neither is asked for: set one, or leave "
            "calibration and calibration_config out."
        )
