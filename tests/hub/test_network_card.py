"""Publishing a quantized model of another architecture, whose checkpoint no code travels with."""

import re

import pytest
import torch
from loopback_store import PUBLIC
from torch import nn
from transformers import BitImageProcessor, ResNetConfig, ResNetForImageClassification

import repvgg_hf
from repvgg_hf.hub import publish
from repvgg_hf.hub.network_card import NetworkCard, read_card

REPO = "org/resnet-w4"


@pytest.fixture
def resnet():
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3, layer_type="basic")
    return ResNetForImageClassification(config).eval()


@pytest.fixture
def push():
    processor = BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})

    def run(model, **options):
        return publish(model, REPO, **({"processor": processor, **PUBLIC} | options))

    return run


def test_loads_as_the_card_says(hub, push, resnet, fresh_process, tmp_path):
    repvgg_hf.quantize(resnet, bits=4)
    push(resnet)
    files = hub.files(REPO)
    assert not [name for name in files if name.endswith(".py")]
    card = files["README.md"].decode()
    (usage,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    x = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    ask = "\nimport torch\nx = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)\n"
    ask += "print(*model.eval()(x).logits[0].tolist())"
    shown = fresh_process(usage + ask, hub.url, tmp_path)
    with torch.no_grad():
        assert [float(text) for text in shown.split()] == resnet(x).logits[0].tolist()
    # and without the package it ends with the error that the card tells of
    without = fresh_process(usage.replace("import repvgg_hf", "pass") + ask, hub.url, tmp_path, expect=1)
    assert "size" in without and "torch.Size([0])" in without


def test_card(hub, push, resnet, tmp_path):
    resnet.config._name_or_path = "microsoft/resnet-18"
    repvgg_hf.quantize(resnet, bits=3)
    push(resnet, folder=tmp_path / "repo")
    card = read_card(tmp_path / "repo" / "card.json")
    assert isinstance(card, NetworkCard) and str(card) == (tmp_path / "repo" / "README.md").read_text(encoding="utf-8")
    metadata = card.metadata()
    assert metadata.pipeline_tag == "image-classification" and "3-bit" in metadata.tags
    assert metadata.base_model == "microsoft/resnet-18" and metadata.library_name == "transformers"
    assert "pip install repvgg-hf" in str(card) and "RepVGG image classifier" not in str(card)


def test_fused_structure_is_told(push, resnet, tmp_path):
    repvgg_hf.fuse(resnet, {"pixel_values": torch.randn(1, 3, 32, 32)})
    repvgg_hf.quantize(resnet, bits=4)
    push(resnet, folder=tmp_path / "repo", dry_run=True)
    count = len(resnet.config.quantization_config.fused_structure)
    assert f"{count} modules" in (tmp_path / "repo" / "README.md").read_text(encoding="utf-8")


def test_again_and_over_another_model(hub, push, resnet, tiny_model, processor):
    push(repvgg_hf.quantize(resnet, bits=4))
    assert not push(resnet).changed
    with pytest.raises(ValueError, match="something else than a RepVGG model"):
        publish(tiny_model(4), REPO, processor=processor, **PUBLIC)


@pytest.mark.parametrize("problem", ["float", "plain"])
def test_refused(hub, push, resnet, problem):
    model = {"float": resnet, "plain": nn.Sequential(nn.Linear(4, 2))}[problem]
    with pytest.raises(ValueError, match={"float": "quantize it before", "plain": "save_quantized"}[problem]):
        push(model)
    assert not hub.repos
