"""The study of other re-parameterizable networks, and its networks."""

import copy
import json

import pytest
import torch
from torch import nn

import repvgg_hf
from repvgg_hf.recipes.studies import generalization
from repvgg_hf.recipes.studies.branch_networks import BLOCKS, build_network


@pytest.mark.parametrize("name", BLOCKS)
def test_its_networks_fuse_into_plain_convolutions(name):
    torch.manual_seed(0)
    model = build_network(BLOCKS[name], 4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.bias.data.normal_()
    images = torch.randn(2, 3, 32, 32)
    expected = model.eval()(images)
    fused = copy.deepcopy(model)
    repvgg_hf.fuse(fused, images)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert (fused(images) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("name", "bounds"), [("ACB", True), ("DBB", True), ("QARepVGG", False), ("RepViT", False)])
def test_oabn_is_tried_where_there_is_something_to_bound(name, bounds):
    assert generalization.has_bounds(name, torch.randn(1, 3, 32, 32)) is bounds


def test_it_trains_each_network_once(tmp_path, run):
    options = (
        "studies.generalization", "--dataset_name", "digits", "--networks", "ACB", "QARepVGG", "--num_train_epochs",
        "1", "--max_train_samples", "16", "--max_eval_samples", "8", "--image_size", "16", "--bf16", "False",
        "--per_device_train_batch_size", "8", "--output_dir", tmp_path, "--output_json", tmp_path / "all.json",
    )  # fmt: skip
    run(*options)
    files = sorted(path.name for path in tmp_path.glob("*-0.json"))
    assert files == ["acb-bn-0.json", "acb-oabn-0.json", "qarepvgg-bn-0.json"]
    table = (tmp_path / "all.md").read_text()
    changed = json.loads((tmp_path / "acb-bn-0.json").read_text())
    for row in json.loads((tmp_path / "all.json").read_text())["networks"]:
        assert all(f"{top1:.2f}" in table for top1 in row["top1"].values())
        assert ("bounded_branches" in row) == (row["norm"] == "OABN")
        assert len(row["top1"]) == 7 and row["kernels_fused"]
    changed["top1"]["float"] = 12.34
    (tmp_path / "acb-bn-0.json").write_text(json.dumps(changed))
    run(*options)
    assert "12.34" in (tmp_path / "all.md").read_text()
    printed = run(*options, "--learning_rate", "0.2", expect=1)
    assert "acb-bn-0.json has figures of learning_rate=0.1, and learning_rate=0.2 is asked for: give the" in printed


def test_a_name_that_it_does_not_know_is_an_error():
    with pytest.raises(ValueError, match="'RepVG'.*RepVGG, MobileOne"):
        generalization.check_networks(["RepVG"])


def test_committed_tables_are_made_from_the_committed_json(recipes):
    figures = recipes / "studies" / "results" / "generalization.json"
    record = json.loads(figures.read_text())
    table = generalization.markdown(record["networks"], record["seed"])
    assert figures.with_suffix(".md").read_text() == table
    assert f"<!-- generalization -->\n{table}<!-- /generalization -->" in (figures.parent / "README.md").read_text()
