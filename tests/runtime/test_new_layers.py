"""A checkpoint of other classes, or without a head: that layer is new, the rest as it was, and a warning says so."""

import copy
import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

from repvgg_hf import ClusterConfig, RepVGGBackbone, RepVGGConfig, RepVGGForImageClassification, RepVGGModel
from repvgg_hf.compression.codebooks.weights import quantize_weight
from repvgg_hf.compression.qat.layers import QATLinear

QUANTIZED = {
    "w4": {"bits": 4},
    "int8": {"bits": 4, "codebook_dtype": "int8"},
    "per_group": {"bits": 2, "granularity": "per_group", "group_size": 5, "modules_to_not_convert": ["repvgg"]},
    "uniform": {"bits": 3, "method": "uniform", "granularity": "per_channel"},
    "a8": {"bits": 4, "activation_bits": 8},
}
PREPARED = {
    "w3": {"bits": 3},
    "no_scale": {"bits": 3, "channel_scale": False},  # no tensor of its codebook tells of the number of classes
    "uniform": {"bits": 3, "method": "uniform", "granularity": "per_channel"},
    "affine": {"bits": 3, "method": "uniform", "symmetric": False},
    "a8": {"bits": 4, "activation_bits": 8},
}


@pytest.fixture
def images(generator):
    return torch.randn(2, 3, 32, 32, generator=generator)


@pytest.fixture
def make(tiny_config, randomize_batch_norms, generator):
    """`make(model_class)`: a float model, a classifier of five classes by default."""

    def make(model_class=RepVGGForImageClassification):
        return randomize_batch_norms(model_class(tiny_config()), generator).eval()

    return make


def with_images(options: dict, images) -> dict:
    return options | ({"calibration": images} if "activation_bits" in options else {})


@torch.no_grad()
def features(model, images):
    if isinstance(model, RepVGGBackbone):
        return model(images, output_hidden_states=True).hidden_states[-1]
    return model.base_model(images).last_hidden_state


def assert_fresh(weight: torch.Tensor) -> None:
    """As Transformers initializes a linear layer, and no memory with arbitrary contents."""
    assert weight.isfinite().all() and 0.01 < weight.std() < 0.03


def load_with_three_classes(folder, caplog, **arguments):
    torch.manual_seed(1)
    with caplog.at_level(logging.WARNING):
        model = AutoModelForImageClassification.from_pretrained(
            folder, num_labels=3, ignore_mismatched_sizes=True, **arguments
        )
    return model, [record.getMessage() for record in caplog.records if "new_layers" in record.name]


@pytest.mark.parametrize("options", QUANTIZED.values(), ids=QUANTIZED)
def test_quantized(options, make, images, tmp_path, caplog):
    source = make().quantize(**with_images(options, images))
    source.save_pretrained(tmp_path / "five")
    model, messages = load_with_three_classes(tmp_path / "five", caplog)
    assert messages == [
        f"classifier has 3 outputs, and {tmp_path / 'five'} has one with 5 outputs: it is new and untrained, and stays "
        "float (modules_to_not_convert). The other layers are the checkpoint's. Train it before use."
    ]
    assert type(model.classifier) is nn.Linear
    assert_fresh(model.classifier.weight)
    for name, tensor in source.repvgg.state_dict().items():
        assert torch.equal(model.repvgg.state_dict()[name], tensor), name
    torch.testing.assert_close(features(model, images), features(source, images), rtol=1e-5, atol=1e-6)

    model(images, labels=torch.tensor([0, 2])).loss.backward()
    assert model.classifier.weight.grad.abs().max() > 0
    model.save_pretrained(tmp_path / "three")
    again = RepVGGForImageClassification.from_pretrained(tmp_path / "three")
    assert "classifier" in again.config.quantization_config.modules_to_not_convert
    with torch.no_grad():
        torch.testing.assert_close(again(images).logits, model(images).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["train", "deploy"])
@pytest.mark.parametrize("options", PREPARED.values(), ids=PREPARED)
def test_prepared_for_qat(options, form, make, images, tmp_path, caplog):
    source = make() if form == "train" else make().reparameterize()
    with torch.no_grad():
        source.classifier.weight.mul_(1000)  # a new classifier can do nothing with its codebook
    source.prepare_qat(**with_images(options, images)).save_pretrained(tmp_path / "five")
    model, messages = load_with_three_classes(tmp_path / "five", caplog)
    assert messages == [
        f"classifier has 3 outputs, and {tmp_path / 'five'} has one with 5 outputs: it is new and untrained, and is "
        "prepared anew for quantization-aware training. The other layers are the checkpoint's. Train it before use."
    ]
    head = model.classifier
    assert type(head) is QATLinear
    assert_fresh(head.weight)
    config, _ = model.qat_settings
    expected = quantize_weight(head.weight, config.bits, config.groups_of("classifier", 3), config).decoded()
    torch.testing.assert_close(head.weight_fake_quant(head.weight), expected, rtol=1e-3, atol=1e-5)
    if config.activation_bits:
        assert head.input_fake_quant.range() == source.classifier.input_fake_quant.range()
    for name, tensor in source.repvgg.state_dict().items():
        assert torch.equal(model.repvgg.state_dict()[name], tensor), name
    with torch.no_grad():
        expected = model(images).logits
        frozen = copy.deepcopy(model).quantize()(images).logits
    torch.testing.assert_close(frozen, expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "three")
    again = RepVGGForImageClassification.from_pretrained(tmp_path / "three")
    with torch.no_grad():
        torch.testing.assert_close(again(images).logits, expected, rtol=1e-5, atol=1e-6)


FORMS = {
    "train": lambda model: model,
    "fused": lambda model: model.reparameterize(),
    "w4": lambda model: model.quantize(bits=4),
    "per_group": lambda model: model.quantize(granularity="per_group", group_size=1),
    "qat": lambda model: model.prepare_qat(bits=3),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_without_the_argument_both_numbers_are_named(form, make, tmp_path):
    form(make()).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"has 5 outputs there, and the configuration asks for 3.*ignore_mism"):
        AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=3)


def test_an_untrained_head_is_not_quantized_on_loading(make, tmp_path):
    make().save_pretrained(tmp_path / "classifier")
    make(RepVGGModel).save_pretrained(tmp_path / "base")
    for folder in ("classifier", "base"):
        with pytest.raises(ValueError, match="classifier is new and untrained.*without quantization_config, train it"):
            AutoModelForImageClassification.from_pretrained(
                tmp_path / folder, num_labels=3, ignore_mismatched_sizes=True, quantization_config=ClusterConfig()
            )


def test_an_incomplete_checkpoint_of_another_library_is_not_quantized_on_loading(tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=2)
    model = ResNetForImageClassification(config)
    lost = "resnet.encoder.stages.0.layers.0.layer.0.convolution"
    model.save_pretrained(tmp_path)
    load = AutoModelForImageClassification.from_pretrained
    load(tmp_path, quantization_config=ClusterConfig())
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != f"{lost}.weight"}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{lost} is new and untrained.*without quantization_config, train it"):
        load(tmp_path, quantization_config=ClusterConfig())


@pytest.mark.parametrize("model_class", [RepVGGModel, RepVGGBackbone])
class TestWithoutAHead:
    """A classifier from a model that has none, and the reverse."""

    @pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 4, "activation_bits": 8}], ids=["w4", "w4a8"])
    def test_quantized(self, options, model_class, make, images, tmp_path, caplog):
        source = make(model_class).quantize(**with_images(options, images))
        source.save_pretrained(tmp_path)
        model, messages = load_with_three_classes(tmp_path, caplog)
        assert len(messages) == 1 and "has no such layer: it is new and untrained, and stays float" in messages[0]
        assert type(model.classifier) is nn.Linear
        assert_fresh(model.classifier.weight)
        torch.testing.assert_close(features(model, images), features(source, images), rtol=1e-5, atol=1e-6)

    def test_prepared_for_qat(self, model_class, make, images, tmp_path, caplog):
        source = make(model_class).prepare_qat(bits=3)
        source.save_pretrained(tmp_path)
        model, messages = load_with_three_classes(tmp_path, caplog)
        assert len(messages) == 1 and "has no such layer: it is new and untrained, and is prepared anew" in messages[0]
        assert type(model.classifier) is QATLinear
        assert_fresh(model.classifier.weight_fake_quant(model.classifier.weight))
        torch.testing.assert_close(features(model, images), features(source, images), rtol=1e-5, atol=1e-6)

    def test_prepared_with_input_ranges_that_a_head_has_not(self, model_class, make, images, tmp_path, caplog):
        make(model_class).prepare_qat(bits=3, activation_bits=8, calibration=images).save_pretrained(tmp_path)
        model, messages = load_with_three_classes(tmp_path, caplog)
        assert len(messages) == 1 and "stays float (modules_to_not_convert), as its input has no range" in messages[0]
        assert type(model.classifier) is nn.Linear
        model.save_pretrained(tmp_path / "again")
        again = RepVGGForImageClassification.from_pretrained(tmp_path / "again").quantize()
        assert type(again.classifier) is nn.Linear

    @pytest.mark.parametrize("options", PREPARED.values(), ids=PREPARED)
    def test_from_a_classifiers_qat_checkpoint(self, options, model_class, make, images, tmp_path):
        source = make().prepare_qat(**with_images(options, images))
        source.save_pretrained(tmp_path)
        model = model_class.from_pretrained(tmp_path)
        torch.testing.assert_close(features(model, images), features(source, images), rtol=1e-5, atol=1e-6)


class TestDamage:
    """What is missing inside the network is an error: it would be memory with arbitrary contents."""

    @pytest.mark.parametrize("tensor", ["codebook", "scale", "steps"])
    def test_a_tensor_of_a_fake_quantizer(self, tensor, make, tmp_path):
        make().prepare_qat(bits=3).save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        del tensors[f"repvgg.embeddings.layer.conv.weight_fake_quant.{tensor}"]
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"layer.conv.weight_fake_quant.{tensor} .* is not in {tmp_path}, a check"):
            AutoModelForImageClassification.from_pretrained(tmp_path)

    def test_float_weights_under_a_configuration_of_qat(self, make, tmp_path):
        model = make()
        model.save_pretrained(tmp_path / "float")
        model.prepare_qat(bits=3).save_pretrained(tmp_path)
        (tmp_path / "float" / "model.safetensors").replace(tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="for float weights remove qat_config from config.json"):
            AutoModelForImageClassification.from_pretrained(tmp_path)

    def test_other_bits_in_the_configuration_of_qat(self, make, tmp_path):
        make().prepare_qat(bits=3).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config["qat_config"]["quantization"]["bits"] = 2
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"weight_fake_quant.codebook is \[1, 8\] in .*trained with other bits"):
            AutoModelForImageClassification.from_pretrained(tmp_path, ignore_mismatched_sizes=True)

    def test_a_layer_of_a_quantized_network(self, make, tmp_path):
        make().quantize(bits=4).save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        layer = "repvgg.encoder.stages.0.layers.1.conv."
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(layer)}
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="layers.1.conv.* is not in"):
            AutoModelForImageClassification.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


class TestOtherFormats:
    """Only safetensors are checked, and other files of a quantized model are refused."""

    @pytest.fixture
    def folder(self, make, tmp_path):
        make().quantize(bits=4).save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        torch.save(tensors, tmp_path / "pytorch_model.bin")
        return tmp_path

    def test_bin_files_beside(self, folder):
        with pytest.raises(ValueError, match="from safetensors files only, got .*pytorch_model.bin.*use_safetensors=F"):
            AutoModelForImageClassification.from_pretrained(folder, use_safetensors=False)

    @pytest.mark.parametrize("lost", [(), ("classifier.weight_scale",)], ids=["whole", "damaged"])
    def test_bin_files_alone(self, folder, lost):
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save({name: t for name, t in tensors.items() if name not in lost}, folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match="from safetensors files only, got .*pytorch_model.bin"):
            AutoModelForImageClassification.from_pretrained(folder)

    def test_bin_files_in_shards(self, folder):
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").rename(folder / "pytorch_model-00001-of-00001.bin")
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "pytorch_model-00001-of-00001.bin")}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match="from safetensors files only, got .*00001.bin"):
            AutoModelForImageClassification.from_pretrained(folder)

    def test_tensors_in_memory(self, folder):
        model, config = (cls.from_pretrained(folder) for cls in (RepVGGForImageClassification, RepVGGConfig))
        with pytest.raises(ValueError, match="got a state_dict.*call load_state_dict()"):
            RepVGGForImageClassification.from_pretrained(None, config=config, state_dict=model.state_dict())

    @pytest.mark.parametrize("argument", ["from_tf", "from_flax"])
    def test_other_frameworks(self, argument, folder):
        with pytest.raises(ValueError, match=f"{argument}=True: RepVGGForImageClassification has no weights in th"):
            AutoModelForImageClassification.from_pretrained(folder, **{argument: True})

    def test_gguf(self, folder):
        with pytest.raises(ValueError, match="gguf_file='model.gguf': RepVGGForImageClassification has no weights in "):
            RepVGGForImageClassification.from_pretrained(folder, gguf_file="model.gguf")

    def test_float_bin_files_load(self, make, images, tmp_path):
        model = make()
        model.save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        loaded = RepVGGForImageClassification.from_pretrained(tmp_path)
        torch.testing.assert_close(features(loaded, images), features(model, images), rtol=1e-5, atol=1e-6)
