"""The configuration of RepVGG models.

A *branch* is one of the linear maps that a block sums while it trains, and that fuse into one convolution. *OABN*,
outlier-aware batch normalization, is batch normalization that bounds what each branch but the largest contributes to an
entry of the fused kernel; see `reparameterization.py`.
"""

from dataclasses import fields

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from .options import is_misspelt

# name: (depths, width multipliers of stages 1 to 4, groups of every second layer, squeeze-excitation)
# RepVGG (arXiv 2101.03697), tables 2 and 3, and the authors' repository for A0 to B3g4 and D2se.
_A_DEPTHS, _B_DEPTHS, _D_DEPTHS = (2, 4, 14, 1), (4, 6, 16, 1), (8, 14, 24, 1)
VARIANTS = {
    "a0": (_A_DEPTHS, (0.75, 0.75, 0.75, 2.5), 1, False),
    "a1": (_A_DEPTHS, (1, 1, 1, 2.5), 1, False),
    "a2": (_A_DEPTHS, (1.5, 1.5, 1.5, 2.75), 1, False),
    "b0": (_B_DEPTHS, (1, 1, 1, 2.5), 1, False),
    "b1": (_B_DEPTHS, (2, 2, 2, 4), 1, False),
    "b1g2": (_B_DEPTHS, (2, 2, 2, 4), 2, False),
    "b1g4": (_B_DEPTHS, (2, 2, 2, 4), 4, False),
    "b2": (_B_DEPTHS, (2.5, 2.5, 2.5, 5), 1, False),
    "b2g2": (_B_DEPTHS, (2.5, 2.5, 2.5, 5), 2, False),
    "b2g4": (_B_DEPTHS, (2.5, 2.5, 2.5, 5), 4, False),
    "b3": (_B_DEPTHS, (3, 3, 3, 5), 1, False),
    "b3g2": (_B_DEPTHS, (3, 3, 3, 5), 2, False),
    "b3g4": (_B_DEPTHS, (3, 3, 3, 5), 4, False),
    "d2se": (_D_DEPTHS, (2.5, 2.5, 2.5, 5), 1, True),
}
BASE_WIDTHS = (64, 128, 256, 512)

# A network beyond these is a slip: the largest variant, b3, has 0.13e9 parameters and 84 branches. Without a limit it
# would fill the memory, or take hours, before anything tells which number is wrong.
MAX_PARAMETERS = 20_000_000_000  # 75 GiB in float32
MAX_BRANCHES = 20_000
MAX_LABELS = 5_000_000
FLOATS = ("float16", "bfloat16", "float32", "float64")

# Called when the first configuration is made. The package registers its model classes here: every Auto class makes the
# configuration first, so that `import repvgg_hf` need not load the modeling code, nor torchvision with it.
before_first_config = []


@strict
class RepVGGConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of a RepVGG model. The defaults give RepVGG-A0 in train form, with OABN.

    Args:
        num_channels (`int`, defaults to 3):
            Channels of the input image.
        stem_hidden_size (`int`, defaults to 48):
            Output channels of the stem layer.
        hidden_sizes (`list[int]`, defaults to `(48, 96, 192, 1280)`):
            Output channels of each stage.
        depths (`list[int]`, defaults to `(2, 4, 14, 1)`):
            Layers of each stage.
        stem_stride (`int`, defaults to 2):
            Stride of the stem; 1 for images of about 32 px, such as CIFAR's.
        strides (`list[int]`, defaults to `(2, 2, 2, 2)`):
            Stride of the first layer of each stage.
        groups (`int`, defaults to 1):
            Groups of every second layer's convolutions (2 in the g2, 4 in the g4 variants).
        use_squeeze_excitation (`bool`, defaults to `False`):
            Put squeeze-excitation before each activation (the D2se variant).
        squeeze_ratio (`int`, defaults to 16):
            Channels of a layer divided by those inside its squeeze-excitation.
        hidden_act (`str`, defaults to `"relu"`):
            Activation after each layer.
        block_branches (`list[str]`, defaults to `("3x3", "1x1", "identity")`):
            Linear branches that a block sums in train form: `"identity"` or `"<height>x<width>"` with odd sizes, at
            least one of them 3x3. Repeat a name for parallel copies.
        batch_norm_eps (`float`, defaults to 1e-5), batch_norm_momentum (`float`, defaults to 0.1):
            Epsilon and momentum of the branches' `torch.nn.BatchNorm2d`.
        oabn (`bool`, defaults to `True`):
            Outlier-aware batch normalization: bound what the 1x1 and identity branches add to the fused kernel.
        oabn_threshold (`float`, defaults to 6.0):
            The bound, in standard deviations of the dense branch's contribution.
        deploy (`bool`, defaults to `False`):
            Build the model fused, one convolution per layer. `model.reparameterize()` sets it.
        classifier_dropout (`float`, defaults to 0.0):
            Dropout before the classifier.
        weights_checksum (`str`, *optional*):
            Checksum of the float weights beside a published `config.json`, and of its fields that change what the
            model computes, to find damage: `from_pretrained` refuses others. A quantized model has one in its
            `quantization_config`. `save_pretrained` leaves it out.
        qat_config (`dict`, *optional*):
            How the model is prepared for quantization-aware training; `prepare_qat` sets it.

    Example:
    ```python
    >>> from repvgg_hf import RepVGGConfig, RepVGGForImageClassification

    >>> config = RepVGGConfig.from_variant("a0", num_labels=10)
    >>> model = RepVGGForImageClassification(config)
    ```"""

    model_type = "repvgg"
    attribute_map = {"num_hidden_layers": "num_stages"}

    num_channels: int = 3
    stem_hidden_size: int = 48
    hidden_sizes: list[int] | tuple[int, ...] = (48, 96, 192, 1280)
    depths: list[int] | tuple[int, ...] = (2, 4, 14, 1)
    stem_stride: int = 2
    strides: list[int] | tuple[int, ...] = (2, 2, 2, 2)
    groups: int = 1
    use_squeeze_excitation: bool = False
    squeeze_ratio: int = 16
    hidden_act: str = "relu"
    block_branches: list[str] | tuple[str, ...] = ("3x3", "1x1", "identity")
    batch_norm_eps: float = 1e-5
    batch_norm_momentum: float = 0.1
    oabn: bool = True
    oabn_threshold: float | int = 6.0
    deploy: bool = False
    classifier_dropout: float | int = 0.0
    weights_checksum: str | None = None
    qat_config: dict | None = None
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        while before_first_config:
            before_first_config.pop()()
        self._check_names(kwargs)
        self._check_labels(kwargs)
        self._check_dtype(kwargs)
        self.stage_names = ["stem"] + [f"stage{index}" for index in range(1, len(self.depths) + 1)]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)

    @property
    def num_stages(self) -> int:
        return len(self.depths)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Make a configuration from a dictionary, with `kwargs` in the place of some of its fields.

        Raises `ValueError` or `StrictDataclassError` naming the field for a value that is impossible.
        """
        made = super().from_dict(config_dict, **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        config.validate()  # `kwargs` were set after it was made
        return made

    @classmethod
    def from_variant(cls, variant: str, **kwargs) -> "RepVGGConfig":
        """Make the configuration of a published variant, `"a0"` to `"b3g4"` and `"d2se"`; `kwargs` override its fields.

        Raises `ValueError` for an unknown name.
        """
        name = variant.lower().replace("repvgg", "").strip("-_")
        if name not in VARIANTS:
            raise ValueError(f"Unknown RepVGG variant {variant!r}: choose one of {', '.join(VARIANTS)}.")
        depths, multipliers, groups, use_squeeze_excitation = VARIANTS[name]
        variant_kwargs = {
            "stem_hidden_size": min(64, int(64 * multipliers[0])),
            "hidden_sizes": [int(base * multiplier) for base, multiplier in zip(BASE_WIDTHS, multipliers)],
            "depths": list(depths),
            "groups": groups,
            "use_squeeze_excitation": use_squeeze_excitation,
        }
        return cls(**(variant_kwargs | kwargs))

    def _check_names(self, others: dict) -> None:
        """Check `others`, which are no fields of this class, as a file may give them.

        Raises `ValueError` for one that is a field's name with one slip, or that would replace what the class works
        with by something else.
        """
        known = [entry.name for entry in fields(RepVGGConfig) if not entry.name.startswith("_")]
        for name in others:
            meant = [field for field in known if is_misspelt(name, field)]
            if meant and not hasattr(type(self), name):
                raise ValueError(
                    f"RepVGGConfig has no field {name!r}: did you mean {meant[0]!r}? Correct it, in config.json or "
                    "where you pass it."
                )
            if callable(getattr(type(self), name, None)) or name == "attribute_map":
                raise ValueError(f"{name!r} can't be a field of a configuration, the class has it: rename it.")
            if name.startswith("base_model_") and not isinstance(others[name], dict | None):
                raise ValueError(f"{name} must be an object or null, got {others[name]!r:.80}.")
        for name in ("output_hidden_states", "return_dict"):  # the types of inherited fields are not checked
            if not isinstance(getattr(self, name), bool | None):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r:.80}.")
        quantization = others.get("quantization_config") or {"quant_method": ""}
        if not hasattr(quantization, "to_dict") and not (
            isinstance(quantization, dict) and isinstance(quantization.get("quant_method", ""), str)
        ):
            raise ValueError(
                f"quantization_config must be an object with a text as quant_method, got {quantization!r:.80}."
            )
        if isinstance(quantization, dict) and quantization.get("quant_method") == "cluster" and "dtype" in quantization:
            raise ValueError("quantization_config has no option 'dtype': remove it, or set codebook_dtype.")

    def _check_labels(self, others: dict) -> None:
        """Raise `ValueError` for class names that are none, or more than memory holds, before they are made."""
        labels = others.get("num_labels")
        if labels is not None and (type(labels) is not int or not 0 <= labels <= MAX_LABELS):
            raise ValueError(f"num_labels must be an integer from 0 to {MAX_LABELS:,}, got {labels!r}.")
        names = {} if self.id2label is None else self.id2label
        if not isinstance(names, dict) or not all(str(key).isdecimal() for key in names):
            raise ValueError(
                f'id2label must be an object that gives a name for each number, such as {{"0": "ant", "1": "bee"}}, '
                f"got {names!r:.80}."
            )
        numbers = {} if self.label2id is None else self.label2id
        if not isinstance(numbers, dict) or not all(type(number) in (int, str) for number in numbers.values()):
            raise ValueError(f"label2id must be an object that gives a number for each name, got {numbers!r:.80}.")

    def _check_dtype(self, others: dict) -> None:
        """Raise `ValueError` for a dtype that is no floating point one."""
        for name, dtype in (("dtype", self.dtype), ("torch_dtype", others.get("torch_dtype"))):
            known = dtype in FLOATS if isinstance(dtype, str) else getattr(dtype, "is_floating_point", dtype is None)
            if not known:
                raise ValueError(f"{name} must be one of {', '.join(FLOATS)}, got {dtype!r:.80}.")

    def validate_activation(self):
        """Check that `hidden_act` is an activation that Transformers knows."""
        from transformers.activations import ACT2FN  # it imports PyTorch, which a configuration alone does not need

        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act must be one of {', '.join(sorted(ACT2FN))}, got {self.hidden_act!r}.")

    def validate_size(self):
        """Check that the network is not so large that it must be a slip."""
        branches = sum(map(abs, self.depths)) * max(1, len(self.block_branches))
        if branches > MAX_BRANCHES:
            raise ValueError(
                f"depths={shortened(self.depths)} and block_branches={shortened(self.block_branches)} ask for "
                f"{branches:,} branches, and {MAX_BRANCHES:,} is the most: give fewer layers or fewer branches."
            )
        widths = [self.num_channels, self.stem_hidden_size, *self.hidden_sizes]
        layers = [1, *self.depths]
        kernels = [9 * before * after + 9 * (depth - 1) * after * after
                   for before, after, depth in zip(widths, widths[1:], layers)]  # fmt: skip
        parameters = sum(kernels) + (widths[-1] + 1) * (self.num_labels or 0)
        if parameters > MAX_PARAMETERS:
            names = ("num_channels", "stem_hidden_size", "hidden_sizes", "depths", "num_labels")
            raise ValueError(
                f"The fused network would have {parameters:,} parameters, and {MAX_PARAMETERS:,} is the most: give "
                f"smaller numbers than {', '.join(f'{name}={shortened(getattr(self, name))}' for name in names)}."
            )

    def validate_stages(self):
        """Check that `hidden_sizes`, `depths` and `strides` describe the same stages, with positive numbers."""
        lengths = {len(self.hidden_sizes), len(self.depths), len(self.strides)}
        if len(lengths) != 1:
            raise ValueError(
                f"hidden_sizes has {len(self.hidden_sizes)} entries, depths {len(self.depths)} and strides "
                f"{len(self.strides)}: give one entry per stage in each."
            )
        for name in ("hidden_sizes", "depths", "strides"):
            if any(value < 1 for value in getattr(self, name)):
                raise ValueError(f"{name} must be positive, got {list(getattr(self, name))}.")
        if min(self.num_channels, self.stem_hidden_size, self.stem_stride, self.squeeze_ratio) < 1:
            raise ValueError("num_channels, stem_hidden_size, stem_stride and squeeze_ratio must be at least 1.")

    def validate_groups(self):
        """Check that `groups` divides every stage's width, as grouped layers exist in each stage."""
        if self.groups < 1 or any(size % self.groups for size in self.hidden_sizes):
            raise ValueError(f"groups={self.groups} must divide every entry of hidden_sizes={list(self.hidden_sizes)}.")

    def validate_oabn(self):
        """Check that `oabn_threshold` is a positive number of standard deviations."""
        if not 0 < self.oabn_threshold < float("inf"):
            raise ValueError(
                f"oabn_threshold must be positive and finite, got {self.oabn_threshold}; 6 is the default."
            )


def shortened(value) -> str:
    """Return `value` as a list for a message, with no more than its first entries; a number as it is."""
    if not isinstance(value, (list, tuple)):
        return str(value)
    return str(list(value)) if len(value) <= 8 else f"[{', '.join(map(repr, value[:8]))}, ... {len(value)} in all]"


__all__ = ["RepVGGConfig"]
