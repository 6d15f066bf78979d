"""RepVGG: a plain stack of 3x3 convolutions that is trained with parallel branches (arXiv 2101.03697)."""

import tempfile
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithNoAttention,
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .checkpoints import check_checkpoint_form, replace_files
from .cluster_layers import check_layers, decode_layers, dequantize_layers, replace_with_cluster_layers
from .configuration_repvgg import RepVGGConfig
from .quantization_cluster import ClusterConfig
from .reparameterization import ReparamConv2d, checkpoint_once, fused_convolutions
from .weight_files import check_published_weights, unreadable_weights

logger = logging.get_logger(__name__)


class RepVGGSqueezeExcitation(nn.Module):
    """Rescale each channel by a gate computed from all channels' means."""

    def __init__(self, channels: int, hidden_channels: int):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden_channels, kernel_size=1)
        self.fc2 = nn.Conv2d(hidden_channels, channels, kernel_size=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate = hidden_states.mean(dim=(2, 3), keepdim=True)  # (batch, channels, 1, 1)
        gate = self.fc2(self.fc1(gate).relu()).sigmoid()
        return hidden_states * gate


class RepVGGLayer(GradientCheckpointingLayer):
    """A sum of branches, or the one convolution that it fuses into, then the activation."""

    def __init__(self, config: RepVGGConfig, in_channels: int, out_channels: int, stride: int = 1, groups: int = 1):
        super().__init__()
        if config.deploy:
            self.conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, groups=groups)
        else:
            self.conv = ReparamConv2d(
                in_channels,
                out_channels,
                kernel_size=3,
                stride=stride,
                groups=groups,
                branches=tuple(config.block_branches),
                eps=config.batch_norm_eps,
                momentum=config.batch_norm_momentum,
                oabn_threshold=config.oabn_threshold if config.oabn else None,
            )
        self.attention = (
            RepVGGSqueezeExcitation(out_channels, max(1, out_channels // config.squeeze_ratio))
            if config.use_squeeze_excitation
            else nn.Identity()
        )
        self.activation = ACT2FN[config.hidden_act]
        if isinstance(self.activation, nn.ReLU):
            self.activation.inplace = True  # nothing before it needs its output for the gradient

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.activation(self.attention(self.conv(hidden_states)))


class RepVGGEmbeddings(nn.Module):
    """The stem: the image to the first feature map."""

    def __init__(self, config: RepVGGConfig):
        super().__init__()
        self.num_channels = config.num_channels
        self.layer = RepVGGLayer(config, config.num_channels, config.stem_hidden_size, config.stem_stride)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if pixel_values.dim() != 4 or pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"pixel_values must be [batch, {self.num_channels}, height, width], got {list(pixel_values.shape)}: "
                "prepare images with the image processor, or set num_channels in the configuration."
            )
        # convolutions run faster with the channels last on CPU and GPU alike, and hand the layout on
        return self.layer(pixel_values.contiguous(memory_format=torch.channels_last))


class RepVGGStage(nn.Module):
    """Layers of one width; the first one downsamples. `first_index` counts the layers before, the stem left out."""

    def __init__(
        self, config: RepVGGConfig, in_channels: int, out_channels: int, stride: int, depth: int, first_index: int
    ):
        super().__init__()
        self.layers = nn.ModuleList()
        for index in range(first_index, first_index + depth):
            groups = config.groups if index % 2 else 1  # the second, fourth, ... layer of the whole network
            self.layers.append(RepVGGLayer(config, in_channels, out_channels, stride, groups))
            in_channels, stride = out_channels, 1

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


class RepVGGPreTrainedModel(PreTrainedModel):
    """Loading, saving, fusing and quantizing, for every RepVGG model."""

    config: RepVGGConfig
    base_model_prefix = "repvgg"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["RepVGGLayer"]
    _keep_in_fp32_modules_strict = ["weight_fake_quant", "input_fake_quant"]

    def post_init(self):
        super().post_init()
        settings = self.config.qat_config
        if settings is not None and next(self.parameters()).is_meta:  # from_pretrained: a QAT checkpoint follows
            _import_compression("A checkpoint of quantization-aware training").restore_qat(self, settings)

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def _set_gradient_checkpointing(
        self, enable=True, gradient_checkpointing_func=torch.utils.checkpoint.checkpoint, **kwargs
    ):
        function = partial(checkpoint_once, gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, function, **kwargs)

    def reparameterize(self):
        """Fuse the branches of every layer into one convolution, in place; returns the model.

        Computed in float32 and checked on a random batch; the result has the model's dtype. A fused model is returned
        as it is. Raises `ValueError` naming the block if the result is wrong; the model is then unchanged.
        """
        self._require_whole_model("reparameterize()")
        if any(getattr(module, "weight_fake_quant", None) is not None for module in self.modules()):
            raise ValueError("The model was prepared for QAT: quantize() fuses it and keeps the trained codebooks.")
        for name, convolution in self.fused_convolutions().items():
            self.set_submodule(name, convolution)
        self.config.deploy = True
        return self

    def fused_convolutions(self) -> dict[str, nn.Conv2d]:
        """What each block of branches fuses into, by the block's name; the model is not changed."""
        return fused_convolutions(self)

    def quantize(self, method: "str | ClusterConfig | None" = None, bits: int | None = None, **options):
        """Replace every weight by codes and a codebook, in place; returns the model. Branches are fused first.

        Args:
            method: `"cluster"` (default) or `"uniform"`, or a whole [`ClusterConfig`].
            bits: 1 to 8, default 4.
            options: further arguments of [`ClusterConfig`].

        After `prepare_qat` call it without arguments: the trained codebooks are kept as they are. Raises `ValueError`
        for a model that is quantized already, bad options, or weights that aren't finite; the model is then unchanged.
        """
        self._require_whole_model("quantize()")
        compression = _import_compression("quantize()")
        return compression.quantize_model(self, method, bits, **options)

    def prepare_qat(self, method: "str | ClusterConfig | None" = None, bits: int | None = None, **options):
        """Make the model compute with quantized weights while its parameters train, in place; returns the model.

        The arguments are those of [`~RepVGGPreTrainedModel.quantize`], which freezes the result. In train form each
        block quantizes its fused kernel, with the batch norm statistics frozen, and runs one convolution. After every
        optimizer step call `repvgg_hf.update_codebooks(model)`, or give `Trainer` a `repvgg_hf.QATCallback()`.
        """
        self._require_whole_model("prepare_qat()")
        compression = _import_compression("prepare_qat()")
        return compression.prepare_qat(self, method, bits, **options)

    def _require_whole_model(self, method: str) -> None:
        if isinstance(self, RepVGGEncoder):
            raise ValueError(
                f"The encoder is a part of a model, whose stem and configuration change with it: call {method} on the "
                "whole model."
            )

    def replace_with_cluster_layers(self, config: ClusterConfig):
        """Put empty cluster layers in the place of those that `config` converts; returns them by name."""
        return replace_with_cluster_layers(self, config)

    def replace_with_float_layers(self):
        """Put float layers with the decoded weights in the place of the cluster layers."""
        dequantize_layers(self)

    def check_cluster_layers(self):
        """Raise `ValueError` naming a loaded tensor whose values can't be right."""
        check_layers(self)

    def decode_weights(self, on_the_fly: bool | None = None):
        """Decode the weights now, instead of when the model first runs; `on_the_fly=True` in every forward instead.

        Call it before `torch.export` or an export to ONNX, which would trace the decoding in a model that never ran;
        before `nn.DataParallel`, whose copies would decode in every step; and before a second CUDA stream uses the
        model.
        """
        decode_layers(self, on_the_fly)

    def dequantize(self, dtype: torch.dtype | None = None):
        """Make a quantized model a float one with the decoded weights, in place; returns the model.

        The rounding of activations (`activation_bits`) is dropped with the layers that did it. `dtype`: of the float
        model, default the present one. Raises `ValueError` for a model that is not quantized or is offloaded.
        """
        return super().dequantize(dtype)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info=False, **kwargs):
        """As `PreTrainedModel.from_pretrained`; raises `ValueError` for the wrong form of checkpoint or a broken file.

        For a quantized checkpoint `quantization_config=ClusterConfig(decode="on_the_fly")` chooses when to decode.
        """
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise ValueError(unreadable_weights(pretrained_model_name_or_path, error, kwargs)) from error
        check_checkpoint_form(info["missing_keys"], info["unexpected_keys"], model.config.deploy)
        check_published_weights(pretrained_model_name_or_path, model.config, kwargs)
        for name, module in model.named_modules():
            if isinstance(module, ReparamConv2d) and any(parameter.is_meta for parameter in module.parameters()):
                raise ValueError(
                    f"{name} is offloaded, but a block of branches runs in memory only: load the model without "
                    "device_map or with device_map='cpu', or reparameterize() and save it first."
                )
            if isinstance(module, nn.Conv2d):  # as the input, so that no call has to rearrange the kernel
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
        requested = kwargs.get("quantization_config")
        if isinstance(requested, ClusterConfig) and requested.decode != model.config.quantization_config.decode:
            model.decode_weights(on_the_fly=requested.decode == "on_the_fly")
        return (model, info) if output_loading_info else model

    def load_state_dict(self, state_dict, *args, **kwargs):
        own = self.state_dict().keys()
        check_checkpoint_form(own - state_dict.keys(), state_dict.keys() - own, self.config.deploy)
        return super().load_state_dict(state_dict, *args, **kwargs)

    def save_pretrained(self, save_directory, *args, push_to_hub=False, **kwargs):
        """As `PreTrainedModel.save_pretrained`, but the files appear only when all of them are complete.

        They are written to a temporary folder and then renamed, so that an interrupted save leaves what was there
        before. Weights of an earlier save under other names (sharded or not) are removed.
        """
        target = Path(save_directory)
        if target.is_file():
            raise ValueError(f"{target} is a file: save_pretrained needs a folder.")
        target.mkdir(parents=True, exist_ok=True)
        if push_to_hub:
            kwargs.setdefault("repo_id", target.name)
        self.config.weights_checksum = None  # that of the files it was loaded from
        with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as folder:
            super().save_pretrained(folder, *args, push_to_hub=push_to_hub, **kwargs)
            replace_files(Path(folder), target)


def _import_compression(caller: str):
    try:
        import repvgg_hf.compression as compression
    except ImportError as error:
        raise ImportError(f"{caller} is part of the package: `pip install repvgg-hf`.") from error
    return compression


class RepVGGEncoder(RepVGGPreTrainedModel):
    """The stages."""

    main_input_name = "hidden_states"
    _can_record_outputs = {"hidden_states": RepVGGStage}

    def __init__(self, config: RepVGGConfig):
        super().__init__(config)
        self.stages = nn.ModuleList()
        in_channels, index = config.stem_hidden_size, 0
        for out_channels, stride, depth in zip(config.hidden_sizes, config.strides, config.depths):
            self.stages.append(RepVGGStage(config, in_channels, out_channels, stride, depth, index))
            in_channels, index = out_channels, index + depth
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, hidden_states: torch.Tensor, **kwargs) -> BaseModelOutputWithNoAttention:
        for stage in self.stages:
            hidden_states = stage(hidden_states)
        return BaseModelOutputWithNoAttention(last_hidden_state=hidden_states)


class RepVGGModel(RepVGGPreTrainedModel):
    """RepVGG without a head: feature maps and their mean.

    `pixel_values` is `[batch, num_channels, height, width]` of any size; `last_hidden_state` is
    `[batch, hidden_sizes[-1], height', width']` and `pooler_output` its mean, `[batch, hidden_sizes[-1]]`.
    """

    def __init__(self, config: RepVGGConfig):
        super().__init__(config)
        self.embeddings = RepVGGEmbeddings(config)
        self.encoder = RepVGGEncoder(config)
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor | None = None, **kwargs) -> BaseModelOutputWithPoolingAndNoAttention:
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        outputs = self.encoder(self.embeddings(pixel_values), return_dict=True, **kwargs)
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=outputs.last_hidden_state.mean(dim=(2, 3)),
            hidden_states=outputs.hidden_states,
        )


class RepVGGForImageClassification(RepVGGPreTrainedModel):
    """RepVGG with a linear classifier on the mean of the last feature map.

    `logits` is `[batch, num_labels]`; with `labels` `[batch]` (or `[batch, num_labels]` for several or real-valued
    labels) there is a `loss`.
    """

    accepts_loss_kwargs = False  # the loss is a mean: Trainer must divide it by the accumulation steps itself

    def __init__(self, config: RepVGGConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.repvgg = RepVGGModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_sizes[-1], config.num_labels) if config.num_labels else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor | None = None, labels: torch.Tensor | None = None, **kwargs
    ) -> ImageClassifierOutputWithNoAttention:
        outputs = self.repvgg(pixel_values, return_dict=True, **kwargs)
        logits = self.classifier(self.dropout(outputs.pooler_output))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class RepVGGBackbone(BackboneMixin, RepVGGPreTrainedModel):
    """RepVGG as a backbone for detection and segmentation: the feature maps of `config.out_features`."""

    has_attentions = False

    def __init__(self, config: RepVGGConfig):
        super().__init__(config)
        self.embeddings = RepVGGEmbeddings(config)
        self.encoder = RepVGGEncoder(config)
        self.num_features = [config.stem_hidden_size, *config.hidden_sizes]
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BackboneOutput:
        hidden_states = self.encoder(self.embeddings(pixel_values), return_dict=True, **kwargs).hidden_states
        feature_maps = tuple(
            hidden_state for stage, hidden_state in zip(self.stage_names, hidden_states) if stage in self.out_features
        )
        return BackboneOutput(feature_maps=feature_maps, hidden_states=hidden_states)


__all__ = ["RepVGGBackbone", "RepVGGForImageClassification", "RepVGGModel", "RepVGGPreTrainedModel"]
