"""Quantizing models of other families: all layers, the same logits in a fresh process, the same bytes when saved."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, load, logits, make_model
from torch import nn

import repvgg_hf
from repvgg_hf import ClusterConfig
from repvgg_hf.runtime.cluster_layers import cluster_layers

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> dict[str, dict]:
    """What quantizing each family gave, and what a fresh process then loaded."""
    root = tmp_path_factory.mktemp("families")
    found = {}
    for family in FAMILIES:
        folder = root / family
        model = make_model(family)
        model.save_pretrained(folder / "float")
        kinds = [type(module) for module in model.modules()]
        quantized = load(family, folder / "float", quantization_config=ClusterConfig(bits=4))
        quantized.save_pretrained(folder / "whole")
        quantized.save_pretrained(folder / "sharded", max_shard_size="4KB")
        found[family] = {
            "folder": folder, "float": logits(model), "quantized": logits(quantized),
            "layers": sum(map(kinds.count, (nn.Conv2d, nn.Conv1d, nn.Linear))),
            "converted": len(cluster_layers(quantized)),
            "left": sum(map([type(module) for module in quantized.modules()].count, (nn.Conv2d, nn.Linear))),
        }  # fmt: skip
    names = [f"{family}={root / family / form}" for family in FAMILIES for form in ("whole", "sharded")]
    command = [sys.executable, str(HERE / "fresh_models.py"), str(root / "fresh.pt"), *names]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert "newly initialized" not in result.stderr and "UNEXPECTED" not in result.stderr
    fresh = torch.load(root / "fresh.pt")
    for family, entry in found.items():
        entry["fresh"] = {form: fresh[str(root / family / form)] for form in ("whole", "sharded")}
    return found


@pytest.mark.parametrize("family", FAMILIES)
class TestFamilies:
    def test_every_layer_is_converted(self, families, family):
        found = families[family]
        assert found["converted"] == found["layers"] >= 8 and found["left"] == 0

    def test_logits_of_four_bits_are_near(self, families, family, relative_error):
        found = families[family]
        assert 1e-3 < relative_error(found["quantized"], found["float"]) < 0.5

    @pytest.mark.parametrize("form", ["whole", "sharded"])
    def test_a_fresh_process_gives_the_same(self, families, family, form):
        assert torch.equal(families[family]["fresh"][form], families[family]["quantized"])

    @pytest.mark.parametrize("form", ["whole", "sharded"])
    def test_saving_again_gives_the_same_bytes(self, families, family, form):
        first, again = families[family]["folder"] / form, families[family]["folder"] / f"{form}-again"
        assert (len(list(first.glob("*.safetensors"))) > 1) == (form == "sharded")
        assert {path.name for path in first.iterdir()} == {path.name for path in again.iterdir()}
        for path in first.iterdir():
            assert path.read_bytes() == (again / path.name).read_bytes(), path.name

    def test_names_in_files_are_those_of_the_float_file(self, families, family):
        """Transformers renames tensors of ViT, RT-DETR and D-FINE on their way into a file."""
        stored = {}
        for form in ("float", "whole"):
            with safe_open(families[family]["folder"] / form / "model.safetensors", framework="pt") as file:
                stored[form] = {name.removesuffix("_codes") for name in file.keys()}  # noqa: SIM118
        extra = {name for name in stored["whole"] if name.endswith(("weight_codebook", "weight_scale"))}
        assert stored["float"] <= stored["whole"]
        # tied layers are stored once in the float file
        assert {name.rpartition(".")[0] for name in extra} >= {
            name.rpartition(".")[0] for name in stored["whole"] - stored["float"] - extra
        }


@pytest.fixture
def resnet(families, tmp_path) -> Path:
    return shutil.copytree(families["resnet"]["folder"] / "whole", tmp_path / "resnet")


@pytest.fixture
def upernet(families, tmp_path) -> Path:
    return shutil.copytree(families["upernet"]["folder"] / "whole", tmp_path / "upernet")


def edit(folder: Path, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


class TestDamage:
    """What a checkpoint of another network is checked for when it is loaded."""

    def test_a_flipped_bit(self, resnet):
        path = resnet / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-100] ^= 1
        path.write_bytes(data)
        with pytest.raises(ValueError, match="don't fit the checksum in config.json"):
            load("resnet", resnet)

    @pytest.mark.parametrize("arguments", [{}, {"quantization_config": ClusterConfig()}], ids=["quantized", "float"])
    def test_a_file_that_is_cut_off(self, families, resnet, arguments):
        if arguments:
            shutil.copytree(families["resnet"]["folder"] / "float", resnet, dirs_exist_ok=True)
        path = resnet / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(ValueError, match=f"can't be read .*{path} is truncated or damaged.*Download or save it"):
            load("resnet", resnet, **arguments)

    def test_a_missing_tensor(self, families, resnet):
        tensors = load_file(resnet / "model.safetensors")
        del tensors["resnet.embedder.embedder.convolution.weight_codes"]
        save_file(tensors, resnet / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"embedder.convolution.weight_codes .* is not in .*model.safetensors"):
            load("resnet", resnet)

    @pytest.mark.parametrize(("name", "value"), [("hidden_act", "silu"), ("downsample_in_bottleneck", True)])
    def test_a_field_that_changes_the_function(self, resnet, name, value):
        edit(resnet, lambda config: config.update({name: value}))
        with pytest.raises(ValueError, match="fields of config.json were changed"):
            load("resnet", resnet)

    def test_a_field_of_a_nested_configuration(self, upernet):
        edit(upernet, lambda config: config["backbone_config"].update(hidden_act="relu"))
        with pytest.raises(ValueError, match="fields of config.json were changed"):
            load("upernet", upernet)

    def test_versions_names_and_new_fields_are_no_damage(self, upernet, families):
        def change(config):
            config["transformers_version"] = config["backbone_config"]["transformers_version"] = "99.0"
            config |= {"id2label": {str(n): f"thing {n}" for n in range(5)}, "architectures": ["Other"]}
            config["backbone_config"]["_name_or_path"] = "elsewhere"

        edit(upernet, change)
        assert torch.equal(logits(load("upernet", upernet)), families["upernet"]["quantized"])

    def test_bits_of_another_checkpoint(self, resnet):
        edit(resnet, lambda config: config["quantization_config"].update(bits=3))
        with pytest.raises(ValueError, match="quantization_config asks for"):
            load("resnet", resnet)

    def test_a_malformed_structure(self, resnet):
        edit(resnet, lambda config: config["quantization_config"].update(fused_structure=[{"name": "resnet.x"}]))
        with pytest.raises(ValueError, match=r"fused_structure\[0\], of 'resnet.x', must have a 'kind'"):
            load("resnet", resnet)


WITHOUT_THE_PACKAGE = """
import sys
from transformers import AutoModelForImageClassification
AutoModelForImageClassification.from_pretrained(sys.argv[1])
"""


class TestLoading:
    def test_without_the_package_it_is_an_error(self, families):
        """Not random weights and a warning."""
        command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(families["vit"]["folder"] / "whole")]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert result.returncode == 1 and "Unknown quantization type, got cluster" in result.stderr
        assert "ignore_mismatched_sizes" in result.stderr.splitlines()[-1]

    @pytest.mark.parametrize("place", ["argument", "config.json"])
    def test_decoding_on_the_fly(self, families, resnet, tmp_path, place):
        lazily = {} if place == "config.json" else {"quantization_config": ClusterConfig(decode="on_the_fly")}
        if not lazily:
            edit(resnet, lambda config: config["quantization_config"].update(decode="on_the_fly"))
        model = load("resnet", resnet, **lazily)
        assert torch.equal(logits(model), families["resnet"]["quantized"])
        assert all("dense_weight" not in dict(layer.named_buffers()) for layer in cluster_layers(model).values())
        model.save_pretrained(tmp_path / "again")
        stored = [json.loads((folder / "config.json").read_text()) for folder in (resnet, tmp_path / "again")]
        assert stored[0] == stored[1]  # the argument is of this process alone

    def test_a_head_for_other_classes_stays_float(self, resnet):
        model = load("resnet", resnet, num_labels=3, ignore_mismatched_sizes=True)
        assert type(model.classifier[1]) is nn.Linear and logits(model).shape == (2, 3)
        assert model.config.quantization_config.modules_to_not_convert == ["classifier.1"]

    def test_the_base_model_of_a_checkpoint_with_a_head(self, families):
        from transformers import ViTModel

        folder = families["vit"]["folder"] / "whole"
        model, whole = ViTModel.from_pretrained(folder, add_pooling_layer=False), load("vit", folder)
        layers = cluster_layers(model)
        assert len(layers) == families["vit"]["layers"] - 1  # without the classifier
        for name, layer in layers.items():
            assert torch.equal(layer.weight, whole.vit.get_submodule(name).weight)

    def test_dequantizing(self, families, resnet, relative_error):
        model = repvgg_hf.dequantize(load("resnet", resnet))
        assert not cluster_layers(model) and not hasattr(model.config, "quantization_config")
        assert relative_error(logits(model), families["resnet"]["quantized"]) < 1e-5

    def test_quantizing_in_memory_is_what_loading_does(self, families):
        model = repvgg_hf.quantize(make_model("vit"), bits=4)
        assert torch.equal(logits(model), families["vit"]["quantized"])

    def test_tied_layers_are_stored_each(self, families):
        """D-FINE ties the heads of its decoder to those of the model."""
        model = load("dfine", families["dfine"]["folder"] / "whole")
        heads = model.class_embed[0], model.model.decoder.class_embed[0]
        assert heads[0] is not heads[1] and torch.equal(heads[0].weight_codes, heads[1].weight_codes)
        assert heads[0].bias is not heads[1].bias and torch.equal(heads[0].bias, heads[1].bias)
        assert not any("class_embed" in key for key in model.all_tied_weights_keys)


class TestParts:
    """RepVGG as the backbone of another model."""

    STAGES = ["stage1", "stage2", "stage3", "stage4"]

    @pytest.fixture
    def segmenter(self, tiny_config, tmp_path):
        from transformers import UperNetConfig, UperNetForSemanticSegmentation

        sizes = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "strides": [2, 2, 2, 2], "num_labels": 2}
        backbone = tiny_config(out_features=self.STAGES, **sizes)
        sizes = {"hidden_size": 32, "auxiliary_in_channels": 16, "auxiliary_channels": 16}
        model = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, num_labels=5, **sizes))
        model.save_pretrained(tmp_path / "float")
        # tensors lie in memory as those of a checkpoint do: where they begin decides how convolutions add
        return load("upernet", tmp_path / "float")

    def test_the_whole_model(self, segmenter, tmp_path):
        repvgg_hf.quantize(segmenter, bits=4)
        assert all(
            name in cluster_layers(segmenter) for name in ("backbone.embeddings.layer.conv", "decode_head.classifier")
        )
        segmenter.save_pretrained(tmp_path / "whole")
        loaded = load("upernet", tmp_path / "whole")
        assert torch.equal(logits(loaded), logits(segmenter))
        loaded.save_pretrained(tmp_path / "again")
        for path in (tmp_path / "whole").iterdir():
            assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()

    def test_the_backbone_alone(self, segmenter, tmp_path):
        segmenter.backbone.quantize(bits=3, bits_overrides={"embeddings": 8})
        segmenter.save_pretrained(tmp_path / "part")
        loaded = load("upernet", tmp_path / "part")
        assert torch.equal(logits(loaded), logits(segmenter))
        assert cluster_layers(loaded).keys() == cluster_layers(segmenter).keys()
        assert loaded.backbone.embeddings.layer.conv.bits == 8 and type(loaded.decode_head.classifier) is nn.Conv2d
        loaded.save_pretrained(tmp_path / "again")
        for path in (tmp_path / "part").iterdir():
            assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
        repvgg_hf.dequantize(loaded)
        assert not cluster_layers(loaded) and not loaded.backbone.is_quantized

    def test_a_quantized_checkpoint_becomes_a_part(self, segmenter, tmp_path):
        from transformers import UperNetConfig, UperNetForSemanticSegmentation

        segmenter.backbone.quantize(bits=4).save_pretrained(tmp_path / "backbone")
        backbone = repvgg_hf.RepVGGBackbone.from_pretrained(tmp_path / "backbone")
        sizes = {"hidden_size": 32, "auxiliary_in_channels": 16, "auxiliary_channels": 16}
        model = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone.config, num_labels=5, **sizes))
        model.backbone = backbone
        model.save_pretrained(tmp_path / "outer")
        loaded = load("upernet", tmp_path / "outer")
        pixels = torch.randn(1, 3, 64, 64)
        for found, expected in zip(loaded.backbone(pixels).feature_maps, backbone(pixels).feature_maps):
            assert torch.equal(found, expected)

    def test_a_float_checkpoint_that_says_its_backbone_is_quantized(self, segmenter, tmp_path):
        segmenter.backbone.reparameterize()
        segmenter.save_pretrained(tmp_path / "part")
        edit(
            tmp_path / "part",
            lambda config: config["backbone_config"].update(quantization_config=ClusterConfig().to_dict()),
        )
        with pytest.raises(ValueError, match="says that it is quantized .* lacks its codes"):
            load("upernet", tmp_path / "part")

    @pytest.mark.parametrize("part", [False, True], ids=["whole", "backbone"])
    def test_a_detector(self, tiny_config, tmp_path, part):
        """DETR replaces the backbone's batch norms by frozen ones, and its tensors have other names in files."""
        from transformers import AutoModelForObjectDetection, DetrConfig, DetrForObjectDetection

        sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 5, "num_labels": 4}
        sizes |= {f"{place}_attention_heads": 2 for place in ("encoder", "decoder")}
        sizes |= {f"{place}_ffn_dim": 32 for place in ("encoder", "decoder")}
        backbone = tiny_config(out_features=["stage2"])
        config = DetrConfig(use_timm_backbone=False, backbone=None, backbone_config=backbone, **sizes)
        DetrForObjectDetection(config).save_pretrained(tmp_path / "float")
        model = AutoModelForObjectDetection.from_pretrained(tmp_path / "float")
        backbone = next(module for module in model.modules() if isinstance(module, repvgg_hf.RepVGGBackbone))
        repvgg_hf.quantize(backbone if part else model, bits=4)
        assert (len(cluster_layers(model)) == len(cluster_layers(backbone))) == part
        model.save_pretrained(tmp_path / "quantized")
        loaded = AutoModelForObjectDetection.from_pretrained(tmp_path / "quantized")
        assert torch.equal(logits(loaded), logits(model))

    def test_a_quantized_part_is_not_quantized_again(self, segmenter):
        segmenter.backbone.quantize(bits=4)
        with pytest.raises(ValueError, match="quantized already"):
            repvgg_hf.quantize(segmenter)
        assert type(segmenter.decode_head.classifier) is nn.Conv2d
