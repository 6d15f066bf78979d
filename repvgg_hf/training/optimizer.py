"""The optimizer of float and quantization-aware training, and the moving average of what it trains."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def build_sgd(model: nn.Module, learning_rate: float, weight_decay: float, momentum: float = 0.9) -> torch.optim.SGD:
    """Build SGD with Nesterov momentum, and weight decay on kernels only, as in RepVGG's own training.

    Codebooks, steps and scales of fake quantizers, batch norms and biases do not decay. `momentum=0` is plain SGD.
    """
    kernels, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_kernel = parameter.dim() > 1 and "fake_quant" not in name
            (kernels if is_kernel else others).append(parameter)
    groups = [{"params": kernels, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, nesterov=momentum > 0)


def moving_average(model: nn.Module, decay: float, device: torch.device | None = None) -> AveragedModel:
    """Return the exponential moving average of a model's state, as a copy of the model that begins at what it is now.

    Call its `update_parameters(model)` after each optimizer step. Parameters and buffers of floating-point type are
    averaged, integers (such as counts of steps) copied.

    Args:
        model: what trains.
        decay: share of the average that each step keeps, 0 to 1.
        device: where the average is kept; by default where the model is.
    """
    average_floats = get_ema_multi_avg_fn(decay)

    def update(averages: list[torch.Tensor], values: list[torch.Tensor], count) -> None:  # each list of one dtype
        if averages[0].is_floating_point():
            average_floats(averages, values, count)
        else:
            for average, value in zip(averages, values):
                average.copy_(value)

    average = AveragedModel(model, device=device, multi_avg_fn=update, use_buffers=True)
    average.update_parameters(model)  # the first call copies
    return average
