"""What a timm model computes beside its weights: other heads and activations are refused by name, dropout is not."""

import pytest
import timm
import torch
from torch import nn

from repvgg_hf.networks import from_timm


def tiny_timm(num_classes=5, config=None, **kwargs):
    model = timm.models.byobnet
    fields = {"blocks": model._rep_vgg_bcfg(d=(2, 2), wf=(0.125, 0.125)), "stem_type": "rep", "stem_chs": 8}
    return model.ByobNet(model.ByoModelCfg(**fields | (config or {})), num_classes=num_classes, **kwargs)


@pytest.mark.parametrize("kind", ["max", "avgmax", "catavgmax", "fastmax", ""])
@pytest.mark.parametrize("num_classes", [0, 5])
def test_other_pooling_is_refused(kind, num_classes):
    with pytest.raises(ValueError, match=f"global_pool='{kind}'.*only models with global_pool='avg' are converted"):
        from_timm(tiny_timm(num_classes, global_pool=kind))


def test_pooling_changed_later_is_refused():
    model = tiny_timm()
    model.reset_classifier(3, global_pool="max")
    with pytest.raises(ValueError, match="global_pool='max'"):
        from_timm(model)


@pytest.mark.parametrize("kind", ["avg", "fast", "fastavg"])
@torch.no_grad()
def test_means_are_converted(kind, generator, relative_error):
    theirs = tiny_timm(global_pool=kind).eval()
    pixel_values = torch.randn(2, 3, 32, 32, generator=generator)
    assert relative_error(from_timm(theirs)(pixel_values).logits, theirs(pixel_values)) < 1e-5


@torch.no_grad()
def test_drop_rates_change_no_prediction(generator, relative_error):
    theirs = tiny_timm(drop_rate=0.3, drop_path_rate=0.2, drop_block_rate=0.1).eval()
    pixel_values = torch.randn(2, 3, 32, 32, generator=generator)
    assert relative_error(from_timm(theirs)(pixel_values).logits, theirs(pixel_values)) < 1e-5


def test_an_activation_of_a_later_block_is_refused():
    model = tiny_timm()
    model.stages[1][0].act = nn.SiLU()
    with pytest.raises(ValueError, match="The activation is SiLU: only models with ReLU are converted"):
        from_timm(model)


def test_another_gate_is_refused():
    model = tiny_timm(config={"attn_layer": "se"})
    model.stages[0][0].attn.gate = nn.Hardsigmoid()
    with pytest.raises(ValueError, match="ReLU and Hardsigmoid"):
        from_timm(model)


def test_dilation_is_refused():
    with pytest.raises(ValueError, match=r"stages\.\d\.\d\.conv_\w+\.conv has dilation \(2, 2\).*output_stride=32"):
        from_timm(timm.create_model("repvgg_a0", output_stride=8))


def test_another_head_is_refused():
    with pytest.raises(ValueError, match=r"unknown keys head\.norm\.weight"):
        from_timm(tiny_timm(config={"head_type": "mlp"}))
    model = tiny_timm()
    model.head.fc = nn.Sequential(model.head.fc)
    with pytest.raises(ValueError, match=r"head\.fc"):
        from_timm(model)
