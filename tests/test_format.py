"""The format on disk, pinned by a file that none of the package's code made.

`python tests/test_format.py` writes it again, which a change of the format (a new `format_version`) calls for, and
nothing else.
"""

import json
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from repvgg_hf import RepVGGForImageClassification

ASSETS = Path(__file__).parent / "assets"
# layer: (shape of its weight, bits); two output channels share a codebook
LAYERS = {
    "repvgg.embeddings.layer.conv": ((4, 3, 3, 3), 3),
    "repvgg.encoder.stages.0.layers.0.conv": ((4, 4, 3, 3), 3),
    "repvgg.encoder.stages.1.layers.0.conv": ((6, 2, 3, 3), 3),  # two groups of three channels
    "classifier": ((4, 6), 5),
}


def codes_of(layer: int, numel: int, bits: int) -> list[int]:
    return [(index * index + 3 * index + layer) % 2**bits for index in range(numel)]


def codebook_of(layer: int, group: int, bits: int) -> list[float]:
    """Ascending, and exact in float16."""
    return [(entry - 2 ** (bits - 1) + 0.5) * (1 + layer + group) / 64 for entry in range(2**bits)]


def scale_of(layer: int, channel: int) -> float:
    return 0.5 + channel / 8 + layer / 32


def packed(codes: list[int], bits: int) -> list[int]:
    """Bytes of the little-endian bit stream, from a text of binary digits whose end comes first."""
    text = "".join(f"{code:0{bits}b}" for code in reversed(codes))
    text = "0" * (-len(text) % 8) + text
    return [int(text[start : start + 8], 2) for start in range(0, len(text), 8)][::-1]


def golden_tensors() -> dict[str, torch.Tensor]:
    tensors = {}
    for number, (name, (shape, bits)) in enumerate(LAYERS.items()):
        codes = codes_of(number, torch.Size(shape).numel(), bits)
        codebook = [codebook_of(number, group, bits) for group in range(shape[0] // 2)]
        scale = [scale_of(number, channel) for channel in range(shape[0])]
        tensors[f"{name}.weight_codes"] = torch.tensor(packed(codes, bits), dtype=torch.uint8)
        tensors[f"{name}.weight_codebook"] = torch.tensor(codebook, dtype=torch.float16)
        tensors[f"{name}.weight_scale"] = torch.tensor(scale, dtype=torch.float32)
        tensors[f"{name}.bias"] = torch.tensor([channel / 16 - 0.1 for channel in range(shape[0])])
    return tensors


def golden_weight(name: str) -> torch.Tensor:
    """The formula, weight by weight."""
    number = list(LAYERS).index(name)
    shape, bits = LAYERS[name]
    numel = torch.Size(shape).numel()
    weight = []
    for index, code in enumerate(codes_of(number, numel, bits)):
        channel = index // (numel // shape[0])
        weight.append(codebook_of(number, channel // 2, bits)[code] * scale_of(number, channel))
    return torch.tensor(weight).view(shape)


def golden_checksum(tensors: dict[str, torch.Tensor]) -> str:
    lines = [f"{name} {zlib.crc32(tensor.numpy().tobytes()):08x}" for name, tensor in tensors.items()]
    return f"crc32:{zlib.crc32(chr(10).join(sorted(lines)).encode()):08x}"


def golden_config() -> dict:
    return {
        "architectures": ["RepVGGForImageClassification"],
        "model_type": "repvgg",
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
            "codebook_dtype": "float16",
            "modules_to_not_convert": [],
            "symmetric": True,
            "range_method": "mse",
            "decode": "at_load",
            "activation_bits": None,
            "checksum": golden_checksum(golden_tensors()),
        },
    }


@pytest.fixture
def golden(tmp_path) -> Path:
    shutil.copy(ASSETS / "golden_w3.safetensors", tmp_path / "model.safetensors")
    shutil.copy(ASSETS / "golden_config.json", tmp_path / "config.json")
    return tmp_path


def test_the_file_is_what_the_description_says():
    tensors = load_file(ASSETS / "golden_w3.safetensors")
    expected = golden_tensors()
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor)
    assert json.loads((ASSETS / "golden_config.json").read_text()) == golden_config()


def test_decoded_weights_are_the_formulas(golden):
    model = RepVGGForImageClassification.from_pretrained(golden)
    for name in LAYERS:
        assert torch.equal(model.get_submodule(name).weight, golden_weight(name))
    tensors = golden_tensors()
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    assert all(
        state[name].dtype == tensor.dtype and torch.equal(state[name], tensor) for name, tensor in tensors.items()
    )
    assert torch.isfinite(model(torch.ones(1, 3, 16, 16)).logits).all()


def test_saving_again_gives_the_same_file(golden, tmp_path):
    RepVGGForImageClassification.from_pretrained(golden).save_pretrained(tmp_path / "again")
    again = tmp_path / "again"
    assert (again / "model.safetensors").read_bytes() == (ASSETS / "golden_w3.safetensors").read_bytes()
    config = json.loads((again / "config.json").read_text())
    assert golden_config().items() <= config.items()


if __name__ == "__main__":
    save_file(golden_tensors(), ASSETS / "golden_w3.safetensors", metadata={"format": "pt"})
    (ASSETS / "golden_config.json").write_text(json.dumps(golden_config(), indent=2) + "\n")
