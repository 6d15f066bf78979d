"""The training loop on a tiny network: what it logs, saves, averages and refuses."""

import time

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from repvgg_hf import QATConfig, RepVGGForImageClassification
from repvgg_hf.compression.qat.callback import GradientCheck
from repvgg_hf.training.batches import collate
from repvgg_hf.training.loop import PhaseArguments, TimedLoader, loss_on_labels, optimizer_steps, predict, train_phase


@pytest.fixture
def images() -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(12, 3, 8, 8, generator=generator)
    return [{"pixel_values": picture, "labels": index % 5} for index, picture in enumerate(pictures)]


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True, step_scheduler_with_optimizer=False)


def train(accelerator, model, images, folder=None, **options):
    loss_of = options.pop("loss_of", loss_on_labels)
    args = PhaseArguments(per_device_train_batch_size=4, **options)
    return train_phase(accelerator, model, (images, collate), "phase", 2, 0.01, folder, args, loss_of)


def test_waiting_is_timed():
    def slow():
        for batch in range(3):
            time.sleep(0.02)
            yield batch

    loader = TimedLoader(slow())
    batches = []
    for batch in loader:
        time.sleep(0.05)  # not waiting for data
        batches.append(batch)
    assert batches == [0, 1, 2] and 0.06 <= loader.seconds < 0.15


def test_steps_of_an_epoch():
    args = PhaseArguments(gradient_accumulation_steps=3)
    assert [optimizer_steps(batches, args) for batches in (1, 3, 4)] == [1, 1, 2]


def test_a_seed_gives_the_same_weights_again(accelerator, images, tiny_config):
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(train(accelerator, RepVGGForImageClassification(tiny_config(groups=1)), images))
    states = [model.state_dict() for model in models]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    torch.manual_seed(0)
    before = RepVGGForImageClassification(tiny_config(groups=1))
    assert not torch.equal(before.classifier.weight, models[0].classifier.weight)


def test_the_average_is_what_remains(accelerator, images, tiny_config):
    """With a decay of 1 that is the model as it began."""
    model = RepVGGForImageClassification(tiny_config(groups=1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = train(accelerator, model, images, ema_decay=1.0).state_dict()
    for name, tensor in before.items():
        if name.endswith("num_batches_tracked"):
            assert trained[name] == 6  # 2 epochs of 3 batches
        else:
            assert torch.equal(trained[name], tensor), name


def test_not_finite_gradients_stop_before_the_step(accelerator, images, tiny_config):
    model = RepVGGForImageClassification(tiny_config(groups=1))
    before = model.classifier.weight.clone()
    with pytest.raises(RuntimeError, match="NaN or infinite in optimizer step 1.* This step was not taken"):
        train(accelerator, model, images, loss_of=lambda model, batch: loss_on_labels(model, batch) * float("nan"))
    assert torch.equal(model.classifier.weight, before)


def slowed(monkeypatch) -> list[int]:
    """Let checks of gradients be those of an accelerator, which has not finished them; the steps that are asked for."""
    asked, make = [], GradientCheck.__init__

    class Copied:
        def __init__(self, step):
            self.step = step

        def synchronize(self):
            asked.append(self.step)

    def slow(check, model, step):
        make(check, model, step)
        check.copied = Copied(step)

    monkeypatch.setattr(GradientCheck, "__init__", slow)
    return asked


def test_gradients_that_are_not_finite_are_found_by_and_by(accelerator, images, tiny_config, monkeypatch):
    """An accelerator's are known after the step was taken, before the next one and before the end of the epoch."""
    asked = slowed(monkeypatch)
    model = RepVGGForImageClassification(tiny_config(groups=1))
    train(accelerator, model, images)
    assert asked == [1, 2, 3, 4, 5, 6]
    for bad in (2, 3):  # the third is the last one of its epoch
        batches = []

        def loss_of(model, batch, bad=bad, batches=batches):
            batches.append(batch)
            return loss_on_labels(model, batch) * (float("nan") if len(batches) == bad else 1)

        with pytest.raises(
            RuntimeError, match=f"NaN or infinite in optimizer step {bad}: .* The step was taken before"
        ):
            train(accelerator, RepVGGForImageClassification(tiny_config(groups=1)), images, loss_of=loss_of)
        assert len(batches) == 3


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.5}, {"gradient_accumulation_steps": 2}], ids=str)
def test_no_step_waits(images, tiny_config, monkeypatch, waiting_operations, options):
    """An epoch may wait a few times for a device, but not more often if it has more steps."""
    asked = slowed(monkeypatch)
    monkeypatch.setattr(GradientCheck, "require_finite", lambda check, **options: check.copied.synchronize())
    accumulated = options.get("gradient_accumulation_steps", 1)
    found = []
    for count in (8, 8, 32):  # the first one has to find out how many steps there were
        model = RepVGGForImageClassification(tiny_config(groups=1))
        model.prepare_qat(bits=3, qat_config=QATConfig(codebook_update_every=1))
        accelerator = Accelerator(
            cpu=True, step_scheduler_with_optimizer=False, gradient_accumulation_steps=accumulated
        )
        asked.clear()
        with waiting_operations() as operations:
            train(accelerator, model, (images * 3)[:count], **options)
        assert asked == [*range(1, count // 2 // accumulated + 1)]
        found.append(sorted(operations.found))
    assert found[0] == found[1] == found[2]


def test_predictions_are_the_models(accelerator, images, tiny_config):
    model = RepVGGForImageClassification(tiny_config(groups=1)).eval()
    loader = accelerator.prepare(DataLoader(images, 5, collate_fn=collate))
    expected = model(torch.stack([image["pixel_values"] for image in images])).logits.detach().numpy()
    assert np.abs(predict(accelerator, model, loader) - expected).max() < 1e-5
