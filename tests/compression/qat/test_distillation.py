"""Losses of a student and its teacher."""

import copy

import pytest
import torch

from repvgg_hf import Distillation
from repvgg_hf.compression.qat.distillation import distillation_loss, feature_loss


def test_distillation_loss_is_the_divergence(generator):
    student, teacher = torch.randn(2, 5, 7, generator=generator)
    for temperature in (1.0, 3.0):
        p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
        expected = (p * (p / q).log()).sum(dim=1).mean() * temperature**2
        torch.testing.assert_close(distillation_loss(student, teacher, temperature), expected)
    assert distillation_loss(teacher, teacher) == pytest.approx(0, abs=1e-6)
    assert feature_loss((2 * teacher,), (teacher,)) == pytest.approx(1)


def test_the_teacher_is_the_float_model_and_stays_it(make_model, batch):
    model = make_model().train()
    distillation = Distillation(model, weight=1.0, temperature=1.0, features=0.5)
    before = copy.deepcopy(distillation.teacher.state_dict())
    model.eval()
    outputs = model(**batch, output_hidden_states=True)
    assert distillation(outputs, batch["pixel_values"]).item() == pytest.approx(0, abs=1e-5)
    model.prepare_qat(bits=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for _ in range(10):
        loss = distillation(model(**batch, output_hidden_states=True), batch["pixel_values"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in distillation.teacher.state_dict().items())
    assert not any("teacher" in name for name in model.state_dict())


def test_distillation_options(make_model, batch):
    model = make_model()
    with pytest.raises(ValueError, match="weight must be from 0 .* got 2"):
        Distillation(model, weight=2)
    with pytest.raises(ValueError, match="temperature must be positive"):
        Distillation(model, temperature=0)
    distillation = Distillation(model)
    outputs = model(**batch)
    outputs.logits = outputs.logits[:, :3]
    with pytest.raises(ValueError, match="The teacher has 4 classes, the student 3"):
        distillation(outputs, batch["pixel_values"])
