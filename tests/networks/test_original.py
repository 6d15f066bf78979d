"""Checkpoints of the authors, against independent implementations of their networks: the same logits, named errors."""

import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

from repvgg_hf import RepVGGConfig, RepVGGForImageClassification, from_original, fuse

sys.path.insert(0, str(Path(__file__).parent))
from authors_networks import MobileOne, RepVGG, trained  # noqa: E402
from authors_networks import fuse as fuse_theirs  # noqa: E402

SIZES = {
    "plain": {"stem": 8, "widths": (8, 16), "depths": (2, 3)},
    "grouped": {"stem": 8, "widths": (16, 32, 16), "depths": (2, 2, 1), "groups": 4},
    "gated": {"stem": 16, "widths": (16, 32), "depths": (2, 1), "gated": True},
    "gray": {"stem": 4, "widths": (8,), "depths": (2,), "channels": 1},
}
A0 = {"stem": 48, "widths": (48, 96, 192, 1280), "depths": (2, 4, 14, 1), "classes": 1000}


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def theirs(images, generator):
    return trained(RepVGG(**SIZES["grouped"]), images, generator)


@pytest.fixture(scope="module")
def mobileone():
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    return trained(MobileOne("s0"), torch.randn(2, 3, 64, 64, generator=generator), generator)


def assert_same_logits(ours, theirs, images):
    with torch.no_grad():
        expected, logits = theirs(images), ours(images).logits
    assert (expected[0] - expected[1]).abs().max() > 1e-2 * expected.abs().max()  # the image matters
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


class TestRepVGG:
    @pytest.mark.parametrize("form", ["train", "deploy"])
    @pytest.mark.parametrize("sizes", SIZES)
    def test_logits(self, sizes, form, images, generator, tmp_path):
        images = images[:, : SIZES[sizes].get("channels", 3)]
        theirs = trained(RepVGG(**SIZES[sizes]), images, generator)
        expected = theirs(images).detach()
        if form == "deploy":
            fuse_theirs(theirs)
            torch.testing.assert_close(theirs(images), expected, rtol=1e-4, atol=1e-4)  # the test's own fusing
        torch.save(theirs.state_dict(), tmp_path / "file.pth")
        ours = from_original(tmp_path / "file.pth")
        assert type(ours) is RepVGGForImageClassification and not ours.training
        assert ours.config.deploy == (form == "deploy") and not ours.config.oabn
        assert_same_logits(ours, theirs, images)
        ours.save_pretrained(tmp_path / "saved")
        assert_same_logits(AutoModelForImageClassification.from_pretrained(tmp_path / "saved"), theirs, images)

    def test_fusing_gives_their_kernels(self, theirs, relative_error):
        ours = from_original(theirs.state_dict()).reparameterize().state_dict()
        expected = from_original(fuse_theirs(theirs).state_dict()).state_dict()
        assert ours.keys() == expected.keys()
        assert all(relative_error(ours[key], expected[key]) < 1e-5 for key in expected)

    def test_a_published_network(self, images, generator):
        theirs = trained(RepVGG(**A0), images, generator)
        ours = from_original(theirs.state_dict(), "RepVGG-A0")
        published = RepVGGConfig.from_variant("a0", num_labels=1000)
        for name in ("hidden_sizes", "depths", "strides"):
            assert list(getattr(ours.config, name)) == list(getattr(published, name))
        assert_same_logits(ours, theirs, images)

    def test_another_published_network_is_refused(self, images, generator):
        state_dict = RepVGG(**A0).state_dict()
        with pytest.raises(ValueError, match=r"not the weights of RepVGG-A1: stem_hidden_size is 48, and there 64"):
            from_original(state_dict, "RepVGG-A1")
        with pytest.raises(ValueError, match=r"Unknown RepVGG variant 'RepVGG-C7'"):
            from_original(state_dict, "RepVGG-C7")

    def test_strides(self, images, generator):
        sizes = SIZES["plain"] | {"first_stride": 1}
        theirs = trained(RepVGG(**sizes), images, generator)
        with pytest.raises(
            ValueError, match=r"stage1\.0\.rbr_identity\.weight is there, so that this layer has stride 1"
        ):
            from_original(theirs.state_dict())
        assert_same_logits(from_original(theirs.state_dict(), strides=[2, 1, 2]), theirs, images)
        with pytest.raises(ValueError, match="strides has 2 entries: expected 3"):
            from_original(theirs.state_dict(), strides=[2, 1])

    def test_image_processor_of_imagenet(self, images, generator, tmp_path):
        sizes = SIZES["plain"] | {"classes": 1000}
        from_original(RepVGG(**sizes).state_dict()).save_pretrained(tmp_path / "imagenet")
        processor = AutoImageProcessor.from_pretrained(tmp_path / "imagenet")
        assert processor.size["shortest_edge"] == 256 and processor.crop_size["height"] == 224
        assert list(processor.image_mean) == [0.485, 0.456, 0.406] and processor.resample == 2
        from_original(RepVGG(**SIZES["plain"]).state_dict()).save_pretrained(tmp_path / "other")
        assert not (tmp_path / "other" / "preprocessor_config.json").exists()

    def test_label_names(self, theirs):
        ours = from_original(theirs.state_dict(), label_names=["a", "b", "c", "d", "e"])
        assert ours.config.id2label[4] == "e" and ours.config.label2id["b"] == 1
        with pytest.raises(ValueError, match=r"label_names has 2 names \(2 different ones\), and the classifier 5"):
            from_original(theirs.state_dict(), label_names=["a", "b"])
        with pytest.raises(ValueError, match=r"label_names has 5 names \(1 different ones\)"):
            from_original(theirs.state_dict(), label_names=["a"] * 5)


class TestMobileOne:
    @pytest.mark.parametrize("form", ["train", "deploy"])
    def test_logits(self, mobileone, form, images, tmp_path):
        theirs = mobileone
        expected = theirs(images).detach()
        if form == "deploy":
            theirs = _fused_copy(theirs)
            torch.testing.assert_close(theirs(images), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
        ours = from_original(theirs.state_dict(), "mobileone_s0")
        assert ours.config.architecture == "mobileone_s0" and not ours.training
        assert_same_logits(ours, theirs, images)
        ours.save_pretrained(tmp_path)
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
        assert_same_logits(loaded.eval(), theirs, images)

    def test_fusing_a_fused_one_gives_its_kernels_back(self, mobileone, images, relative_error):
        theirs = _fused_copy(mobileone)
        ours = from_original(theirs.state_dict())
        fuse(ours, images)
        kernels = [m.weight for m in ours.modules() if isinstance(m, nn.Conv2d) and m.weight.dim() == 4]
        expected = [m.weight for m in theirs.modules() if isinstance(m, nn.Conv2d)]
        assert len(kernels) == len(expected)
        for ours_kernel, their_kernel in zip(kernels, expected):
            assert relative_error(ours_kernel, their_kernel) < 1e-6

    @pytest.mark.parametrize("variant", [pytest.param(v, marks=pytest.mark.slow) for v in ("s1", "s2", "s3")] + ["s4"])
    def test_every_variant_is_recognized(self, variant, images, generator):
        theirs = trained(MobileOne(variant, classes=7), images, generator)
        ours = from_original(theirs.state_dict(), label_names=list("abcdefg"))
        assert ours.config.architecture == f"mobileone_{variant}" and ours.config.id2label[6] == "g"
        # in float64: in float32 the order in which branches are added shows after 44 gated blocks, by 5e-5
        assert_same_logits(ours.double(), theirs.double(), images.double())

    def test_bad_files(self, mobileone):
        state_dict = mobileone.state_dict()
        with pytest.raises(ValueError, match=r"not the weights of mobileone_s1\. Beside mobileone_s1: .*stage0"):
            from_original(state_dict, "mobileone-s1")
        with pytest.raises(ValueError, match=r"unknown MobileOne 'mobileone_s9': choose one of mobileone_s0"):
            from_original(state_dict, "mobileone_s9")
        without = {k: v for k, v in state_dict.items() if k != "stage2.3.rbr_conv.1.conv.weight"}
        with pytest.raises(ValueError, match=r"Beside mobileone_s0: missing: stage2\.3\.rbr_conv\.1\.conv\.weight\."):
            from_original(without)
        with pytest.raises(ValueError, match=r"unknown names stage1\.0\.extra\.weight"):
            from_original(state_dict | {"stage1.0.extra.weight": torch.zeros(1)})
        with pytest.raises(ValueError, match=r"linear\.weight \[classes, channels\].* is missing"):
            from_original({k: v for k, v in state_dict.items() if not k.startswith("linear")})
        with pytest.raises(ValueError, match="strides is an option for RepVGG"):
            from_original(state_dict, strides=[2, 2, 2, 2, 2])

    def test_image_processor_of_imagenet(self, mobileone, tmp_path):
        from_original(MobileOne("s0", classes=1000).state_dict()).save_pretrained(tmp_path)
        config = AutoModelForImageClassification.from_pretrained(tmp_path).config
        assert config.id2label[0].startswith("tench")
        assert AutoImageProcessor.from_pretrained(tmp_path).data_config["crop_pct"] == 0.875
        assert not hasattr(from_original(mobileone.state_dict()).config, "pretrained_cfg")


def _fused_copy(model: MobileOne) -> MobileOne:
    copied = MobileOne("s0")
    copied.load_state_dict(model.state_dict())
    return fuse_theirs(copied)


def prefixed(state_dict, *prefixes):
    return {"".join(prefixes) + key: tensor for key, tensor in state_dict.items()}


WRAPPED = {
    "bare": lambda s: s,
    "DDP": lambda s: prefixed(s, "module."),
    "DDP of a compiled one": lambda s: {"state_dict": prefixed(s, "module.", "_orig_mod.")},
    "training loop": lambda s: {"epoch": 3, "arch": "a0", "model": OrderedDict(s), "optimizer": {"state": {}}},
    "EMA": lambda s: {"state_dict": zeros(s), "state_dict_ema": prefixed(s, "module.")},
    "model EMA": lambda s: {"model_ema": s, "model": zeros(s)},
    "nested EMA": lambda s: {"ema": {"state_dict": s, "decay": 0.9}, "model": zeros(s)},
    "averaged model": lambda s: {"ema": {"n_averaged": torch.tensor(3)} | prefixed(s, "module.")},
    "no counters": lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
}


def zeros(state_dict):
    return {key: torch.zeros_like(tensor) for key, tensor in state_dict.items()}


class TestFiles:
    @pytest.mark.parametrize("wrapping", WRAPPED)
    def test_what_training_loops_write(self, wrapping, theirs, images, tmp_path):
        torch.save(WRAPPED[wrapping](theirs.state_dict()), tmp_path / "file.pt")
        assert_same_logits(from_original(tmp_path / "file.pt"), theirs, images)

    def test_the_old_format_of_torch(self, theirs, images, tmp_path):
        torch.save(theirs.state_dict(), tmp_path / "file.pth", _use_new_zipfile_serialization=False)
        assert_same_logits(from_original(tmp_path / "file.pth"), theirs, images)

    def test_safetensors(self, theirs, images, tmp_path):
        save_file(theirs.state_dict(), tmp_path / "file.safetensors")
        assert_same_logits(from_original(str(tmp_path / "file.safetensors")), theirs, images)

    def test_an_entry_by_name(self, theirs, images, caplog):
        content = {"state_dict": theirs.state_dict(), "state_dict_ema": zeros(theirs.state_dict())}
        assert from_original(content).classifier.weight.abs().max() == 0
        assert "has weights in state_dict_ema, state_dict: state_dict_ema is taken" in caplog.text
        assert_same_logits(from_original(content, entry="state_dict"), theirs, images)
        with pytest.raises(ValueError, match=r"no entry 'net': it has state_dict \(dict\), state_dict_ema \(dict\)"):
            from_original({name: dict(s) for name, s in content.items()}, entry="net")

    def test_code_is_not_run(self, theirs, tmp_path):
        path = tmp_path / "file.pth"
        torch.save({"state_dict": theirs.state_dict(), "args": Trap(tmp_path / "ran")}, path)
        with pytest.raises(ValueError, match=r"file\.pth holds more than weights: .*Trap.*torch\.save\(\{'state_dict'"):
            from_original(path)
        torch.save(theirs, path)  # a whole model
        with pytest.raises(ValueError, match=r"holds more than weights: .*authors_networks\.RepVGG"):
            from_original(path)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("name", ["file.pth", "file.safetensors"])
    @pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
    def test_truncated(self, name, share, theirs, tmp_path):
        path = tmp_path / name
        (save_file if name.endswith("safetensors") else torch.save)(theirs.state_dict(), path)
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match=rf"{name} \([\d,]+ bytes\) can't be read, it is cut off, damaged"):
            from_original(path)

    def test_other_files(self, tmp_path):
        path = tmp_path / "file.pth"
        with pytest.raises(FileNotFoundError, match=r"no checkpoint file .*file\.pth: give the path"):
            from_original(path)
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
        with pytest.raises(ValueError, match="is a pointer of Git LFS"):
            from_original(path)
        path.write_text("<!DOCTYPE html><html></html>")
        with pytest.raises(ValueError, match="is a web page"):
            from_original(path)
        torch.save({"epoch": 3, "optimizer": {"state": {}}}, path)
        with pytest.raises(ValueError, match=r"has no weights: expected .*it has epoch \(int\), optimizer \(dict\)"):
            from_original(path)
        torch.save(torch.zeros(3), path)
        with pytest.raises(ValueError, match="has no weights: .*it has a Tensor"):
            from_original(path)

    def test_tensors_that_do_not_fit(self, theirs, tmp_path):
        state_dict = theirs.state_dict()
        without = {k: v for k, v in state_dict.items() if k != "stage2.1.rbr_1x1.bn.bias"}
        with pytest.raises(ValueError, match=r"depths \[2, 2, 1\].*missing: stage2\.1\.rbr_1x1\.bn\.bias\. Convert"):
            from_original(without)
        with pytest.raises(ValueError, match=r"unknown names stage1\.0\.rbr_avg\.weight"):
            from_original(state_dict | {"stage1.0.rbr_avg.weight": torch.zeros(3)})
        kernel = "stage1.1.rbr_dense.conv.weight"
        with pytest.raises(ValueError, match=r"stage1\.1\.rbr_dense\.conv\.weight is missing"):
            from_original({k: v for k, v in state_dict.items() if k != kernel})
        with pytest.raises(ValueError, match=r"rbr_dense\.conv\.weight is \[16, 16, 5, 5\]: expected \[out,"):
            from_original(state_dict | {kernel: torch.zeros(16, 16, 5, 5)})
        with pytest.raises(
            ValueError, match=r"stage1\.1\.rbr_1x1\.conv\.weight is \[16, 16, 1, 1\] instead of \[16, 4, 1"
        ):
            from_original(state_dict | {"stage1.1.rbr_1x1.conv.weight": torch.zeros(16, 16, 1, 1)})
        with pytest.raises(ValueError, match=r"stage0\.rbr_1x1\.bn\.bias is torch\.int64 instead of floating point"):
            from_original(state_dict | {"stage0.rbr_1x1.bn.bias": torch.zeros(8, dtype=torch.int64)})
        mixed = fuse_theirs(RepVGG(**SIZES["grouped"])).state_dict()
        mixed = {
            k: v for k, v in (mixed | state_dict).items() if not k.startswith(("stage1.0.rbr_d", "stage1.0.rbr_1"))
        }
        with pytest.raises(
            ValueError, match=r"stage1\.0\.rbr_dense\.conv\.weight is missing: .*all layers are|missing"
        ):
            from_original(mixed)

    def test_other_networks(self):
        with pytest.raises(
            ValueError, match=r"no layers of RepVGG .*: it has conv1\.weight\. Weights under timm's names"
        ):
            from_original({"conv1.weight": torch.zeros(3, 3, 3, 3)})
        plus = {"stage1.blocks.0.rbr_dense.conv.weight": torch.zeros(1)}
        with pytest.raises(ValueError, match="is a RepVGGplus"):
            from_original(plus)


class Trap:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (Trap._run, (self.path,))

    @staticmethod
    def _run(path):
        Path(path).touch()
        return 0
