"""Checkpoints with quantized activations: every way to load one, and ranges that are damaged or do not fit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from repvgg_hf import ClusterConfig, RepVGGForImageClassification
from repvgg_hf.runtime.cluster_layers import ClusterLayer, cluster_layers

ASSETS = Path(__file__).parents[1] / "assets"
CONV = "repvgg.encoder.stages.0.layers.0.conv"
RANGE = ("input_scale", "input_zero_point")


@pytest.fixture
def folder(tmp_path) -> Path:
    """3 bit weights, 8 bit activations."""
    folder = tmp_path / "w3a8"
    folder.mkdir()
    shutil.copy(ASSETS / "golden_w3a8.safetensors", folder / "model.safetensors")
    shutil.copy(ASSETS / "golden_w3a8_config.json", folder / "config.json")
    return folder


@pytest.fixture
def model(folder):
    return RepVGGForImageClassification.from_pretrained(folder)


@pytest.fixture
def images(generator):
    return torch.randn(2, 3, 16, 16, generator=generator)


@torch.no_grad()
def logits(model, images):
    return model(images.to(model.dtype)).logits


class TestLoading:
    @pytest.mark.parametrize("device_map", ["cpu", "auto", {"repvgg": "disk", "classifier": "cpu"}], ids=str)
    @pytest.mark.parametrize("offload_buffers", [False, True])
    def test_device_maps(self, device_map, offload_buffers, model, folder, images, tmp_path):
        loaded = AutoModelForImageClassification.from_pretrained(
            folder, device_map=device_map, offload_folder=tmp_path / "offload", offload_buffers=offload_buffers
        )
        for _ in range(2):
            torch.testing.assert_close(logits(loaded, images), logits(model, images), atol=1e-6, rtol=1e-5)
        loaded.save_pretrained(tmp_path / "again")
        assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()

    def test_bfloat16_leaves_the_ranges_alone(self, model, folder, images, relative_error):
        loaded = RepVGGForImageClassification.from_pretrained(folder, dtype=torch.bfloat16)
        for name, layer in cluster_layers(loaded).items():
            stored = model.get_submodule(name)
            assert layer.input_scale.dtype == torch.float32
            assert all(torch.equal(getattr(layer, tensor), getattr(stored, tensor)) for tensor in RANGE)
        assert relative_error(logits(loaded, images), logits(model, images)) < 0.05

    def test_decoding_on_the_fly(self, model, folder, images):
        config = ClusterConfig(decode="on_the_fly")
        loaded = RepVGGForImageClassification.from_pretrained(folder, quantization_config=config)
        assert torch.equal(logits(loaded, images), logits(model, images))

    def test_compiles_to_one_graph(self, model, images):
        expected = logits(model, images)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(logits(compiled, images), expected, atol=1e-6, rtol=1e-5)

    def test_shards(self, model, images, tmp_path):
        model.save_pretrained(tmp_path, max_shard_size=300)
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
        assert torch.equal(
            logits(RepVGGForImageClassification.from_pretrained(tmp_path), images), logits(model, images)
        )

    def test_dequantizing_drops_the_rounding(self, model, images):
        for layer in cluster_layers(model).values():
            layer.set_input_range(1.0)  # coarse: next to nothing is left of an image
        rounded = logits(model, images)
        plain = logits(model.dequantize(), images)
        assert not any(name.endswith(RANGE) for name in model.state_dict())
        assert (plain - rounded).abs().max() > 0.01


def test_layers_that_stay_float_have_no_range(tiny_config):
    model = RepVGGForImageClassification(tiny_config(deploy=True))
    config = ClusterConfig(activation_bits=4, modules_to_not_convert=["classifier", "embeddings"])
    layers = model.replace_with_cluster_layers(config)
    assert not isinstance(model.classifier, ClusterLayer) and len(layers) == 4
    assert {name.rpartition(".")[0] for name in model.state_dict() if name.endswith("input_scale")} == layers.keys()
    assert {
        name.rpartition(".")[0] for name in model.state_dict() if name.endswith("input_zero_point")
    } == layers.keys()
    assert all(layer.activation_bits == 4 for layer in layers.values())


def test_ranges_need_calibration_data(tiny_config, tmp_path):
    model = RepVGGForImageClassification(tiny_config())
    message = "activation_bits needs calibration data: pass calibration="
    with pytest.raises(ValueError, match=message):
        model.quantize(activation_bits=8)
    assert not getattr(model, "is_quantized", False) and not model.config.deploy
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        RepVGGForImageClassification.from_pretrained(tmp_path, quantization_config=ClusterConfig(activation_bits=8))


def edited(folder, tensors=None, **fields):
    """Change tensors (a function of the old one; `None` removes it) and fields of `quantization_config`."""
    stored = load_file(folder / "model.safetensors")
    for name, change in (tensors or {}).items():
        tensor = stored.pop(f"{CONV}.{name}")
        if change is not None:
            stored[f"{CONV}.{name}"] = change(tensor)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= {"checksum": None} | fields
    (folder / "config.json").write_text(json.dumps(config))


BAD_FILES = {
    "NaN": ({"input_scale": lambda scale: scale * float("nan")}, {}, "input_scale is nan, not positive and finite"),
    "negative": ({"input_scale": lambda scale: -scale}, {}, "input_scale is -0.0.*, not positive and finite"),
    "half": ({"input_scale": lambda scale: scale.half()}, {}, r"input_scale in .* is torch.float16 \[\]"),
    "a scale a channel": ({"input_scale": lambda scale: scale.expand(4).clone()}, {}, r"input_scale in .*\[4\], but"),
    "no scale": ({"input_scale": None}, {}, "input_scale .* is not in .*model.safetensors"),
    "no zero point": ({"input_zero_point": None}, {}, "input_zero_point .* is not in .*model.safetensors"),
    "signed": ({"input_zero_point": lambda zero: zero.to(torch.int8)}, {}, "input_zero_point in .* is torch.int8"),
    "fewer bits": ({}, {"activation_bits": 4}, "input_zero_point is 121, and 4 bits end at 15"),
    "no bits": ({}, {"activation_bits": None}, "input_scale in .* is none of the tensors"),
}


@pytest.mark.parametrize(("tensors", "fields", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_refused(folder, tensors, fields, message):
    edited(folder, tensors, **fields)
    with pytest.raises(ValueError, match=message) as raised:
        AutoModelForImageClassification.from_pretrained(folder)
    assert raised.match("ownload|quantize (the float model )?again")


def test_a_weights_only_file_under_a_config_with_activations(folder):
    shutil.copy(ASSETS / "golden_w3.safetensors", folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"input_scale \(8 tensors in all\) is not in .*model.safetensors"):
        AutoModelForImageClassification.from_pretrained(folder)


@pytest.mark.parametrize("tensor", RANGE)
def test_a_flipped_bit_does_not_fit_the_checksum(folder, tensor):
    data = bytearray((folder / "model.safetensors").read_bytes())
    header = int.from_bytes(data[:8], "little")
    start, _ = json.loads(data[8 : 8 + header])[f"{CONV}.{tensor}"]["data_offsets"]
    data[8 + header + start] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="model.safetensors don't fit the checksum in config.json"):
        AutoModelForImageClassification.from_pretrained(folder)
