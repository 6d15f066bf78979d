"""What a user writes, for the type checker: the test beside it checks this file and never runs it."""

import torch
from torch import nn

from repvgg_hf import ClusterConfig, QATConfig, RepVGGConfig, RepVGGForImageClassification, update_codebooks


def load(folder: str) -> RepVGGForImageClassification:
    model = RepVGGForImageClassification.from_pretrained(folder)
    return model.reparameterize()


def quantize(folder: str) -> RepVGGForImageClassification:
    model = load(folder)
    return model.quantize("cluster", bits=3, granularity="per_channel", bits_overrides={"classifier": 8})


def quantize_calibrated(folder: str, batches: list[torch.Tensor]) -> None:
    model = RepVGGForImageClassification.from_pretrained(folder)
    model.quantize(method="uniform", bits=8, symmetric=True, activation_bits=8, calibration=batches)
    model.save_pretrained(folder + "-w8")


def quantize_while_loading(folder: str) -> torch.Tensor:
    config = ClusterConfig(bits=2, granularity="per_group", group_size=4)
    model = RepVGGForImageClassification.from_pretrained(folder, quantization_config=config)
    outputs = model(torch.zeros(1, 3, 224, 224))
    assert outputs.logits is not None
    return outputs.logits


def train(batches: list[torch.Tensor], labels: list[torch.Tensor]) -> nn.Module:
    model = RepVGGForImageClassification(RepVGGConfig.from_variant("a0", num_labels=10))
    model.prepare_qat(bits=4, channel_scale=True, qat_config=QATConfig(codebook_momentum=0.5, blend_steps=100))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for pixel_values, label in zip(batches, labels):
        model(pixel_values, labels=label).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_codebooks(model)
    return model.quantize()
