"""No operation of a training step waits for the device: on an accelerator the next one is queued meanwhile."""

import copy

import pytest
import torch

from repvgg_hf import QATCallback, QATConfig, update_codebooks
from repvgg_hf.compression.qat.callback import GradientCheck

OPTIONS = [
    {"bits": 4},
    {"bits": 2},
    {"bits": 1, "granularity": "per_channel"},
    {"bits": 3, "granularity": "per_group", "group_size": 4, "channel_scale": True},
    {"bits": 3, "codebook_dtype": "int8"},
    {"bits": 4, "activation_bits": 8},
    {"method": "uniform", "bits": 4},
    {"method": "uniform", "bits": 3, "symmetric": False, "granularity": "per_channel", "activation_bits": 4},
]


@pytest.mark.parametrize("form", ["train", "deploy"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_step_waits(make_model, batch, form, options, waiting_operations):
    """Forward, backward, optimizer and codebooks, once the first step has found out how many there were."""
    if "activation_bits" in options:
        options = options | {"calibration": batch["pixel_values"]}
    often = {} if options.get("method") == "uniform" else {"codebook_update_every": 1}
    qat_config = QATConfig(blend_steps=3, **often)
    model = make_model(form).prepare_qat(**options, qat_config=qat_config).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, foreach=True)

    def step():
        model(**batch).loss.backward()
        optimizer.step()
        update_codebooks(model)
        optimizer.zero_grad()

    step()
    with waiting_operations() as operations:
        for _ in range(3):
            step()
    assert operations.count > 500
    assert operations.found == []


def test_operations_that_wait_are_found(waiting_operations):
    x = torch.tensor([1.0, 0.0])
    calls = [lambda: x.sum().item(), lambda: bool(x.any()), lambda: x.nonzero(), lambda: x[x > 0], lambda: x.unique()]
    for call in calls:
        with waiting_operations() as operations:
            call()
        assert operations.found, call
    with waiting_operations() as operations:
        x.repeat_interleave(2)
        x[torch.tensor([0, 1])]
    assert operations.found == []


class TestCallbackOnAnAccelerator:
    """Stood in for by a check that the device has not finished: it is asked one step later."""

    @pytest.fixture
    def slow_device(self, monkeypatch):
        """The steps whose check was waited for."""
        waited = []

        class Copied:
            def __init__(self, step):
                self.step = step

            def synchronize(self):
                waited.append(self.step)

        init = GradientCheck.__init__

        def slow(check, model, step):
            init(check, model, step)
            check.copied = Copied(step)

        monkeypatch.setattr(GradientCheck, "__init__", slow)
        return waited

    @pytest.fixture
    def trained(self, make_model, batch):
        model = make_model().prepare_qat(bits=3)
        model(**batch).loss.backward()
        return model

    def events(self, callback, model, step, bad=False, **flags):
        """What `Trainer` calls in a step."""
        from transformers import TrainerControl, TrainerState, TrainingArguments

        arguments = TrainingArguments(use_cpu=True, report_to=[])
        state, control = TrainerState(global_step=step - 1), TrainerControl(**flags)
        if bad:
            model.classifier.weight.grad[0, 0] = float("nan")
        callback.on_pre_optimizer_step(arguments, state, control, model=model)
        callback.on_optimizer_step(arguments, state, control, model=model)
        state.global_step = step
        callback.on_step_end(arguments, state, control, model=model)

    def test_it_reads_what_was_found_a_step_before(self, slow_device, trained):
        callback = QATCallback()
        self.events(callback, trained, 1)
        assert slow_device == []
        self.events(callback, trained, 2)
        assert slow_device == [1]
        self.events(callback, trained, 3, bad=True)
        with pytest.raises(RuntimeError, match="of classifier.weight .* step 3: .* The step was taken before that"):
            self.events(callback, trained, 4)

    @pytest.mark.parametrize("flag", ["should_save", "should_evaluate", "should_training_stop"])
    def test_nothing_spoiled_is_saved(self, slow_device, trained, flag):
        callback = QATCallback()
        self.events(callback, copy.deepcopy(trained), 1)
        with pytest.raises(RuntimeError, match="gradients of classifier.weight and 0 other .* step 2"):
            self.events(callback, trained, 2, bad=True, **{flag: True})

    def test_nor_at_the_end(self, slow_device, trained):
        for end in ("on_epoch_end", "on_train_end"):
            callback = QATCallback()
            self.events(callback, trained, 2, bad=True)
            with pytest.raises(RuntimeError, match="optimizer step 2"):
                getattr(callback, end)(None, None, None)
