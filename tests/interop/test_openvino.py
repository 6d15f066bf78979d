"""OpenVINO's files: packed weights, int8 kernels, the model's logits, with every instruction set of this CPU."""

import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_models import NEAR, SIZE, agreement, pictures, residual_network, trained, trained_float
from quantized_models import images as noise
from quantized_models import quantized, repvgg
from torch import nn

from repvgg_hf import RepVGGBackbone, RepVGGConfig, export_openvino, load_openvino
from repvgg_hf.interop.integers import integer_layers, runs_exactly_without_vnni
from repvgg_hf.interop.openvino import read_openvino

pytest.importorskip("openvino")
pytest.importorskip("onnxscript")

FORMATS = {
    "W4A8": {},
    "W2A8": {"bits": 2},
    "W8A8": {"bits": 8},
    "per channel": {"bits": 5, "granularity": "per_channel"},
    "per group": {"bits": 7, "granularity": "per_group", "group_size": 4},
    # with 6 bits in the stem one of the few values that the classifier's input has is half a step, to the last digit
    "mixed": {"bits": 3, "bits_overrides": {"classifier": 8, "repvgg.embeddings.layer.conv": 5}},
    "A4": {"activation_bits": 4},
    "squeeze and excitation": {"squeeze_excitation": True},
    "int8_symmetric": {"activation_scheme": "int8_symmetric"},
    "float classifier": {"modules_to_not_convert": ["classifier"]},
}


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_weights_and_logits_are_the_models(options, tmp_path):
    model, images = trained(**options), pictures(256, seed=3)[0]
    path = export_openvino(model, tmp_path)
    assert path == tmp_path / "openvino" / "openvino_model.xml"
    found, layers = read_openvino(path), integer_layers(model)
    assert found.keys() == layers.keys()
    assert all(np.array_equal(found[name], layer.weight) for name, layer in layers.items())
    logits = torch.from_numpy(load_openvino(path, threads=1)(images)["logits"])
    with torch.no_grad():
        expected = model(images).logits
    same, near = agreement(logits, expected)
    assert same >= 0.996 and near >= NEAR  # of 256 images one may differ
    assert expected.argmax(1).unique().numel() == 4


@pytest.mark.parametrize("squeeze_excitation", [False, True])
def test_every_quantized_layer_is_int8(squeeze_excitation, tmp_path):
    model = trained(squeeze_excitation=squeeze_excitation)
    compiled = load_openvino(export_openvino(model, tmp_path))
    kernels = [
        node.get_rt_info()["primitiveType"].astype(str)
        for node in compiled.get_runtime_model().get_ops()
        if node.get_rt_info()["layerType"].astype(str) in ("Convolution", "FullyConnected")
    ]
    assert len(kernels) == len(integer_layers(model))
    assert all(kernel.endswith("_I8") for kernel in kernels), kernels


def test_another_network(tmp_path):
    model, images = residual_network(), pictures(64, seed=3)[0]
    compiled = load_openvino(export_openvino(model, tmp_path), threads=1)
    with torch.no_grad():
        same, near = agreement(torch.from_numpy(compiled(images)["logits"]), model(images).logits)
    assert same == 1 and near >= NEAR


@pytest.mark.parametrize("dynamic", [(), ("batch", "height", "width")], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_modes_of_padding(mode, dynamic, tmp_path):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1, padding_mode=mode), nn.ReLU()]
    layers += [nn.Conv2d(8, 8, 4, padding="same", padding_mode=mode), nn.ReLU()]  # stays float
    model = quantized(
        nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)), modules_to_not_convert=["2"]
    )
    compiled = load_openvino(export_openvino(model, tmp_path, image_size=32, dynamic=dynamic), threads=1)
    x = noise(4 if dynamic else 1)
    with torch.no_grad():
        assert agreement(torch.from_numpy(compiled(x)["logits"]), model(x))[1] == 1


@pytest.mark.parametrize("bits", range(1, 9))
def test_weights_take_their_bits(bits, tmp_path):
    config = RepVGGConfig(stem_hidden_size=32, hidden_sizes=[64, 128], depths=[1, 1], strides=[2, 2], num_labels=10)
    model = repvgg(config, bits)
    path = export_openvino(model, tmp_path)
    layers = integer_layers(model).values()
    codes = sum(layer.weight.numel() for layer in layers) * bits / 8
    besides = sum(9 * len(layer.weight) + 2**bits for layer in layers)  # scales, zero points, biases; codebooks
    assert codes < path.with_suffix(".bin").stat().st_size < codes + besides + 1000


def test_any_batch_and_size(tmp_path):
    model = trained()
    compiled = load_openvino(export_openvino(model, tmp_path))
    for shape in ((1, 3, 16, 16), (5, 3, 24, 40)):
        images = torch.randn(shape)
        with torch.no_grad():
            assert torch.allclose(torch.from_numpy(compiled(images)["logits"]), model(images).logits, atol=0.05)


def test_fixed_sizes(tmp_path):
    path = export_openvino(trained(), tmp_path, dynamic=(), image_size=SIZE)
    assert list(load_openvino(path).input(0).shape) == [1, 3, SIZE, SIZE]


def test_a_backbone_gives_its_feature_maps(tiny_config, tmp_path):
    model = repvgg(tiny_config(out_features=["stage1", "stage2"]), model_class=RepVGGBackbone)
    images = torch.randn(2, 3, 32, 32)
    outputs = list(load_openvino(export_openvino(model, tmp_path))(images).values())
    with torch.no_grad():
        expected = model(images).feature_maps
    for one, other in zip(outputs, expected, strict=True):
        assert torch.allclose(torch.from_numpy(one), other, atol=1e-2 * other.abs().max())


RUN = """
import sys, numpy as np
from repvgg_hf import load_openvino
np.save("logits.npy", load_openvino(sys.argv[1], threads=1)(np.load("images.npy"))["logits"])
"""


def logits_with(isa: str, path: Path, images: torch.Tensor, folder: Path) -> torch.Tensor:
    np.save(folder / "images.npy", images.numpy())
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", RUN, str(path)]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return torch.from_numpy(np.load(folder / "logits.npy"))


class TestInstructionSets:
    """CPUs without VNNI add pairs of products in 16 bits, which saturate: oneDNN does so where it is told to."""

    @pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
    def test_within_63_the_logits_are_the_same(self, isa, tmp_path):
        model, images = trained(4, reduce_range=True), pictures(256, seed=3)[0]
        assert runs_exactly_without_vnni(integer_layers(model))
        path = export_openvino(model, tmp_path)
        with torch.no_grad():
            same, near = agreement(logits_with(isa, path, images, tmp_path), model(images).logits)
        assert same >= 0.996 and near >= 0.95

    def test_beyond_63_they_are_not(self, tmp_path):
        """With inputs and weights that saturate: or the test above would show nothing."""
        model = trained(8, reduce_range=False)
        assert not runs_exactly_without_vnni(integer_layers(model))
        images = 3 * pictures(64, seed=3)[0]
        path = export_openvino(model, tmp_path)
        with torch.no_grad():
            expected = model(images).logits
        assert agreement(logits_with("AVX2", path, images, tmp_path), expected)[1] < 0.5


class TestBadInput:
    def test_no_integers(self, tmp_path):
        with pytest.raises(ValueError, match="is not quantized"):
            export_openvino(trained_float(), tmp_path)
        with pytest.raises(ValueError, match="activation_bits"):
            export_openvino(trained_float().quantize(bits=4), tmp_path)
        with pytest.raises(ValueError, match="being trained quantized"):
            export_openvino(trained_float().prepare_qat(bits=4), tmp_path)
        assert not any(tmp_path.iterdir())

    @pytest.mark.parametrize("package, extra", [("openvino", "openvino"), ("onnx", "onnx")])
    def test_no_package(self, package, extra, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=rf"repvgg-hf\[{extra}\]"):
            export_openvino(trained(), tmp_path)

    def test_old_openvino(self, tmp_path, monkeypatch):
        import openvino

        monkeypatch.setattr(openvino, "Type", types.SimpleNamespace(u4=None))
        with pytest.raises(ImportError, match="has no constants of 2, 3 and 6 bits"):
            export_openvino(trained(), tmp_path)

    def test_broken_file(self, tmp_path):
        path = export_openvino(trained(), tmp_path)
        path.write_text(path.read_text()[:1000])
        with pytest.raises(ValueError, match="can't be loaded by OpenVINO"):
            load_openvino(path)
        with pytest.raises(ValueError, match="can't be loaded by OpenVINO"):
            load_openvino(tmp_path / "none.xml")


def test_it_is_imported_only_when_asked_for():
    code = "import sys, repvgg_hf; repvgg_hf.export_openvino; print({'openvino', 'onnx'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.stdout.strip() == "set()", result.stderr
