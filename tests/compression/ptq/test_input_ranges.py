"""Input ranges for quantization-aware training, against the inputs themselves."""

import numpy as np
import pytest
import torch
from torch import nn

from repvgg_hf import CalibrationConfig, ClusterConfig
from repvgg_hf.compression.ptq.data import CalibrationData
from repvgg_hf.compression.ptq.input_ranges import observe_ranges

A8 = ClusterConfig(activation_bits=8)


def inputs_of(model, names, images):
    """What goes into each layer when all images run at once."""
    seen = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: args[0].numpy()})
        )
        for name in names
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return seen


def layer_names(model):
    return [name for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]


@pytest.mark.parametrize("bits", [8, 4])
def test_minmax_is_from_the_least_to_the_largest_input(bits, model, images):
    fused = model.reparameterize()
    names = layer_names(fused)
    how = CalibrationConfig(activation_range="minmax")
    config = ClusterConfig(activation_bits=bits)
    found, _ = observe_ranges(fused, names, CalibrationData(images, batch_size=7), config, how)
    assert list(found) == names
    for name, x in inputs_of(fused, names, images).items():
        low, high = min(float(x.min()), 0), max(float(x.max()), 0)
        scale, zero_point = found[name]
        assert scale == pytest.approx((high - low) / (2**bits - 1), rel=1e-5)
        assert zero_point == round(-low / scale) and (zero_point == 0) == (low == 0)


def test_mse_is_no_worse_than_any_range_of_a_grid(model, images):
    fused = model.reparameterize()
    names = layer_names(fused)
    config = ClusterConfig(activation_bits=4)
    found, _ = observe_ranges(fused, names, CalibrationData(images, batch_size=16), config, CalibrationConfig())
    for name, x in inputs_of(fused, names, images).items():

        def error(scale, zero_point, x=x):
            integers = np.clip(np.rint(x / scale) + zero_point, 0, 15)
            return np.square((integers - zero_point) * scale - x).mean()

        low, high = min(float(x.min()), 0), max(float(x.max()), 0)
        best = np.inf
        for share in np.linspace(0.3, 1, 29):
            for low_share in np.linspace(0.3, 1, 29) if low < 0 else [1]:
                scale = (high * share - low * low_share) / 15
                best = min(best, error(scale, round(-low * low_share / scale)))
        assert error(*found[name]) <= 1.03 * best


def test_only_the_layers_asked_for_and_no_hook_is_left(model, images):
    fused = model.reparameterize()
    data = CalibrationData(images)
    found, outputs = observe_ranges(fused, ["classifier"], data, A8, CalibrationConfig())
    assert list(found) == ["classifier"] and outputs == {}
    assert not any(module._forward_pre_hooks for module in fused.modules())


def test_inputs_that_are_not_finite_name_the_layer(model, images):
    fused = model.reparameterize()
    fused.repvgg.embeddings.layer.conv.bias.data[0] = float("inf")
    with pytest.raises(ValueError, match="^The input of 'repvgg.encoder.stages.0.layers.0.conv': .*NaN or infinite"):
        observe_ranges(fused, layer_names(fused), CalibrationData(images), A8, CalibrationConfig())
    assert not any(module._forward_pre_hooks for module in fused.modules())


def test_a_layer_that_does_not_run(model, images):
    fused = model.reparameterize()
    fused.unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="^'unused' gets no input when the model runs: name it in modules_to_not"):
        observe_ranges(fused, ["classifier", "unused"], CalibrationData(images), A8, CalibrationConfig())
