"""How much the loss depends on each weight."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_models import make_model
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from repvgg_hf import CalibrationConfig, RepVGGModel
from repvgg_hf.compression.ptq.data import CalibrationData
from repvgg_hf.compression.ptq.outputs import calibration_loss, floating_outputs, relative_error
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


def jacobian_squares(model, x, weight) -> torch.Tensor:
    """What a change of each entry of `weight` by one changes the outputs by, squared, over their squared norm."""
    outputs = floating_outputs(model(x))
    total = torch.zeros_like(weight)
    for output in outputs:
        for entry in output.flatten():
            total += (
                torch.autograd.grad(entry, weight, retain_graph=True, materialize_grads=True)[0] ** 2
                / output.detach().square().sum()
            )
    return total


def test_without_labels_or_classes_it_is_how_far_the_outputs_move(generator):
    """The mean over many random combinations, against the Jacobian itself; for outputs of any form."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.boxes, self.scores, self.unused = (nn.Linear(3, 3) for _ in range(4))

        def forward(self, x):
            x = self.body(x).tanh()
            return (None, {"boxes": self.boxes(x), "count": torch.tensor(1)}, [self.scores(x) * 10])

    torch.manual_seed(0)
    model, x = Net(), torch.randn(1, 3, generator=generator)
    names = ["body", "boxes", "scores", "unused"]
    found = diagonal_fisher(model, CalibrationData(x.expand(1000, 3), 500, model=model), names)
    assert list(found) == names[:3]
    for name, squares in found.items():
        expected = jacobian_squares(model, x, model.get_submodule(name).weight)
        torch.testing.assert_close(squares, expected, rtol=0.25, atol=1e-3)
    weight = model.scores.weight
    before = floating_outputs(model(x))
    with torch.no_grad():
        weight[1, 2] += 0.01
        moved = relative_error(floating_outputs(model(x)), before) * len(before)
    torch.testing.assert_close(moved, 0.01**2 * jacobian_squares(model, x, weight)[1, 2], rtol=0.05, atol=0)


def test_a_base_model_measures_its_outputs(tiny_config, images):
    model = RepVGGModel(tiny_config()).eval()
    how = CalibrationConfig(sensitivity="fisher")
    with torch.no_grad():
        expected = model(images).pooler_output
        model.quantize(bits=6, calibration=images[:8], calibration_config=how)
        assert (model(images).pooler_output - expected).norm() < 0.1 * expected.norm()


def test_the_loss_of_a_foreign_classifier(images):
    """Its own with labels, by its predictions without; the cross-entropy for a module that has no loss."""
    torch.manual_seed(0)
    model = ResNetForImageClassification(
        ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], num_labels=3, layer_type="basic")
    ).eval()

    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, pixel_values):
            return self.model(pixel_values).logits

    plain, images, labels = Scores(), images[:4], torch.tensor([0, 1, 2, 0])
    name = "resnet.embedder.embedder.convolution"

    def fisher(net, data, name):
        return diagonal_fisher(net, CalibrationData([data], model=net), [name])[name]

    def by_hand(labels):
        total = 0
        weight = model.get_submodule(name).weight
        for image, label in zip(images, labels):
            loss = F.cross_entropy(model(image[None]).logits, label[None])
            total = total + torch.autograd.grad(loss, weight)[0] ** 2 / len(images)
        return total

    with_labels = fisher(model, {"pixel_values": images, "labels": labels}, name)
    torch.testing.assert_close(with_labels, by_hand(labels))
    torch.testing.assert_close(fisher(plain, (images, labels), f"model.{name}"), with_labels)
    predicted = model(images).logits.argmax(dim=1)
    torch.testing.assert_close(fisher(model, images, name), by_hand(predicted))
    assert not torch.allclose(fisher(plain, images, f"model.{name}"), by_hand(predicted))  # no scores, for all it knows


def test_the_loss_of_a_detector(images, generator):
    """Boxes of each image are its labels, which `forward` takes as they are."""
    model = make_model("rtdetr")
    boxes = 0.3 + 0.3 * torch.rand(4, 2, 4, generator=generator)
    labels = [{"class_labels": torch.tensor([1, 2]), "boxes": of_image} for of_image in boxes]
    batch = {"pixel_values": F.interpolate(images[:4], size=64), "labels": labels, "image_id": torch.arange(4)}
    (read,) = CalibrationData([batch], model=model).batches
    found = calibration_loss(model, read.take(slice(2, 3)), generator)
    expected = model(batch["pixel_values"][2:3], labels=labels[2:3]).loss
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_labels_that_are_of_no_use(images):
    model = nn.Sequential(nn.Conv2d(3, 2, 3))
    data = CalibrationData([(images, torch.arange(48))], model=model)
    with pytest.raises(
        ValueError, match=r"^Sequential.forward takes no labels, and puts out \[1, 2, 14, 14\], which is"
    ):
        diagonal_fisher(model, data, ["0"])
    frozen = CalibrationData(images, model=model)
    model.register_forward_hook(lambda module, args, output: output.detach())
    with pytest.raises(ValueError, match="outputs of Sequential have no gradient.* sensitivity='none'"):
        diagonal_fisher(model, frozen, ["0"])
