"""Writes `golden_w3`, a 3-bit checkpoint that pins the format on disk. Nothing of the package makes its tensors.

    python tests/assets/make_golden.py

The committed files are the reference: run this again only for a new format_version.
"""

import json
import struct
import zlib
from pathlib import Path

FOLDER = Path(__file__).parent / "golden_w3"
BITS = 3
SHAPES = {
    "repvgg.embeddings.layer.conv": (4, 3, 3, 3),
    "repvgg.encoder.stages.0.layers.0.conv": (4, 4, 3, 3),
    "classifier": (3, 4),
}
# all of these are exact in float16
CODEBOOK = [-1.5, -0.75, -0.25, -0.0625, 0.125, 0.375, 0.875, 1.25]


def codes_of(index: int, count: int) -> list[int]:
    """Codes without a short period: another bit order or another offset gives other ones."""
    return [(i * i + 3 * i * (index + 1) + i // 5 + index) % 8 for i in range(count)]


def packed(codes: list[int]) -> bytes:
    """The bit stream as text, each code and each byte with its lowest bit first."""
    stream = "".join(format(code, f"0{BITS}b")[::-1] for code in codes)
    stream += "0" * (-len(stream) % 8)
    return bytes(int(stream[i : i + 8][::-1], 2) for i in range(0, len(stream), 8))


def scales_of(channels: int) -> list[float]:
    return [0.25 + 0.125 * channel for channel in range(channels)]


def biases_of(index: int, channels: int) -> list[float]:
    return [0.5 * channel - 0.25 * (index + 1) for channel in range(channels)]


def tensors() -> dict[str, tuple[str, list[int], bytes]]:
    """Name: (safetensors dtype, shape, bytes)."""
    result = {}
    for index, (name, shape) in enumerate(SHAPES.items()):
        count, out = 1, shape[0]
        for size in shape:
            count *= size
        data = packed(codes_of(index, count))
        result[f"{name}.weight_codes"] = ("U8", [len(data)], data)
        # every layer's codebook is another multiple by a power of two
        codebook = [entry / 2**index for entry in CODEBOOK]
        result[f"{name}.weight_codebook"] = ("F16", [1, 8], struct.pack("<8e", *codebook))
        result[f"{name}.weight_scale"] = ("F32", [out], struct.pack(f"<{out}f", *scales_of(out)))
        result[f"{name}.bias"] = ("F32", [out], struct.pack(f"<{out}f", *biases_of(index, out)))
    return result


def checksum(contents: dict) -> str:
    lines = sorted(f"{name} {zlib.crc32(data):08x}" for name, (_, _, data) in contents.items())
    return f"crc32:{zlib.crc32(chr(10).join(lines).encode()):08x}"


def main():
    from safetensors import TensorSpec, serialize_file

    from repvgg_hf import ClusterConfig, RepVGGConfig

    FOLDER.mkdir(exist_ok=True)
    contents = tensors()
    buffers = {name: memoryview(data) for name, (_, _, data) in contents.items()}
    del TensorSpec, buffers
    dtypes = {"U8": "uint8", "F16": "float16", "F32": "float32"}
    flat = {n: {"dtype": dtypes[dtype], "shape": shape, "data": data} for n, (dtype, shape, data) in contents.items()}
    serialize_file(flat, FOLDER / "model.safetensors", metadata={"format": "pt"})
    config = RepVGGConfig(
        stem_hidden_size=4, hidden_sizes=[4], depths=[1], strides=[2], num_labels=3, deploy=True, dtype="float32"
    )
    config.architectures = ["RepVGGForImageClassification"]
    config.quantization_config = ClusterConfig(bits=BITS, checksum=checksum(contents))
    (FOLDER / "config.json").write_text(json.dumps(config.to_diff_dict(), indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
