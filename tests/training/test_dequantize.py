"""Training on from a quantized checkpoint, or quantizing it again: refused before any work, or from decoded weights."""

import importlib

import pytest
import torch
from transformers import BitImageProcessor

from repvgg_hf import RepVGGForImageClassification
from repvgg_hf.training.models import ModelArguments, build_model

NO_DATA = ["--dataset_name", "no/such-data"]  # an error of loading it would come first otherwise
DIGITS = [str(digit) for digit in range(10)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_config):
    """A classifier of the digits as a float, a quantized and a QAT checkpoint, by these names."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    names = {"id2label": dict(enumerate(DIGITS)), "label2id": {name: i for i, name in enumerate(DIGITS)}}
    side = {"height": 8, "width": 8}
    changes = {"float": lambda m: m, "quantized": lambda m: m.quantize(bits=4), "qat": lambda m: m.prepare_qat(bits=4)}
    for name, change in changes.items():
        change(RepVGGForImageClassification(tiny_config(num_labels=10, **names))).save_pretrained(root / name)
        BitImageProcessor(size={"shortest_edge": 8}, crop_size=side, resample=2).save_pretrained(root / name)
    return root


@pytest.mark.parametrize("recipe", ["train", "qat", "quantize"])
class TestRecipes:
    def start(self, recipe, folder, tmp_path, *options):
        main = importlib.import_module(f"repvgg_hf.recipes.{recipe}").main
        options = ["--model_name_or_path", str(folder), "--output_dir", str(tmp_path / "out"), *options]
        try:
            return main(options)
        finally:
            self.output = tmp_path / "out"

    def test_a_quantized_checkpoint(self, recipe, folders, tmp_path):
        with pytest.raises(ValueError, match="quantized is quantized to 4 bits.*pass --dequantize True"):
            self.start(recipe, folders / "quantized", tmp_path, *NO_DATA)
        assert not self.output.exists()

    def test_a_float_checkpoint_and_the_option(self, recipe, folders, tmp_path):
        with pytest.raises(ValueError, match="float is a float checkpoint: leave the option out"):
            self.start(recipe, folders / "float", tmp_path, *NO_DATA, "--dequantize", "True")

    def test_a_checkpoint_of_quantization_aware_training(self, recipe, folders, tmp_path):
        with pytest.raises(ValueError, match="qat is a checkpoint of quantization-aware training.*float checkpoint"):
            self.start(recipe, folders / "qat", tmp_path, *NO_DATA)


def test_the_option_without_a_checkpoint():
    with pytest.raises(ValueError, match="--dequantize True is for a quantized checkpoint, and a new model is float"):
        build_model(ModelArguments(dequantize=True), DIGITS)


@torch.no_grad()
def test_the_decoded_weights_are_where_training_starts(folders, generator):
    args = ModelArguments(model_name_or_path=str(folders / "quantized"), dequantize=True)
    model = build_model(args, DIGITS)
    quantized = RepVGGForImageClassification.from_pretrained(folders / "quantized")
    pixel_values = torch.randn(2, 3, 8, 8, generator=generator)
    torch.testing.assert_close(model(pixel_values).logits, quantized(pixel_values).logits, rtol=1e-5, atol=1e-6)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {name for name, _ in model.named_parameters()} >= {
        "classifier.weight",
        "repvgg.embeddings.layer.conv.weight",
    }
