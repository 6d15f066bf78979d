"""The chain of blocks, and what goes into a layer of one."""

import pytest
import torch
from torch import nn

from repvgg_hf import RepVGGBackbone, RepVGGForImageClassification, RepVGGModel
from repvgg_hf.compression.ptq.blocks import is_chain, layer_input, quantizable, run_blocks


@pytest.fixture
def images(generator):
    return torch.randn(10, 3, 16, 16, generator=generator)


@pytest.mark.parametrize("squeeze", [False, True])
def test_chain_runs_as_the_model_does(squeeze, tiny_config, images):
    fields = {"use_squeeze_excitation": squeeze, "deploy": True}
    for model_class in (RepVGGForImageClassification, RepVGGModel, RepVGGBackbone):
        model = model_class(tiny_config(num_labels=4, **fields)).eval()
        x = images
        names = []
        for block in model.calibration_blocks().items():
            x = block[1](x)
            names += [name for name, _ in quantizable(*block)]
        outputs = model(images)
        expected = outputs.feature_maps[-1] if model_class is RepVGGBackbone else outputs[0]
        assert torch.allclose(x, expected, atol=1e-6)
        every = [name for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
        assert names == every


@torch.no_grad()
def test_what_is_no_chain(make_model, images):
    model = make_model("deploy").eval()
    blocks = model.calibration_blocks()
    assert is_chain(model, blocks, images[:2])
    del blocks[""]  # the classifier
    assert not is_chain(model, blocks, images[:2])  # other shapes
    model.repvgg.encoder.stages[0].layers[0].register_forward_hook(lambda module, args, output: output)
    assert is_chain(model, model.calibration_blocks(), images[:2])
    model.repvgg.encoder.stages[0].register_forward_hook(lambda module, args, output: 2 * output)
    assert not is_chain(model, model.calibration_blocks(), images[:2])  # other values


@torch.no_grad()
def test_layer_inputs_are_what_a_hook_sees_in_the_whole_model(tiny_config, images):
    model = RepVGGForImageClassification(tiny_config(use_squeeze_excitation=True, deploy=True)).eval()
    seen = {}
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(lambda module, args, output, name=name: seen.update({name: args[0]}))
    model(images)
    x, found = images, {}
    for block_name, block in model.calibration_blocks().items():
        found |= {name: layer_input(block, layer, x) for name, layer in quantizable(block_name, block)}
        x = run_blocks([block], x)
    assert found.keys() == seen.keys() and len(found) == 16
    for name, value in seen.items():
        torch.testing.assert_close(found[name], value)


def test_a_layer_that_does_not_run_is_found(images):
    block = nn.Sequential(nn.Conv2d(3, 4, 1))
    with pytest.raises(RuntimeError, match="^The forward pass of Sequential does not run its Linear"):
        layer_input(block, nn.Linear(2, 2), images)
    assert block(images).shape == (10, 4, 16, 16)  # no hook is left
