"""Quantizing, saving and loading any `nn.Module`: convolutions of all kinds, layers with several names, bad input."""

import copy
import json
import logging

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations, prune

import repvgg_hf
from repvgg_hf import ClusterConv1d, ClusterConv2d, ReparamConv2d
from repvgg_hf.runtime.cluster_layers import cluster_layers
from repvgg_hf.runtime.fused_structure import describe_convolution, rebuild_fused

CONVOLUTIONS = {
    "zeros": nn.Conv2d(8, 8, 3, padding=1),
    "no bias": nn.Conv2d(8, 8, 3, padding=1, bias=False),
    "grouped": nn.Conv2d(8, 8, 3, groups=4),
    "depthwise": nn.Conv2d(8, 16, 5, groups=8, padding=2),
    "dilated, stride 2": nn.Conv2d(8, 8, 3, 2, padding=2, dilation=2),
    "same": nn.Conv2d(8, 8, (4, 3), padding="same", dilation=(1, 2)),
    "valid": nn.Conv2d(8, 8, 3, padding="valid"),
    "reflect": nn.Conv2d(8, 8, (3, 5), 2, padding=(1, 2), padding_mode="reflect"),
    "replicate, same": nn.Conv2d(8, 8, (4, 3), padding="same", padding_mode="replicate", groups=2),
    "circular": nn.Conv2d(8, 8, 3, padding=(1, 2), padding_mode="circular", dilation=2),
    "1d": nn.Conv1d(8, 8, 3, 2, padding=1, groups=2),
    "1d, circular": nn.Conv1d(8, 8, 4, padding="same", padding_mode="circular", dilation=2),
}


def image(layer) -> torch.Tensor:
    shape = (2, 8, 11) if isinstance(layer, nn.Conv1d) else (2, 8, 11, 9)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def padded(layer, x: torch.Tensor) -> torch.Tensor:
    """`x` with what the definition of its padding puts around it: each index of the result looked up in `x`."""
    sizes = [layer.dilation[i] * (layer.kernel_size[i] - 1) for i in range(len(layer.kernel_size))]
    for axis, total in enumerate(sizes, start=2):
        width = layer.padding[axis - 2] if not isinstance(layer.padding, str) else None
        before = total // 2 if layer.padding == "same" else width or 0
        after = total - before if layer.padding == "same" else width or 0
        n = x.shape[axis]
        index = torch.arange(-before, n + after)
        kept = {
            "zeros": index.clamp(0, n - 1), "replicate": index.clamp(0, n - 1), "circular": index % n,
            "reflect": (n - 1) - ((n - 1) - index.abs()).abs(),
        }[layer.padding_mode]  # fmt: skip
        x = x.index_select(axis, kept)
        if layer.padding_mode == "zeros":
            inside = ((index >= 0) & (index < n)).to(x.dtype)
            x = x * inside.view([-1 if d == axis else 1 for d in range(x.dim())])
    return x


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_quantized_convolution_is_the_float_one_with_its_weight(name, relative_error):
    model = nn.Sequential(copy.deepcopy(CONVOLUTIONS[name]))
    x = image(model[0])
    repvgg_hf.quantize(model, bits=4)
    layer, like = model[0], CONVOLUTIONS[name]
    assert type(layer) is (ClusterConv1d if x.dim() == 3 else ClusterConv2d)
    convolve = F.conv1d if x.dim() == 3 else F.conv2d
    expected = convolve(padded(like, x), layer.weight, like.bias, like.stride, 0, like.dilation, like.groups)
    assert relative_error(layer(input=x), expected) < 1e-6
    for attribute in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    ):
        assert getattr(layer, attribute) == getattr(like, attribute), attribute
    repvgg_hf.dequantize(model)
    assert repr(model[0]) == repr(like)
    assert relative_error(model(x), expected) < 1e-6


class Tangled(nn.Module):
    """A convolution under two names, tied weights and biases, branches, and layers that are not quantized."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(8, 16, 3, padding=1, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(16)
        self.block = ReparamConv2d(16, 16, oabn_threshold=6.0)
        self.twice = nn.Conv2d(16, 16, 3, padding="same", groups=4)
        self.again = nn.ModuleList([self.twice])
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.one = nn.Conv1d(8, 8, 3, padding=1)
        self.tied = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.tied[1].weight, self.tied[2].bias = self.tied[0].weight, self.tied[0].bias
        self.computed = parametrizations.weight_norm(nn.Linear(8, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.norm(self.first(x))
        x = self.again[0](self.twice(self.block(x).relu()).relu())
        x = self.one(self.up(x).flatten(2)).transpose(1, 2)
        for layer in self.tied:
            x = layer(x).relu()
        x = self.computed(x)
        return self.attention(x, x, x)[0]


@pytest.fixture
def tangled() -> Tangled:
    return Tangled().eval()


class TestTangled:
    def test_layers_and_names(self, tangled, caplog):
        with caplog.at_level(logging.WARNING, logger="repvgg_hf"):
            repvgg_hf.quantize(tangled, bits=4)
        assert set(cluster_layers(tangled)) == {
            "first", "block", "twice", "one", "tied.0", "tied.1", "tied.2"
        }  # fmt: skip
        assert tangled.again[0] is tangled.twice
        assert tangled.tied[0].weight_codes is not tangled.tied[1].weight_codes
        assert torch.equal(tangled.tied[0].weight, tangled.tied[1].weight)
        assert tangled.tied[0].bias is not tangled.tied[2].bias and torch.equal(
            tangled.tied[0].bias, tangled.tied[2].bias
        )
        message = next(record.getMessage() for record in caplog.records if "stay float" in record.getMessage())
        for part in ("3 layers", "1 ConvTranspose2d (up)", "1 Linear with a computed weight (computed)", "(attention)"):
            assert part in message

    def test_saved_and_loaded(self, tangled, tmp_path):
        x = image(tangled.first)
        repvgg_hf.quantize(tangled, bits=5, bits_overrides={"tied": 3})
        repvgg_hf.save_quantized(tangled, tmp_path / "first")
        loaded = repvgg_hf.load_quantized(Tangled(), tmp_path / "first")
        assert torch.equal(loaded(x), tangled(x)) and not loaded.training and loaded.is_quantized
        assert loaded.again[0] is loaded.twice
        repvgg_hf.save_quantized(loaded, tmp_path / "again")
        assert sorted(path.name for path in (tmp_path / "first").iterdir()) == [
            "model.safetensors", "quantization_config.json"
        ]  # fmt: skip
        for path in (tmp_path / "first").iterdir():
            assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
        assert not any("again" in name for name in load_file(tmp_path / "first" / "model.safetensors"))

    @pytest.mark.parametrize("decode", ["at_load", "on_the_fly"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_forms(self, tangled, tmp_path, decode, dtype):
        x = image(tangled.first).to(dtype)
        repvgg_hf.quantize(tangled, decode=decode, codebook_dtype="int8").to(dtype)
        repvgg_hf.save_quantized(tangled, tmp_path)
        loaded = repvgg_hf.load_quantized(Tangled().to(dtype), tmp_path)
        assert torch.equal(loaded(x), tangled(x))
        assert loaded.first.on_the_fly == (decode == "on_the_fly")

    def test_when_to_decode_is_chosen_on_loading(self, tangled, tmp_path):
        x = image(tangled.first)
        repvgg_hf.save_quantized(repvgg_hf.quantize(tangled, bits=3), tmp_path / "first")
        loaded = repvgg_hf.load_quantized(Tangled(), tmp_path / "first", decode="on_the_fly")
        assert loaded.first.on_the_fly and torch.equal(loaded(x), tangled(x))
        repvgg_hf.save_quantized(loaded, tmp_path / "again")  # as it was
        for path in (tmp_path / "first").iterdir():
            assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
        with pytest.raises(ValueError, match="decode must be one of at_load, on_the_fly, got 'lazy'"):
            repvgg_hf.load_quantized(Tangled(), tmp_path / "first", decode="lazy")

    def test_either_name_chooses(self, tangled):
        repvgg_hf.quantize(tangled, bits=4, bits_overrides={"again.0": 7}, modules_to_not_convert=["tied.1"])
        assert tangled.twice.bits == 7 and type(tangled.tied[1]) is nn.Linear
        other = repvgg_hf.quantize(Tangled(), modules_to_not_convert=["again"])
        assert type(other.twice) is nn.Conv2d and other.again[0] is other.twice

    def test_dequantized(self, tangled, relative_error):
        x = image(tangled.first)
        expected = repvgg_hf.quantize(tangled, bits=4)(x)
        repvgg_hf.dequantize(tangled)
        assert relative_error(tangled(x), expected) < 1e-5
        assert not tangled.is_quantized and tangled.again[0] is tangled.twice
        with pytest.raises(ValueError, match="is float already"):
            repvgg_hf.dequantize(tangled)


class TestFused:
    """A network that was fused before it was quantized; its structure is in the configuration."""

    def make(self) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()

    def fused(self) -> nn.Module:
        model = self.make()
        fused = nn.utils.fuse_conv_bn_eval(model[0], model[1])
        rebuild_fused(model, [describe_convolution("0", fused), {"name": "1", "kind": "identity"}])
        model[0].load_state_dict(fused.state_dict())
        return model

    def test_the_structure_is_rebuilt(self, tmp_path):
        model = repvgg_hf.quantize(self.fused(), bits=4)
        repvgg_hf.save_quantized(model, tmp_path)
        loaded = repvgg_hf.load_quantized(self.make(), tmp_path)
        x = torch.randn(1, 3, 8, 8)
        assert torch.equal(loaded(x), model(x))
        assert type(loaded[1]) is nn.Identity and loaded.fused_structure == model.fused_structure

    def test_a_transformers_model(self, tmp_path):
        from tiny_models import load, logits, make_model

        model = make_model("resnet")
        place = "resnet.embedder.embedder"
        layer = model.get_submodule(place)
        fused = nn.utils.fuse_conv_bn_eval(layer.convolution, layer.normalization)
        entries = [
            describe_convolution(f"{place}.convolution", fused), {"name": f"{place}.normalization", "kind": "identity"}
        ]  # fmt: skip
        rebuild_fused(model, entries)
        layer.convolution.load_state_dict(fused.state_dict())
        repvgg_hf.quantize(model, bits=4).save_pretrained(tmp_path / "fused")
        loaded = load("resnet", tmp_path / "fused")
        assert torch.equal(logits(loaded), logits(model))
        loaded.save_pretrained(tmp_path / "again")
        for path in (tmp_path / "fused").iterdir():
            assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()

    def test_an_entry_of_another_network(self, tmp_path):
        repvgg_hf.save_quantized(repvgg_hf.quantize(self.fused(), bits=4), tmp_path)
        with pytest.raises(ValueError, match=r"fused_structure\[\d\] .*'0'|weights? "):
            repvgg_hf.load_quantized(Tangled(), tmp_path)


def snapshot(model: nn.Module) -> tuple:
    kinds = [(name, type(module)) for name, module in model.named_modules()]
    return kinds, {name: id(tensor) for name, tensor in model.named_parameters()}, set(vars(model))


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(2 * x)


def with_padding_mode(mode: str) -> nn.Module:
    layer = nn.Conv2d(3, 4, 3)
    layer.padding_mode = mode
    return layer


def with_integers() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return layer


def with_config(config) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    model.quantization_config = config
    return model


BAD = {
    "lazy": (lambda: nn.Sequential(nn.LazyConv2d(4, 3)), "'0' is a LazyConv2d that has no weights yet"),
    "meta": (lambda: nn.Sequential(nn.Linear(4, 4, device="meta")), "0.weight is offloaded"),
    "integer weights": (
        lambda: nn.Sequential(with_integers()),
        "The weight of '0' is a Parameter of torch.int8, no float tensor",
    ),
    "another library's configuration": (
        lambda: with_config({"quant_method": "gptq"}), "is quantized with 'gptq', by another library"
    ),
    "torch's quantized layers": (
        lambda: nn.Sequential(nn.Linear(4, 4), torch.ao.nn.quantized.Linear(4, 4)), "quantized by another library"
    ),
    "quantized": (lambda: repvgg_hf.quantize(nn.Sequential(nn.Linear(8, 8))), "quantized already"),
    "quantized inside": (
        lambda: nn.Sequential(repvgg_hf.quantize(nn.Sequential(nn.Linear(8, 8))), nn.Linear(8, 8)), "quantized already"
    ),
    "padding": (lambda: nn.Sequential(with_padding_mode("mirror")), "'0' has padding_mode='mirror'"),
    "nothing to quantize": (lambda: nn.Sequential(OwnForward(4, 4)), "has no plain nn.Linear, nn.Conv1d or nn.Conv2d"),
    "pruned": (
        lambda: nn.Sequential(prune.l1_unstructured(nn.Linear(4, 4), "weight", 3)), "0.weight is pruned"
    ),
}  # fmt: skip


@pytest.mark.parametrize("function", [repvgg_hf.quantize, repvgg_hf.prepare_qat], ids=["quantize", "prepare_qat"])
@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_bad_models_are_refused_and_unchanged(make, message, function):
    model = make()
    before = snapshot(model)
    if function is repvgg_hf.prepare_qat and message == "quantized already":
        message = "packed codes, which don't train|quantized already"
    with pytest.raises(ValueError, match=message):
        function(model, bits=2)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bits": 9}, ValueError, "bits must be an integer from 1 to 8"),
        ({"bit": 4}, TypeError, "bit"),
        ({"modules_to_not_convert": ["head"]}, ValueError, "names 'head', which is no convolution or linear layer"),
        ({"granularity": "per_group", "group_size": 3}, ValueError, "does not divide"),
        ({"activation_bits": 8}, ValueError, "needs calibration data"),
    ],
)
def test_bad_options_leave_the_model_unchanged(tangled, options, error, message):
    before = snapshot(tangled)
    with pytest.raises(error, match=message):
        repvgg_hf.quantize(tangled, **options)
    assert snapshot(tangled) == before


class TestBadFiles:
    @pytest.fixture
    def folder(self, tangled, tmp_path):
        repvgg_hf.save_quantized(repvgg_hf.quantize(tangled, bits=4), tmp_path)
        return tmp_path

    def refused(self, folder, message, model=None):
        model = Tangled() if model is None else model
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            repvgg_hf.load_quantized(model, folder)
        assert snapshot(model) == before

    def edit(self, folder, **changes):
        path = folder / "quantization_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def change(self, folder, change):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    def test_a_flipped_bit(self, folder):
        self.change(folder, lambda tensors: tensors["first.weight_codes"].bitwise_xor_(1))
        self.refused(folder, "don't fit the checksum in quantization_config.json")

    def test_a_damaged_header(self, folder):
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[:-1])
        self.refused(folder, "truncated or damaged")

    @pytest.mark.parametrize("name", ["model.safetensors", "quantization_config.json"])
    def test_a_missing_file(self, folder, name):
        (folder / name).unlink()
        self.refused(folder, f"has no {name}: it is no folder that repvgg_hf.save_quantized has written")

    @pytest.mark.parametrize("name", ["first.weight_codes", "norm.running_mean", "up.weight"])
    def test_a_missing_tensor(self, folder, name):
        self.change(folder, lambda tensors: tensors.pop(name))
        self.refused(folder, name)

    def test_a_tensor_too_many(self, folder):
        self.change(folder, lambda tensors: tensors.update(other=torch.zeros(2)))
        self.refused(folder, r"other is \[2\] in .* and missing in the model")

    def test_another_shape(self, folder):
        self.change(folder, lambda tensors: tensors.update({"up.weight": torch.zeros(1, 2)}))
        self.refused(folder, r"up.weight is \[1, 2\] in .* and \[16, 8, 2, 2\] in the model")

    def test_codebooks_that_are_not_ascending(self, folder):
        self.change(folder, lambda tensors: tensors["first.weight_codebook"].neg_())
        self.edit(folder, checksum=None)
        self.refused(folder, "first.weight_codebook is not ascending")

    def test_other_fields(self, folder):
        self.edit(folder, bits=3)
        self.refused(folder, "quantization_config asks for")
        self.edit(folder, bits=4, format_version=2)
        self.refused(folder, "format_version 2")

    def test_another_network(self, folder):
        self.refused(folder, "is missing in|is not in|in the model", nn.Sequential(nn.Conv2d(3, 4, 3)))

    def test_a_quantized_model(self, folder, tangled):
        self.refused(folder, "is quantized already", tangled)

    def test_what_is_not_plain(self, tmp_path):
        model = repvgg_hf.RepVGGModel(repvgg_hf.RepVGGConfig(hidden_sizes=[8], depths=[1], strides=[2]))
        with pytest.raises(ValueError, match="save it with model.save_pretrained"):
            repvgg_hf.save_quantized(model, tmp_path)
        with pytest.raises(ValueError, match="load the folder with its from_pretrained"):
            repvgg_hf.load_quantized(model, tmp_path)
        with pytest.raises(ValueError, match="is not quantized: call repvgg_hf.quantize"):
            repvgg_hf.save_quantized(nn.Linear(2, 2), tmp_path)

    def test_a_failed_save_leaves_the_old_one(self, folder, tangled, monkeypatch):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        monkeypatch.setattr("repvgg_hf.compression.saved_modules.json.dumps", lambda *args, **kwargs: 1 / 0)
        with torch.no_grad():
            tangled.norm.bias += 1
        with pytest.raises(ZeroDivisionError):
            repvgg_hf.save_quantized(tangled, folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
