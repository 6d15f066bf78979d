"""Fusing whole networks of timm and Transformers, each checked against the unfused model and timm's own fusing."""

import copy
import json

import pytest
import torch
from torch import nn

from repvgg_hf import RepVGGForImageClassification, fuse
from repvgg_hf.networks.fusing import count_layers
from repvgg_hf.networks.verifying import output_error
from repvgg_hf.runtime.fused_structure import rebuild_fused

timm = pytest.importorskip("timm")
from timm.utils.model import reparameterize_model  # noqa: E402

# by architecture: pixels of an image, and whether timm fuses it as well
ARCHITECTURES = {
    "repvgg_a0": (64, True),
    "mobileone_s0": (64, True),
    "fastvit_t8": (64, True),
    "repvit_m0_9": (64, True),
    "repghostnet_050": (64, True),
    "lcnetv2_base": (64, True),
    "ghostnetv3_050": (64, True),
    "efficientvit_m0": (224, True),
    "resnet18": (64, False),
    "mobilenetv3_small_050": (64, False),
    "regnetx_002": (64, False),
}


def randomize(model: nn.Module) -> nn.Module:
    """Give every batch norm statistics, scales and shifts as of a trained one; returns the model in eval mode."""
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.8, 1.2)
                module.weight.normal_(1, 0.1)
                module.bias.normal_(0, 0.1)
    return model.eval()


def images(size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_timm(name):
    size, timm_fuses = ARCHITECTURES[name]
    model = randomize(timm.create_model(name, num_classes=5))
    others = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(images(size, 1))
        report = fuse(model, images(size))
        assert output_error(expected, model(images(size, 1))) <= 1e-5
    assert report.error <= 1e-5 and report.left == []
    assert max(region.error for region in report.fused) <= 1e-14
    assert {region.method for region in report.fused} == {"closed form"}
    assert report.layers_after == count_layers(model) < report.layers_before
    if timm_fuses:
        assert report.layers_after <= 1.05 * count_layers(reparameterize_model(others))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobileone_s0", "ghostnetv3_050", "lcnetv2_base"])
def test_fused_timm_models_compile_export_and_come_back(name):
    model, x = randomize(timm.create_model(name, num_classes=5)), images(64)
    with torch.no_grad():
        fuse(model, x)
        expected = model(x)
        assert output_error(expected, torch.export.export(model, (x,)).module()(x)) <= 1e-6
        assert output_error(expected, torch.compile(model, fullgraph=True, backend="aot_eager")(x)) <= 1e-6
        with torch.device("meta"):
            fresh = timm.create_model(name, num_classes=5).eval()
        rebuild_fused(fresh, json.loads(json.dumps(model.fused_structure)))
        fresh.load_state_dict(model.state_dict(), assign=True)
        assert torch.equal(fresh(x), expected)


def test_padding_that_depends_on_the_size_is_left():
    """TensorFlow's "same" padding of a strided convolution is a module's own, and not alike on both sides."""
    model = randomize(timm.create_model("tf_efficientnet_lite0", num_classes=5))
    with torch.no_grad():
        expected = model(images(63, 1))
        report = fuse(model, images(64))
        assert output_error(expected, model(images(63, 1))) <= 1e-5
    assert report.layers_before - report.layers_after == len(report.fused) > 40
    assert {region.name.rpartition(".")[2] for region in report.left} <= {"bn1", "bn2"}
    assert all("computed by forward() of" in region.left for region in report.left)


def test_a_model_that_timm_gets_wrong():
    """Its `RepVggDw` of 5 x 5 pads the 1 x 1 kernel to 3 x 3."""
    from timm.models.repvit import RepVggDw

    model = randomize(nn.Sequential(RepVggDw(8, 5), nn.ReLU()))
    x = torch.randn(1, 8, 9, 9)
    with torch.no_grad():
        expected = model(x)
    report = fuse(model, x)
    assert isinstance(model[0], nn.Conv2d) and model[0].kernel_size == (5, 5)
    assert report.error <= 1e-5 and output_error(expected, model(x)) <= 1e-5


def rt_detr():
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

    backbone = RTDetrResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 32, 32], depths=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"], layer_type="basic",
    )  # fmt: skip
    return RTDetrForObjectDetection(
        RTDetrConfig(
            backbone_config=backbone,
            encoder_hidden_dim=32,
            encoder_in_channels=[32, 32, 32],
            feat_strides=[8, 16, 32],
            encoder_layers=1,
            encoder_ffn_dim=32,
            encoder_attention_heads=2,
            d_model=32,
            num_queries=10,
            decoder_in_channels=[32, 32, 32],
            decoder_ffn_dim=32,
            decoder_layers=2,
            decoder_attention_heads=2,
            num_labels=5,
            anchor_image_size=None,
        )  # fmt: skip
    )


def d_fine():
    from transformers import DFineConfig, DFineForObjectDetection, HGNetV2Config

    backbone = HGNetV2Config(
        stage_in_channels=[16, 16, 32, 32], stage_mid_channels=[8, 8, 16, 16], stage_out_channels=[16, 32, 32, 32],
        stage_num_blocks=[1, 1, 1, 1], stage_numb_of_layers=[1, 1, 1, 1], stem_channels=[3, 8, 16],
        stage_downsample=[False, True, True, True], out_features=["stage2", "stage3", "stage4"], embedding_size=16,
        depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 32, 32],
    )  # fmt: skip
    return DFineForObjectDetection(
        DFineConfig(
            backbone_config=backbone,
            encoder_hidden_dim=32,
            encoder_in_channels=[32, 32, 32],
            encoder_ffn_dim=32,
            encoder_attention_heads=2,
            d_model=32,
            num_queries=10,
            decoder_in_channels=[32, 32, 32],
            decoder_ffn_dim=32,
            decoder_layers=2,
            decoder_attention_heads=2,
            num_labels=5,
            decoder_n_points=[2, 2, 2],
        )  # fmt: skip
    )


def resnet():
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], num_labels=5)
    return ResNetForImageClassification(config)


def regnet():
    from transformers import RegNetConfig, RegNetForImageClassification

    config = RegNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], groups_width=8, num_labels=5)
    return RegNetForImageClassification(config)


def mobilenet_v2():
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    return MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.25, num_labels=5))


def timm_wrapper():
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    return TimmWrapperForImageClassification(TimmWrapperConfig(architecture="repvgg_a0", num_labels=5, do_pooling=True))


MODELS = [rt_detr, d_fine, resnet, regnet, mobilenet_v2, timm_wrapper]


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_transformers(make):
    model = randomize(make())
    with torch.no_grad():
        expected = model(pixel_values=images(64, 1), output_hidden_states=True)
        report = fuse(model, {"pixel_values": images(64)})
        outputs = model(pixel_values=images(64, 1), output_hidden_states=True)
    assert expected.keys() == outputs.keys()
    assert output_error(expected, outputs) <= 1e-5 and report.error <= 1e-5
    assert max(region.error for region in report.fused) <= 1e-14
    norms = [name for name, module in model.named_modules() if "BatchNorm" in type(module).__name__]
    assert norms == [] and report.left == []


def test_detectors_have_one_convolution_per_block():
    """The RepVGG blocks of RT-DETR and D-FINE, which Transformers never fuses."""
    for make in (rt_detr, d_fine):
        model = randomize(make())
        blocks = [name for name, module in model.named_modules() if "RepVgg" in type(module).__name__]
        fuse(model, images(64))
        assert blocks
        for name in blocks:
            block = model.get_submodule(name)
            assert sum(isinstance(module, nn.Conv2d) for module in block.modules()) == 1


@pytest.mark.parametrize("deploy", [False, True])
def test_own_models_use_their_own_fusing(tiny_config, deploy):
    model = randomize(RepVGGForImageClassification(tiny_config(oabn_threshold=1.0)))
    if deploy:
        model.reparameterize()
    reference = copy.deepcopy(model).reparameterize()
    expected = model(images(32, 1)).logits
    report = fuse(model, {"pixel_values": images(32)})
    assert model.config.deploy and not hasattr(model, "fused_structure")
    assert torch.equal(model(images(32, 1)).logits, reference(images(32, 1)).logits)
    assert output_error(expected, model(images(32, 1)).logits) <= 1e-5
    blocks = 0 if deploy else 5
    assert len(report.fused) == blocks and all(region.error <= 1e-14 for region in report.fused)
    assert report.layers_after == count_layers(reference)


def test_own_backbone_in_another_model(tiny_config):
    """Inside another model, whose class knows nothing of `reparameterize()`, it is fused as any network is."""
    model = randomize(nn.Sequential(RepVGGForImageClassification(tiny_config(oabn_threshold=1.0))))
    with torch.no_grad():
        expected = model(images(32, 1))
        report = fuse(model, images(32))
        assert output_error(expected, model(images(32, 1))) <= 1e-5
    assert len(report.fused) == 5 and report.left == []
