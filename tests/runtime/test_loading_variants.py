"""Quantized checkpoints with the less common arguments of `from_pretrained`, and with code from the repository."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification

import repvgg_hf
from repvgg_hf import ClusterConfig, RepVGGBackbone, RepVGGForImageClassification, RepVGGModel
from repvgg_hf.runtime.cluster_layers import cluster_layers

RUNTIME = Path(repvgg_hf.__file__).parent / "runtime"  # its files are what a Hub repository gets for trust_remote_code
AUTO_MAP = {
    "AutoConfig": "configuration_repvgg.RepVGGConfig",
    "AutoModel": "modeling_repvgg.RepVGGModel",
    "AutoModelForImageClassification": "modeling_repvgg.RepVGGForImageClassification",
}
DISK = {"repvgg": "disk", "classifier": "cpu"}
OFFLOADED = "^repvgg.*is offloaded to disk.*load the model without device_map"
STORED = ("weight_codes", "weight_codebook", "weight_scale")


def logits(model, pixel_values) -> torch.Tensor:
    with torch.no_grad():
        return model(pixel_values.to(model.dtype)).logits


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def contents(folder: Path) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_config, randomize_batch_norms):
    """One model in train form, fused, and quantized to 4 bits (`model`, `logits`), in folders of these names."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved")
    model = randomize_batch_norms(RepVGGForImageClassification(tiny_config(num_labels=8)), generator).eval()
    model.save_pretrained(folder / "train")
    copy.deepcopy(model).reparameterize().save_pretrained(folder / "fused")
    model.quantize(bits=4).save_pretrained(folder / "quantized")
    pixel_values = torch.randn(2, 3, 32, 32, generator=generator)
    return SimpleNamespace(
        train=folder / "train", fused=folder / "fused", quantized=folder / "quantized",
        model=model, pixel_values=pixel_values, logits=logits(model, pixel_values),
    )  # fmt: skip


@pytest.mark.parametrize("cls", [RepVGGModel, RepVGGBackbone])
def test_a_classifiers_checkpoint_gives_the_other_models(cls, saved):
    model, info = cls.from_pretrained(saved.quantized, output_loading_info=True)
    assert not info["missing_keys"]
    assert set(info["unexpected_keys"]) == {f"classifier.{name}" for name in (*STORED, "bias")}
    assert len(cluster_layers(model)) == 5
    with torch.no_grad():
        outputs = model(saved.pixel_values)
        expected = saved.model.repvgg(saved.pixel_values).last_hidden_state
    assert_close(outputs.feature_maps[-1] if cls is RepVGGBackbone else outputs.last_hidden_state, expected)


@pytest.mark.parametrize("dtype", [torch.float16, "bfloat16", "auto"], ids=str)
def test_dtype_in_every_notation(dtype, saved, relative_error):
    model = AutoModelForImageClassification.from_pretrained(saved.quantized, dtype=dtype)
    expected_dtype = {"auto": torch.float32, "bfloat16": torch.bfloat16}.get(dtype, dtype)
    assert model.dtype == expected_dtype
    for name, layer in cluster_layers(model).items():
        source = saved.model.get_submodule(name)
        assert layer.weight.dtype == expected_dtype and torch.equal(layer.weight, source.weight.to(expected_dtype))
        assert all(torch.equal(getattr(layer, stored), getattr(source, stored)) for stored in STORED)
    assert relative_error(logits(model, saved.pixel_values), saved.logits) < 0.05


def test_bfloat16_rounds_biases_and_nothing_else(saved, tmp_path):
    model = RepVGGForImageClassification.from_pretrained(saved.quantized, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    again = RepVGGForImageClassification.from_pretrained(tmp_path / "half")
    assert again.dtype == torch.bfloat16
    again.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "half")
    widened = RepVGGForImageClassification.from_pretrained(tmp_path / "half", dtype=torch.float32).state_dict()
    for name, tensor in saved.model.state_dict().items():
        expected = tensor.bfloat16().float() if name.endswith(".bias") else tensor
        assert widened[name].dtype == tensor.dtype and torch.equal(widened[name], expected)


def test_shards_are_saved_again_whole(saved, tmp_path):
    saved.model.save_pretrained(tmp_path, max_shard_size="1KB")
    assert len(contents(tmp_path)) > 4
    model = RepVGGForImageClassification.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert contents(tmp_path) == contents(saved.quantized)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
@pytest.mark.parametrize("form", ["quantized", "train"])
def test_device_map(form, device_map, saved):
    config = {"quantization_config": ClusterConfig(bits=4)} if form == "train" else {}
    folder = getattr(saved, form)
    model = AutoModelForImageClassification.from_pretrained(folder, device_map=device_map, **config)
    assert_close(logits(model, saved.pixel_values), saved.logits)


@pytest.mark.parametrize("decode", ["at_load", "on_the_fly"])
@pytest.mark.parametrize("offload_buffers", [False, True])
def test_offloaded_to_disk(offload_buffers, decode, saved, tmp_path):
    model = AutoModelForImageClassification.from_pretrained(
        saved.quantized, device_map=DISK, offload_folder=tmp_path / "offload", offload_buffers=offload_buffers,
        quantization_config=ClusterConfig(decode=decode),
    )  # fmt: skip
    assert model.repvgg.embeddings.layer.conv.bias.is_meta
    assert model.repvgg.embeddings.layer.conv.weight_codes.is_meta is offload_buffers
    for _ in range(2):
        assert_close(logits(model, saved.pixel_values), saved.logits)
    with pytest.raises(ValueError, match=OFFLOADED):
        model.dequantize()
    assert_close(logits(model, saved.pixel_values), saved.logits)
    model.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(saved.quantized)


def test_a_float_model_on_disk_is_not_quantized(saved, tmp_path):
    where = {"device_map": DISK, "offload_folder": tmp_path}
    with pytest.raises(ValueError, match=OFFLOADED):
        RepVGGForImageClassification.from_pretrained(saved.fused, quantization_config=ClusterConfig(), **where)
    model = RepVGGForImageClassification.from_pretrained(saved.fused, **where)
    for change in (model.quantize, model.prepare_qat):
        with pytest.raises(ValueError, match=OFFLOADED):
            change()


class TestQuantizedOnLoading:
    def test_a_bfloat16_checkpoint_stays_one(self, saved, tmp_path):
        RepVGGForImageClassification.from_pretrained(saved.train).bfloat16().save_pretrained(tmp_path / "half")
        config = ClusterConfig()
        model = RepVGGForImageClassification.from_pretrained(tmp_path / "half", quantization_config=config)
        assert model.dtype == model.config.dtype == torch.bfloat16
        model.save_pretrained(tmp_path / "quantized")
        loaded = RepVGGForImageClassification.from_pretrained(tmp_path / "quantized")
        assert loaded.dtype == torch.bfloat16
        assert_close(logits(loaded, saved.pixel_values), logits(model, saved.pixel_values))
        assert config.checksum is None  # the caller's config is not the model's

    def test_a_dict_does_as_well(self, saved):
        config = {"quant_method": "cluster", "bits": 4}
        model = RepVGGForImageClassification.from_pretrained(saved.fused, quantization_config=config)
        assert_close(logits(model, saved.pixel_values), saved.logits)

    def test_errors_are_those_of_quantize(self, saved):
        config = ClusterConfig(granularity="per_group", group_size=3)
        with pytest.raises(ValueError, match="group_size=3 does not divide the 8 output channels of 'repvgg.embed"):
            RepVGGForImageClassification.from_pretrained(saved.train, quantization_config=config)


def test_decoding_can_be_chosen_against_the_checkpoint(saved, tmp_path):
    lazily = ClusterConfig(decode="on_the_fly")
    model = RepVGGForImageClassification.from_pretrained(saved.quantized, quantization_config=lazily)
    config = model.config.quantization_config
    assert config.bits == 4 and config.decode == "at_load"  # the checkpoint's own
    model.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(saved.quantized)
    config.decode = "on_the_fly"
    model.save_pretrained(tmp_path / "lazy")
    assert RepVGGForImageClassification.from_pretrained(tmp_path / "lazy").classifier.on_the_fly
    eager = RepVGGForImageClassification.from_pretrained(
        tmp_path / "lazy", quantization_config=ClusterConfig(decode="at_load")
    )
    assert not eager.classifier.on_the_fly
    assert torch.equal(eager.classifier.weight, saved.model.classifier.weight)


def test_the_float_layers_that_a_dequantized_checkpoint_gives(saved, tmp_path):
    model = RepVGGForImageClassification.from_pretrained(saved.quantized).dequantize()
    assert type(model.classifier) is nn.Linear
    model.save_pretrained(tmp_path)
    assert_close(logits(RepVGGForImageClassification.from_pretrained(tmp_path), saved.pixel_values), saved.logits)


@pytest.mark.parametrize("cls", [RepVGGForImageClassification, AutoModelForImageClassification])
def test_no_quantization_config_at_all(cls, saved):
    """`AutoModel` puts the `None` into the configuration, where nothing is left to tell what the codes mean."""
    if cls is RepVGGForImageClassification:
        model = cls.from_pretrained(saved.quantized, quantization_config=None)
        assert_close(logits(model, saved.pixel_values), saved.logits)
    else:
        with pytest.raises(ValueError, match="quantized checkpoint .* leave out the argument quantization_config=None"):
            cls.from_pretrained(saved.quantized, quantization_config=None)


def test_branches_are_not_offloaded(saved, tmp_path):
    with pytest.raises(ValueError, match="^repvgg.*.conv is offloaded, but a block .*device_map='cpu', or reparam"):
        RepVGGForImageClassification.from_pretrained(saved.train, device_map=DISK, offload_folder=tmp_path)


WITHOUT_THEN_BESIDE_THE_PACKAGE = """
import sys
import torch

torch.set_num_threads(1)
folder, pixel_values = sys.argv[1], torch.load("pixel_values.pt")

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "repvgg_hf":
            raise ModuleNotFoundError(f"no package {name}")

sys.meta_path.insert(0, Blocker())
from transformers import AutoModel, AutoModelForImageClassification
features = AutoModel.from_pretrained(folder, trust_remote_code=True)(pixel_values).pooler_output.detach()
remote = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).dequantize()
result = {"features": features, "logits": remote(pixel_values).logits.detach()}
for method in (remote.quantize, remote.prepare_qat):
    try:
        method()
    except ImportError as error:
        result[method.__name__] = str(error)

sys.meta_path.pop(0)
import repvgg_hf
options = {"bits": 3, "granularity": "per_channel"}
local = repvgg_hf.RepVGGForImageClassification.from_pretrained(folder).dequantize()
remote.prepare_qat(repvgg_hf.ClusterConfig(**options))
repvgg_hf.update_codebooks(remote)
remote.quantize()
local.prepare_qat(**options)
repvgg_hf.update_codebooks(local)
local.quantize()
result["modules"] = [type(model.classifier).__module__ for model in (remote, local)]
result["again"] = [model(pixel_values).logits.detach() for model in (remote, local)]
remote.save_pretrained("again")
torch.save(result, "result.pt")
"""


class TestCodeFromTheRepository:
    @pytest.fixture(scope="class")
    def result(self, saved, tmp_path_factory) -> dict:
        """What a new interpreter outside the source tree makes of a checkpoint that comes with its code."""
        folder = tmp_path_factory.mktemp("remote")
        shutil.copytree(saved.quantized, folder / "repository")
        for path in RUNTIME.glob("[!_]*.py"):
            shutil.copy(path, folder / "repository")
        config = json.loads((folder / "repository" / "config.json").read_text())
        (folder / "repository" / "config.json").write_text(json.dumps(config | {"auto_map": AUTO_MAP}))
        torch.save(saved.pixel_values, folder / "pixel_values.pt")
        process = subprocess.run(
            [sys.executable, "-c", WITHOUT_THEN_BESIDE_THE_PACKAGE, str(folder / "repository")],
            capture_output=True, text=True, timeout=300, cwd=folder,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")},
        )  # fmt: skip
        assert process.returncode == 0, process.stderr
        return torch.load(folder / "result.pt") | {"folder": folder / "again"}

    def test_without_the_package(self, saved, result):
        with torch.no_grad():
            assert_close(result["features"], saved.model.repvgg(saved.pixel_values).pooler_output)
        assert_close(result["logits"], saved.logits)
        for method in ("quantize", "prepare_qat"):
            assert result[method] == f"{method}() is part of the package: `pip install repvgg-hf`."

    def test_beside_the_package(self, saved, result):
        """The installed package makes the codes and trains; the layers are those of the repository's code."""
        assert result["modules"][0].startswith("transformers_modules.")
        assert result["modules"][1] == "repvgg_hf.runtime.cluster_layers"
        assert_close(*result["again"])
        again = RepVGGForImageClassification.from_pretrained(result["folder"])
        assert_close(logits(again, saved.pixel_values), result["again"][1])
