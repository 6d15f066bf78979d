"""ExecuTorch programs: int8 convolutions of XNNPACK, the checkpoint's weights, the model's logits in its runtime."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_models import NEAR, SIZE, agreement, pictures, residual_network, trained, trained_float
from quantized_models import repvgg

from repvgg_hf import RepVGGBackbone, export_executorch
from repvgg_hf.interop.executorch import float_layers
from repvgg_hf.interop.integers import integer_layers
from repvgg_hf.interop.programs import export_program

pytestmark = pytest.mark.filterwarnings("ignore")

FORMATS = {
    "W4A8": {},
    "W8A8": {"bits": 8},
    "W2A8 per channel": {"bits": 2, "granularity": "per_channel"},
    "A4": {"activation_bits": 4},
    "squeeze and excitation": {"squeeze_excitation": True},
    "int8_symmetric": {"activation_scheme": "int8_symmetric"},
    "float classifier": {"modules_to_not_convert": ["classifier"]},
}
CONVOLUTIONS = [
    "repvgg.embeddings.layer.conv",
    *(f"repvgg.encoder.stages.{stage}.layers.{layer}.conv" for stage in (0, 1) for layer in (0, 1)),
]


def run(path: Path, images: torch.Tensor) -> list[torch.Tensor]:
    runtime = pytest.importorskip("executorch.runtime").Runtime.get()
    program = runtime.load_program(path.read_bytes())
    return program.load_method("forward").execute([images])


def stored_weights(layer) -> tuple[bytes, bytes]:
    """A weight as XNNPACK stores it, channels last: int8, and float32."""
    integers = layer.weight.permute(0, 2, 3, 1) if layer.weight.dim() == 4 else layer.weight
    floats = integers.float() * layer.weight_scale.view(-1, *[1] * (integers.dim() - 1))
    return integers.contiguous().numpy().tobytes(), floats.contiguous().numpy().tobytes()


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_weights_and_logits_are_the_models(options, tmp_path):
    pytest.importorskip("executorch")
    model, images = trained(**options), pictures(64, seed=3)[0]
    path = export_executorch(model, tmp_path, image_size=SIZE, batch_size=len(images))
    assert path == tmp_path / "executorch" / "model.pte"
    (logits,) = run(path, images)
    with torch.no_grad():
        expected = model(images).logits
    same, near = agreement(logits, expected)
    assert same == 1 and near >= NEAR - 1 / 64
    assert expected.argmax(1).unique().numel() == 4
    data, floats = path.read_bytes(), float_layers(export_program(model, images, signed=True))
    for name, layer in integer_layers(model).items():
        as_integers, as_floats = stored_weights(layer)
        assert (as_integers in data, as_floats in data) == (name not in floats, name in floats), name


class TestFloatLayers:
    def test_only_the_classifier(self):
        model = trained()
        found = float_layers(export_program(model, pictures(2, seed=3)[0], signed=True))
        assert found == ["classifier"]

    def test_a_float_last_map(self):
        model = trained(quantize_last_map=False)
        found = float_layers(export_program(model, pictures(2, seed=3)[0], signed=True))
        assert found == [CONVOLUTIONS[-1], "classifier"]

    def test_gates_and_what_they_multiply(self):
        model = trained(squeeze_excitation=True)
        found = float_layers(export_program(model, pictures(2, seed=3)[0], signed=True))
        gates = [name.replace("conv", "attention.fc2") for name in CONVOLUTIONS]
        assert sorted(found) == sorted([*CONVOLUTIONS, *gates, "classifier"])


def test_a_backbone_gives_its_feature_maps(tiny_config, tmp_path):
    pytest.importorskip("executorch")
    model = repvgg(tiny_config(out_features=["stage1", "stage2"]), model_class=RepVGGBackbone)
    images = torch.randn(1, 3, 32, 32)
    outputs = run(export_executorch(model, tmp_path, image_size=32), images)
    with torch.no_grad():
        expected = model(images).feature_maps
    for one, other in zip(outputs, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-2 * other.abs().max())


def test_another_network(tmp_path):
    pytest.importorskip("executorch")
    model, images = residual_network(), pictures(64, seed=3)[0]
    (logits,) = run(export_executorch(model, tmp_path, image_size=SIZE, batch_size=len(images)), images)
    with torch.no_grad():
        same, near = agreement(logits, model(images).logits)
    assert same == 1 and near >= NEAR


class TestBadInput:
    @pytest.mark.parametrize("sizes", [{"image_size": None}, {"batch_size": 0}])
    def test_sizes_that_are_not_fixed(self, sizes, tmp_path):
        with pytest.raises(
            ValueError, match=f"{next(iter(sizes))} must be a positive integer.*ExecuTorch takes images"
        ):
            export_executorch(trained(), tmp_path, **sizes)

    def test_no_integers(self, tmp_path):
        with pytest.raises(ValueError, match="is not quantized"):
            export_executorch(trained_float(), tmp_path)
        with pytest.raises(ValueError, match="being trained quantized"):
            export_executorch(trained_float().prepare_qat(bits=4), tmp_path)
        assert not any(tmp_path.iterdir())

    def test_no_executorch(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "executorch", None)
        monkeypatch.setitem(sys.modules, "executorch.exir", None)
        with pytest.raises(ImportError, match=r"repvgg-hf\[executorch\]"):
            export_executorch(trained(), tmp_path)
        assert not any(tmp_path.iterdir())


def test_it_is_imported_only_when_asked_for():
    code = "import sys, repvgg_hf; repvgg_hf.export_executorch; print('executorch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.stdout.strip() == "False", result.stderr
