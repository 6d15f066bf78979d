"""The configuration of RepVGG models.

A *branch* is one of the linear maps that a block sums while it trains, and that fuse into one convolution. *OABN*,
outlier-aware batch normalization, is batch normalization that bounds what each branch but the largest contributes to an
entry of the fused kernel; see `reparameterization.py`.
"""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

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
            Checksum of the float weights beside a published `config.json`, to find damage: `from_pretrained` refuses
            others. A quantized model has one in its `quantization_config`. `save_pretrained` leaves it out.
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
        self.stage_names = ["stem"] + [f"stage{index}" for index in range(1, len(self.depths) + 1)]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)

    @property
    def num_stages(self) -> int:
        return len(self.depths)

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


__all__ = ["RepVGGConfig"]
