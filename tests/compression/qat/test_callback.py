"""What happens in every optimizer step: codebooks follow the kernels, and training that diverges is stopped."""

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from repvgg_hf import QATCallback, QATConfig, RepVGGForImageClassification, update_codebooks
from repvgg_hf.compression.qat import callback
from repvgg_hf.compression.qat.callback import check_gradients
from repvgg_hf.compression.qat.prepare import fake_quantizers

EVERY_STEP = QATConfig(codebook_update_every=1)


@pytest.mark.parametrize("form", ["train", "deploy"])
def test_updates_follow_the_kernel(form, make_model, batch):
    model = make_model(form).prepare_qat(bits=3, qat_config=QATConfig(codebook_update_every=2))
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
def test_training_lowers_the_loss(options, form, tiny_config, train, batch):
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


class Images(Dataset):
    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return {name: tensor[index] for name, tensor in self.batch.items()}


def test_trainer(make_model, assert_same_state, batch, tmp_path, monkeypatch, caplog):
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
    monkeypatch.setattr(callback, "update_codebooks", lambda model: calls.append(update_codebooks(model)))
    model = make_model().prepare_qat(bits=3, qat_config=EVERY_STEP)
    before = {name: layer.codebook.clone() for name, layer in fake_quantizers(model).items()}
    first = trainer(model)
    first.train()
    assert len(calls) == first.state.global_step == 4
    assert not any(torch.equal(layer.codebook, before[name]) for name, layer in fake_quantizers(model).items())

    resumed = make_model().prepare_qat(bits=3, qat_config=EVERY_STEP)
    trainer(resumed).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_state(resumed.state_dict(), model.state_dict())

    loss = first.evaluate()["eval_loss"]
    assert trainer(model.quantize()).evaluate()["eval_loss"] == loss

    assert "update_codebooks" not in caplog.text
    checkpoint = RepVGGForImageClassification.from_pretrained(tmp_path / "checkpoint-4")
    assert_same_state(checkpoint.state_dict(), resumed.state_dict())


@pytest.mark.parametrize(
    ("options", "qat_config", "steps", "warns"),
    [
        ({"bits": 3}, None, 0, True),
        ({"bits": 3}, None, 1, False),
        ({"method": "uniform", "bits": 3}, None, 0, False),  # whose steps learn by gradients
        ({"method": "uniform", "bits": 3}, QATConfig(blend_steps=3), 0, True),
    ],
)
def test_forgotten_updates_are_told_of(make_model, batch, tmp_path, caplog, options, qat_config, steps, warns):
    model = make_model().prepare_qat(**options, qat_config=qat_config)
    model.save_pretrained(tmp_path)
    assert not caplog.records  # nothing was trained
    model(**batch).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for _ in range(steps):
        update_codebooks(model)
    for call in (lambda: model.save_pretrained(tmp_path), model.quantize):
        caplog.clear()
        call()
        told = [record.getMessage() for record in caplog.records]
        assert len(told) == warns and all("call repvgg_hf.update_codebooks(model) after" in text for text in told)


def test_gradients_that_are_not_finite(make_model, batch):
    """Named before the optimizer spoils the parameters."""
    model = make_model().prepare_qat(bits=3)
    model(**batch).loss.backward()
    check_gradients(model, 7)
    model.classifier.weight.grad[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="gradients of classifier.weight and 0 other .* optimizer step 7: lower the"):
        check_gradients(model, 7)


def test_trainer_stops_before_it_spoils_the_model(make_model, batch, tmp_path):
    arguments = TrainingArguments(
        tmp_path, use_cpu=True, report_to=[], disable_tqdm=True, max_steps=6, save_steps=1, learning_rate=1e6,
        per_device_train_batch_size=4, max_grad_norm=0, optim="sgd", lr_scheduler_type="constant",
    )  # fmt: skip
    model = make_model("deploy").prepare_qat(bits=3, qat_config=EVERY_STEP)
    trainer = Trainer(model, arguments, train_dataset=Images(batch), callbacks=[QATCallback()])
    with pytest.raises(RuntimeError, match="are NaN or infinite in optimizer step [2-6]"):
        trainer.train()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert (tmp_path / "checkpoint-1" / "model.safetensors").exists()
