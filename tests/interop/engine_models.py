"""A small trained network for the tests of engines, quantized, with images that it was not trained on."""

import functools

import torch
import torch.nn.functional as F
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

import repvgg_hf
from repvgg_hf import RepVGGConfig, RepVGGForImageClassification

SIZE = 16


def pictures(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noisy images whose label is the brighter quadrant, `[count, 3, 16, 16]`, and the labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    images = torch.randn(count, 3, SIZE, SIZE, generator=generator)
    half = SIZE // 2
    for image, label in zip(images, labels):
        row, column = half * (label // 2), half * (label % 2)
        image[:, row : row + half, column : column + half] += 0.4
    return images, labels


@functools.cache
def _trained(squeeze_excitation: bool) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = RepVGGForImageClassification(_config(squeeze_excitation))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        images, labels = pictures(256, seed=1)
        for step in range(48):
            batch = torch.arange(32) + 32 * (step % 8)
            loss = F.cross_entropy(model(images[batch]).logits, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.state_dict()


def _config(squeeze_excitation: bool) -> RepVGGConfig:
    return RepVGGConfig(
        stem_hidden_size=16, hidden_sizes=[16, 32], depths=[2, 2], strides=[2, 2], groups=2, num_labels=4,
        use_squeeze_excitation=squeeze_excitation, squeeze_ratio=4,
    )  # fmt: skip


def trained_float(squeeze_excitation: bool = False) -> RepVGGForImageClassification:
    """Return the float network in train form: a stem, four layers of which two are grouped, a classifier."""
    model = RepVGGForImageClassification(_config(squeeze_excitation))
    model.load_state_dict(_trained(squeeze_excitation))
    return model.eval()


def trained(bits: int = 4, squeeze_excitation: bool = False, **options) -> RepVGGForImageClassification:
    """Return the network quantized after training, with the integers that engines take."""
    options = {"activation_bits": 8, "codebook_dtype": "int8", "channel_scale": True} | options
    model = trained_float(squeeze_excitation).reparameterize()
    return model.quantize(bits=bits, calibration=[pictures(64, seed=2)[0]], **options).eval()


def residual_network() -> nn.Module:
    """Return a network that is none of this package: a tiny ResNet with random weights, fused, W4A8."""
    config = ResNetConfig(embedding_size=16, layer_type="basic", num_labels=5, hidden_sizes=[16, 32], depths=[1, 1])
    model = ResNetForImageClassification(config).eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 1.5)
    images = pictures(32, seed=2)[0]
    repvgg_hf.fuse(model, images)
    return repvgg_hf.quantize(model, bits=4, activation_bits=8, calibration=[images]).eval()


# the least share of images with the same logits to a float sum's rounding: others have a value between two integers
NEAR = 0.95


def agreement(actual: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Return the share of images with the same first class, and that with logits within 1e-5 standard deviations."""
    same = (actual.argmax(1) == expected.argmax(1)).double().mean().item()
    near = (actual.double() - expected.double()).abs().amax(1) < 1e-5 * expected.double().std()
    return same, near.double().mean().item()
