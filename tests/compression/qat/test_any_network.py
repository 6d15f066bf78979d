"""Quantization-aware training of networks that are not of this package."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import (
    Trainer,
    TrainingArguments,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTConfig,
    ViTForImageClassification,
)

from repvgg_hf import (
    ClusterConfig,
    Distillation,
    QATCallback,
    QATConfig,
    prepare_qat,
    quantize,
    update_codebooks,
)
from repvgg_hf.compression.qat.layers import QATReparamConv2d, qat_layers
from repvgg_hf.compression.qat.prepare import fake_quantizers, remove_fake_quantizers


class Net(nn.Module):
    """Convolutions with all kinds of borders, a sequence, a layer under two names, and one that runs twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1, padding_mode="reflect")
        self.body = nn.Conv2d(8, 8, 4, padding="same", groups=2, padding_mode="circular")
        self.norm = nn.BatchNorm2d(8)
        self.dilated = nn.Conv2d(8, 8, 3, padding=2, dilation=2, bias=False)
        self.sequence = nn.Conv1d(8, 8, 3, padding=1, padding_mode="replicate")
        self.twice = nn.Linear(8, 8)
        self.again = self.twice
        self.head = nn.Linear(in_features=8, out_features=4)

    def forward(self, x):
        x = self.norm(self.body(self.stem(x).relu())).relu()
        x = self.sequence(self.dilated(x).flatten(2)).relu().mT
        return self.head(self.again(self.twice(x).relu()).mean(dim=1))


class Encoder(nn.Module):
    """PyTorch's own transformer, which in evaluation takes the weights of its linear layers and does not call them."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.patches, self.encoder, self.head = nn.Conv2d(3, 8, 4, 4), nn.TransformerEncoder(layer, 2), nn.Linear(8, 4)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).mT
        mask = torch.arange(tokens.shape[1], device=x.device)[None].expand(len(x), -1) >= 12
        return self.head(self.encoder(tokens, src_key_padding_mask=mask)[:, :12].mean(dim=1))


def fit(model, batch, steps=4):
    """An ordinary loop; returns the losses before each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model.train()(batch["pixel_values"]), batch["labels"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_codebooks(model)
        losses.append(loss.item())
    return losses


@pytest.fixture(params=[Net, Encoder], ids=["convolutions", "transformer"])
def net(request):
    torch.manual_seed(0)
    return request.param()


OPTIONS = {
    "w3": {"bits": 3},
    "w4a8": {"bits": 4, "activation_bits": 8},
    "uniform": {"method": "uniform", "bits": 3, "granularity": "per_channel"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_ordinary_loop_then_quantize_changes_nothing(options, net, batch):
    images = batch["pixel_values"]
    if "activation_bits" in options:
        options = options | {"calibration": [batch]}
    expected = copy.deepcopy(net).eval()(images)
    assert prepare_qat(net, **options) is net
    assert (net.eval()(images) - expected).norm() > 1e-3 * expected.norm()
    losses = fit(net, batch, 12)
    assert losses[-1] < losses[0]
    trained = fake_quantizers(net)
    codebooks = {name: quantizer.stored()[0].clone() for name, quantizer in trained.items()}
    with torch.no_grad():
        expected = net.eval()(images)
        quantize(net)
        torch.testing.assert_close(net(images), expected, rtol=0, atol=0 if isinstance(net, Net) else 1e-6)
    assert net.is_quantized and net.qat_settings is None and not fake_quantizers(net)
    assert all(torch.equal(net.get_submodule(name).weight_codebook, book) for name, book in codebooks.items())
    if isinstance(net, Net):
        assert list(codebooks) == ["stem", "body", "dilated", "sequence", "twice", "head"] and net.again is net.twice


def test_a_layer_computes_with_its_quantized_weight_and_any_border(batch):
    """Each against the float layer with the decoded weight put into it."""
    torch.manual_seed(0)
    net = Net().eval()
    seen = {}
    for name, layer in net.named_children():
        layer.register_forward_hook(lambda layer, args, kwargs, y, name=name: seen.update(
            {name: (args[0] if args else kwargs["input"], y)}), with_kwargs=True)  # fmt: skip
    prepare_qat(net, bits=2)
    with torch.no_grad():
        net(batch["pixel_values"])
        for name, layer in qat_layers(net).items():
            x, y = seen[name]
            plain = copy.deepcopy(net)
            remove_fake_quantizers(plain)
            plain = plain.get_submodule(name)
            plain.weight.copy_(layer.weight_fake_quant.quantized(layer.weight).decoded())
            assert torch.equal(plain(x), y), name


def test_evaluation_computes_with_quantized_weights(batch):
    """Also of PyTorch's transformer layers, whose own kernel for that would take the float ones."""
    torch.manual_seed(0)
    net = prepare_qat(Encoder(), bits=2).eval()
    with torch.no_grad():
        actual = net(batch["pixel_values"])
    with torch.enable_grad():  # takes no such kernel
        expected = net(batch["pixel_values"])
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    remove_fake_quantizers(net)
    assert [module.activation_relu_or_gelu for module in net.encoder.layers] == [1, 1]
    assert net.encoder.use_nested_tensor and Encoder().encoder.use_nested_tensor


def test_a_state_dict_resumes_it(net, batch):
    prepare_qat(net, bits=2, qat_config=QATConfig(codebook_update_every=2))
    fit(net, batch, 3)
    again = prepare_qat(type(net)(), bits=2, qat_config=QATConfig(codebook_update_every=2))
    again.load_state_dict(net.state_dict())
    assert fit(again, batch, 3) == fit(net, batch, 3)


@pytest.fixture
def vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_labels=4, **sizes))


class Examples(Dataset):
    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return len(self.batch["labels"])

    def __getitem__(self, index):
        return {name: tensor[index] for name, tensor in self.batch.items()}


class InOrder(Trainer):
    """A `Trainer` that does not shuffle: one that is resumed would, in another order."""

    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)


def trainer_of(model, batch, folder, steps):
    arguments = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-2, lr_scheduler_type="constant",
        save_steps=2, report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    return InOrder(model, arguments, train_dataset=Examples(batch), callbacks=[QATCallback()])


def test_trainer_trains_resumes_and_freezes_a_model_of_transformers(vit, batch, tmp_path):
    fresh = copy.deepcopy(vit)
    qat_config = QATConfig(codebook_update_every=2)
    prepare_qat(vit, bits=3, qat_config=qat_config)
    start = {name: quantizer.codebook.clone() for name, quantizer in fake_quantizers(vit).items()}
    assert len(start) == 14  # the patches, six in each layer, the head
    trainer_of(vit, batch, tmp_path, 4).train()
    assert all(int(quantizer.steps) == 4 for quantizer in fake_quantizers(vit).values())
    assert all(not torch.equal(quantizer.codebook, start[name]) for name, quantizer in fake_quantizers(vit).items())

    resumed = prepare_qat(fresh, bits=3, qat_config=qat_config)
    trainer_of(resumed, batch, tmp_path, 4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, tensor in vit.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name

    with torch.no_grad():
        expected = vit.eval()(batch["pixel_values"]).logits
        quantize(vit)
        assert torch.equal(vit(batch["pixel_values"]).logits, expected)
    assert "qat_config" not in vit.config.to_dict() and vit.config.quantization_config.bits == 3
    vit.save_pretrained(tmp_path / "quantized")
    loaded = ViTForImageClassification.from_pretrained(tmp_path / "quantized").eval()
    with torch.no_grad():
        assert torch.equal(loaded(batch["pixel_values"]).logits, expected)


def test_resuming_from_a_checkpoint_of_something_else(vit, batch, tmp_path):
    trainer_of(copy.deepcopy(vit), batch, tmp_path, 2).train()
    trainer = trainer_of(prepare_qat(vit, bits=3), batch, tmp_path, 4)
    with pytest.raises(
        RuntimeError, match="resumes after step 2, and the fake quantizer of 'vit.* has taken 0: the che"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_checkpoint_of_training_that_is_loaded_without_its_codebooks(vit, batch, tmp_path):
    """Transformers makes the float network, and leaves out what was learned: quantizing it silently would lose it."""
    trainer_of(prepare_qat(vit, bits=3), batch, tmp_path, 2).train()
    folder = tmp_path / "checkpoint-2"
    loaded = ViTForImageClassification.from_pretrained(folder)
    modules = dict(loaded.named_modules())
    with pytest.raises(ValueError, match="left out what its codebooks have learned.*'bits': 3.*qat_config to None"):
        quantize(loaded)
    assert dict(loaded.named_modules()) == modules
    with pytest.raises(ValueError, match="left out what its codebooks"):
        ViTForImageClassification.from_pretrained(folder, quantization_config=ClusterConfig(bits=3))
    prepare_qat(loaded, bits=3).load_state_dict(load_file(folder / "model.safetensors"))
    with torch.no_grad():
        expected = vit.eval()(batch["pixel_values"]).logits
        assert torch.equal(quantize(loaded).eval()(batch["pixel_values"]).logits, expected)
    again = ViTForImageClassification.from_pretrained(folder)
    again.config.qat_config = None
    quantize(again, bits=2)


def test_settings_are_kept_for_checkpoints_and_forgotten(vit, tmp_path):
    def saved():
        vit.save_pretrained(tmp_path)
        return set(load_file(tmp_path / "model.safetensors"))

    names, before = saved(), vit.config.to_dict()
    prepare_qat(vit, bits=3)
    assert vit.config.qat_config["quantization"]["bits"] == 3
    assert saved() == set(vit.state_dict()) and names - saved()  # as Trainer reads them, not as float files have them
    remove_fake_quantizers(vit)
    assert vit.config.to_dict() == before and saved() == names
    assert not any("qat" in type(module).__name__.lower() for module in vit.modules())


def test_blocks_of_branches_in_another_model(tiny_config, randomize_batch_norms, generator, tmp_path):
    """They train by their equivalent kernel; the rest by its plain weights."""
    torch.manual_seed(0)
    backbone = tiny_config(out_features=["stage1", "stage2"])
    sizes = {"hidden_size": 8, "pool_scales": [1], "use_auxiliary_head": False}
    config = UperNetConfig(backbone_config=backbone, num_labels=3, **sizes)
    model = randomize_batch_norms(UperNetForSemanticSegmentation(config), generator)
    x = torch.randn(4, 3, 32, 32, generator=generator)
    prepare_qat(model, bits=4)
    blocks = {name: layer for name, layer in qat_layers(model).items() if isinstance(layer, QATReparamConv2d)}
    assert len(blocks) == 5 and all(name.startswith("backbone.") for name in blocks)
    assert len(qat_layers(model)) > 10
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    labels = torch.randint(3, (4, 32, 32), generator=generator)
    for _ in range(2):
        model.train()(x, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_codebooks(model)
    with torch.no_grad():
        expected = model.eval()(x).logits
        quantize(model)
        assert torch.equal(model(x).logits, expected)
    assert not any("branches" in name for name, _ in model.named_modules())


def test_distillation_from_a_model_that_puts_out_scores(batch):
    torch.manual_seed(0)
    net = Net()
    distillation = Distillation(net)
    prepare_qat(net, bits=2)
    loss = distillation(net.train()(batch["pixel_values"]), batch["pixel_values"])
    loss.backward()
    assert net.stem.weight.grad.abs().sum() > 0 and not any(p.requires_grad for p in distillation.teacher.parameters())
    with pytest.raises(ValueError, match="weight=0.5 gives the labels a share of the loss, and .* have none: pass it"):
        Distillation(net, weight=0.5)(net(batch["pixel_values"]), batch["pixel_values"])


def test_what_is_refused_leaves_it_as_it_is(batch):
    net = Net()
    modules = dict(net.named_modules())
    net.head.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="The weight of 'head' has 1 NaN"):
        prepare_qat(net)
    assert dict(net.named_modules()) == modules and not qat_layers(net)
    net = prepare_qat(Net(), ClusterConfig(bits=2))
    with pytest.raises(ValueError, match="prepared for QAT already, with method='cluster', bits=2"):
        prepare_qat(net, bits=3)
