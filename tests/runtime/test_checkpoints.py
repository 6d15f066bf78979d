"""Saving and loading: the two forms, interrupted and repeated saves, damaged files."""

import json
import os

import pytest
import torch
from transformers import AutoModelForImageClassification, modeling_utils

from repvgg_hf import RepVGGForImageClassification
from repvgg_hf.runtime.checkpoints import check_checkpoint_form

TRAIN_INTO_DEPLOY = r"train-form checkpoint .* the model is fused \(deploy=True\).*deploy=False, then call model.repara"
DEPLOY_INTO_TRAIN = r"fused checkpoint .* the model has branches \(deploy=False\).*with deploy=True"


@pytest.fixture
def make_model(tiny_config, randomize_batch_norms, generator):
    def make(**fields):
        return randomize_batch_norms(RepVGGForImageClassification(tiny_config(**fields)), generator).eval()

    return make


@pytest.fixture
def images(generator):
    return torch.randn(1, 3, 32, 32, generator=generator)


def assert_same(loaded, model, images):
    """Equal weights, and so logits: their last bits depend on where the weights lie in memory."""
    assert loaded.config.deploy == model.config.deploy
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    torch.testing.assert_close(loaded(images).logits, model(images).logits, atol=1e-6, rtol=1e-5)


class TestForms:
    def test_both_forms_come_back(self, make_model, images, tmp_path):
        model = make_model()
        for form, folder in ((model, tmp_path / "train"), (make_model().reparameterize(), tmp_path / "deploy")):
            form.save_pretrained(folder)
            assert_same(RepVGGForImageClassification.from_pretrained(folder), form, images)

    @pytest.mark.parametrize("cls", [RepVGGForImageClassification, AutoModelForImageClassification])
    def test_train_form_into_a_fused_model(self, make_model, tmp_path, cls):
        make_model().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=TRAIN_INTO_DEPLOY):
            cls.from_pretrained(tmp_path, deploy=True)

    @pytest.mark.parametrize("cls", [RepVGGForImageClassification, AutoModelForImageClassification])
    def test_fused_into_a_model_with_branches(self, make_model, tmp_path, cls):
        make_model().reparameterize().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=DEPLOY_INTO_TRAIN):
            cls.from_pretrained(tmp_path, deploy=False)

    def test_base_model_of_the_wrong_form(self, make_model, tmp_path):
        make_model().repvgg.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=TRAIN_INTO_DEPLOY):
            RepVGGForImageClassification.from_pretrained(tmp_path, deploy=True)

    @pytest.mark.parametrize("strict", [True, False])
    def test_state_dicts_of_the_wrong_form(self, make_model, strict):
        train, deploy = make_model(), make_model().reparameterize()
        with pytest.raises(ValueError, match=TRAIN_INTO_DEPLOY):
            deploy.load_state_dict(train.state_dict(), strict=strict)
        with pytest.raises(ValueError, match=DEPLOY_INTO_TRAIN):
            train.load_state_dict(deploy.state_dict(), strict=strict)

    def test_other_differences_are_left_to_pytorch(self, make_model):
        model = make_model()
        state = model.state_dict()
        del state["classifier.bias"]
        with pytest.raises(RuntimeError, match="classifier.bias"):
            model.load_state_dict(state)
        assert model.load_state_dict(state, strict=False).missing_keys == ["classifier.bias"]

    def test_oabn_can_be_switched_on_a_checkpoint(self, make_model, images, tmp_path):
        model = make_model(oabn=False)
        model.save_pretrained(tmp_path)
        loaded = RepVGGForImageClassification.from_pretrained(tmp_path, oabn=True, oabn_threshold=1.0)
        assert not torch.allclose(loaded(images).logits, model(images).logits)
        assert_same(RepVGGForImageClassification.from_pretrained(tmp_path), model, images)

    def test_another_number_of_labels(self, make_model, images, tmp_path):
        make_model().save_pretrained(tmp_path)
        model = RepVGGForImageClassification.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
        assert model(images).logits.shape == (1, 3)

    @pytest.mark.parametrize(
        ("missing", "unexpected", "message"),
        [
            (["a.weight"], ["a.weight_fake_quant.codebook"], "quantization-aware training: .*call prepare_qat"),
            (["a.weight"], ["a.weight_codes"], "quantized checkpoint and the model is not: .*quantization_config"),
            (["a.weight_codes"], ["a.weight"], "model is quantized and the checkpoint is not: .*then quantize()"),
        ],
        ids=["qat", "quantized", "float"],
    )
    def test_quantized_forms(self, missing, unexpected, message):
        with pytest.raises(ValueError, match=message):
            check_checkpoint_form(missing, unexpected, deploy=True)


def interrupt_call(monkeypatch, module, name, number):
    """Make the `number`th call of `module.name` raise `KeyboardInterrupt`, before it does anything."""
    original, calls = getattr(module, name), []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == number:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, interrupted)
    return calls


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestSaving:
    # what is there before, and what the interrupted save would put in its place
    SAVES = {
        "sharded_over_whole": ({}, {"max_shard_size": "4KB"}),
        "whole_over_sharded": ({"max_shard_size": "4KB"}, {}),
        "whole_over_whole": ({}, {}),
        "sharded_over_sharded": ({"max_shard_size": "4KB"}, {"max_shard_size": "4KB"}),
    }

    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "checkpoint").mkdir()
        (tmp_path / "checkpoint" / "README.md").write_text("A card that stays.")
        return tmp_path / "checkpoint"

    @pytest.mark.parametrize(("before", "after"), SAVES.values(), ids=SAVES)
    def test_interrupted_while_renaming(self, make_model, images, folder, monkeypatch, before, after):
        """At every single rename: before the first one of a file all stays, from then on the new files are there."""
        old, new = make_model(), make_model().reparameterize()
        old.save_pretrained(folder, **before)
        expected = contents(folder)
        outcomes, number = [], 0
        while True:
            number += 1
            with monkeypatch.context() as patch:
                calls = interrupt_call(patch, os, "replace", number)
                try:
                    new.save_pretrained(folder, **after)
                except KeyboardInterrupt:
                    assert not list(folder.glob(".saving-*"))
                    untouched = contents(folder) == expected
                    saved = new if not untouched else old
                    assert_same(RepVGGForImageClassification.from_pretrained(folder), saved, images)
                    outcomes.append(untouched)
                    old.save_pretrained(folder, **before)
                    assert contents(folder) == expected
                    continue
            break
        # the first is that of the manifest; then the files', two or more
        assert outcomes == [True] + [False] * (len(calls) - 1) and len(calls) >= 3
        assert_same(RepVGGForImageClassification.from_pretrained(folder), new, images)

    @pytest.mark.parametrize("number", [1, 2])
    def test_interrupted_while_writing(self, make_model, images, folder, monkeypatch, number):
        model = make_model()
        model.save_pretrained(folder)
        expected = contents(folder)
        with monkeypatch.context() as patch:
            interrupt_call(patch, modeling_utils, "safe_save_file", number)
            with pytest.raises(KeyboardInterrupt):
                make_model().save_pretrained(folder, max_shard_size="4KB")
        assert contents(folder) == expected
        assert not list(folder.glob(".saving-*"))
        assert_same(RepVGGForImageClassification.from_pretrained(folder), model, images)

    def test_the_first_save_interrupted_leaves_nothing(self, make_model, folder, monkeypatch):
        expected = contents(folder)
        with monkeypatch.context() as patch:
            interrupt_call(patch, os, "replace", 1)
            with pytest.raises(KeyboardInterrupt):
                make_model().save_pretrained(folder)
        assert contents(folder) == expected

    @pytest.mark.parametrize(("before", "after"), SAVES.values(), ids=SAVES)
    def test_no_stale_weights(self, make_model, images, folder, before, after):
        make_model(depths=[2, 6]).save_pretrained(folder, **before)
        model = make_model()
        model.save_pretrained(folder, **after)
        names = {path.name for path in folder.iterdir()}
        if after:
            index = json.loads((folder / "model.safetensors.index.json").read_text())
            shards = set(index["weight_map"].values())
            assert len(shards) > 1
            assert names == shards | {"model.safetensors.index.json", "config.json", "README.md"}
        else:
            assert names == {"model.safetensors", "config.json", "README.md"}
        assert_same(RepVGGForImageClassification.from_pretrained(folder), model, images)

    def test_a_variant_lies_beside(self, make_model, folder):
        make_model().save_pretrained(folder)
        weights = (folder / "model.safetensors").read_bytes()
        make_model().save_pretrained(folder, variant="other")
        assert (folder / "model.safetensors").read_bytes() == weights
        assert (folder / "model.other.safetensors").exists()

    def test_only_the_main_process_writes(self, make_model, folder):
        expected = contents(folder)
        make_model().save_pretrained(folder, is_main_process=False)
        assert contents(folder) == expected

    def test_a_file_in_the_way(self, make_model, tmp_path):
        (tmp_path / "taken").touch()
        with pytest.raises(ValueError, match="taken is a file: save_pretrained needs a folder"):
            make_model().save_pretrained(tmp_path / "taken")

    def test_new_folders_and_strings(self, make_model, tmp_path):
        make_model().save_pretrained(str(tmp_path / "a" / "b"))
        assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {"model.safetensors", "config.json"}

    @pytest.mark.parametrize("keep", [0.9, 0.01, 0.0])
    def test_truncated_weights(self, make_model, folder, keep):
        make_model().save_pretrained(folder)
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights[: int(len(weights) * keep)])
        with pytest.raises(ValueError) as raised:
            RepVGGForImageClassification.from_pretrained(folder)
        assert str(folder) in str(raised.value) and "Download or save it again" in str(raised.value)

    @pytest.mark.parametrize(
        ("text", "found"), [("{}", "has no weight_map"), ("{", "can't be read")], ids=["no map", "no JSON"]
    )
    def test_a_damaged_index(self, make_model, folder, text, found):
        make_model().save_pretrained(folder, max_shard_size="4KB")
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ValueError, match=f"model.safetensors.index.json {found}.*it is (truncated or )?damaged"):
            RepVGGForImageClassification.from_pretrained(folder)

    def test_dtypes(self, make_model, folder):
        make_model().bfloat16().save_pretrained(folder)
        assert RepVGGForImageClassification.from_pretrained(folder).dtype == torch.bfloat16
        assert RepVGGForImageClassification.from_pretrained(folder, dtype=torch.float32).dtype == torch.float32
