"""What the checksum of a published checkpoint covers, and what it leaves to the user."""

import copy
import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, BitImageProcessor

from repvgg_hf import ClusterConfig, RepVGGBackbone, RepVGGForImageClassification, RepVGGModel
from repvgg_hf.hub import write_folder

REFUSED = (
    r"don't fit (the |weights_)checksum in config.json, or fields of config.json were changed: .*remove (weights_)?"
)
FORMS = ["train", "fused", "w4"]


@pytest.fixture(scope="module")
def published(tiny_config, tmp_path_factory):
    """Folders as they are published: in train form, fused, and with 4 bits."""
    root = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    model = RepVGGForImageClassification(tiny_config()).eval()
    processor = BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    models = {
        "train": model,
        "fused": copy.deepcopy(model).reparameterize(),
        "w4": copy.deepcopy(model).quantize(bits=4),
    }
    for name, made in models.items():
        write_folder(made, root / name, f"org/{name}", processor=processor, license="mit", draw_plots=False)
    return root


@pytest.fixture(params=FORMS)
def folder(request, published, tmp_path) -> Path:
    return shutil.copytree(published / request.param, tmp_path / request.param)


def edit(folder: Path, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def load(folder: Path, **options):
    return AutoModelForImageClassification.from_pretrained(folder, **options)


def rename_dtype(path: Path, old: str, new: str) -> int:
    """Change what the header says about tensors of one dtype; returns how many there are."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length].replace(f'"dtype":"{old}"'.encode(), f'"dtype":"{new}"'.encode())
    header = header.rstrip() + b" " * (-len(header.rstrip()) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    return header.count(f'"dtype":"{new}"'.encode())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_another_dtype_for_the_same_bytes(published, tmp_path, form, dtype):
    """All sizes fit, and the numbers are others."""
    model = load(published / form).to(dtype)
    processor = BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    write_folder(model, tmp_path / "half", "org/half", processor=processor, license="mit", draw_plots=False)
    load(tmp_path / "half")
    names = {torch.bfloat16: ("BF16", "F16"), torch.float16: ("F16", "BF16")}[dtype]
    assert rename_dtype(tmp_path / "half" / "model.safetensors", *names) > 0
    # the codebooks of a quantized model are float16 in any case, so that their dtype tells before the checksum does
    with pytest.raises(ValueError, match=f"{REFUSED}|weight_codebook in .* is torch.bfloat16"):
        load(tmp_path / "half")


@pytest.mark.parametrize("kind", ["name", "shape"])
def test_another_name_or_shape_for_the_same_bytes(published, tmp_path, kind):
    """Two tensors of one shape change places, or a square matrix of kernels is read the other way round."""
    folder = shutil.copytree(published / "train", tmp_path / "train")
    tensors = load_file(folder / "model.safetensors")
    block = "repvgg.embeddings.layer.conv.branches.3x3"
    if kind == "name":
        names = f"{block}.norm.weight", f"{block}.norm.bias"
        tensors |= {names[0]: tensors[names[1]], names[1]: tensors[names[0]]}
    else:
        tensors[f"{block}.norm.num_batches_tracked"] = tensors[f"{block}.norm.num_batches_tracked"].view(1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=REFUSED):
        load(folder)


FIELDS = {
    "num_channels": 1, "strides": [2, 1], "stem_stride": 1, "hidden_act": "silu", "batch_norm_eps": 1e-3,
    "oabn": False, "oabn_threshold": 1.0, "squeeze_ratio": 8, "use_squeeze_excitation": True, "groups": 1,
    "block_branches": ["3x3", "1x1"], "depths": [2, 1], "hidden_sizes": [8, 8], "dtype": "bfloat16",
    "out_indices": [1], "classifier_dropout": 0.5,
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), FIELDS.items(), ids=FIELDS)
def test_fields_that_change_the_function(folder, name, value):
    """Refused by the checksum or, where tensors can't fit, by their names and shapes."""

    def change(config):
        assert config[name] != value
        config[name] = value
        if name == "out_indices":
            config["out_features"] = ["stage1"]

    edit(folder, change)
    with pytest.raises(
        (ValueError, RuntimeError), match=rf"{REFUSED}|quantization_config asks for|is not in .*safetensors"
    ):
        load(folder)


@pytest.mark.parametrize("name", ["hidden_act", "dtype", "out_features"])
def test_a_field_that_has_its_default_may_be_missing(folder, name):
    expected = load(folder)

    def change(config):
        del config[name]
        if name == "dtype":  # the weights' own is then taken: it can't be told from one that was lost
            config["dtype"] = "float32"

    edit(folder, change)
    assert load(folder).dtype == expected.dtype


def test_names_of_classes_and_new_fields_are_the_users(folder):
    edit(folder, lambda config: config.update(id2label={str(n): f"ant {n}" for n in range(5)}, note="mine"))
    assert load(folder).config.id2label[1] == "ant 1"
    edit(folder, lambda config: config["id2label"].pop("4"))
    with pytest.raises((ValueError, RuntimeError), match="checksum in config.json"):
        load(folder)


QUANTIZATION = {
    "bits": 3, "method": "uniform", "granularity": "per_channel", "channel_scale": False, "activation_bits": 8,
    "codebook_dtype": "float32", "bits_overrides": {"classifier": 4}, "modules_to_not_convert": ["classifier"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), QUANTIZATION.items(), ids=QUANTIZATION)
def test_fields_of_quantization_config(published, tmp_path, name, value):
    folder = shutil.copytree(published / "w4", tmp_path / "w4")
    edit(folder, lambda config: config["quantization_config"].update({name: value}))
    with pytest.raises(ValueError):
        load(folder)


def test_when_weights_are_decoded_is_the_users(published, tmp_path):
    folder = shutil.copytree(published / "w4", tmp_path / "w4")
    edit(folder, lambda config: config["quantization_config"].update(decode="on_the_fly"))
    load(folder)
    load(folder, quantization_config=ClusterConfig(decode="at_load"))


def test_arguments_change_no_file(published):
    """Fields that are passed to `from_pretrained` are no damage, nor is a model without the head."""
    for form in FORMS:
        assert load(published / form, hidden_act="silu").config.hidden_act == "silu"
        assert load(published / form, dtype=torch.bfloat16).dtype == torch.bfloat16
        RepVGGModel.from_pretrained(published / form)
        RepVGGBackbone.from_pretrained(published / form, out_indices=[1])
        head = load(published / form, num_labels=3, ignore_mismatched_sizes=True).classifier
        assert head.weight.shape[0] == 3
    assert load(published / "train", oabn=False).config.oabn is False


def test_removing_the_checksum_is_the_way_to_change_a_field(folder):
    edit(folder, lambda config: config.update(hidden_act="silu"))
    with pytest.raises(ValueError, match="remove (weights_)?checksum from"):
        load(folder)
    edit(folder, lambda config: config.get("quantization_config", config).update(
        {"checksum" if "quantization_config" in config else "weights_checksum": None}
    ))  # fmt: skip
    assert load(folder).config.hidden_act == "silu"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool, torch.uint8], ids=str)
def test_integer_biases_are_refused(published, tmp_path, dtype):
    """Also without a checksum: they would be converted, and rounded."""
    folder = shutil.copytree(published / "w4", tmp_path / "w4")
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.bias"] = tensors["classifier.bias"].to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder, lambda config: config["quantization_config"].pop("checksum"))
    with pytest.raises(ValueError, match=f"classifier.bias in .* is {dtype} .*asks for torch.float32"):
        load(folder)


@pytest.mark.parametrize("place", ["quantization_config", "qat_config"])
@pytest.mark.parametrize("name", ["bit", "momentum"])
def test_unknown_options_of_quantization(published, tmp_path, place, name, tiny_config):
    if place == "quantization_config":
        folder = shutil.copytree(published / "w4", tmp_path / "w4")
        edit(folder, lambda config: config[place].update({name: 3}))
    else:
        folder = tmp_path / "qat"
        RepVGGForImageClassification(tiny_config()).prepare_qat(bits=4).save_pretrained(folder)
        edit(folder, lambda config: config[place]["quantization"].update({name: 3}))
    with pytest.raises((TypeError, ValueError), match=f"has no option {name!r}"):
        load(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits_overrides": 3}, "bits_overrides must be an object of bits by module, got 3"),
        ({"modules_to_not_convert": True}, "modules_to_not_convert must be a list of names of modules, got True"),
        ({"modules_to_not_convert": [1]}, r"must be a list of names of modules, got \[1\]"),
        ({"modules_to_not_convert": "classifier"}, "must be a list of names of modules, got 'classifier'"),
    ],
)
def test_kinds_of_options(fields, message):
    with pytest.raises(ValueError, match=message):
        ClusterConfig(**fields)
