"""Networks that are fused and then quantized: saved, and loaded in a process that has seen neither."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from tiny_models import load, logits, make_model
from torch import nn

import repvgg_hf
from repvgg_hf.runtime.cluster_layers import cluster_layers

HERE = Path(__file__).parent
FAMILIES = ["resnet", "mobilenetv2", "upernet", "rtdetr", "dfine", "timm"]


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> dict[str, dict]:
    """What each family gave when it was fused and quantized, and what a fresh process then loaded."""
    root = tmp_path_factory.mktemp("fused")
    found = {}
    for family in FAMILIES:
        folder = root / family
        make_model(family).save_pretrained(folder / "float")
        model = load(family, folder / "float")
        report = repvgg_hf.fuse(model, torch.randn(1, 3, 64, 64))
        model = repvgg_hf.quantize(model, "uniform", bits=8, granularity="per_channel")
        model.save_pretrained(folder / "whole")
        model.save_pretrained(folder / "sharded", max_shard_size="4KB")
        found[family] = {"folder": folder, "report": report, "logits": logits(model)}
    names = [f"{family}={root / family / form}" for family in FAMILIES for form in ("whole", "sharded")]
    command = [sys.executable, str(HERE / "fresh_models.py"), str(root / "fresh.pt"), *names]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert "newly initialized" not in result.stderr and "UNEXPECTED" not in result.stderr
    fresh = torch.load(root / "fresh.pt")
    for family, entry in found.items():
        entry["fresh"] = {form: fresh[str(root / family / form)] for form in ("whole", "sharded")}
    return found


@pytest.mark.parametrize("form", ["whole", "sharded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_transformers(families, family, form):
    found = families[family]
    assert len(found["report"].fused) > 5
    assert torch.equal(found["fresh"][form], found["logits"])
    first, again = found["folder"] / form, found["folder"] / f"{form}-again"
    assert {path.name for path in first.iterdir()} == {path.name for path in again.iterdir()}
    for path in first.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def make_plain(kind: str) -> nn.Module:
    """Return two blocks of timm, whose classes have a `reparameterize()` of their own, and a layer of PyTorch."""
    block = timm.models.byobnet.MobileOneBlock if kind == "byobnet" else timm.models.fastvit.MobileOneBlock
    if kind == "byobnet":
        first, second = block(3, 8, 3, stride=2), block(8, 8, 3)
    else:
        first, second = block(3, 8, 3, stride=2, num_conv_branches=2), block(8, 8, 3, use_se=True)
    return nn.Sequential(first, second, nn.Conv2d(8, 4, 1)).eval()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["byobnet", "fastvit"])
def test_blocks_with_a_reparameterize_of_their_own(kind, fused, tmp_path, relative_error):
    torch.manual_seed(0)
    model, x = make_plain(kind), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(x)
        if fused:
            assert len(repvgg_hf.fuse(model, x).fused) == 2
        layers = sum(isinstance(module, nn.Conv2d) for module in model.modules())
        repvgg_hf.quantize(model, bits=8)
        assert len(cluster_layers(model)) == layers >= 3
        assert relative_error(model(x), expected) < 0.05
        repvgg_hf.save_quantized(model, tmp_path / "first")
        loaded = repvgg_hf.load_quantized(make_plain(kind), tmp_path / "first")
        assert torch.equal(loaded(x), model(x))
    repvgg_hf.save_quantized(loaded, tmp_path / "again")
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_such_a_block_trains_quantized_and_teaches():
    torch.manual_seed(0)
    model, x = make_plain("byobnet"), torch.randn(2, 3, 16, 16)
    distillation = repvgg_hf.Distillation(nn.Sequential(*model, nn.Flatten()))
    repvgg_hf.prepare_qat(model, bits=4)
    distillation(model.train()(x).flatten(1), x).backward()
    with torch.no_grad():
        expected = model.eval()(x)
        torch.testing.assert_close(repvgg_hf.quantize(model)(x), expected, rtol=1e-5, atol=1e-6)
