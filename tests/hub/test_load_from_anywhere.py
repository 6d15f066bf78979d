"""The whole story: train on digits, publish a family, and load it in fresh processes in every way."""

import re

import pytest
import torch
import torch.nn.functional as F
from loopback_hub import LoopbackHub
from loopback_store import PUBLIC
from PIL import Image
from sklearn.datasets import load_digits

from repvgg_hf import RepVGGConfig, RepVGGForImageClassification
from repvgg_hf.analysis import bits_per_weight, kernel_report
from repvgg_hf.hub import DatasetInfo, HistogramResult, KernelResult, ModelResult, Results, publish_family
from repvgg_hf.hub.branch_kernels import branch_histograms

BITS = (8, 6, 4, 3, 2)


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 8 - 1
    return images.contiguous(), torch.tensor(data.target)


def train(images: torch.Tensor, labels: torch.Tensor) -> RepVGGForImageClassification:
    config = RepVGGConfig(
        stem_hidden_size=16, hidden_sizes=[16, 32], depths=[1, 2], stem_stride=1, strides=[1, 2], num_labels=10
    )
    model = RepVGGForImageClassification(config).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    for _ in range(8):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            model(images[batch], labels=labels[batch]).loss.backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def measure(name: str, model, folder, images, labels) -> ModelResult:
    model.save_pretrained(folder)
    logits = model(images).logits
    ranked = logits.argsort(dim=1, descending=True) == labels[:, None]
    quantization = getattr(model.config, "quantization_config", None)
    return ModelResult(
        model=name,
        method="float" if quantization is None else "cluster",
        bits=32 if quantization is None else quantization.bits,
        top1=100 * ranked[:, 0].float().mean().item(),
        top5=100 * ranked[:, :5].any(dim=1).float().mean().item(),
        loss=F.cross_entropy(logits, labels).item(),
        bytes=(folder / "model.safetensors").stat().st_size,
        bits_per_weight=bits_per_weight(model),
        images=len(images),
        seed=0,
    )


@pytest.fixture(scope="module")
def story(tmp_path_factory, processor):
    """(Hub with the family in org/digits, folder with the test images and each model's logits, results)."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("story")
    images, labels = digits()
    model = train(images[400:], labels[400:])
    model.reparameterize().save_pretrained(folder / "fused")
    models = {"float": RepVGGForImageClassification.from_pretrained(folder / "fused")}
    for bits in BITS:
        models[f"w{bits}"] = RepVGGForImageClassification.from_pretrained(folder / "fused").quantize(bits=bits)
    rows = [measure(name, model, folder / name, images[:400], labels[:400]) for name, model in models.items()]
    kernels = [KernelResult(**kernel) for kernel in kernel_report(models["float"])]
    histograms = [HistogramResult(**entry) for entry in branch_histograms(models["float"], before=False)]
    results = Results(DatasetInfo("digits", "first 400"), rows, kernels_after=kernels, histograms=histograms)
    with torch.no_grad():
        logits = {name: model(images[:64]).logits for name, model in models.items()}
    torch.save((images[:64], logits), folder / "expected.pt")
    Image.fromarray((images[0].permute(1, 2, 0) * 127.5 + 127.5).byte().numpy()).save(folder / "image.png")
    with pytest.MonkeyPatch.context() as patch, LoopbackHub() as hub:
        for name, value in (("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True), ("ENDPOINT", hub.url)):
            patch.setattr(f"huggingface_hub.constants.{name}", value)
        options = {"processor": processor, **PUBLIC}
        publish_family(models, "org/digits", results, as_revisions=True, collection="Digits", **options)
        publish_family({"w4": models["w4"]}, "org/digits", results, collection="Digits", **options)
        yield hub, folder, results


PRELUDE = """
import sys, torch
torch.set_num_threads(1)
images, expected = torch.load("expected.pt")
def same(model, name):
    with torch.no_grad():
        assert model.eval()(images).logits.equal(expected[name]), name
"""

WITH_PACKAGE = (
    PRELUDE
    + """
import repvgg_hf
from transformers import AutoBackbone, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline
for name in expected:
    model = AutoModelForImageClassification.from_pretrained("org/digits", revision=name)
    assert type(model) is repvgg_hf.RepVGGForImageClassification
    same(model, name)
same(AutoModelForImageClassification.from_pretrained("org/digits"), "float")
same(AutoModelForImageClassification.from_pretrained("org/digits-w4"), "w4")
features = AutoModel.from_pretrained("org/digits-w4")(images).pooler_output
assert features.shape == (64, 32)
assert AutoImageProcessor.from_pretrained("org/digits-w4").crop_size["height"] == 8
print(pipeline("image-classification", "org/digits-w4")("image.png")[0]["label"])

class Segmenter(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = AutoBackbone.from_pretrained("org/digits-w4", out_features=["stage1", "stage2"])
        self.heads = torch.nn.ModuleList(torch.nn.Conv2d(size, 2, 1) for size in self.backbone.channels)
    def forward(self, images):
        maps = self.backbone(images).feature_maps
        return sum(torch.nn.functional.interpolate(h(m), images.shape[2:]) for h, m in zip(self.heads, maps))

segmenter = Segmenter()
optimizer = torch.optim.Adam(segmenter.heads.parameters(), lr=0.05)
ink = (images[:, 0] > 0).long()
losses = []
for _ in range(20):
    loss = torch.nn.functional.cross_entropy(segmenter(images), ink)
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    losses.append(loss.item())
assert losses[-1] < 0.7 * losses[0], losses
"""
)

WITHOUT_PACKAGE = (
    PRELUDE
    + """
try:
    import repvgg_hf
    raise SystemExit("repvgg_hf is importable")
except ModuleNotFoundError:
    pass
from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained("org/digits-w4", trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
same(model, "w4")
same(AutoModelForImageClassification.from_pretrained("org/digits", revision="w3", trust_remote_code=True), "w3")
assert AutoModel.from_pretrained("org/digits-w4", trust_remote_code=True)(images).pooler_output.shape == (64, 32)
backbone = AutoBackbone.from_pretrained("org/digits-w4", out_features=["stage1"], trust_remote_code=True)
assert backbone(images).feature_maps[0].shape == (64, 16, 8, 8)
assert AutoConfig.from_pretrained("org/digits-w4", trust_remote_code=True).model_type == "repvgg"
try:
    model.dequantize().quantize(bits=3)
    raise SystemExit("quantize() without the package")
except ImportError as error:
    assert "pip install repvgg-hf" in str(error)
"""
)


def test_family_with_the_package(story, fresh_process, tmp_path):
    hub, folder, results = story
    assert results.select("float")[0].top1 > 80
    label = fresh_process(WITH_PACKAGE, hub.url, tmp_path, cwd=folder).split()[-1]
    assert label.startswith("LABEL_")
    # the same from the cache, without a Hub; AutoBackbone always asks the Hub whether there is such a repository
    offline = WITH_PACKAGE.replace("AutoBackbone.from_pretrained", "repvgg_hf.RepVGGBackbone.from_pretrained")
    fresh_process(offline, "http://127.0.0.1:1", tmp_path, offline=True, cwd=folder)


def test_without_the_package(story, fresh_process, python_without_package, tmp_path):
    """Then the card's own lines, as they stand, with the Hub and offline."""
    hub, folder, _ = story
    card = hub.files("org/digits-w4")["README.md"].decode()
    usage = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert len([line for line in usage.splitlines() if line]) <= 5
    options = {"python": python_without_package, "cwd": folder}
    online = fresh_process(WITHOUT_PACKAGE + usage, hub.url, tmp_path, **options)
    assert "score" in online and "LABEL_" in online
    assert fresh_process(usage, "http://127.0.0.1:1", tmp_path, offline=True, **options).endswith(online)


def test_family_and_collection_on_the_hub(story):
    hub, _, results = story
    assert set(hub.repos["org/digits"].refs) == {"main", "float", *(f"w{bits}" for bits in BITS)}
    (collection,) = hub.collections.values()
    assert [item["id"] for item in collection["items"]] == ["org/digits", "org/digits-w4"]
    for name in ("float", "w4"):
        card = hub.files("org/digits", name)["README.md"].decode()
        assert f"# digits ({name})" in card
        assert f"**Top-1 {results.select(name)[0].top1:.2f} %**" in card
        for kind in ("accuracy", "kernels"):
            assert f"plots/digits-{kind}.svg" in card and f"plots/digits-{kind}.svg" in hub.files("org/digits", name)
    # each branch began empty: no other model was ever there
    branch = hub.repos["org/digits"].find("w4")
    assert list(hub.repos["org/digits"].commits[branch.parent].files) == [".gitattributes"]
