"""What works with the core dependencies alone: the modules in the arguments are not found, installed or not."""

import importlib.machinery
import sys
import tempfile

EXTRAS = set(sys.argv[1:])


class CoreOnly(importlib.machinery.PathFinder):
    """Finds no module of `EXTRAS`, as if they were not installed."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in EXTRAS else super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = CoreOnly

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import AutoImageProcessor, AutoModelForImageClassification, BitImageProcessorPil, pipeline  # noqa: E402

import repvgg_hf  # noqa: E402


def small_model() -> repvgg_hf.RepVGGForImageClassification:
    config = repvgg_hf.RepVGGConfig(
        stem_hidden_size=8, hidden_sizes=[8, 16], depths=[1, 2], strides=[2, 2], id2label={0: "cat", 1: "dog"}
    )
    return repvgg_hf.RepVGGForImageClassification(config).eval()


def save_and_load(model, folder: str) -> None:
    """The loaded model has the logits of `model`."""
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = model(pixel_values).logits
        model.save_pretrained(folder)
        actual = AutoModelForImageClassification.from_pretrained(folder)(pixel_values).logits
    torch.testing.assert_close(actual, expected)


def train_quantized() -> repvgg_hf.RepVGGForImageClassification:
    model = small_model().prepare_qat(bits=3).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        model(torch.randn(4, 3, 32, 32), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        repvgg_hf.update_codebooks(model)
    return model.eval().quantize()


def classify(folder: str) -> None:
    """A picture goes through `pipeline`, which finds an image processor that needs no torchvision."""
    BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    assert type(AutoImageProcessor.from_pretrained(folder)) is BitImageProcessorPil
    answers = pipeline("image-classification", folder)(Image.new("RGB", (40, 30), "red"))
    assert {answer["label"] for answer in answers} == {"cat", "dog"}, answers


def main() -> None:
    torch.manual_seed(0)
    models = {
        "float": small_model(),
        "fused": small_model().reparameterize(),
        "uniform": small_model().quantize(method="uniform", bits=8, granularity="per_channel"),
        "cluster": small_model().quantize(bits=4),
        "trained": train_quantized(),
    }
    for name, model in models.items():
        with tempfile.TemporaryDirectory() as folder:
            save_and_load(model, folder)
            classify(folder)
        print(name)
    loaded = EXTRAS & {name.split(".")[0] for name in sys.modules}
    assert not loaded, loaded


if __name__ == "__main__":
    main()
