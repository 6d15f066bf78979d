"""Converting RepVGG models of timm (`repvgg_a0` to `repvgg_d2se`), with branches or fused."""

import re
from collections.abc import Mapping

import torch
from torch import nn
from transformers.initialization import no_init_weights

from ..runtime.configuration_repvgg import RepVGGConfig
from ..runtime.modeling_repvgg import RepVGGForImageClassification
from .timm_images import timm_image_processor, timm_label_names

# a layer's parts, in timm's names and in ours
_PARTS = {
    "conv_kxk.conv": "conv.branches.3x3.conv",
    "conv_kxk.bn": "conv.branches.3x3.norm",
    "conv_1x1.conv": "conv.branches.1x1.conv",
    "conv_1x1.bn": "conv.branches.1x1.norm",
    "identity": "conv.branches.identity.norm",
    "reparam_conv": "conv",
    "attn.fc1": "attention.fc1",
    "attn.fc2": "attention.fc2",
}
_LAYER_KEY = re.compile(rf"(?:stem|stages\.(\d+)\.(\d+))\.({'|'.join(map(re.escape, _PARTS))})\.(\w+)")


def convert_timm_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the tensors of a timm RepVGG for [`RepVGGForImageClassification`].

    Args:
        state_dict (`dict[str, torch.Tensor]`): what the timm model's `state_dict()` returned.

    Returns the same tensors under our names. Raises `ValueError` naming the keys that no RepVGG of timm has.
    """
    converted, unknown = {}, []
    for key, tensor in state_dict.items():
        if key in ("head.fc.weight", "head.fc.bias"):
            converted[key.replace("head.fc", "classifier")] = tensor
        elif match := _LAYER_KEY.fullmatch(key):
            stage, layer, part, name = match.groups()
            place = "embeddings.layer" if stage is None else f"encoder.stages.{stage}.layers.{layer}"
            converted[f"repvgg.{place}.{_PARTS[part]}.{name}"] = tensor
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(
            f"Not a RepVGG of timm: unknown keys {', '.join(unknown[:5])} ({len(unknown)} of {len(state_dict)}). Give "
            "the state dict of a model such as timm.create_model('repvgg_a0')."
        )
    return converted


def from_timm(timm_model: nn.Module) -> RepVGGForImageClassification:
    """Make a [`RepVGGForImageClassification`] with the weights of a timm RepVGG, in the form that it has.

    The form is train form (with branches) or fused. Batch normalization is plain, as timm's is. To train further with
    outlier-aware batch normalization (OABN), which bounds what small branches add to the fused kernel, save the model
    and load it with `from_pretrained(folder, oabn=True)`. The image processor that goes along (size, crop,
    interpolation, mean and standard deviation of timm's `pretrained_cfg`) is saved with the model; the names of the
    classes come over if timm has them.

    Args:
        timm_model (`nn.Module`): a model that `timm.create_model` made. It is not changed, and shares no tensor with
            the new one.

    Raises `ValueError` for a model that is no RepVGG, or that computes something else with these weights: another
    activation than ReLU, other pooling than the mean, dilation. Dropout and stochastic depth are left out.

    Example:
    ```python
    >>> import timm
    >>> from repvgg_hf.networks import from_timm

    >>> model = from_timm(timm.create_model("repvgg_a0", pretrained=True))
    ```"""
    state_dict = convert_timm_state_dict(timm_model.state_dict())
    _check_function(timm_model)
    with no_init_weights():  # every weight is loaded
        model = RepVGGForImageClassification(_config_of(timm_model, state_dict))
    model.load_state_dict(state_dict)
    model.image_processor_file = timm_image_processor(timm_model)
    return model.train(timm_model.training)


def _check_function(timm_model: nn.Module) -> None:
    """Raise `ValueError` naming the part of the model that the new one would compute otherwise."""
    for block in (timm_model.stem, *(block for stage in timm_model.stages for block in stage)):
        if type(block.act) is not nn.ReLU:
            raise ValueError(f"The activation is {type(block.act).__name__}: only models with ReLU are converted.")
        if not isinstance(block.attn, nn.Identity):
            functions = [type(part).__name__ for part in (block.attn.act, block.attn.gate)]  # timm has a Sigmoid too
            if functions != ["ReLU", "Sigmoid"]:
                raise ValueError(
                    f"The squeeze-and-excitation has {' and '.join(functions)}: only those with ReLU and Sigmoid are "
                    "converted."
                )
    for name, module in timm_model.named_modules():
        if isinstance(module, nn.Conv2d) and set(module.dilation) != {1}:
            raise ValueError(
                f"{name} has dilation {tuple(module.dilation)}, and the layers here have none: create the timm model "
                "with output_stride=32."
            )
    kind = timm_model.head.global_pool.pool_type
    if kind not in ("avg", "fast", "fastavg"):
        raise ValueError(
            f"The head has global_pool={kind!r}, and the classifier here takes the mean of the feature map: only "
            "models with global_pool='avg' are converted."
        )
    if not isinstance(timm_model.head.fc, (nn.Linear, nn.Identity)):
        raise ValueError(
            f"The classifier is {type(timm_model.head.fc).__name__}: only models with nn.Linear, or none, are "
            "converted."
        )


def _config_of(timm_model: nn.Module, state_dict: dict[str, torch.Tensor]) -> RepVGGConfig:
    """Return the configuration that the shapes describe; strides and epsilon, in no shape, come from the modules."""
    deploy = not any(".branches." in key for key in state_dict)
    kernel_key = "conv.weight" if deploy else "conv.branches.3x3.conv.weight"
    stem = state_dict[f"repvgg.embeddings.layer.{kernel_key}"]
    squeeze = state_dict.get("repvgg.embeddings.layer.attention.fc1.weight")
    stages = []  # kernels [out, in / groups, 3, 3] of each stage's layers
    for stage in range(len(timm_model.stages)):
        layers = range(len(timm_model.stages[stage]))
        stages.append([state_dict[f"repvgg.encoder.stages.{stage}.layers.{layer}.{kernel_key}"] for layer in layers])
    outs = [stem.shape[0], *(kernel.shape[0] for stage in stages for kernel in stage)]
    ins = [kernel.shape[1] for stage in stages for kernel in stage]
    classifier = state_dict.get("classifier.weight")
    norms = [module for module in timm_model.modules() if isinstance(module, nn.BatchNorm2d)]
    names = timm_label_names(timm_model)
    labels = {} if names is None else {"id2label": names, "label2id": {name: index for index, name in names.items()}}
    return RepVGGConfig(
        num_channels=stem.shape[1],
        stem_hidden_size=stem.shape[0],
        hidden_sizes=[stage[0].shape[0] for stage in stages],
        depths=[len(stage) for stage in stages],
        stem_stride=_stride(timm_model.stem),
        strides=[_stride(stage[0]) for stage in timm_model.stages],
        groups=max(before // width for before, width in zip(outs, ins)),
        use_squeeze_excitation=squeeze is not None,
        squeeze_ratio=16 if squeeze is None else stem.shape[0] // squeeze.shape[0],
        batch_norm_eps=norms[0].eps if norms else 1e-5,
        oabn=False,
        deploy=deploy,
        num_labels=0 if classifier is None else classifier.shape[0],
        **labels,
    )


def _stride(layer: nn.Module) -> int:
    """Return the stride of a layer's convolutions."""
    return max(module.stride[0] for module in layer.modules() if isinstance(module, nn.Conv2d))
