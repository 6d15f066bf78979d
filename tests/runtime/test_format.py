"""The format on disk, pinned by files that none of the package's code made: weights only, with activations, integers.

`python tests/runtime/test_format.py` writes them again, which a change of the format on purpose calls for, and nothing
else.
"""

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from repvgg_hf import RepVGGForImageClassification

ASSETS = Path(__file__).parents[1] / "assets"
# layer: (shape of its weight, bits); two output channels share a codebook
LAYERS = {
    "repvgg.embeddings.layer.conv": ((4, 3, 3, 3), 3),
    "repvgg.encoder.stages.0.layers.0.conv": ((4, 4, 3, 3), 3),
    "repvgg.encoder.stages.1.layers.0.conv": ((6, 2, 3, 3), 3),  # two groups of three channels
    "classifier": ((4, 6), 5),
}

ACTIVATION_BITS = {"w3": None, "w3a8": 8, "w3a8-int8": 8}
# layer: range of its input with 8 bits; the image has negative values
INPUT_RANGES = dict(zip(LAYERS, [(0.03, 121), (0.02, 0), (0.015, 0), (0.01, 0)]))
OUTPUT_RANGE = (0.012, 3)  # of the last convolution, in the file of integers
LAST = "repvgg.encoder.stages.1.layers.0.conv"


def codes_of(layer: int, numel: int, bits: int) -> list[int]:
    return [(index * index + 3 * index + layer) % 2**bits for index in range(numel)]


def is_int8(name: str) -> bool:
    return name.endswith("int8")


def codebook_of(name: str, layer: int, group: int, bits: int) -> list[float]:
    """Ascending, and exact in float16, or integers."""
    if is_int8(name):
        return [(entry - 2 ** (bits - 1)) * (1 + group) - layer for entry in range(2**bits)]
    return [(entry - 2 ** (bits - 1) + 0.5) * (1 + layer + group) / 64 for entry in range(2**bits)]


def scale_of(name: str, layer: int, channel: int) -> float:
    return (0.5 + channel / 8 + layer / 32) / (8 if is_int8(name) else 1)


def bias_of(name: str, layer: str) -> torch.Tensor:
    """Any numbers, or with integers 9, 16, 23, ... steps, each of an input's integer times a weight's, in float32."""
    (shape, _), number = LAYERS[layer], list(LAYERS).index(layer)
    if not is_int8(name):
        return torch.tensor([channel / 16 - 0.1 for channel in range(shape[0])])
    input_scale = np.float32(INPUT_RANGES[layer][0])
    steps = [input_scale * np.float32(scale_of(name, number, channel)) for channel in range(shape[0])]
    return torch.tensor(np.array([np.float32(9 + 7 * channel) * step for channel, step in enumerate(steps)]))


def packed(codes: list[int], bits: int) -> list[int]:
    """Bytes of the little-endian bit stream, from a text of binary digits whose end comes first."""
    text = "".join(f"{code:0{bits}b}" for code in reversed(codes))
    text = "0" * (-len(text) % 8) + text
    return [int(text[start : start + 8], 2) for start in range(0, len(text), 8)][::-1]


def golden_tensors(name: str) -> dict[str, torch.Tensor]:
    tensors = {}
    for number, (layer, (shape, bits)) in enumerate(LAYERS.items()):
        codes = codes_of(number, torch.Size(shape).numel(), bits)
        codebook = [codebook_of(name, number, group, bits) for group in range(shape[0] // 2)]
        scale = [scale_of(name, number, channel) for channel in range(shape[0])]
        tensors[f"{layer}.weight_codes"] = torch.tensor(packed(codes, bits), dtype=torch.uint8)
        tensors[f"{layer}.weight_codebook"] = torch.tensor(
            codebook, dtype=torch.int8 if is_int8(name) else torch.float16
        )
        tensors[f"{layer}.weight_scale"] = torch.tensor(scale, dtype=torch.float32)
        ranges = {"input": INPUT_RANGES[layer]} if ACTIVATION_BITS[name] is not None else {}
        if is_int8(name) and layer == LAST:
            ranges["output"] = OUTPUT_RANGE
        for end, (scale, zero_point) in ranges.items():
            tensors[f"{layer}.{end}_scale"] = torch.tensor(scale, dtype=torch.float32)
            tensors[f"{layer}.{end}_zero_point"] = torch.tensor(zero_point, dtype=torch.uint8)
        tensors[f"{layer}.bias"] = bias_of(name, layer)
    return tensors


def golden_weight(name: str, layer: str) -> torch.Tensor:
    """The formula, weight by weight."""
    number = list(LAYERS).index(layer)
    shape, bits = LAYERS[layer]
    numel = torch.Size(shape).numel()
    weight = []
    for index, code in enumerate(codes_of(number, numel, bits)):
        channel = index // (numel // shape[0])
        weight.append(codebook_of(name, number, channel // 2, bits)[code] * scale_of(name, number, channel))
    return torch.tensor(weight).view(shape)


# as safetensors calls them
DTYPES = {torch.uint8: "U8", torch.int8: "I8", torch.float16: "F16", torch.float32: "F32"}


def golden_settings(name: str) -> dict:
    """What the configuration says about the function, field by field, but for what is as by default."""
    settings = {
        "_out_features": ["stage2"],
        "_out_indices": [2],
        "deploy": True,
        "depths": [1, 1],
        "dtype": "float32",
        "groups": 2,
        "hidden_sizes": [4, 6],
        "num_labels": 4,
        "quantization_config.activation_bits": ACTIVATION_BITS[name],
        "quantization_config.bits": 3,
        "quantization_config.bits_overrides": {"classifier": 5},
        "quantization_config.channel_scale": True,
        "quantization_config.codebook_dtype": "int8" if is_int8(name) else "float16",
        "quantization_config.format_version": 1,
        "quantization_config.granularity": "per_group",
        "quantization_config.group_size": 2,
        "quantization_config.method": "cluster",
        "quantization_config.quant_method": "cluster",
        "quantization_config.quantize_last_map": True if is_int8(name) else None,
        "stem_hidden_size": 4,
        "strides": [2, 2],
    }
    return {name: value for name, value in settings.items() if value is not None}


def golden_checksum(name: str) -> str:
    """A line for each tensor, in the order of their names, and one of JSON."""
    lines = [
        f"{tensor_name} {DTYPES[tensor.dtype]} {list(tensor.shape)} {zlib.crc32(tensor.numpy().tobytes()):08x}"
        for tensor_name, tensor in sorted(golden_tensors(name).items())
    ]
    lines.append(json.dumps(golden_settings(name)))
    return f"crc32:{zlib.crc32(chr(10).join(lines).encode()):08x}"


def golden_config(name: str) -> dict:
    last_map = {"quantize_last_map": True} if is_int8(name) else {}
    return {
        "architectures": ["RepVGGForImageClassification"],
        "model_type": "repvgg",
        "dtype": "float32",
        "deploy": True,
        "stem_hidden_size": 4,
        "hidden_sizes": [4, 6],
        "depths": [1, 1],
        "strides": [2, 2],
        "groups": 2,
        "id2label": {str(label): f"LABEL_{label}" for label in range(4)},
        "quantization_config": {
            "quant_method": "cluster",
            "format_version": 1,
            "method": "cluster",
            "bits": 3,
            "bits_overrides": {"classifier": 5},
            "granularity": "per_group",
            "group_size": 2,
            "channel_scale": True,
            "codebook_dtype": "int8" if is_int8(name) else "float16",
            "modules_to_not_convert": [],
            "symmetric": None,
            "range_method": None,
            "decode": "at_load",
            "activation_bits": ACTIVATION_BITS[name],
            "checksum": golden_checksum(name),
        }
        | last_map,
    }


def files_of(name: str) -> tuple[Path, Path]:
    """The weights and the configuration among the assets."""
    config = "golden_config.json" if name == "w3" else f"golden_{name}_config.json"
    return ASSETS / f"golden_{name}.safetensors", ASSETS / config


@pytest.fixture(params=ACTIVATION_BITS)
def name(request) -> str:
    return request.param


@pytest.fixture
def golden(tmp_path, name) -> Path:
    for source, target in zip(files_of(name), ("model.safetensors", "config.json")):
        shutil.copy(source, tmp_path / target)
    return tmp_path


def test_the_file_is_what_the_description_says(name):
    weights, config = files_of(name)
    tensors, expected = load_file(weights), golden_tensors(name)
    assert tensors.keys() == expected.keys()
    for tensor_name, tensor in expected.items():
        assert tensors[tensor_name].dtype == tensor.dtype and torch.equal(tensors[tensor_name], tensor)
    assert json.loads(config.read_text()) == golden_config(name)


def test_decoded_weights_are_the_formulas(golden, name):
    model = RepVGGForImageClassification.from_pretrained(golden)
    for layer in LAYERS:
        assert torch.equal(model.get_submodule(layer).weight, golden_weight(name, layer))
    tensors = golden_tensors(name)
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    assert all(state[key].dtype == tensor.dtype and torch.equal(state[key], tensor) for key, tensor in tensors.items())


def rounded(x: torch.Tensor, of_range: tuple[float, int], name: str) -> torch.Tensor:
    """ONNX QuantizeLinear and DequantizeLinear."""
    if ACTIVATION_BITS[name] is None:
        return x
    scale, zero_point = np.float32(of_range[0]), of_range[1]
    integers = np.clip(np.rint(x.numpy() / scale) + zero_point, 0, 2 ** ACTIVATION_BITS[name] - 1)
    return torch.from_numpy((integers - zero_point).astype(np.float32) * scale)


def test_logits_are_those_of_float_layers_between_roundings(golden, name):
    biases = golden_tensors(name)
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 6 - 3
    x = pixels
    for layer, groups in zip(list(LAYERS)[:3], (1, 1, 2)):
        x = rounded(x, INPUT_RANGES[layer], name)
        x = F.conv2d(x, golden_weight(name, layer), biases[f"{layer}.bias"], 2, 1, groups=groups)
        if is_int8(name) and layer == LAST:
            x = rounded(x, OUTPUT_RANGE, name)
        x = x.relu()
    x = rounded(x.mean(dim=(2, 3)), INPUT_RANGES["classifier"], name)
    expected = F.linear(x, golden_weight(name, "classifier"), biases["classifier.bias"])
    with torch.no_grad():
        logits = RepVGGForImageClassification.from_pretrained(golden)(pixels).logits
    assert expected.std() > 0.01
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-5)


def test_saving_again_gives_the_same_file(golden, name, tmp_path):
    RepVGGForImageClassification.from_pretrained(golden).save_pretrained(tmp_path / "again")
    again = tmp_path / "again"
    assert (again / "model.safetensors").read_bytes() == files_of(name)[0].read_bytes()
    config, expected = json.loads((again / "config.json").read_text()), golden_config(name)
    # options that came later have been added, with what they were before
    quantization, expected_quantization = config.pop("quantization_config"), expected.pop("quantization_config")
    assert config | expected == config and quantization | expected_quantization == quantization


if __name__ == "__main__":
    for name in ACTIVATION_BITS:
        weights, config = files_of(name)
        save_file(golden_tensors(name), weights, metadata={"format": "pt"})
        config.write_text(json.dumps(golden_config(name), indent=2) + "\n")
