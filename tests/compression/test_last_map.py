"""The last feature map is rounded where activations are: after training, in training, and in the checkpoint."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from repvgg_hf import (
    CalibrationConfig,
    ClusterConfig,
    RepVGGBackbone,
    RepVGGForImageClassification,
    RepVGGModel,
    quantize,
    update_codebooks,
)
from repvgg_hf.compression.qat.layers import qat_layers
from repvgg_hf.runtime.cluster_layers import cluster_layers

LAST = "repvgg.encoder.stages.1.layers.1.conv"
A8 = {"bits": 4, "activation_bits": 8}


@pytest.fixture
def images(batch):
    return batch["pixel_values"]


def last_output(model, images) -> torch.Tensor:
    """What the last convolution puts out, before its activation."""
    found = []
    hook = model.get_submodule(LAST).register_forward_hook(lambda module, args, output: found.append(output.clone()))
    with torch.no_grad():
        model.eval()(images)
    hook.remove()
    return found[0]


def rounded_layers(model) -> list[str]:
    return [name for name, layer in cluster_layers(model).items() if layer.rounds_output]


class TestAfterTraining:
    @pytest.mark.parametrize("order", ["sequential", "one_pass"])
    @pytest.mark.parametrize("bits", [8, 4])
    def test_it_takes_integers_only(self, bits, order, make_model, images):
        how = CalibrationConfig(order=order)
        model = make_model().quantize(bits=4, activation_bits=bits, calibration=images, calibration_config=how)
        assert model.config.quantization_config.quantize_last_map is True and rounded_layers(model) == [LAST]
        layer = model.get_submodule(LAST)
        assert layer.output_zero_point == 0  # rounding cuts off what the ReLU would
        output = last_output(model, images)
        integers = (output / layer.output_scale).round()
        assert torch.equal(integers * layer.output_scale, output)
        assert integers.min() == 0 and 1 < integers.max() <= 2**bits - 1
        assert integers.unique().numel() > 8

    def test_its_range_is_the_best_for_what_the_quantized_layers_put_out(self, make_model, images):
        how = CalibrationConfig(activation_range="minmax")
        options = A8 | {"calibration": images, "calibration_config": how}
        without = make_model().quantize(**options, quantize_last_map=False)
        largest = last_output(without, images).max().item()
        assert make_model().quantize(**options).get_submodule(LAST).output_scale == pytest.approx(
            largest / 255, rel=1e-5
        )
        assert without.config.quantization_config.quantize_last_map is False and rounded_layers(without) == []

    def test_the_head_is_calibrated_on_the_rounded_map(self, make_model, images):
        options = {"bits": 4, "activation_bits": 2, "calibration": images}
        plain, rounded = (make_model().quantize(**options, quantize_last_map=some) for some in (False, None))
        assert torch.equal(plain.get_submodule(LAST).weight, rounded.get_submodule(LAST).weight)
        assert not torch.equal(plain.classifier.bias, rounded.classifier.bias)
        means = last_output(rounded, images).relu().mean(dim=(2, 3))
        low = means.min().item()
        assert rounded.classifier.input_zero_point == 0 and low >= 0

    def test_symmetric_integers_keep_their_middle(self, make_model, images):
        model = make_model().quantize(**A8, activation_scheme="int8_symmetric", calibration=images)
        layer = model.get_submodule(LAST)
        assert all(layer.input_zero_point == 128 for layer in cluster_layers(model).values())
        assert layer.output_zero_point == 128
        largest = (last_output(model, images) / layer.output_scale).round().max()
        assert 64 < largest <= 127

    def test_an_activation_that_keeps_negative_values(self, make_model, images):
        how = CalibrationConfig(activation_range="minmax")
        options = A8 | {"calibration": images, "calibration_config": how}
        without = last_output(make_model(hidden_act="gelu").quantize(**options, quantize_last_map=False), images)
        model = make_model(hidden_act="gelu").quantize(**options)
        layer = model.get_submodule(LAST)
        assert without.min() < 0 < layer.output_zero_point
        assert (last_output(model, images) - without).abs().max() <= 0.51 * layer.output_scale

    def test_no_labels(self, tiny_config, images):
        model = RepVGGForImageClassification(tiny_config(num_labels=0)).quantize(**A8, calibration=images)
        assert rounded_layers(model) == [LAST]


class TestWhereThereIsNone:
    def test_other_models_have_none(self, tiny_config, images):
        for model in (RepVGGModel(tiny_config()), RepVGGBackbone(tiny_config())):
            config = model.quantize(**A8, calibration=images).config.quantization_config
            assert rounded_layers(model) == [] and config.quantize_last_map is None
            assert "quantize_last_map" not in config.to_dict()
        net = quantize(nn.Sequential(nn.Conv2d(3, 4, 3)), **A8, calibration=images)
        assert not net[0].rounds_output

    def test_weights_only(self, make_model):
        model = make_model().quantize(bits=4)
        assert rounded_layers(model) == [] and model.config.quantization_config.quantize_last_map is None

    @pytest.mark.parametrize("method", ["quantize", "prepare_qat"])
    def test_asking_for_it_is_an_error(self, method, make_model, tiny_config, images):
        cases = {
            "RepVGGModel has no last feature map": (RepVGGModel(tiny_config()), {}),
            "RepVGGForImageClassification has no last": (make_model(use_squeeze_excitation=True), {}),
            f"leaves '{LAST}', which makes the last feature map, float": (
                make_model(), {"modules_to_not_convert": ["encoder.stages.1"]},
            ),
        }  # fmt: skip
        for message, (model, options) in cases.items():
            state = list(model.state_dict())
            with pytest.raises(ValueError, match=f"{message}.* leave quantize_last_map out"):
                getattr(model, method)(**A8, quantize_last_map=True, calibration=images, **options)
            assert list(model.state_dict()) == state
            # by default it is left float
            if method == "quantize":  # some gates' inputs are all zero
                options["calibration_config"] = CalibrationConfig(error_compensation=False)
            getattr(model, method)(**A8, calibration=images, **options)

    def test_it_needs_activation_bits(self):
        with pytest.raises(ValueError, match="^quantize_last_map=True is for quantized activations, .*activation_bits"):
            ClusterConfig(quantize_last_map=True)


class TestCheckpoint:
    @pytest.fixture
    def folder(self, make_model, images, tmp_path):
        make_model().quantize(**A8, calibration=images).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    def test_loads_and_saves_again(self, folder, images, tmp_path):
        model = RepVGGForImageClassification.from_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        assert tensors[f"{LAST}.output_scale"].dtype == torch.float32 and tensors[f"{LAST}.output_scale"].shape == ()
        assert tensors[f"{LAST}.output_zero_point"].dtype == torch.uint8
        assert sum("output_" in name for name in tensors) == 2
        stored = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert stored["quantize_last_map"] is True and stored["codebook_dtype"] == "int8"
        model.save_pretrained(tmp_path / "again")
        for file in ("model.safetensors", "config.json"):
            assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes()

    def test_base_model_and_backbone_round_it_too(self, folder, images):
        with torch.no_grad():
            model = RepVGGForImageClassification.from_pretrained(folder)
            expected = model.repvgg(images).last_hidden_state
            base, backbone = RepVGGModel.from_pretrained(folder), RepVGGBackbone.from_pretrained(folder)
            assert torch.equal(base(images).last_hidden_state, expected)
            assert torch.equal(backbone(images).feature_maps[-1], expected)

    def test_half_precision_keeps_the_range(self, folder):
        model = RepVGGForImageClassification.from_pretrained(folder, dtype=torch.bfloat16)
        assert model.get_submodule(LAST).output_scale.dtype == torch.float32

    @pytest.mark.parametrize("change, message", [
        ({f"{LAST}.output_scale": torch.tensor(float("nan"))}, "output_scale is nan, not positive and finite"),
        ({f"{LAST}.output_scale": torch.tensor(0.0)}, "output_scale is 0.0, not positive and finite"),
        ({f"{LAST}.output_scale": torch.ones(3)}, r"output_scale in .* is torch.float32 \[3\], but"),
        ({f"{LAST}.output_zero_point": None}, "output_zero_point .* is not in"),
        ({"classifier.output_scale": torch.tensor(1.0)}, "classifier.output_scale in .* is none of the tensors"),
    ], ids=["NaN", "zero", "shape", "missing", "stray"])  # fmt: skip
    def test_damage(self, change, message, folder):
        tensors = load_file(folder / "model.safetensors") | change
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["checksum"] = None
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            RepVGGForImageClassification.from_pretrained(folder)

    def test_the_checksum_covers_it(self, folder):
        tensors = load_file(folder / "model.safetensors")
        tensors[f"{LAST}.output_scale"] *= 1.5
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="don't fit the checksum"):
            RepVGGForImageClassification.from_pretrained(folder)

    def test_fewer_activation_bits_than_the_zero_point_needs(self, make_model, images, tmp_path):
        scheme = {"activation_scheme": "int8_symmetric"}
        make_model().quantize(**A8, **scheme, calibration=images).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantization_config"] |= {"checksum": None, "activation_bits": 4}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="zero_point is 128, and 4 bits end at 15"):
            RepVGGForImageClassification.from_pretrained(tmp_path)


class TestInTraining:
    @pytest.mark.parametrize("form", ["train", "deploy"])
    def test_it_is_learned_resumed_and_frozen(self, form, make_model, batch, tmp_path):
        images = batch["pixel_values"]
        model = make_model(form).prepare_qat(**A8, calibration=images)
        assert [name for name, layer in qat_layers(model).items() if layer.output_fake_quant is not None] == [LAST]
        start = model.get_submodule(LAST).output_fake_quant.range()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(3):
            model.train()(**batch).loss.backward()
            assert model.get_submodule(LAST).output_fake_quant.scale.grad.abs() > 0
            optimizer.step()
            optimizer.zero_grad()
            update_codebooks(model)
        learned = model.get_submodule(LAST).output_fake_quant.range()
        assert learned[0] != start[0] and learned[1] == start[1] == 0
        model.save_pretrained(tmp_path)
        loaded = RepVGGForImageClassification.from_pretrained(tmp_path)
        assert loaded.get_submodule(LAST).output_fake_quant.range() == learned
        expected = last_output(loaded, images)
        loaded.quantize()
        layer = loaded.get_submodule(LAST)
        assert (layer.output_scale.item(), layer.output_zero_point.item()) == learned
        assert torch.equal(last_output(loaded, images), expected)
        assert loaded.config.quantization_config.quantize_last_map is True

    def test_training_computes_with_the_biases_that_are_stored(self, make_model, batch):
        """So that freezing changes nothing: they are multiples of input_scale * weight_scale."""
        model = make_model("deploy").prepare_qat(**A8, calibration=batch["pixel_values"])
        layer = model.classifier
        nn.init.normal_(layer.bias)
        used = layer.quantized_bias(layer.bias)
        used.sum().backward()
        assert torch.equal(layer.bias.grad, torch.ones_like(layer.bias)) and not torch.equal(used, layer.bias)
        assert torch.equal(model.quantize().classifier.bias, used)
        plain = make_model("deploy").prepare_qat(**A8, codebook_dtype="float16", calibration=batch["pixel_values"])
        assert plain.classifier.quantized_bias(plain.classifier.bias) is plain.classifier.bias

    def test_without(self, make_model, batch):
        model = make_model().prepare_qat(**A8, calibration=batch["pixel_values"], quantize_last_map=False)
        assert all(layer.output_fake_quant is None for layer in qat_layers(model).values())
        assert rounded_layers(model.quantize()) == []

    def test_a_new_head_leaves_it(self, make_model, batch, tmp_path):
        model = make_model().prepare_qat(**A8, calibration=batch["pixel_values"])
        model.save_pretrained(tmp_path)
        loaded = RepVGGForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
        found, there = (some.get_submodule(LAST).output_fake_quant.range() for some in (loaded, model))
        assert found == there
