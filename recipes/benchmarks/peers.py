"""The same network as timm has it and as we have it, with the same weights."""

import copy

import timm
import torch
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg

from repvgg_hf import RepVGGForImageClassification

CIFAR_WIDTHS, CIFAR_DEPTHS = (48, 96, 192, 256), (2, 4, 4, 1)


def timm_model(variant: str) -> torch.nn.Module:
    """timm's model of a published variant, or the study's small network for 32 px images, `"cifar"`, in train form."""
    if variant != "cifar":
        return timm.create_model(f"repvgg_{variant}")
    blocks = tuple(ByoBlockCfg(type="rep", d=depth, c=width) for depth, width in zip(CIFAR_DEPTHS, CIFAR_WIDTHS))
    model = ByobNet(ByoModelCfg(blocks=blocks, stem_type="rep", stem_chs=32), num_classes=10)
    for module in model.stem.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.stride = (1, 1)  # timm's configuration has no stride for the stem
    return model


def channels_last(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of a timm model in train form that computes the same with its channels last."""
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    branch = model.stem.conv_1x1
    step_h, step_w = branch.conv.stride
    # oneDNN 3.12 (PyTorch 2.14) corrupts memory in the gradient of a strided 1x1 convolution of so few channels
    # (uxlfoundation/oneDNN#6035): skip the pixels before it, as our branches do
    branch.conv.stride = (1, 1)
    branch.register_forward_pre_hook(lambda module, inputs: (inputs[0][:, :, ::step_h, ::step_w],))
    return model


def with_oabn(model: RepVGGForImageClassification) -> RepVGGForImageClassification:
    """A copy of a train-form `model` that trains with OABN."""
    config = type(model.config).from_dict(model.config.to_dict() | {"oabn": True})
    bounded = RepVGGForImageClassification(config)
    bounded.load_state_dict(model.state_dict())
    return bounded.train(model.training)


def check_agreement(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> float:
    """The largest difference relative to the largest value. Raises `ValueError` if it is more than `tolerance`."""
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    if not error <= tolerance:  # also true for NaN
        raise ValueError(f"Not the same network: our output differs from timm's by {error:.1e} (at most {tolerance}).")
    return error
