"""Core ML packages, read back: Core ML itself runs on Apple's systems alone, so their program is computed here."""

import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine_models import NEAR, SIZE, agreement, pictures, residual_network, trained, trained_float
from quantized_models import quantized, repvgg
from torch import nn

from repvgg_hf import RepVGGBackbone, RepVGGConfig, export_coreml
from repvgg_hf.interop.coreml import read_coreml, read_program
from repvgg_hf.interop.integers import integer_layers

pytest.importorskip("coremltools")

pytestmark = pytest.mark.filterwarnings("ignore")


def value(variable, values: dict):
    """What an operation's input is: computed before, or a constant of the file."""
    if variable is None:
        return None
    if variable.name in values:
        return values[variable.name]
    return torch.as_tensor(variable.val) if isinstance(variable.val, np.ndarray) else variable.val


def broadcast(number, x: torch.Tensor, axis=None) -> torch.Tensor:
    number = torch.as_tensor(np.array(0 if number is None else number), dtype=torch.float32)
    return number if axis is None else number.view([-1 if i == axis else 1 for i in range(x.dim())])


def unpack(operation) -> torch.Tensor:
    """A constant weight, as the documentation of Core ML's operators defines it."""
    if operation.op_type == "constexpr_blockwise_shift_scale":
        data = operation.data.op
        data = unpack(data) if data.op_type.startswith("constexpr") else torch.as_tensor(operation.data.val)
        return data.float() * torch.as_tensor(operation.scale.val)
    assert operation.op_type == "constexpr_lut_to_dense"
    lut = operation.lut.op
    table = unpack(lut) if lut.op_type.startswith("constexpr") else torch.as_tensor(operation.lut.val)
    indices = torch.as_tensor(operation.indices.val.astype(np.int64))
    table = table.reshape(len(table), -1).repeat_interleave(len(indices) // len(table), dim=0)
    return table.gather(1, indices.reshape(len(indices), -1)).view(indices.shape)


def compute(program, x: torch.Tensor) -> list[torch.Tensor]:
    """Compute a package's program with PyTorch: the few operators that these networks need."""
    (name,) = program.inputs
    values = {name: x}
    for operation in program.operations:
        kind, output = operation.op_type, operation.outputs[0].name
        if kind == "const":
            continue
        if kind.startswith("constexpr"):
            values[output] = unpack(operation)
            continue
        x = value(operation.inputs.get("x") or operation.inputs.get("input"), values)
        if kind == "quantize":
            kept = {"uint8": (0, 255), "int8": (-128, 127)}[operation.output_dtype.val]
            zero = broadcast(value(operation.zero_point, values), x)
            y = ((x / broadcast(operation.scale.val, x)).round() + zero).clamp(*kept)
        elif kind == "dequantize":
            y = (x - broadcast(value(operation.zero_point, values), x)) * broadcast(operation.scale.val, x)
        elif kind == "conv":
            assert operation.pad_type.val in ("custom", "valid") and list(operation.dilations.val) == [1, 1]
            top, bottom, left, right = operation.pad.val if operation.pad_type.val == "custom" else (0, 0, 0, 0)
            weight, bias = value(operation.weight, values), value(operation.bias, values)
            x = F.pad(x, (left, right, top, bottom))
            y = F.conv2d(x, weight, bias, tuple(operation.strides.val), groups=int(operation.groups.val))
        elif kind == "linear":
            y = F.linear(x, value(operation.weight, values), value(operation.bias, values))
        elif kind == "reduce_mean":
            y = x.mean(tuple(operation.axes.val), keepdim=bool(operation.keep_dims.val))
        elif kind == "max_pool":
            assert operation.pad_type.val == "custom" and len({*operation.pad.val}) == 1
            y = F.max_pool2d(
                x, *(tuple(t.val) for t in (operation.kernel_sizes, operation.strides)), operation.pad.val[0]
            )
        elif kind == "reshape":
            y = x.reshape(tuple(int(size) for size in operation.shape.val))
        elif kind == "clip":
            y = x.clamp(operation.alpha.val, operation.beta.val)
        elif kind in ("mul", "add"):
            other = value(operation.y, values)
            y = x * other if kind == "mul" else x + other
        else:
            y = {"relu": torch.relu, "sigmoid": torch.sigmoid, "identity": lambda x: x}[kind](x)
        values[output] = y
    return [values[variable.name] for variable in program.outputs]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_weights_in_the_package_are_the_checkpoints_integers(bits, tmp_path):
    model = trained(bits)
    path = export_coreml(model, tmp_path, image_size=SIZE)
    assert path == tmp_path / "coreml" / "model.mlpackage"
    found, layers = read_coreml(path), integer_layers(model)
    assert found.keys() == layers.keys()
    for name, layer in layers.items():
        assert np.array_equal(found[name].integers, layer.weight.numpy()), name
        assert np.array_equal(found[name].scale, layer.weight_scale.numpy()), name
    tables = {name: weight for name, weight in found.items() if weight.codes is not None}
    assert bool(tables) == (bits <= 4)  # no channel has weights enough for 64 entries
    for name, weight in tables.items():
        assert np.array_equal(weight.codes, layers[name].codes.numpy())
        assert np.array_equal(weight.table[:, : 2**bits], np.tile(layers[name].codebook, (len(weight.table), 1)))


@pytest.mark.parametrize(
    "options",
    [
        {"granularity": "per_channel"},
        {"granularity": "per_group", "group_size": 4, "bits_overrides": {"classifier": 8}},
        {"method": "uniform", "activation_bits": 4},
        {"squeeze_excitation": True},
        {"modules_to_not_convert": ["classifier"]},
        {"activation_scheme": "int8_symmetric"},
        {"other": "network"},
    ],
    ids=lambda options: "_".join(map(str, options.values())),
)
def test_the_packages_program_gives_the_models_logits(options, tmp_path):
    model = residual_network() if "other" in options else trained(3, **options)
    images = pictures(64, seed=3)[0]
    program = read_program(export_coreml(model, tmp_path, image_size=SIZE, batch_size=len(images)))
    with torch.no_grad():
        expected = model(images).logits
    (logits,) = compute(program, images)
    same, near = agreement(logits, expected)
    assert same >= 0.999 and near >= NEAR
    assert "other" in options or expected.argmax(1).unique().numel() == 4
    assert [variable.name for variable in program.outputs] == ["logits"]


def test_weights_take_their_bits(tmp_path):
    """The tables that coremltools makes for every channel aside."""
    size, sizes = 64, {}
    config = RepVGGConfig(stem_hidden_size=64, hidden_sizes=[64, 128], depths=[1, 1], strides=[2, 2], num_labels=10)
    for bits in (2, 4, 8):
        quantized = repvgg(config, bits, size=size)
        path = export_coreml(quantized, tmp_path / str(bits), image_size=size)
        sizes[bits] = (path / "Data" / "com.apple.CoreML" / "weights" / "weight.bin").stat().st_size
    weights = sum(layer.weight.numel() for layer in integer_layers(quantized).values())
    channels = sum(len(layer.weight) for layer in integer_layers(quantized).values())
    for bits, size in sizes.items():
        tables = 0 if bits == 8 else channels * 2**bits
        assert weights * bits / 8 + tables < size < 1.02 * (weights * bits / 8 + tables) + 10 * channels + 2000


def test_a_backbone_gives_its_feature_maps(tiny_config, tmp_path):
    model = repvgg(tiny_config(out_features=["stage1", "stage2"]), model_class=RepVGGBackbone)
    program = read_program(export_coreml(model, tmp_path, image_size=(32, 48)))
    images = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        expected = model(images).feature_maps
    assert [variable.name for variable in program.outputs] == ["feature_maps_0", "feature_maps_1"]
    for map_, other in zip(compute(program, images), expected, strict=True):
        assert torch.allclose(map_, other, atol=1e-4 * other.abs().max())


def test_the_package_is_what_apple_reads(tmp_path):
    path = export_coreml(trained(), tmp_path, image_size=SIZE)
    manifest = json.loads((path / "Manifest.json").read_text())
    files = {entry["path"] for entry in manifest["itemInfoEntries"].values()}
    assert files == {"com.apple.CoreML/model.mlmodel", "com.apple.CoreML/weights"}
    there = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    assert there == {
        "Manifest.json",
        "Data/com.apple.CoreML/model.mlmodel",
        "Data/com.apple.CoreML/weights/weight.bin",
    }
    kinds = {operation.op_type for operation in read_program(path).operations}
    assert {"constexpr_lut_to_dense", "constexpr_blockwise_shift_scale", "quantize", "dequantize"} <= kinds


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_modes_of_padding(mode, tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, padding_mode=mode), nn.ReLU(), nn.Flatten(2))
    path = export_coreml(quantized(network), tmp_path, image_size=32)
    assert list(read_coreml(path)) == ["0"]


class TestBadInput:
    @pytest.mark.parametrize("sizes", [{"image_size": None}, {"image_size": (224, -1)}, {"batch_size": "any"}])
    def test_sizes_that_are_not_fixed(self, sizes, tmp_path):
        with pytest.raises(ValueError, match=f"{next(iter(sizes))} must be a positive integer.*Core ML takes images"):
            export_coreml(trained(), tmp_path, **sizes)

    def test_no_integers(self, tmp_path):
        with pytest.raises(ValueError, match="is not quantized"):
            export_coreml(trained_float(), tmp_path)
        with pytest.raises(ValueError, match="activation_bits"):
            export_coreml(trained_float().quantize(bits=4), tmp_path)
        with pytest.raises(ValueError, match="quantize"):
            export_coreml(trained_float().prepare_qat(bits=4), tmp_path)
        assert not any(tmp_path.iterdir())

    def test_no_coremltools(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "coremltools", None)
        with pytest.raises(ImportError, match=r"repvgg-hf\[coreml\]"):
            export_coreml(trained(), tmp_path)

    def test_old_coremltools(self, tmp_path, monkeypatch):
        import coremltools

        monkeypatch.setattr(coremltools, "target", types.SimpleNamespace(iOS17=None))
        with pytest.raises(ImportError, match="operators of iOS 18"):
            export_coreml(trained(), tmp_path)

    def test_no_package(self, tmp_path):
        with pytest.raises(ValueError, match="can't be read as a Core ML package"):
            read_coreml(tmp_path)

    def test_anothers_package(self, tmp_path):
        import coremltools

        path = export_coreml(trained(), tmp_path, image_size=SIZE)
        package = coremltools.models.MLModel(str(path), skip_model_load=True)
        del package.user_defined_metadata["repvgg_hf.layers"]
        package.save(str(tmp_path / "other.mlpackage"))
        with pytest.raises(ValueError, match="was not written by export_coreml"):
            read_coreml(tmp_path / "other.mlpackage")


def test_it_is_imported_only_when_asked_for():
    code = "import sys, repvgg_hf; repvgg_hf.export_coreml; print('coremltools' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.stdout.strip() == "False", result.stderr
