"""The optimizer's groups and steps, and the moving average, against formulas by hand."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from repvgg_hf import RepVGGForImageClassification
from repvgg_hf.training.optimizer import MovingAverage, build_sgd


def test_only_kernels_decay(tiny_config):
    model = RepVGGForImageClassification(tiny_config()).prepare_qat("uniform", 4, granularity="per_channel")
    model.classifier.weight.requires_grad_(False)
    kernels, others = build_sgd(model, 0.1, 5e-4, 0.8).param_groups
    assert (kernels["weight_decay"], others["weight_decay"]) == (5e-4, 0.0)
    expected = {id(layer.weight) for layer in model.modules() if isinstance(layer, nn.Conv2d)}
    assert {id(parameter) for parameter in kernels["params"]} == expected
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert {id(parameter) for parameter in others["params"]} == trained - expected
    assert all(group["momentum"] == 0.8 and group["nesterov"] and group["lr"] == 0.1 for group in (kernels, others))


def test_steps_are_nesterovs():
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1.0)
    optimizer = build_sgd(layer, learning_rate=0.1, weight_decay=0.5, momentum=0.9)
    weight, velocity = 1.0, 0.0
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.ones(1, 1)).sum().backward()
        optimizer.step()
        gradient = 1.0 + 0.5 * weight
        velocity = 0.9 * velocity + gradient
        weight -= 0.1 * (gradient + 0.9 * velocity)
    torch.testing.assert_close(layer.weight.item(), weight, atol=1e-6, rtol=0)
    assert not build_sgd(layer, 0.1, 0.0, momentum=0.0).param_groups[0]["nesterov"]


def test_the_average_is_of_all_steps():
    model = nn.BatchNorm2d(2)
    average = MovingAverage(model, decay=0.75)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}  # begins at the model
    for step in range(4):
        for name, tensor in model.state_dict().items():
            tensor.copy_(torch.full_like(tensor, 3 + step))
            mixed = 0.75 * expected[name] + 0.25 * tensor
            expected[name] = mixed if tensor.is_floating_point() else tensor.clone()
        average.update_parameters(model)
    for name, tensor in average.module.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])
    assert average.module.num_batches_tracked == 6 and average.module.num_batches_tracked.dtype == torch.int64


def test_the_average_is_pytorchs(tiny_config):
    """That of `torch.optim.swa_utils`, bit for bit."""
    model = RepVGGForImageClassification(tiny_config())
    average = MovingAverage(model, 0.9)
    reference = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    reference.update_parameters(model)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update_parameters(model)
        reference.update_parameters(model)
    expected = dict(reference.module.named_parameters())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in average.module.named_parameters())
    with pytest.raises(ValueError, match="must be from 0 to 1, got 1.5"):
        MovingAverage(model, 1.5)


def test_the_average_is_saved_and_loaded():
    model = nn.Linear(2, 2)
    average, other = MovingAverage(model, 0.9), MovingAverage(nn.Linear(2, 2), 0.9)
    with torch.no_grad():
        model.weight.add_(1)
    average.update_parameters(model)
    other.load_state_dict(average.state_dict())
    for each in (average, other):
        each.update_parameters(model)
    assert torch.equal(average.module.weight, other.module.weight)
