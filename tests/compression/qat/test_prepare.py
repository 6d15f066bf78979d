"""Quantization-aware training: what is trained is what is shipped."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from repvgg_hf import ClusterConfig, QATCallback, ReparamConv2d, RepVGGForImageClassification, update_codebooks
from repvgg_hf.compression import qat
from repvgg_hf.compression.qat.prepare import ClusterFakeQuantize, fake_quantizers
from repvgg_hf.compression.codebooks.weights import QuantizedWeight, quantize_weight

FORMATS = {
    "w3": {"bits": 3},
    "w1": {"bits": 1},
    "w4 without scale": {"bits": 4, "channel_scale": False},
    "w2 per_channel": {"bits": 2, "granularity": "per_channel"},
    "w4 per_group float32": {"bits": 4, "granularity": "per_group", "group_size": 4, "codebook_dtype": "float32"},
    "w3 int8": {"bits": 3, "codebook_dtype": "int8", "bits_overrides": {"classifier": 8}},
    "w2 per_channel int8": {"bits": 2, "granularity": "per_channel", "codebook_dtype": "int8"},
    "part": {"bits": 3, "modules_to_not_convert": ["embeddings", "encoder.stages.1.layers.0"]},
}


def train(model, batch, steps, optimizer=None, learning_rate=0.05) -> list[float]:
    """Losses before each step."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_codebooks(model)
        losses.append(loss.item())
    return losses


def logits(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(batch["pixel_values"]).logits


def assert_same_state(actual: dict, expected: dict):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("form", ["train", "deploy"])
@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_quantize_changes_nothing(options, form, make_model, batch, tmp_path):
    model = make_model(form)
    assert model.prepare_qat(**options) is model
    train(model, batch, 3)
    codebooks = {name: layer.stored()[0] for name, layer in fake_quantizers(model).items()}
    expected = logits(model, batch)
    assert model.quantize() is model and model.is_quantized and not fake_quantizers(model)
    if options == FORMATS["part"] and form == "train":  # fusing what stays float rounds
        torch.testing.assert_close(logits(model, batch), expected, rtol=1e-4, atol=1e-6)
        expected = logits(model, batch)
    assert torch.equal(logits(model, batch), expected)
    assert all(torch.equal(model.get_submodule(name).weight_codebook, book) for name, book in codebooks.items())
    model.save_pretrained(tmp_path)
    loaded = RepVGGForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, batch), expected)


@pytest.mark.parametrize("form", ["train", "deploy"])
def test_it_starts_where_post_training_quantization_ends(form, make_model, batch):
    quantized = make_model(form).quantize(bits=3)
    assert torch.equal(logits(make_model(form).prepare_qat(bits=3), batch), logits(quantized, batch))


@pytest.mark.parametrize("form", ["train", "deploy"])
def test_gradients_reach_everything_and_statistics_stay(form, make_model, batch):
    model = make_model(form, oabn=False).prepare_qat(bits=2)
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers() if "fake_quant" not in name}
    model.train()(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    for name, buffer in model.named_buffers():
        assert "fake_quant" in name or torch.equal(buffer, statistics[name]), name
    assert len(statistics) == (0 if form == "deploy" else 3 * (5 + 5 + 2))  # 2 of the 5 blocks have an identity


class CountConvolutions(TorchFunctionMode):
    def __init__(self):
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function in (F.conv2d, torch.conv2d)
        return function(*args, **(kwargs or {}))


def test_one_convolution_a_block(make_model, batch):
    model = make_model()
    counts = []
    for prepare in (False, True):
        if prepare:
            model.prepare_qat()
        with CountConvolutions() as mode:
            model.train()(**batch)
        counts.append(mode.count)
    assert counts == [10, 5]  # 3x3 and 1x1 in each block


@pytest.mark.parametrize("threshold", [None, 2.0], ids=["bn", "oabn"])
def test_the_gradient_is_that_of_the_convolution_with_the_quantized_kernel(threshold, randomize_batch_norms, generator):
    block = ReparamConv2d(8, 8, groups=2, oabn_threshold=threshold)
    randomize_batch_norms(block, generator)
    config = ClusterConfig(bits=2)
    block.weight_fake_quant = ClusterFakeQuantize(quantize_weight(block.equivalent()[0], 2, 1, config), torch.float16)
    x, direction = torch.randn(2, 8, 7, 7, generator=generator), torch.randn(2, 8, 7, 7, generator=generator)
    (block(x) * direction).sum().backward()

    kernel, bias = block.equivalent()
    quantized = block.weight_fake_quant.quantized(kernel).decoded().requires_grad_()
    fixed_bias = bias.detach().requires_grad_()
    (F.conv2d(x, quantized, fixed_bias, padding=1, groups=2) * direction).sum().backward()
    assert not torch.equal(quantized, kernel)
    parameters = dict(block.named_parameters())
    expected = torch.autograd.grad((kernel, bias), parameters.values(), (quantized.grad, fixed_bias.grad))
    for (name, parameter), gradient in zip(parameters.items(), expected):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5, msg=name)


def update_by_hand(kernel, codebook, scale, momentum):
    """One step, weight by weight."""
    rows = [row.tolist() for row in kernel.flatten(1)]
    books, scales = codebook.tolist(), [1.0] * len(rows) if scale is None else scale.tolist()
    group_of = [channel * len(books) // len(rows) for channel in range(len(rows))]

    def code(weight, channel):
        return min(
            range(len(books[0])), key=lambda entry: abs(weight - scales[channel] * books[group_of[channel]][entry])
        )

    segments = {}  # (group, entry) to its (weight, scale, channel)
    for channel, row in enumerate(rows):
        for weight in row:
            segment = segments.setdefault((group_of[channel], code(weight, channel)), [])
            segment.append((weight, scales[channel], channel))
    means, errors = {}, {}
    for key, segment in segments.items():
        total = sum(s * s for _, s, _ in segment)
        means[key] = sum(s * w for w, s, _ in segment) / total
        errors[key] = (sum((w - s * means[key]) ** 2 for w, s, _ in segment), total)
    new = [[momentum * entry for entry in book] for book in books]
    for group, book in enumerate(new):
        for entry in range(len(book)):
            book[entry] += (1 - momentum) * means.get((group, entry), books[group][entry])
    fitted = []
    for channel in range(len(rows)):
        pairs = [
            (weight, new[group][entry])
            for (group, entry), segment in segments.items()
            for weight, _, owner in segment
            if owner == channel
        ]
        fit = sum(weight * entry for weight, entry in pairs) / sum(entry**2 for _, entry in pairs)
        fitted.append(momentum * scales[channel] + (1 - momentum) * fit)
    for group, book in enumerate(new):  # the first unused entry splits the worst segment
        unused = [entry for entry in range(len(book)) if (group, entry) not in segments]
        worst = max((key for key in segments if key[0] == group), key=lambda key: errors[key][0])
        book[unused[0]] = means[worst] + (errors[worst][0] / errors[worst][1]) ** 0.5
    return torch.tensor([sorted(book) for book in new]), None if scale is None else torch.tensor(fitted)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_an_update_is_one_step_of_k_means(groups, scaled, momentum, generator):
    kernel = torch.randn(6, 4, 3, 3, generator=generator)
    codebook = torch.randn(groups, 8, generator=generator).sort(dim=1).values
    codebook[:, -1] = 50  # nearest to nothing
    scale = 0.5 + torch.rand(6, generator=generator) if scaled else None
    weight = QuantizedWeight(torch.zeros(6, 1), codebook, scale)
    layer = ClusterFakeQuantize(weight, torch.float32, "kmeans", momentum)
    expected_codebook, expected_scale = update_by_hand(kernel, codebook, scale, momentum)
    layer.update(kernel)
    codebook, scale = layer.ascending()
    torch.testing.assert_close(codebook, expected_codebook, rtol=1e-5, atol=1e-6)
    if scaled:
        torch.testing.assert_close(scale, expected_scale, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["train", "deploy"])
def test_updates_follow_the_kernel(form, make_model, batch):
    model = make_model(form).prepare_qat(bits=3, codebook_update="kmeans", update_every=2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 4:
                parameter *= 1.3
        kernels = {name: conv.weight for name, conv in model.fused_convolutions().items()}
        kernels |= {name: model.get_submodule(name).weight for name in fake_quantizers(model) if name not in kernels}
        errors = []
        for _ in range(40):
            layers = fake_quantizers(model)
            errors.append([(layer(kernels[name]) - kernels[name]).square().sum() for name, layer in layers.items()])
            update_codebooks(model)
    errors = torch.tensor(errors)
    # the classifier was not moved: its codebook can but follow its rounding to float16
    assert (errors[-1] <= errors[0] * 1.0001).all() and errors[-1].sum() < 0.8 * errors[0].sum()


@pytest.mark.parametrize("form", ["train", "deploy"])
@pytest.mark.parametrize("options", [{"bits": 2}, {"bits": 2, "codebook_dtype": "int8"}], ids=["float16", "int8"])
def test_training_lowers_the_loss(options, form, tiny_config, batch):
    model = RepVGGForImageClassification(tiny_config(num_labels=4))
    train(model, batch, 3, torch.optim.Adam(model.parameters(), lr=0.003))  # with batch statistics, to fit the data
    if form == "deploy":
        model.reparameterize()
    model.prepare_qat(**options)
    losses = train(model, batch, 40, torch.optim.Adam(model.parameters(), lr=0.003))
    assert losses[-1] < 0.5 * losses[0]
    model.quantize()
    with torch.no_grad():
        assert model.eval()(**batch).loss < 0.5 * losses[0]


@pytest.mark.parametrize("form", ["train", "deploy"])
def test_resuming_is_not_noticed(form, make_model, batch):
    def prepared():
        model = make_model(form).prepare_qat(bits=3)
        return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    model, optimizer = prepared()
    train(model, batch, 3, optimizer)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, batch, 3, optimizer)

    resumed, optimizer = prepared()
    assert {name for name in saved[0] if name.endswith(("fake_quant.codebook", "fake_quant.scale"))} == {
        f"{name}.weight_fake_quant.{buffer}" for name in fake_quantizers(model) for buffer in ("codebook", "scale")
    }
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(resumed, batch, 3, optimizer)
    assert_same_state(resumed.state_dict(), model.state_dict())
    assert torch.equal(logits(resumed.quantize(), batch), logits(model, batch))


class Images(Dataset):
    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return {name: tensor[index] for name, tensor in self.batch.items()}


def test_trainer(make_model, batch, tmp_path, monkeypatch):
    """The callback runs once per optimizer step, a checkpoint resumes exactly, and the result is what was evaluated."""

    def trainer(model):
        arguments = TrainingArguments(
            tmp_path, use_cpu=True, report_to=[], disable_tqdm=True, max_steps=4, save_steps=2, learning_rate=0.01,
            per_device_train_batch_size=4, gradient_accumulation_steps=2,
        )  # fmt: skip
        return Trainer(
            model, arguments, train_dataset=Images(batch), eval_dataset=Images(batch), callbacks=[QATCallback()]
        )

    calls = []
    monkeypatch.setattr(qat, "update_codebooks", lambda model: calls.append(update_codebooks(model)))
    model = make_model().prepare_qat(bits=3, update_every=1)
    before = {name: layer.codebook.clone() for name, layer in fake_quantizers(model).items()}
    first = trainer(model)
    first.train()
    assert len(calls) == first.state.global_step == 4
    assert not any(torch.equal(layer.codebook, before[name]) for name, layer in fake_quantizers(model).items())

    resumed = make_model().prepare_qat(bits=3, update_every=1)
    trainer(resumed).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_state(resumed.state_dict(), model.state_dict())

    loss = first.evaluate()["eval_loss"]
    assert trainer(model.quantize()).evaluate()["eval_loss"] == loss

    checkpoint = RepVGGForImageClassification.from_pretrained(tmp_path / "checkpoint-4")
    assert_same_state(checkpoint.state_dict(), resumed.state_dict())


def test_compiled_blocks_train_alike(make_model, batch):
    model = make_model().prepare_qat(bits=2).train()
    compiled = copy.deepcopy(model)
    torch._dynamo.reset()
    step = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    for runner in (model, step):
        runner(**batch).loss.backward()
    for (name, parameter), other in zip(model.named_parameters(), compiled.parameters()):
        torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_autocast(make_model, batch):
    model = make_model().prepare_qat(bits=4).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    assert loss.isfinite() and all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


DISTRIBUTED = """
import sys
import torch
import torch.distributed as distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from repvgg_hf import RepVGGForImageClassification, update_codebooks

kind, folder, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
model = RepVGGForImageClassification.from_pretrained(f"{folder}/float").prepare_qat(bits=2, update_every=2).train()
if kind == "ddp":
    parallel = DistributedDataParallel(model, broadcast_buffers=False)
else:
    mesh = init_device_mesh("cpu", (2,))
    parallel = model.to(memory_format=torch.contiguous_format)
    for module in [*[block for stage in model.repvgg.encoder.stages for block in stage.layers], model]:
        fully_shard(module, mesh=mesh)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
batch = {name: tensor[rank::2] for name, tensor in torch.load(f"{folder}/batch.pt").items()}
for _ in range(4):
    parallel(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    update_codebooks(model)
state = {name: getattr(tensor, "full_tensor", lambda: tensor)() for name, tensor in model.state_dict().items()}
torch.save(state, f"{folder}/{rank}.pt")
distributed.destroy_process_group()
"""


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_are_one_with_twice_the_batch(kind, make_model, batch, tmp_path):
    """Their codebooks are the same without any exchange, as the same kernels give the same ones."""
    make_model().save_pretrained(tmp_path / "float")
    torch.save(batch, tmp_path / "batch.pt")
    command = [sys.executable, "-c", DISTRIBUTED, kind, str(tmp_path)]
    processes = [
        subprocess.Popen(
            [*command, str(rank)], stderr=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_same_state(first, second)

    model = make_model().prepare_qat(bits=2, update_every=2).train()
    start = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(4):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_codebooks(model)
    assert all(not torch.equal(first[name], start[name]) for name in first if name.endswith("fake_quant.codebook"))
    for name, tensor in model.state_dict().items():
        # rounding may decide whether a bounded batch norm weight gets its gradient
        atol = 5e-3 if name.endswith("norm.weight") else 1e-4
        torch.testing.assert_close(first[name], tensor, rtol=1e-3, atol=atol, msg=name)
