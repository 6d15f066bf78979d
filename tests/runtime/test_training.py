"""Training steps: gradient checkpointing, several processes, mixed precision, compilation."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from repvgg_hf import RepVGGForImageClassification


@pytest.fixture
def make_model(tiny_config, randomize_batch_norms, generator):
    """A model in train form whose small threshold makes OABN clip."""

    def make(**fields):
        model = RepVGGForImageClassification(tiny_config(**({"oabn_threshold": 1.0} | fields)))
        return randomize_batch_norms(model, generator).train()

    return make


@pytest.fixture
def batch(generator):
    return torch.randn(4, 3, 16, 16, generator=generator), torch.tensor([0, 1, 2, 3])


def train(model, batch, steps=1):
    """Losses of some SGD steps; gradients of the last one stay."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(batch[0], labels=batch[1]).loss
        loss.backward()
        losses.append(loss.item())
        if len(losses) < steps:
            optimizer.step()
    return losses


def assert_same_training(model, expected, tolerance=0.0):
    for (name, parameter), other in zip(expected.named_parameters(), model.parameters()):
        torch.testing.assert_close(other.grad, parameter.grad, atol=tolerance, rtol=tolerance, msg=name)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, atol=tolerance, rtol=tolerance, msg=name)


class TestGradientCheckpointing:
    @pytest.mark.parametrize("fields", [{}, {"oabn": False}, {"use_squeeze_excitation": True}], ids=str)
    @pytest.mark.parametrize("use_reentrant", [False, True], ids=["non_reentrant", "reentrant"])
    def test_same_losses_gradients_and_statistics(self, make_model, batch, use_reentrant, fields):
        """Over several steps, so that statistics counted twice or bounds from other statistics would show."""
        plain = make_model(**fields)
        model = copy.deepcopy(plain)
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        assert train(model, batch, steps=3) == train(plain, batch, steps=3)
        assert_same_training(model, plain)
        assert plain.repvgg.embeddings.layer.conv.branches["3x3"].norm.num_batches_tracked == 3

    def test_it_recomputes(self, make_model, batch):
        model = make_model()
        calls = []
        for layer in model.repvgg.encoder.stages[0].layers:
            layer.conv.register_forward_hook(lambda *_: calls.append(1))
        model.gradient_checkpointing_enable()
        train(model, batch)
        assert len(calls) == 4  # two layers, twice

    def test_without_gradients_and_in_eval_mode(self, make_model, batch):
        plain = make_model()
        model = copy.deepcopy(plain)
        model.gradient_checkpointing_enable()
        with torch.no_grad():
            assert torch.equal(model(batch[0]).logits, plain(batch[0]).logits)
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers()))
        assert torch.equal(model.eval()(batch[0]).logits, plain.eval()(batch[0]).logits)

    def test_it_can_be_switched_off(self, make_model, batch):
        plain = make_model()
        model = copy.deepcopy(plain)
        model.gradient_checkpointing_enable()
        model.gradient_checkpointing_disable()
        assert not model.is_gradient_checkpointing
        assert train(model, batch) == train(plain, batch)
        assert_same_training(model, plain)


def test_two_processes(make_model, batch, tmp_path, relative_error):
    """One step of DistributedDataParallel on half a batch each, against the mean gradient computed in one process."""
    model = make_model()
    model.save_pretrained(tmp_path / "checkpoint")
    torch.save(batch, tmp_path / "batch.pt")
    script = Path(__file__).with_name("distributed_step.py")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    result = subprocess.run(
        [sys.executable, *command, tmp_path / "checkpoint", tmp_path / "batch.pt", tmp_path],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (first, first_synced), (second, second_synced) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))

    halves = [copy.deepcopy(model) for _ in range(2)]
    for half, pixel_values, labels in zip(halves, *(tensor.chunk(2) for tensor in batch)):
        train(half, (pixel_values, labels))
    for (name, parameter), *others in zip(model.named_parameters(), *(half.parameters() for half in halves)):
        expected = parameter - 0.1 * (others[0].grad + others[1].grad) / 2
        assert torch.equal(first[name], second[name]), name
        assert relative_error(first[name], expected) < 1e-5, name
    for name, _ in model.named_buffers():
        assert relative_error(first[name], halves[0].state_dict()[name]) < 1e-5, name
        assert relative_error(second[name], halves[1].state_dict()[name]) < 1e-5, name
        assert torch.equal(first_synced[name], first[name]) and torch.equal(second_synced[name], first[name]), name


def test_every_parameter_has_a_gradient(make_model, batch):
    """Clipped batch norm weights too, or DistributedDataParallel would wait for them."""
    model = make_model(oabn_threshold=0.01)
    train(model, batch)
    norms = [module.norm for name, module in model.named_modules() if name.endswith(("1x1", "identity"))]
    assert any((norm.weight.grad == 0).any() for norm in norms)  # those that would go further out
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_the_bound_holds_while_training(make_model, batch):
    model = make_model(oabn_threshold=2.0)
    train(model, batch, steps=5)
    for name, conv in model.eval().named_modules():
        if hasattr(conv, "branches"):
            bounds = conv.bounds()
            for branch_name, bound in bounds.items():
                if bound is not None:
                    kernel, _ = conv.branches[branch_name].equivalent(bound)
                    dense, _ = conv.branches["3x3"].equivalent()
                    assert kernel.abs().max() <= 2.0 * dense.std() * (1 + 1e-5), (name, branch_name)


def test_bfloat16_autocast(make_model, batch):
    model = make_model()
    full = copy.deepcopy(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(batch[0], labels=batch[1]).loss
    loss.backward()
    assert abs(loss.item() - train(full, batch)[0]) < 0.05
    for name, parameter in model.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all(), name


def test_compiled_model(make_model, batch):
    eager = make_model(depths=[1, 1])
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, backend="aot_eager")
    expected = eager(batch[0], labels=batch[1])
    actual = compiled(batch[0], labels=batch[1])
    torch.testing.assert_close(actual.loss, expected.loss)
    expected.loss.backward()
    actual.loss.backward()
    assert_same_training(model, eager, tolerance=1e-5)


def test_a_few_steps_lower_the_loss(make_model, batch):
    losses = train(make_model(), batch, steps=40)
    assert losses[-1] < losses[0] / 2


def test_frozen_statistics(make_model, batch):
    """Batch norms in eval mode inside a model in train mode, as in fine-tuning on few images."""
    model = make_model()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    before = copy.deepcopy(dict(model.named_buffers()))
    train(model, batch)
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
