"""Counting parameters, multiply-accumulates and activations of a model, from its configuration alone."""

import copy
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..runtime.configuration_repvgg import RepVGGConfig


@dataclass
class Complexity:
    """What a model takes for one image.

    Attributes:
        parameters (`int`): those that train, in train form, or their fused equivalent, whatever bits they are stored
            with.
        macs (`int`): multiply-accumulates.
        activations (`int`): entries that convolutions and the classifier put out.
    """

    parameters: int
    macs: int
    activations: int


def measure_complexity(config: RepVGGConfig, image_size: int, deploy: bool) -> Complexity:
    """Count what the classifier that `config` describes takes, from one forward pass that needs no memory.

    The pass runs on the `meta` device. Batch norms, activation functions and means are not counted, as is usual.

    Args:
        config ([`RepVGGConfig`]): the classifier's configuration; how it is quantized changes nothing.
        image_size (`int`): side in pixels of a square image.
        deploy (`bool`): count the fused model instead of the one with branches.
    """
    from ..runtime.modeling_repvgg import RepVGGForImageClassification

    config = copy.deepcopy(config)
    config.deploy = deploy
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        model = RepVGGForImageClassification(config).eval()
        pixel_values = torch.empty(1, config.num_channels, image_size, image_size)
    with torch.no_grad(), _Counter() as counter:
        model(pixel_values)
    return Complexity(model.num_parameters(), counter.macs, counter.activations)


class _Counter(TorchDispatchMode):
    """A mode that sees every operation, also those that no module's hook would: branches may call a convolution."""

    def __init__(self):
        super().__init__()
        self.macs, self.activations = 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        output = operation(*args, **(kwargs or {}))
        terms = None  # of the sum that gives one entry of the output
        if operation is torch.ops.aten.convolution.default:
            terms = args[1][0].numel()  # weight[0]
        elif operation is torch.ops.aten.addmm.default:
            terms = args[1].shape[1]
        if terms is not None:
            self.macs += output.numel() * terms
            self.activations += output.numel()
        return output
