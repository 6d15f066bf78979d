"""How much the loss depends on each weight."""

import copy

import pytest
import torch
import torch.nn.functional as F

from repvgg_hf import CalibrationConfig, RepVGGModel
from repvgg_hf.compression.ptq.data import CalibrationData
from repvgg_hf.compression.ptq.sensitivity import diagonal_fisher


def logits(model, images):
    with torch.no_grad():
        return model(images).logits


def test_labels_steer_the_fisher_information(model, images):
    """The diagonal Fisher against one gradient after the other, and its use as the importance of weights."""
    fused = copy.deepcopy(model).reparameterize()
    name = "repvgg.encoder.stages.0.layers.0.conv"
    labels = torch.arange(48) % 4
    data = CalibrationData([(images, labels)])
    found = diagonal_fisher(fused, data, [name])[name]
    expected = torch.zeros_like(found)
    for image, label in zip(images, labels):
        fused.zero_grad()
        F.cross_entropy(fused(image[None]).logits, label[None]).backward()
        expected += fused.get_submodule(name).weight.grad ** 2 / 48
    assert torch.allclose(found, expected, rtol=1e-4)
    predicted = diagonal_fisher(fused, CalibrationData(images), [name])[name]
    assert not torch.allclose(found, predicted, rtol=0.1)

    how = CalibrationConfig(sensitivity="fisher")
    with_labels = copy.deepcopy(model).quantize(bits=2, calibration=[(images, labels)], calibration_config=how)
    without = copy.deepcopy(model).quantize(bits=2, calibration=images, calibration_config=how)
    assert not torch.equal(logits(with_labels, images), logits(without, images))


def test_a_model_without_a_loss_is_refused(tiny_config, images):
    model = RepVGGModel(tiny_config()).eval()
    with pytest.raises(
        ValueError, match="^sensitivity='fisher' needs a loss, and RepVGGModel has no classifier: use 'n"
    ):
        model.quantize(calibration=images, calibration_config=CalibrationConfig(sensitivity="fisher"))
