"""timm's RepVGG, an independent implementation: same weights, same logits, same size."""

import copy

import pytest
import timm
import torch
from timm.models.byobnet import RepVggBlock
from timm.utils.model import reparameterize_model
from torch import nn

from repvgg_hf import RepVGGConfig, RepVGGForImageClassification, from_timm, to_timm_state_dict
from repvgg_hf.networks import convert_timm_state_dict
from repvgg_hf.networks.timm import timm_architecture
from repvgg_hf.runtime.modeling_repvgg import RepVGGLayer
from repvgg_hf.runtime.reparameterization import ReparamConv2d

SMALL = ["a0", "a1", "a2", "b0"]
LARGE = ["b1", "b1g4", "b2", "b2g4", "b3", "b3g4", "d2se"]
ARCHITECTURE = (
    "stem_hidden_size", "hidden_sizes", "depths", "strides", "stem_stride", "groups", "use_squeeze_excitation",
    "squeeze_ratio", "num_channels", "num_labels", "batch_norm_eps",
)  # fmt: skip


def num_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("variant", SMALL + [pytest.param(name, marks=pytest.mark.slow) for name in LARGE])
@torch.no_grad()
def test_every_variant(variant, randomize_batch_norms, keep_signal, relative_error, generator):
    theirs = timm.create_model(f"repvgg_{variant}", num_classes=10).eval()
    keep_signal(randomize_batch_norms(theirs, generator), RepVggBlock)
    pixel_values = torch.randn(2, 3, 32, 32, generator=generator)
    expected = theirs(pixel_values)
    assert relative_error(*expected) > 1e-2  # the images matter, or the next comparisons would show nothing

    ours = keep_signal(from_timm(theirs), RepVGGLayer)
    published = RepVGGConfig.from_variant(variant, num_labels=10)
    assert all(list_or_value(ours.config, name) == list_or_value(published, name) for name in ARCHITECTURE)
    assert not ours.config.oabn and not ours.config.deploy and not ours.training
    assert num_parameters(ours) == num_parameters(theirs)
    assert relative_error(ours(pixel_values).logits, expected) < 1e-4
    del ours

    fused = reparameterize_model(theirs, inplace=True)
    ours = keep_signal(from_timm(fused), RepVGGLayer)
    assert ours.config.deploy
    assert num_parameters(ours) == num_parameters(fused)
    assert all(list_or_value(ours.config, name) == list_or_value(published, name) for name in ARCHITECTURE)
    # in float64, where the layout of the kernels in memory, on which float32's rounding depends, makes no difference
    logits = ours.double()(pixel_values.double()).logits
    assert relative_error(logits, fused.double()(pixel_values.double())) < 1e-10
    assert relative_error(logits.float(), expected) < 1e-4


def list_or_value(config, name):
    value = getattr(config, name)
    return list(value) if isinstance(value, (list, tuple)) else value


def tiny_timm(**kwargs):
    """timm's RepVGG of the tiny shape that the other tests use, with a grouped second and fourth layer."""
    model = timm.models.byobnet
    config = model.ByoModelCfg(
        blocks=model._rep_vgg_bcfg(d=(2, 2), wf=(0.125, 0.125), groups=2), stem_type="rep", stem_chs=8, **kwargs
    )
    return model.ByobNet(config, num_classes=5)


@torch.no_grad()
def test_fusing_ours_is_fusing_theirs(randomize_batch_norms, relative_error, generator):
    theirs = randomize_batch_norms(tiny_timm(), generator).eval()
    ours = from_timm(theirs).reparameterize().state_dict()
    expected = convert_timm_state_dict(reparameterize_model(theirs).state_dict())
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert relative_error(ours[name], tensor) < 1e-5, name


def test_training_step_is_theirs(relative_error, generator):
    """Gradients and running statistics, with plain batch norm."""
    theirs = tiny_timm().train()
    ours = from_timm(theirs)
    assert ours.training
    pixel_values = torch.randn(4, 3, 32, 32, generator=generator)
    labels = torch.tensor([0, 1, 2, 3])
    ours(pixel_values, labels=labels).loss.backward()
    nn.functional.cross_entropy(theirs(pixel_values), labels).backward()
    expected = convert_timm_state_dict({name: p.grad for name, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        assert relative_error(parameter.grad, expected[name]) < 1e-4, name
    for name, tensor in convert_timm_state_dict(theirs.state_dict()).items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, msg=name)


def test_other_shapes(generator, relative_error):
    """Channels, strides and epsilon that are not RepVGG's own come over; some of them are in no weight's shape."""
    model = timm.models.byobnet
    blocks = tuple(model.ByoBlockCfg(type="rep", d=2, c=width, s=stride) for width, stride in ((8, 1), (24, 2)))
    theirs = model.ByobNet(model.ByoModelCfg(blocks=blocks, stem_type="rep", stem_chs=8), num_classes=0, in_chans=1)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    ours = from_timm(theirs.eval())
    assert (ours.config.num_channels, ours.config.strides, ours.config.num_labels) == (1, [1, 2], 0)
    assert ours.config.batch_norm_eps == 1e-3
    pixel_values = torch.randn(2, 1, 20, 28, generator=generator)
    assert relative_error(ours(pixel_values).logits, theirs(pixel_values)) < 1e-5


def test_weights_are_copies():
    theirs = tiny_timm()
    ours = from_timm(theirs)
    before = copy.deepcopy(theirs.state_dict())
    for tensor in ours.state_dict().values():
        tensor.add_(1)
    assert all(torch.equal(before[name], tensor) for name, tensor in theirs.state_dict().items())


def test_it_can_be_saved_and_trained_on_with_oabn(tmp_path):
    from_timm(tiny_timm()).save_pretrained(tmp_path)
    loaded = RepVGGForImageClassification.from_pretrained(tmp_path, oabn=True)
    assert loaded.repvgg.encoder.stages[0].layers[1].conv.oabn_threshold == loaded.config.oabn_threshold


def test_repvgg_with_another_activation_is_refused():
    with pytest.raises(ValueError, match="The activation is SiLU: only models with ReLU are converted"):
        from_timm(tiny_timm(act_layer="silu"))


def test_state_dicts_of_other_models_are_refused():
    with pytest.raises(ValueError, match=r"Not a RepVGG of timm: unknown keys conv1\.0\.weight, .* \(\d+ of \d+\)"):
        convert_timm_state_dict(timm.create_model("resnet10t").state_dict())
    with pytest.raises(ValueError, match=r"unknown keys stages\.0\.0\.other\.weight \(1 of 1\)"):
        convert_timm_state_dict({"stages.0.0.other.weight": torch.zeros(1)})


class TestBackToTimm:
    @pytest.mark.parametrize("fused", [False, True], ids=["branches", "fused"])
    @pytest.mark.parametrize("oabn", [False, True], ids=["BN", "OABN"])
    @torch.no_grad()
    def test_the_same_logits(self, oabn, fused, randomize_batch_norms, keep_signal, relative_error, generator):
        config = RepVGGConfig.from_variant("a0", num_labels=7, oabn=oabn, oabn_threshold=0.5)
        ours = randomize_batch_norms(RepVGGForImageClassification(config), generator).eval()
        blocks = [block for block in ours.modules() if isinstance(block, ReparamConv2d)]
        assert len(blocks) == 22 and all((block.bounds()["1x1"] is not None) == oabn for block in blocks)
        ours, theirs = ours.double(), timm.create_model("repvgg_a0", num_classes=7).double().eval()
        if fused:
            ours, theirs = ours.reparameterize().double(), reparameterize_model(theirs)
        theirs.load_state_dict(to_timm_state_dict(ours))
        pixel_values = torch.randn(2, 3, 64, 64, generator=generator).double()
        expected = keep_signal(ours, RepVGGLayer)(pixel_values).logits
        assert relative_error(*expected) > 1e-2
        assert relative_error(keep_signal(theirs, RepVggBlock)(pixel_values), expected) < 1e-10

    @torch.no_grad()
    def test_squeeze_excitation_and_groups(self, generator, randomize_batch_norms):
        byobnet = timm.models.byobnet
        blocks = byobnet._rep_vgg_bcfg(d=(2, 2), wf=(0.25, 0.25), groups=2)
        gates = {"attn_layer": "se", "attn_kwargs": {"rd_ratio": 1 / 16, "rd_divisor": 1}}
        config = byobnet.ByoModelCfg(blocks=blocks, stem_type="rep", stem_chs=16, **gates)
        theirs = byobnet.ByobNet(config, num_classes=5)
        tensors = to_timm_state_dict(from_timm(randomize_batch_norms(theirs, generator)))
        expected = theirs.state_dict()
        assert tensors.keys() == expected.keys() and "stem.attn.fc1.weight" in tensors
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)

    def test_they_are_copies(self):
        ours = from_timm(tiny_timm())
        before = copy.deepcopy(ours.state_dict())
        for tensor in to_timm_state_dict(ours).values():
            tensor.add_(1)
        assert all(torch.equal(before[name], tensor) for name, tensor in ours.state_dict().items())

    def test_kernels_are_contiguous_after_inference(self):
        ours = from_timm(tiny_timm()).reparameterize().eval()
        with torch.no_grad():
            ours(torch.randn(1, 3, 32, 32))
        assert all(tensor.is_contiguous() for tensor in to_timm_state_dict(ours).values())

    def test_what_timm_has_not(self, tiny_config):
        make = RepVGGForImageClassification
        with pytest.raises(
            ValueError, match="The blocks have branches 3x3, 1x1, and timm's have 3x3, 1x1 and identity"
        ):
            to_timm_state_dict(make(tiny_config(block_branches=("3x3", "1x1"))))
        with pytest.raises(ValueError, match=r"branches 3x3, 1x3.*as it has repvgg\.\S+1x3\.conv\.weight"):
            to_timm_state_dict(make(tiny_config(block_branches=("3x3", "1x3", "1x1", "identity"))))
        assert to_timm_state_dict(make(tiny_config(block_branches=("3x3", "1x3"))).reparameterize())
        with pytest.raises(ValueError, match="hidden_act is 'silu'"):
            to_timm_state_dict(make(tiny_config(hidden_act="silu")))
        with pytest.raises(ValueError, match=r"The model is quantized.*dequantize\(\) it first"):
            to_timm_state_dict(make(tiny_config()).quantize(bits=4))
        with pytest.raises(ValueError, match="prepared for training with quantized weights"):
            to_timm_state_dict(make(tiny_config()).prepare_qat(bits=4))
        with pytest.raises(TypeError, match="RepVGGModel has no counterpart in timm"):
            to_timm_state_dict(make(tiny_config()).repvgg)

    def test_names_in_timm(self):
        for variant in [*SMALL, *LARGE]:
            assert timm_architecture(RepVGGConfig.from_variant(variant, num_labels=3)) == f"repvgg_{variant}"
        with pytest.raises(ValueError, match=r"strides is \[1, 2, 2, 2\], and timm's repvgg_a0 has \[2, 2, 2, 2\]"):
            timm_architecture(RepVGGConfig.from_variant("a0", strides=[1, 2, 2, 2]))
        with pytest.raises(ValueError, match=r"timm has no RepVGG with stem_hidden_size=8, hidden_sizes=\[8\]"):
            timm_architecture(RepVGGConfig(stem_hidden_size=8, hidden_sizes=[8], depths=[1], strides=[2]))
