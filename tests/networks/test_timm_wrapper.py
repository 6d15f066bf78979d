"""timm's other networks as models of Transformers: the same logits, also after a reload; what can't be converted."""

import copy
import json
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from timm.utils.model import reparameterize_model
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    TimmWrapperForImageClassification,
    pipeline,
)

from repvgg_hf import RepVGGForImageClassification, add_oabn, from_timm, fuse, quantize, to_timm_state_dict

# one of each family, the smallest
NETWORKS = ["mobileone_s0", "fastvit_t8", "repvit_m0_9", "ghostnetv3_050", "lcnetv2_small", "repghostnet_050"]
OTHERS = ["resnet10t", "levit_128s"]


def make(name, seed=0, **arguments):
    """A timm model whose batch norms are of two images, so that a third matters to its logits."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **{"num_classes": 4} | arguments)
    with torch.no_grad():
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.weight.uniform_(0.6, 1)
            norm.bias.normal_(0, 0.1)
            norm.momentum = None
        model.train()(torch.randn(2, *image_size(model)))
        for norm in norms:
            norm.momentum = 0.1
    return model.eval()


def image_size(model, side=None):
    channels, height, width = model.pretrained_cfg["input_size"]
    return getattr(model, "in_chans", channels), side or height, side or width


@torch.no_grad()
def assert_same_logits(ours, theirs, tolerance=1e-5):
    image = torch.randn(2, *image_size(theirs), generator=torch.Generator().manual_seed(1))
    expected = theirs.eval()(image)
    assert (expected[0] - expected[1]).abs().max() > 1e-3 * expected.abs().max()  # the image matters
    logits = ours.eval()(image).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("name", NETWORKS + OTHERS)
def test_every_family(name, tmp_path):
    theirs = make(name)
    before = copy.deepcopy(theirs.state_dict())
    ours = from_timm(theirs)
    assert type(ours) is TimmWrapperForImageClassification and not ours.training and ours.config.num_labels == 4
    assert_same_logits(ours, theirs)
    ours.save_pretrained(tmp_path)
    assert_same_logits(AutoModelForImageClassification.from_pretrained(tmp_path), theirs)
    back = timm.create_model(name, num_classes=4)
    back.load_state_dict(to_timm_state_dict(ours))
    for tensor in ours.state_dict().values():
        tensor.zero_()
    assert all(torch.equal(before[key], tensor) for key, tensor in theirs.state_dict().items())
    assert all(torch.equal(before[key], tensor) for key, tensor in back.state_dict().items())


def test_training_mode_stays():
    assert from_timm(make("repghostnet_050").train()).training


@pytest.mark.parametrize("name", ["fastvit_t8", "lcnetv2_small", "mobileone_s0"])
def test_fused_ones(name, tmp_path):
    theirs = reparameterize_model(make(name))
    ours = from_timm(theirs)
    if name == "mobileone_s0":  # timm can't make it fused: it has branches again, of which the first does all
        assert ours.timm_model.stem.conv_scale.conv.weight.abs().max() == 0
    else:
        assert ours.config.model_args["inference_mode"]
    assert_same_logits(ours, theirs)
    ours.save_pretrained(tmp_path)
    assert_same_logits(AutoModelForImageClassification.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("name", ["repvit_m0_9", "ghostnetv3_050"])
def test_fused_ones_that_timm_can_not_make(name):
    with pytest.raises(
        ValueError, match=rf"makes other tensors.*missing: .*timm can't make a fused {name}: convert it"
    ):
        from_timm(reparameterize_model(make(name)))


def test_arguments_come_over(tmp_path):
    theirs = make("mobileone_s0", in_chans=2, act_layer="silu", drop_path_rate=0.1)
    ours = from_timm(theirs)
    assert ours.config.model_args == {"in_chans": 2, "act_layer": "silu", "drop_path_rate": 0.1}
    assert_same_logits(ours, theirs)
    ours.save_pretrained(tmp_path)
    assert_same_logits(AutoModelForImageClassification.from_pretrained(tmp_path), theirs)


def test_arguments_that_timm_has_not_noted(tmp_path):
    theirs = make("mobileone_s0", in_chans=2, act_layer="silu")
    theirs._model_args = {}
    with pytest.raises(ValueError, match="timm's mobileone_s0 computes something else with these weights"):
        from_timm(theirs)
    assert_same_logits(from_timm(theirs, model_args={"act_layer": "silu"}), theirs)


def test_changes_after_creation_are_refused():
    model = make("mobileone_s0")
    model.stages[1][0].act = nn.SiLU()
    with pytest.raises(ValueError, match="timm's mobileone_s0 computes something else.*model_args"):
        from_timm(model)
    model = make("mobileone_s0")
    model.stages[1][1].conv_kxk[2].bn.eps = 1.1e-5  # too little for the logits to show
    with pytest.raises(ValueError, match=r"stages\.1\.1\.conv_kxk\.2\.bn has eps=1\.1e-05, and that of .* has 1e-05"):
        from_timm(model)
    model = make("mobileone_s0")
    model.head.fc = nn.Sequential(nn.Linear(1024, 4))
    with pytest.raises(ValueError, match=r"makes other tensors.*missing: head\.fc\.weight, .*unknown: head\.fc\.0"):
        from_timm(model)


def test_what_is_no_model_of_timm():
    with pytest.raises(TypeError, match="Linear is no model of timm"):
        from_timm(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"no classifier \(num_classes=0\).*reset_classifier"):
        from_timm(timm.create_model("mobileone_s0", num_classes=0))
    byobnet = timm.models.byobnet
    blocks = tuple(byobnet.ByoBlockCfg(type="one", d=1, c=8, s=2) for _ in range(2))
    anonymous = byobnet.ByobNet(byobnet.ByoModelCfg(blocks=blocks, stem_type="one", stem_chs=8), num_classes=3)
    with pytest.raises(ValueError, match="This ByobNet has the architecture None.*save_quantized take any nn.Module"):
        from_timm(anonymous)
    with pytest.raises(ValueError, match="act_layer=.* can't be stored in config.json: create the model with a name"):
        from_timm(make("mobileone_s0", act_layer=nn.SiLU))
    with torch.device("meta"):
        empty = timm.create_model("mobileone_s0")
    with pytest.raises(ValueError, match=r"stem\.\S+ is offloaded"):
        from_timm(empty)


class TestFilesByName:
    """`from_timm(name, file)`."""

    @pytest.mark.parametrize("form", ["branches", "fused"])
    @pytest.mark.parametrize("name", ["mobileone_s0", "fastvit_t8", "repvgg_a0"])
    def test_forms(self, name, form, tmp_path):
        theirs = make(name, num_classes=6)
        theirs = reparameterize_model(theirs) if form == "fused" else theirs
        save_file(theirs.state_dict(), tmp_path / "file.safetensors")
        ours = from_timm(name, tmp_path / "file.safetensors")
        assert ours.config.num_labels == 6 and isinstance(ours, RepVGGForImageClassification) == (name == "repvgg_a0")
        assert_same_logits(ours, theirs, 1e-4)

    def test_wrapped_weights_and_channels(self, tmp_path):
        theirs = make("repghostnet_050", in_chans=1)
        state_dict = {f"module.{key}": tensor for key, tensor in theirs.state_dict().items()}
        torch.save({"model_ema": state_dict, "epoch": 3}, tmp_path / "file.pth")
        ours = from_timm("repghostnet_050", tmp_path / "file.pth")
        assert ours.config.model_args == {"in_chans": 1}
        assert_same_logits(ours, theirs)

    def test_names_that_timm_reads(self, tmp_path):
        """FastViT's authors' names, for which timm has a filter."""
        theirs = make("fastvit_t8", num_classes=1000)
        parts = {
            "stem": "patch_embed", "conv_kxk": "rbr_conv", "conv_scale": "rbr_scale", "identity": "rbr_skip",
            "final_conv": "conv_exp", "large_conv": "lkb_origin", "mlp": "convffn", "head.fc": "head",
            "layer_scale.gamma": "layer_scale", "se.fc1": "se.reduce", "se.fc2": "se.expand",
        }  # fmt: skip
        state_dict = {}
        for key, tensor in theirs.state_dict().items():
            for ours, authors in parts.items():
                key = key.replace(ours, authors)
            key = re.sub(r"stages\.(\d)\.blocks", lambda match: f"network.{2 * int(match[1])}", key)
            key = re.sub(r"stages\.(\d)\.downsample", lambda match: f"network.{2 * int(match[1]) - 1}", key)
            state_dict[key] = tensor
        torch.save(state_dict, tmp_path / "file.pth")
        assert "patch_embed.0.rbr_conv.0.conv.weight" in state_dict
        assert_same_logits(from_timm("fastvit_t8", tmp_path / "file.pth"), theirs)

    def test_bad_ones(self, tmp_path):
        theirs = make("mobileone_s0")
        state_dict = theirs.state_dict()
        torch.save(state_dict | {"extra.weight": torch.zeros(1)}, tmp_path / "file.pth")
        with pytest.raises(ValueError, match=r"file\.pth does not fit timm's mobileone_s0: unknown: extra\.weight\."):
            from_timm("mobileone_s0", tmp_path / "file.pth")
        with pytest.raises(ValueError, match=r"does not fit timm's mobileone_s1: unknown: .*instead of"):
            from_timm("mobileone_s1", tmp_path / "file.pth")
        torch.save({"stage1.0.rbr_dense.conv.weight": torch.zeros(3)}, tmp_path / "file.pth")
        with pytest.raises(ValueError, match=r"those of the authors' code: repvgg_hf\.from_original reads"):
            from_timm("mobileone_s0", tmp_path / "file.pth")
        with pytest.raises(ValueError, match=r"timm \S+ has no model 'mobileone_s00': did you mean 'mobileone_s0'"):
            from_timm("mobileone_s00", tmp_path / "file.pth")
        with pytest.raises(ValueError, match="checkpoint_file='x.pth' goes with the name of a timm model"):
            from_timm(theirs, "x.pth")


class TestImagesAndLabels:
    def test_pixels_are_those_of_timm(self, tmp_path):
        theirs = make("fastvit_t8")
        from_timm(theirs).save_pretrained(tmp_path)
        pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels)
        expected = create_transform(**resolve_model_data_config(theirs), is_training=False)(picture)[None]
        actual = AutoImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="pt")["pixel_values"]
        assert torch.equal(actual, expected)
        answers = pipeline("image-classification", str(tmp_path))(picture)
        assert {answer["label"] for answer in answers} == {"LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"}

    def test_labels(self, tmp_path):
        ours = from_timm(make("repghostnet_050", num_classes=1000))
        ours.save_pretrained(tmp_path)
        config = AutoModelForImageClassification.from_pretrained(tmp_path).config
        assert config.id2label[0] == "tench, Tinca tinca" and config.id2label[134] == "crane (n02012849)"
        assert config.id2label == ours.config.id2label and len(config.label2id) == 1000
        theirs = make("repghostnet_050", num_classes=2)
        theirs.pretrained_cfg = theirs.pretrained_cfg | {"label_names": ["ant", "bee"]}
        assert from_timm(theirs).config.id2label == {0: "ant", 1: "bee"}

    def test_images_of_which_nothing_is_known(self, caplog, tmp_path):
        from_timm(make("repghostnet_050", in_chans=1)).save_pretrained(tmp_path)
        assert "a mean of 3 channels, and it has 1" in caplog.text
        assert "pretrained_cfg" not in json.loads((tmp_path / "config.json").read_text())
        assert AutoModelForImageClassification.from_pretrained(tmp_path).config.num_labels == 4


def test_ready_for_oabn():
    """Bounded branches come out bounded, also under timm's names."""
    ours = from_timm(make("mobileone_s0"))
    add_oabn(ours, torch.randn(1, 3, 64, 64), threshold=0.1)
    tensors = to_timm_state_dict(ours)
    bounded = [
        key for key, tensor in make("mobileone_s0").state_dict().items() if not torch.equal(tensor, tensors[key])
    ]
    assert bounded and all(key.endswith("weight") for key in bounded)
    assert any(key.endswith("identity.weight") for key in bounded)


@pytest.mark.parametrize("name", ["mobileone_s0", "repghostnet_050"])
def test_ready_for_fusing_and_quantizing(name, tmp_path):
    ours = from_timm(make(name))
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = ours(image).logits
        assert fuse(ours, image).regions
        torch.testing.assert_close(ours(image).logits, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
        with pytest.raises(ValueError, match=r"fused by repvgg_hf\.fuse"):
            to_timm_state_dict(ours)
        quantize(ours, bits=8)
        expected = ours(image).logits
    ours.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(image).logits, expected)
