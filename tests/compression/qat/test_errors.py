"""What quantization-aware training refuses, and that a refusal changes nothing."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from repvgg_hf import ClusterConfig, QATCallback
from repvgg_hf.compression.qat.annealing import set_bits
from repvgg_hf.compression.qat.prepare import check_gradients, fake_quantizers
from repvgg_hf.compression.qat.layers import qat_layers


def logits(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(batch["pixel_values"]).logits


def test_a_model_prepared_already(make_model):
    with pytest.raises(ValueError, match="prepared for QAT already, with method='cluster', bits=4: train it, or"):
        make_model().prepare_qat().prepare_qat(bits=2)


def test_a_quantized_model(make_model, batch):
    options = {"bits": 3, "granularity": "per_channel"}
    model = make_model().quantize(**options)
    with pytest.raises(ValueError, match="holds packed codes, which don't train: call model.dequantize"):
        model.prepare_qat()
    expected = logits(model, batch)
    assert torch.equal(logits(model.dequantize().prepare_qat(**options), batch), expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"codebook_update": "sgd"}, "codebook_update must be one of kmeans, gradient, both, got 'sgd'"),
        ({"momentum": 1}, "momentum must be at least 0 and less than 1, got 1"),
        ({"update_every": 0}, "update_every must be an integer of at least 1, got 0"),
        ({"blend_steps": -1}, "blend_steps must be an integer of at least 0, got -1"),
        ({"batch_norm_every": 2.5}, "batch_norm_every must be an integer of at least 0, got 2.5"),
        ({"freeze_threshold": 0}, "freeze_threshold must be None or a share of steps between 0 and 1, got 0"),
        ({"activation_update": "max"}, "activation_update must be one of gradient, moving_average, got 'max'"),
        ({"start": "random"}, "start must be one of kernel, decoded, got 'random'"),
        ({"activation_bits": 8}, "activation_bits needs calibration data"),
        ({"tuning_steps": 10}, "tuning_steps needs calibration data"),
        ({"momentun": 0.9}, "Unknown quantization option 'momentun': did you mean 'momentum'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options(options, message, make_model):
    model = make_model()
    with pytest.raises((ValueError, TypeError), match=message):
        model.prepare_qat(**options)
    assert not fake_quantizers(model)


def test_bits_of_a_float_model_can_not_be_changed(make_model):
    with pytest.raises(ValueError, match="not prepared for QAT: call prepare_qat"):
        set_bits(make_model(), 2)
    model = make_model().prepare_qat(bits=4)
    with pytest.raises(ValueError, match="bits must be an integer from 1 to 8, got 9"):
        set_bits(model, 9)
    assert model.qat_config.bits == 4


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
    model = make_model("deploy").prepare_qat(bits=3, codebook_update="gradient")
    images = [{name: tensor[index] for name, tensor in batch.items()} for index in range(16)]
    trainer = Trainer(model, arguments, train_dataset=images, callbacks=[QATCallback()])
    with pytest.raises(RuntimeError, match="are NaN or infinite in optimizer step [2-6]"):
        trainer.train()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert (tmp_path / "checkpoint-1" / "model.safetensors").exists()


def test_a_config_and_bits(make_model):
    with pytest.raises(ValueError, match="Give either a whole ClusterConfig or its arguments, not both"):
        make_model().prepare_qat(ClusterConfig(bits=4), bits=2)


@pytest.mark.parametrize("form", ["train", "deploy"])
def test_nothing_changes_when_it_fails(form, make_model):
    model = make_model(form)
    model.classifier.weight.data[2, 3] = float("inf")
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match="The weight of 'classifier' has 1 NaN or infinite entries"):
        model.prepare_qat()
    assert dict(model.named_modules()) == modules and not fake_quantizers(model)
    assert not qat_layers(model)


def test_arguments_after_training(make_model):
    model = make_model().prepare_qat(bits=3)
    for arguments in ({"bits": 3}, {"method": "cluster"}, {"granularity": "per_channel"}):
        with pytest.raises(ValueError, match="prepared for QAT, which fixed how it is quantized: call quantize"):
            model.quantize(**arguments)


@pytest.mark.parametrize("form", ["train", "deploy"])
def test_training_that_diverged(form, make_model):
    model = make_model(form).prepare_qat(bits=3)
    conv = model.repvgg.embeddings.layer.conv
    next(parameter for parameter in conv.parameters() if parameter.dim() == 4).data[0] = float("nan")
    with pytest.raises(ValueError, match="'repvgg.embeddings.layer.conv' (can't be fused|has 27 NaN)"):
        model.quantize()
    assert fake_quantizers(model)


def test_fusing_would_lose_the_codebooks(make_model):
    with pytest.raises(ValueError, match="prepared for QAT: quantize.. fuses it and keeps the trained codebooks"):
        make_model().prepare_qat().reparameterize()


def test_repr_says_what_a_fake_quantizer_holds(make_model):
    model = make_model().prepare_qat(bits=3)
    assert repr(model.classifier.weight_fake_quant) == (
        "ClusterFakeQuantize(codebooks=[1, 8], channel_scale, kmeans, momentum=0.9)"
    )
    model = make_model().prepare_qat("uniform", bits=3, channel_scale=True)
    assert repr(model.classifier.weight_fake_quant) == "UniformFakeQuantize(steps=4, integers=-4..3)"
