"""RepVGG: a plain stack of 3x3 convolutions that is trained with parallel branches (arXiv 2101.03697)."""

import torch
from torch import nn
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
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cluster_layers import ClusterLayer
from .configuration_repvgg import RepVGGConfig
from .layer_swaps import LastMap
from .modeling_reparameterized import ReparameterizedPreTrainedModel
from .reparameterization import ReparamConv2d
from .tensors import channels_last, lay_out


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
    """A layer of RepVGG: a sum of branches, or the one convolution that it fuses into, then the activation."""

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
        self.was_laid_out = False  # whether the fused kernel was contiguous before inference

    def train(self, mode: bool = True):
        if mode and self.was_laid_out:
            lay_out(self.conv.weight, torch.contiguous_format)
            self.was_laid_out = False
        return super().train(mode)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.training and not torch.is_grad_enabled() and type(self.conv) is nn.Conv2d:
            self.was_laid_out |= lay_out(self.conv.weight, torch.channels_last)
        return self.activation(self.attention(self.conv(hidden_states)))


class RepVGGEmbeddings(nn.Module):
    """The stem, which makes the first feature map from the image."""

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
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values must be floating point numbers, got {pixel_values.dtype}: pass images through the image "
                "processor, which scales them."
            )
        # convolutions run faster with the channels last on CPU and GPU alike, and hand the layout on
        return self.layer(channels_last(pixel_values.to(self._dtype(pixel_values.dtype))))

    def _dtype(self, default: torch.dtype) -> torch.dtype:
        """Return the dtype that the stem computes in; `default` if it can't be known, as in a `DataParallel` copy."""
        first = next(self.layer.conv.parameters(), None)
        return getattr(self.layer.conv, "compute_dtype", default if first is None else first.dtype)


class RepVGGStage(nn.Module):
    """A stage: layers of one width, the first of which downsamples.

    `first_index` counts the layers before it, the stem left out.
    """

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


class RepVGGPreTrainedModel(ReparameterizedPreTrainedModel):
    """Base class of RepVGG models: configuration, initialization, and the blocks that calibration runs through.

    *Calibration* is choosing how weights and inputs are quantized from images that the model sees.
    """

    config: RepVGGConfig
    base_model_prefix = "repvgg"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["RepVGGLayer"]
    rounds_last_map = False  # whether quantize(activation_bits=) rounds the last feature map, too, by default

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, ClusterLayer):
            in_memory = [tensor for tensor in module.stored().values() if not tensor.is_meta]  # the rest was offloaded
            if not all(getattr(tensor, "_is_hf_initialized", False) for tensor in in_memory):
                raise ValueError(
                    "The configuration of the RepVGG backbone says that it is quantized (quantization_config), and the "
                    "checkpoint lacks its codes: remove that from config.json to load a float one, or save it again."
                )
        else:
            super()._init_weights(module)

    def calibration_blocks(self) -> dict[str, nn.Module]:
        """Return the blocks, by name in the model, that `pixel_values` run through in turn to the last feature map.

        Each maps one tensor to one tensor.
        """
        return {name: module for name, module in self.named_modules() if isinstance(module, RepVGGLayer)}

    def last_map(self) -> LastMap | None:
        """Return which convolution makes the last feature map; `None` if its output is gated before it is one."""
        name, layer = [item for item in self.named_modules() if isinstance(item[1], RepVGGLayer)][-1]
        if not isinstance(layer.attention, nn.Identity):
            return None
        return LastMap(f"{name}.conv", rectified=isinstance(layer.activation, nn.ReLU))

    def _require_whole_model(self, method: str) -> None:
        if isinstance(self, RepVGGEncoder):
            raise ValueError(
                f"The encoder is a part of a model, whose stem and configuration change with it: call {method} on the "
                "whole model."
            )


class RepVGGEncoder(RepVGGPreTrainedModel):
    """The stages, one after the other."""

    main_input_name = "hidden_states"
    is_part = True
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
    """RepVGG without a head, which returns the last feature map and its mean.

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


class PooledClassifier(nn.Module):
    """The last of [`RepVGGForImageClassification`]'s blocks: its classifier on the mean of the last feature map."""

    def __init__(self, classifier: nn.Module):
        super().__init__()
        self.classifier = classifier

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.classifier(hidden_states.mean(dim=(2, 3)))


class RepVGGForImageClassification(RepVGGPreTrainedModel):
    """RepVGG with a linear classifier on the mean of the last feature map.

    `logits` is `[batch, num_labels]`; with `labels` `[batch]` (or `[batch, num_labels]` for several or real-valued
    labels) there is a `loss`.
    """

    rounds_last_map = True  # nothing takes it but the mean
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

    def calibration_blocks(self) -> dict[str, nn.Module]:
        """Return the blocks of [`RepVGGPreTrainedModel`] and, if there is a classifier, one that gives the logits.

        That one's name is empty, as the block is not part of the model, but its layer is.
        """
        head = {"": PooledClassifier(self.classifier)} if isinstance(self.classifier, nn.Linear) else {}
        return super().calibration_blocks() | head


class RepVGGBackbone(BackboneMixin, RepVGGPreTrainedModel):
    """RepVGG as a backbone for detection and segmentation, which returns the feature maps of `config.out_features`."""

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


AUTO_CLASSES = {
    "AutoModel": RepVGGModel,
    "AutoModelForImageClassification": RepVGGForImageClassification,
    "AutoBackbone": RepVGGBackbone,
}

__all__ = ["AUTO_CLASSES", "RepVGGBackbone", "RepVGGForImageClassification", "RepVGGModel", "RepVGGPreTrainedModel"]
