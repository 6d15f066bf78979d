"""Damage small published checkpoints in many ways, and look whether any loads to other logits unnoticed.

python tests/fuzz_checkpoints.py --mutants 10000 [--seed 0] [--output_json FILE]

A mutant is one of four checkpoints (train form, fused, 4 bit, 3 bit with 8 bit activations) with one fault: bytes of
the weights flipped, inserted or cut; names, dtypes, shapes or offsets changed in the header; tensors swapped;
configuration values changed, added or deleted. It must be refused with an error that says what is wrong, or give the
logits of the original. No mutant loses its checksum, without which it may load to anything. `auto_map` is left alone
and `model_type` stays a text, as Transformers reads them before any code of ours. The exit code is 1 if some mutant
loads to other logits, ends with another error, or hangs.
"""

import argparse
import collections
import contextlib
import copy
import io
import json
import random
import signal
import struct
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForImageClassification, BitImageProcessor
from transformers.utils import logging

from repvgg_hf import RepVGGConfig, RepVGGForImageClassification
from repvgg_hf.hub import write_folder

SECONDS = 20  # for one mutant: none needs a tenth of a second
# what says what is wrong with which field, tensor or file: by type, and where that is general by what it says
CLEAR = {ValueError: "", StrictDataclassError: "", OSError: "", TypeError: "has no option",
         RuntimeError: "tensors differ in all"}  # fmt: skip
CHECKSUMS = ("weights_checksum", "checksum")
OTHER_VALUES = [0, 1, 2, 3, -1, 7, 16, 10**12, 0.5, 1e-3, True, False, None, "", "relu", "silu", "cluster", "float16",
                "per_channel", [], [1], [2, 2], ["3x3"], ["3x3", "identity"], {}, {"classifier": 8}]  # fmt: skip
DTYPES = ["F32", "F16", "BF16", "F64", "I8", "U8", "I32", "I64", "BOOL", "F8_E4M3", "X"]


def make_checkpoints(root: Path) -> dict[str, Path]:
    """Publish four small classifiers into folders."""
    torch.manual_seed(0)
    sizes = {"stem_hidden_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "strides": [2, 2], "groups": 2}
    train = RepVGGForImageClassification(RepVGGConfig(num_labels=4, oabn_threshold=1.0, **sizes)).eval()
    for module in train.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.normal_(module.running_mean, 0, 0.3)
            torch.nn.init.normal_(module.bias, 0, 0.3)
    models = {"train": train, "fused": copy.deepcopy(train).reparameterize()}
    grouped = {"granularity": "per_group", "group_size": 2, "channel_scale": False}
    models["w4"] = copy.deepcopy(train).quantize(bits=4, bits_overrides={"classifier": 8})
    models["w3a8"] = copy.deepcopy(train).quantize(
        "uniform", bits=3, activation_bits=8, calibration=torch.randn(8, 3, 32, 32), **grouped
    )
    size = {"height": 32, "width": 32}
    processor = BitImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    for name, model in models.items():
        write_folder(model, root / name, f"tests/{name}", processor=processor, license="mit", draw_plots=False)
    return {name: root / name for name in models}


def split(data: bytes) -> tuple[dict, bytes]:
    """The header and the tensors' bytes of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: dict, body: bytes) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def insert(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.randbytes(rng.choice([1, 2, 8, 64])) + data[place:]


def cut(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + (data[place + rng.choice([1, 2, 8, 64]) :] if rng.random() < 0.7 else b"")


def change_header(kind: str):
    """A mutator of one entry of the header, the rest of which stays consistent."""

    def change(data: bytes, rng: random.Random) -> bytes:
        header, body = split(data)
        names = [name for name in header if name != "__metadata__"]
        name, other = rng.sample(names, 2)
        entry = header[name]
        if kind == "name":
            new = rng.choice([name[:-1], name + "x", other + "_", name.replace("bias", "weight"), "repvgg." + name])
            header = {new if key == name else key: value for key, value in header.items()}
        elif kind == "dtype":
            same = {"F16": ["BF16"], "BF16": ["F16"], "F32": ["I32"], "U8": ["I8", "BOOL"]}.get(entry["dtype"], [])
            entry["dtype"] = rng.choice(same * 5 + DTYPES)
        elif kind == "shape":
            shape = entry["shape"]
            options = [shape[::-1], [*shape, 1], shape[1:], [1, *shape], [size + 1 for size in shape], []]
            if len(shape) > 1:
                options.append([shape[1], shape[0], *shape[2:]])
            entry["shape"] = rng.choice(options)
        elif kind == "offsets":
            begin, end = entry["data_offsets"]
            step = rng.choice([-8, -4, -1, 1, 4, 8, len(body)])
            entry["data_offsets"] = rng.choice([[begin + step, end + step], [begin, end + step], [begin + step, end]])
        elif kind == "swap":
            same = [key for key in names if key != name and header[key]["shape"] == entry["shape"]]
            other = rng.choice(same) if same and rng.random() < 0.8 else other
            header[name], header[other] = header[other], header[name]
        return joined(header, body)

    return change


def change_config(kind: str):
    """A mutator of `config.json`, or of an object inside it."""

    def change(text: str, rng: random.Random) -> str:
        config = json.loads(text)
        inner = [value for key, value in config.items() if isinstance(value, dict) and key != "auto_map"]
        place = rng.choice(
            [config, config, *inner, *([config["quantization_config"]] if "quantization_config" in config else [])]
        )
        names = [name for name in place if name not in (*CHECKSUMS, "auto_map")]
        name = rng.choice(names)
        if kind == "delete":
            del place[name]
        elif kind == "add":
            known = [
                *RepVGGConfig.__dataclass_fields__,
                "torch_dtype",
                "num_labels",
                "quantization_config",
                "checksum_",
            ]
            new = rng.choice([name[:-1], name + "s", name[1:], *rng.sample(known, 3)])
            # Transformers takes a class called dtype for a dtype
            if new not in CHECKSUMS and not (new == "dtype" and place is config["label2id"]):
                place[new] = rng.choice(OTHER_VALUES)
        elif kind == "change":
            value = place[name]
            similar = []
            if isinstance(value, bool):
                similar = [not value]
            elif isinstance(value, int | float):
                similar = [value + 1, value * 2, -value, value / 3]
            elif isinstance(value, list) and value:
                similar = [value[::-1], value[:-1], [*value, value[-1]], [value[0]] * len(value)]
                if isinstance(value[0], int):
                    similar.append([value[0] + 1, *value[1:]])
            elif isinstance(value, str):
                similar = [value[:-1], value.upper(), value[1:], {"relu": "gelu", "float32": "bfloat16"}.get(value, "")]
            place[name] = rng.choice(similar * 2 + OTHER_VALUES)
        elif kind == "text":
            return flip(text.encode(), rng).decode("utf-8", "replace")
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    return change


WEIGHTS = {"flip bytes": flip, "insert bytes": insert, "cut bytes": cut} | {
    f"header {kind}": change_header(kind) for kind in ("name", "dtype", "shape", "offsets")
} | {"swap tensors": change_header("swap")}  # fmt: skip
CONFIGS = {f"config {kind}": change_config(kind) for kind in ("change", "add", "delete", "text")}


def is_ours(original: str, text: str) -> bool:
    """Tell whether a mutated configuration still has the checksum that the original has, and a text as model_type."""
    try:
        config, before = json.loads(text), json.loads(original)
        if not isinstance(config.get("model_type", ""), str):
            return False
        inner, inner_before = config.get("quantization_config"), before.get("quantization_config")
        if inner_before is not None:
            return isinstance(inner, dict) and inner.get("checksum") == inner_before["checksum"]
        return config.get("weights_checksum") == before["weights_checksum"]
    except (ValueError, AttributeError):
        return True  # unreadable: it must be refused


def load_logits(folder: Path, images: torch.Tensor, cls) -> torch.Tensor:
    """What the classifier in a folder makes of images, in float32."""
    with torch.no_grad():
        # else a damaged model_type would make an Auto class ask at the terminal for the code in the folder
        model = cls.from_pretrained(folder, trust_remote_code=False).eval()
        return model(images.to(model.dtype), return_dict=True).logits.float()


@contextlib.contextmanager
def time_limit(seconds: int):
    def stop(number, frame):
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def judge(folder: Path, images: torch.Tensor, expected: torch.Tensor, cls) -> tuple[str, str]:
    """(what came of a mutant, the error or how far logits are off)."""
    try:
        with time_limit(SECONDS), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logits = load_logits(folder, images, cls)
    except TimeoutError:
        return "hangs", f"more than {SECONDS} s"
    except Exception as error:
        clear = any(isinstance(error, kind) and words in str(error) for kind, words in CLEAR.items())
        return "refused" if clear else "crashes", f"{type(error).__name__}: {error}"
    if logits.shape != expected.shape or not torch.allclose(logits, expected, atol=1e-5, rtol=1e-4, equal_nan=False):
        return "other logits", f"shape {list(logits.shape)}" if logits.shape != expected.shape else str(
            (logits - expected).abs().max().item()
        )  # fmt: skip
    return "same logits", ""


def fuzz(mutants: int, seed: int = 0) -> dict:
    """Make and judge `mutants` mutants; returns the counts and each failure."""
    rng = random.Random(seed)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    counts, errors, failures = collections.Counter(), collections.Counter(), []
    with tempfile.TemporaryDirectory() as root:
        folders = make_checkpoints(Path(root))
        whole = {
            name: ((folder / "model.safetensors").read_bytes(), (folder / "config.json").read_text())
            for name, folder in folders.items()
        }
        expected = {
            name: load_logits(folder, images, AutoModelForImageClassification) for name, folder in folders.items()
        }
        kinds = [*WEIGHTS, *CONFIGS]
        number = 0
        while number < mutants:
            name, kind = list(folders)[number % len(folders)], kinds[number // len(folders) % len(kinds)]
            weights, config = whole[name]
            if kind in WEIGHTS:
                weights = WEIGHTS[kind](weights, rng)
            else:
                config = CONFIGS[kind](config, rng)
                if not is_ours(whole[name][1], config):
                    continue
            if (weights, config) == whole[name]:
                continue
            (folders[name] / "model.safetensors").write_bytes(weights)
            (folders[name] / "config.json").write_text(config)
            number += 1
            cls = rng.choice([AutoModelForImageClassification, RepVGGForImageClassification])
            outcome, detail = judge(folders[name], images, expected[name], cls)
            counts[kind, outcome] += 1
            if detail and outcome != "other logits":
                errors[detail.split(":")[0]] += 1
            if outcome not in ("refused", "same logits"):
                changed = {
                    key: value
                    for key, value in _flat(config).items()
                    if _flat(whole[name][1]).get(key, "absent") != value
                }
                failures.append({"mutant": number, "checkpoint": name, "kind": kind, "outcome": outcome,
                                 "detail": detail[:300], "changed": str(changed)[:300]})  # fmt: skip
    table = {kind: {outcome: count for (k, outcome), count in sorted(counts.items()) if k == kind} for kind in kinds}
    return {"mutants": mutants, "seed": seed, "outcomes": table, "errors": dict(errors.most_common()),
            "failures": failures}  # fmt: skip


def _flat(text: str) -> dict:
    """The values of a configuration by their path; nothing for one that is no JSON."""
    try:
        config = json.loads(text)
    except ValueError:
        return {}
    flat = {}
    for key, value in config.items():
        flat |= {f"{key}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_json", type=Path, help="file for the figures, which are printed as well")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    record = fuzz(args.mutants, args.seed)
    text = json.dumps(record, indent=2)
    print(text)
    if args.output_json is not None:
        args.output_json.write_text(text + "\n")
    sys.exit(bool(record["failures"]))


if __name__ == "__main__":
    main()
