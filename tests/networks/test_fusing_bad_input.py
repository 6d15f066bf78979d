"""What can't be fused: a named error that leaves the model as it was, or a part that is left with a reason."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from repvgg_hf import RepVGGForImageClassification, fuse

sys.path.insert(0, str(Path(__file__).parent))
from reparam_blocks import acb, conv_norm, network, randomize  # noqa: E402

C = 8


def images(size: int = 16) -> torch.Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))


def expect_error(model: nn.Module, example, match: str, error=ValueError, **options):
    """Check that fusing fails with that message, and that every module and weight is where it was."""
    modules = list(model.named_modules())
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if type(tensor) is torch.Tensor}
    with pytest.raises(error, match=match):
        fuse(model, example, **options)
    assert [(name, id(module)) for name, module in model.named_modules()] == [(n, id(m)) for n, m in modules]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items() if name in weights)
    assert not hasattr(model, "fused_structure")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_empty_example():
    expect_error(network(acb(C), C), images()[:0], r"The example is empty \(tensors of \[0, 3, 16, 16\]\)")


class Decides(nn.Module):
    """Runs one branch or another, as its input says."""

    def __init__(self, how):
        super().__init__()
        self.how, self.layers = how, conv_norm(C, C, 3)

    def forward(self, x):
        return self.how(x) if self.how(x) is not None else self.layers(x)


@pytest.mark.parametrize(
    "how",
    [
        lambda x: x if x.mean() > 100 else None,
        lambda x: x * x.max().item(),
        lambda x: x * float(x.amax(dim=(1, 2, 3))),
        lambda x: x[:, : int(x.abs().sum()) % 3 + 1],
        lambda x: x * max(x.flatten().tolist()),
    ],
    ids=["if", "item", "float", "int", "tolist"],
)
def test_control_flow_that_depends_on_data(how):
    expect_error(network(Decides(how), C), images(), r"1 \(Decides\) has data-dependent control flow.*fuse\(model\.")


def test_control_flow_that_depends_on_the_shape_is_no_obstacle():
    model = network(Decides(lambda x: x if x.shape[-1] > 100 and x.dim() == 4 else None), C)
    assert len(fuse(model, images()).fused) == 1


def test_lazy_module():
    model = nn.Sequential(nn.LazyConv2d(C, 3), nn.LazyBatchNorm2d()).eval()
    with pytest.raises(
        ValueError, match=r"0\.weight is uninitialized, as its module is a lazy one: run the model once"
    ):
        fuse(model, images())


def test_meta_weights():
    with torch.device("meta"):
        model = nn.Sequential(conv_norm(3, C, 3)).eval()
    with pytest.raises(ValueError, match="0.0.weight is offloaded"):
        fuse(model, images())


def test_offloaded_weight():
    model = network(acb(C), C)
    model[3].to("meta")
    with pytest.raises(ValueError, match="3.weight is offloaded"):
        fuse(model, images())
    assert len(list(model[1].branches)) == 3


@pytest.mark.parametrize("part", ["", "1.branches.0.1"])
def test_training_mode(part):
    model = network(acb(C), C)
    model.get_submodule(part).train()
    named = f"{part} \\(BatchNorm2d\\)" if part else "The model \\(Sequential\\)"
    expect_error(model, images(), f"{named} is in training mode.*call model.eval\\(\\) first")


def test_training_mode_of_an_own_model(tiny_config):
    expect_error(RepVGGForImageClassification(tiny_config()).train(), images(32), "is in training mode")


def test_batch_norm_without_statistics_is_left():
    model = network(nn.Sequential(nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C, track_running_stats=False)), C)
    expected = model(images())
    report = fuse(model, images())
    (left,) = report.left
    assert left.name == "1.1" and "track_running_stats=False" in left.left and report.fused == []
    assert torch.equal(model(images()), expected)


@pytest.mark.parametrize("shape", [(1, 4, 16, 16), (3, 16), (1, 3, 16, 16, 2)])
def test_example_of_the_wrong_shape(shape):
    match = (
        rf"Sequential does not run on the example \(tensors of \[{', '.join(map(str, shape))}\]\).*in 0\.0 \(Conv2d\)"
    )
    expect_error(network(acb(C), C), torch.randn(shape), match)


def test_example_of_the_wrong_dtype():
    expect_error(network(acb(C), C), images().to(torch.int32), "does not run on the example.*0.0 .Conv2d")


@pytest.mark.parametrize("example", [None, 3, [torch.ones(1)], (), {}, "image", (1, 2)], ids=str)
def test_example_that_is_none(example):
    expect_error(network(acb(C), C), example, "example must be a tensor, a tuple", error=TypeError)


def test_example_with_an_unknown_name():
    expect_error(network(acb(C), C), {"pixels": images()}, "does not run on the example.*TypeError.*pixels")


@pytest.mark.parametrize("mode", ["mirror", None])
def test_unknown_padding_mode(mode):
    model = network(acb(C), C)
    model[3].padding_mode = mode
    expect_error(model, images(), f"3 has the unknown padding_mode {mode!r}.*zeros, reflect, replicate, circular")


@pytest.mark.parametrize("tolerance", [0, -1, float("nan"), "1e-5", None, True])
def test_tolerance(tolerance):
    expect_error(network(acb(C), C), images(), "tolerance must be a positive number", tolerance=tolerance)


def test_quantized_by_this_package(tiny_config):
    model = RepVGGForImageClassification(tiny_config()).eval().quantize("uniform", bits=4)
    expect_error(model, {"pixel_values": images(32)}, "quantized already.*take the float model")
    expect_error(nn.Sequential(model).eval(), images(32), "0.repvgg.*is quantized, or prepared for it")


def test_prepared_for_qat(tiny_config):
    model = RepVGGForImageClassification(tiny_config()).prepare_qat("uniform", bits=4).eval()
    expect_error(nn.Sequential(model).eval(), images(32), "is quantized, or prepared for it")
    expect_error(model, images(32), "is quantized, or prepared for it")


def test_quantized_by_another_library():
    from transformers import BitsAndBytesConfig, ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=5)
    model = ResNetForImageClassification(config).eval()
    model.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    expect_error(model, images(32), r"quantized already \(bitsandbytes\)")


def test_weights_that_are_no_float():
    class Int8Conv(nn.Conv2d):
        def __init__(self):
            super().__init__(C, C, 1)
            self.weight = nn.Parameter(torch.ones(C, C, 1, 1, dtype=torch.int8), requires_grad=False)

        def forward(self, x):
            return self._conv_forward(x, self.weight.float(), self.bias)

    expect_error(network(Int8Conv(), C), images(), r"1\.weight is a Tensor of torch\.int8, no plain float tensor")


def test_not_finite_weights_are_left():
    model = network(acb(C), C)
    with torch.no_grad():
        model[1].branches[0][0].weight[0, 0, 0, 0] = torch.nan
    report = fuse(model, images())
    assert report.left and all("inf in float64" in region.left for region in report.left if region.error)


def test_tolerance_decides_what_is_left():
    model = network(acb(C), C)
    expected = model(images())
    report = fuse(model, images(), tolerance=1e-30)
    assert report.fused == [] and "more than 1e-30" in report.left[0].left and report.left[0].error > 0
    assert torch.equal(model(images()), expected)


def test_random_numbers_and_tensors_from_nowhere_are_no_constants():
    class Noise(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = conv_norm(C, C, 1)

        def forward(self, x):
            gate = torch.from_numpy(x.detach().mean((2, 3), keepdim=True).sigmoid().cpu().clone().numpy())
            return self.layers(x) * gate

    class Random(Noise):
        def forward(self, x):
            return self.layers(x) + torch.rand(1, C, 1, 1)

    expect_error(network(Noise(), C), images(), "reads the values of a tensor")
    report = fuse(network(Random(), C), images())
    assert report.left == [] or "differ" in report.left[0].left


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (lambda norm: norm.weight.mean(), "reads 1.first.1.weight elsewhere as well, by mul() in 1"),
        (lambda norm: norm.weight.mean().item(), "reads 1.first.1.weight elsewhere as well, as a number"),
        (lambda norm: norm.eps, "the model fails, TypeError"),
    ],
    ids=["tensor", "number", "setting"],
)
def test_code_that_reads_replaced_modules(read, reason):
    """A forward that needs more of a module than its result: what only that module's absence breaks is left."""

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = conv_norm(C, C, 3), conv_norm(C, C, 3)

        def forward(self, x):
            return self.second(self.first(x).relu() * read(self.first[1]))

    model = network(Reads(), C)
    expected = model(images())
    report = fuse(model, images())
    assert [region.name for region in report.fused] == ["1.second"]
    assert any(reason in region.left for region in report.left)
    assert torch.allclose(model(images()), expected, atol=1e-5)


def test_model_whose_root_is_the_region():
    model = randomize(acb(3))
    model.act = nn.Identity()
    reference = copy.deepcopy(model)
    report = fuse(model, images())
    assert len(report.fused) == 1 and report.layers_after == 1
    assert torch.allclose(model(images()), reference(images()), atol=1e-5)
