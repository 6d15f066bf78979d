"""On a CUDA device: the same figures as on the CPU, and nothing in a training step that waits for the device.

One command for a machine that has one: `pytest -m cuda`.
"""

import copy
import json

import pytest
import torch

from repvgg_hf import QATConfig, RepVGGForImageClassification, update_codebooks
from repvgg_hf.compression.qat.callback import GradientCheck
from repvgg_hf.runtime.cluster_layers import cluster_layers

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
FORMS = ["branches", "fused", "quantized", "quantized inputs", "qat", "fused qat"]


@pytest.fixture(autouse=True)
def exact():
    """Float32 convolutions as on a CPU, not in TF32; and no mode is left behind."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.cuda.set_sync_debug_mode("default")
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def batch(generator):
    labels = torch.arange(4)
    return {"pixel_values": torch.randn(4, 3, 16, 16, generator=generator), "labels": labels}


@pytest.fixture
def make_model(tiny_config, randomize_batch_norms, generator, batch):
    def make(form: str) -> RepVGGForImageClassification:
        model = randomize_batch_norms(RepVGGForImageClassification(tiny_config(oabn_threshold=1.0)), generator).eval()
        if form.startswith("fused"):
            model.reparameterize()
        if form == "quantized inputs":
            model.quantize(bits=4, activation_bits=8, calibration=batch["pixel_values"])
        elif form == "quantized":
            model.quantize(bits=4)
        elif form.endswith("qat"):
            qat_config = QATConfig(codebook_update_every=1, blend_steps=2)
            model.prepare_qat(bits=4, qat_config=qat_config)
        return model

    return make


def on_cuda(batch: dict) -> dict:
    return {name: tensor.cuda() for name, tensor in batch.items()}


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_logits(make_model, batch, form, relative_error):
    model = make_model(form)
    expected = model(batch["pixel_values"]).logits
    actual = copy.deepcopy(model).cuda()(batch["pixel_values"].cuda()).logits.cpu()
    # a rounding may fall to the other side where inputs are quantized
    assert relative_error(actual, expected) < (0.05 if form == "quantized inputs" else 1e-4)


@pytest.mark.parametrize("form", ["branches", "fused", "qat", "fused qat"])
def test_no_training_step_waits(make_model, batch, form, relative_error):
    """Forward, backward, the check of gradients, optimizer and codebooks."""
    model = make_model(form).train()
    reference = copy.deepcopy(model)
    model.cuda()
    batch_on_cuda = on_cuda(batch)

    def step(model, batch, optimizer, index):
        loss = model(**batch).loss
        loss.backward()
        check = GradientCheck(model, index)
        optimizer.step()
        update_codebooks(model)
        optimizer.zero_grad()
        return loss.detach(), check

    sides = [
        (m, b, torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9))
        for m, b in ((model, batch_on_cuda), (reference, batch))
    ]
    first = [step(*side, 1)[0] for side in sides]
    assert relative_error(first[0].cpu(), first[1]) < 1e-4
    torch.cuda.set_sync_debug_mode("error")
    checks = [step(*sides[0], index)[1] for index in (2, 3, 4)]
    torch.cuda.set_sync_debug_mode("default")
    for check in checks:
        check.require_finite()


def test_gradients_that_are_not_finite(make_model, batch):
    model = make_model("qat").cuda().train()
    model(**on_cuda(batch)).loss.backward()
    model.classifier.weight.grad[0, 0] = float("nan")
    check = GradientCheck(model, 3)
    with pytest.raises(RuntimeError, match="gradients of classifier.weight and 0 other .* step 3"):
        check.require_finite()


@torch.no_grad()
def test_fusing(make_model, batch, relative_error):
    model = make_model("branches")
    expected = model(batch["pixel_values"]).logits
    fused = model.cuda().reparameterize()
    assert next(fused.parameters()).is_cuda
    assert relative_error(fused(batch["pixel_values"].cuda()).logits.cpu(), expected) < 1e-4


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_loading(make_model, batch, form, tmp_path):
    """To the device at once: what is computed is what it was on the device before."""
    model = make_model(form).cuda()
    model.save_pretrained(tmp_path)
    loaded = RepVGGForImageClassification.from_pretrained(tmp_path).cuda()
    pixel_values = batch["pixel_values"].cuda()
    first = loaded(pixel_values).logits
    torch.testing.assert_close(first, model(pixel_values).logits)
    torch.cuda.set_sync_debug_mode("error")
    second = loaded(pixel_values).logits
    torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(second, first)


def test_quantizing_on_the_device(make_model):
    """Gives the codebooks that it gives on the CPU, and codes but for a weight in the middle between two entries."""
    model = make_model("fused")
    models = [model, copy.deepcopy(model).cuda()]
    layers = [cluster_layers(model.quantize(bits=3)) for model in models]
    for name, expected in layers[0].items():
        actual = layers[1][name].cpu()
        torch.testing.assert_close(actual.weight_codebook, expected.weight_codebook, msg=name)
        assert (actual.codes() != expected.codes()).float().mean() < 0.01, name


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_compiled(make_model, batch, form):
    torch._dynamo.reset()
    model = make_model(form).cuda()
    pixel_values = batch["pixel_values"].cuda()
    expected = model(pixel_values).logits
    compiled = torch.compile(model, fullgraph=True)
    compiled(pixel_values)
    torch.cuda.set_sync_debug_mode("error")
    actual = compiled(pixel_values).logits
    torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inference", "train_step", "load", "qat", "calibrate"])
def test_benchmarks(name, tmp_path):
    main = pytest.importorskip("repvgg_hf.recipes.benchmarks.__main__", reason="needs timm and rich").main
    small = {
        "inference": ["--variant", "cifar", "--image_size", "32", "--batch_sizes", "4", "--method", "uniform"],
        "train_step": ["--variants", "cifar", "--image_sizes", "32", "--batch_sizes", "8"],
        "load": ["--variant", "cifar", "--image_size", "32", "--method", "uniform", "--memory_repeats", "1"],
        "qat": ["--variants", "cifar", "--image_sizes", "32", "--batch_sizes", "8", "--memory_repeats", "1"],
        "calibrate": ["--variant", "cifar", "--image_size", "32", "--calibration_images", "8"],
    }[name]  # fmt: skip
    output = tmp_path / "figures.json"
    once = [] if name == "calibrate" else ["--repeats", "1", "--seconds", "0.01"]
    main([name, *small, *once, "--device", "cuda", "--output_json", str(output)])
    record = json.loads(output.read_text())
    assert record["device"] == torch.cuda.get_device_name()
    assert all(value > 0 for run in record["runs"] for value in run["medians"].values())
