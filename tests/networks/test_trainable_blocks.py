"""Blocks of other networks that are fused with their branches kept, to be trained on."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import repvgg_hf
from repvgg_hf.compression.qat.layers import qat_layers

timm = pytest.importorskip("timm")
sys.path.insert(0, str(Path(__file__).parent))
from reparam_blocks import QARepVGG, acb, network, randomize  # noqa: E402


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, repvgg_hf.ReparamConv2d)}


def relative_error(outputs: torch.Tensor, expected: torch.Tensor) -> float:
    return ((outputs - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(("name", "count"), [("repvgg_a0", 22), ("mobileone_s0", 40), ("ghostnetv3_050", 68)])
def test_branches_of_timm_are_kept_and_trained_and_fused(name, count):
    torch.manual_seed(0)
    model = randomize(timm.create_model(name, num_classes=4))
    images = torch.randn(2, 3, 64, 64)
    expected = model(images)
    report = repvgg_hf.fuse(model, images, keep_branches=True)
    assert relative_error(model(images), expected) < 1e-5
    kept = blocks(model)
    assert len(kept) == sum(region.keeps_branches for region in report.fused) >= min(count, 22)
    assert "branches kept" in str(report)
    model.train()(images).square().mean().backward()
    assert all(parameter.grad is not None for block in kept.values() for parameter in block.parameters())
    model.eval()
    before = model(images)
    for block_name, block in kept.items():
        model.set_submodule(block_name, block.fuse())
    assert relative_error(model(images), before) < 1e-5


def test_training_goes_on_as_in_the_network_itself():
    torch.manual_seed(0)
    model = randomize(network(acb(8)))
    images = torch.randn(4, 3, 16, 16)
    kept = copy.deepcopy(model)
    # without its own norms outside of blocks, which are folded: nothing else may differ
    repvgg_hf.fuse(kept, images, keep_branches=True)
    assert len(blocks(kept)) == 1
    for trained in (model, kept):
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            trained.train()(images).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(kept.eval()(images), model.eval()(images), rtol=1e-3, atol=1e-4)


def test_qat_trains_the_fused_kernel_and_reloads(tmp_path):
    torch.manual_seed(0)
    model = randomize(network(acb(8)))
    fresh = copy.deepcopy(model)
    images = torch.randn(4, 3, 16, 16)
    repvgg_hf.fuse(model, images, keep_branches=True)
    (name,) = blocks(model)
    repvgg_hf.prepare_qat(model, bits=3)
    assert name in qat_layers(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(images).square().mean().backward()
        optimizer.step()
        repvgg_hf.update_codebooks(model)
    expected = model.eval()(images)
    repvgg_hf.quantize(model)
    assert relative_error(model(images), expected) < 1e-5
    repvgg_hf.save_quantized(model, tmp_path)
    loaded = repvgg_hf.load_quantized(fresh, tmp_path)
    assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize(
    "block",
    [
        QARepVGG(8),  # a norm after the sum
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=True), nn.BatchNorm2d(8)),  # a bias that a branch has not
        nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)),  # another padding
    ],
)
def test_what_is_no_sum_of_normalized_branches_is_one_convolution(block):
    torch.manual_seed(0)
    model = randomize(network(block))
    images = torch.randn(2, 3, 16, 16)
    expected = model(images)
    report = repvgg_hf.fuse(model, images, keep_branches=True)
    assert not blocks(model) and not any(region.keeps_branches for region in report.regions)
    assert relative_error(model(images), expected) < 1e-5


@pytest.mark.parametrize("branch", [0, 1], ids=["dense", "other"])
def test_a_norm_without_weight_and_bias_is_kept(branch):
    torch.manual_seed(0)
    block = acb(8)
    norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
    model = randomize(network(block))
    norms[branch].weight = norms[branch].bias = None
    images = torch.randn(2, 3, 16, 16)
    expected = model(images)
    repvgg_hf.fuse(model, images, keep_branches=True)
    (block,) = blocks(model).values()
    assert relative_error(model(images), expected) < 1e-5
    block.oabn_threshold = 1e6
    assert relative_error(model(images), expected) < 1e-5
    model.set_submodule(next(iter(blocks(model))), block.fuse())
    assert relative_error(model(images), expected) < 1e-5


def test_oabn_bounds_kept_branches():
    torch.manual_seed(0)
    model = randomize(network(acb(8)))
    images = torch.randn(2, 3, 16, 16)
    repvgg_hf.fuse(model, images, keep_branches=True)
    repvgg_hf.add_oabn(model, images, 2.0)
    (block,) = blocks(model).values()
    assert block.oabn_threshold == 2.0
