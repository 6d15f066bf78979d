"""What quantisation-aware training refuses, and that a refusal changes nothing."""

import pytest
import torch

from repvgg_hf import ClusterConfig
from repvgg_hf.compression import qat
from repvgg_hf.compression.qat import fake_quantizers


def logits(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(batch["pixel_values"]).logits


def test_a_model_prepared_already(make_model):
    with pytest.raises(ValueError, match="prepared for QAT already: train it, or call quantize"):
        make_model().prepare_qat().prepare_qat()


def test_a_quantised_model(make_model, batch):
    options = {"bits": 3, "granularity": "per_channel"}
    model = make_model().quantize(**options)
    with pytest.raises(ValueError, match="holds packed codes, which don't train: call model.dequantize"):
        model.prepare_qat()
    expected = logits(model, batch)
    assert torch.equal(logits(model.dequantize().prepare_qat(**options), batch), expected)


def test_uniform(make_model):
    for arguments in ({"method": "uniform"}, {"method": ClusterConfig(method="uniform")}):
        with pytest.raises(ValueError, match="prepare_qat trains method='cluster', got 'uniform'"):
            make_model().prepare_qat(**arguments)


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
    assert {type(module) for module in model.modules()}.isdisjoint(qat.FLOAT_CLASSES)


def test_arguments_after_training(make_model):
    model = make_model().prepare_qat(bits=3)
    for arguments in ({"bits": 3}, {"method": "cluster"}, {"granularity": "per_channel"}):
        with pytest.raises(ValueError, match="prepared for QAT, which fixed how it is quantised: call quantize"):
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


def test_repr_says_what_a_fake_quantiser_holds(make_model):
    model = make_model().prepare_qat(bits=3)
    assert repr(model.classifier.weight_fake_quant) == (
        "ClusterFakeQuantize(codebooks=[1, 8], channel_scale, momentum=0.9)"
    )
