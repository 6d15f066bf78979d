"""OABN in networks of other libraries: which branches are found, and that they stay within their bounds."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import repvgg_hf
from repvgg_hf.networks.branch_sums import BranchSum, NormedBranch

sys.path.insert(0, str(Path(__file__).parent))
from oabn_networks import Asymmetric, Decides, NormAfterSum, Residual, frozen, network, padded_by, widen  # noqa: E402

THRESHOLD = 2.0


def contribution(model: nn.Module, branch: NormedBranch) -> torch.Tensor:
    """What a branch adds to the fused kernel, in float64: the response to an impulse in every input channel."""
    norm = copy.deepcopy(model.get_submodule(branch.norm)).double().eval()
    norm.running_mean.zero_()
    norm.bias.data.zero_()
    if branch.convolution is None:
        return norm(torch.eye(norm.num_features, dtype=torch.float64)[:, :, None, None]).diagonal()[..., None]
    return norm(copy.deepcopy(model.get_submodule(branch.convolution)).weight.double().transpose(0, 1)).transpose(0, 1)


def assert_within_bounds(model: nn.Module, sums: list[BranchSum], threshold: float, reached: bool = True) -> None:
    """Check the bounds against kernels that batch norm itself has made; with `reached` some branch is at its bound."""
    shares = []
    for branches in sums:
        bound = threshold * sum(contribution(model, branch).var() for branch in branches.dense).sqrt()
        shares += [(contribution(model, branch).abs().max() / bound).item() for branch in branches.others]
    assert max(shares) < 1 + 1e-5
    assert not reached or max(shares) > 1 - 1e-5


def train(model: nn.Module, steps: int, example: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(example).square().mean().neg().backward()  # the weights of norms grow
        optimizer.step()


@pytest.fixture
def example():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0", "fastvit_t8", "repghostnet_050", "ghostnetv3_050"])
def test_branches_of_timm_stay_within_their_bounds(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4)
    widen(model)
    example = torch.randn(2, 3, 64, 64)
    report = repvgg_hf.add_oabn(model, example, THRESHOLD)
    model.train()(example)
    model.state_dict()  # the forward pass has moved the statistics
    assert_within_bounds(model, report.bounded, THRESHOLD)
    norms = {branch.norm for branches in report.bounded for branch in branches.others}
    assert len(norms) == sum(len(branches.others) for branches in report.bounded) > 10


def test_every_branch_of_timms_repvgg_is_found():
    model = timm.create_model("repvgg_a0", num_classes=4)
    report = repvgg_hf.add_oabn(model, torch.randn(1, 3, 64, 64))
    blocks = {name for name, module in model.named_modules() if type(module).__name__ == "RepVggBlock"}
    assert {branches.name for branches in report.bounded} == blocks
    for branches in report.bounded:
        identity = model.get_submodule(branches.name).identity is not None
        assert [branch.norm for branch in branches.dense] == [f"{branches.name}.conv_kxk.bn"]
        expected = [f"{branches.name}.conv_1x1.bn"] + [f"{branches.name}.identity"] * identity
        assert sorted(branch.norm for branch in branches.others) == sorted(expected)


@pytest.mark.parametrize(
    ("block", "dense", "others"),
    [
        (Asymmetric, ["2.square.norm"], ["2.row.norm", "2.column.norm"]),
        (Residual, ["2.block.norm"], ["2.identity"]),
    ],
)
def test_bounds_hold_while_training(block, dense, others, example):
    torch.manual_seed(0)
    model = network(block())
    widen(model)
    report = repvgg_hf.add_oabn(model, example, THRESHOLD)
    (branches,) = report.bounded
    assert [branch.norm for branch in branches.dense] == dense
    assert [branch.norm for branch in branches.others] == others
    train(model, 3, example)
    model.state_dict()
    assert_within_bounds(model, report.bounded, THRESHOLD)


def test_only_the_projection_differs_from_training_without(example):
    torch.manual_seed(0)
    plain = network(Asymmetric())
    bounded = copy.deepcopy(plain)
    repvgg_hf.add_oabn(bounded, example, threshold=1e6)
    for model in (plain, bounded):
        train(model, 3, example)
    assert plain.state_dict().keys() == bounded.state_dict().keys()
    for key, tensor in plain.state_dict().items():
        assert torch.equal(tensor, bounded.state_dict()[key]), key


def test_evaluation_and_the_training_mode_are_left_alone(example):
    model = network(Asymmetric())
    widen(model)
    model[2].row.eval()
    before = copy.deepcopy(model.state_dict())
    repvgg_hf.add_oabn(model, example, THRESHOLD)
    assert model.training and not model[2].row.training
    model.eval()(example)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.named_parameters())


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_bound_themselves(way, example):
    torch.manual_seed(0)
    model = network(Asymmetric())
    report = repvgg_hf.add_oabn(model, example, THRESHOLD)
    other = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    widen(other)
    other.train()(example)
    other.state_dict()
    assert_within_bounds(other, report.bounded, THRESHOLD)
    assert torch.equal(model[2].row.norm.weight, torch.ones(8))  # the first one is another model


def test_compiled_training_gives_the_same_weights(example):
    torch.manual_seed(0)
    model = network(Asymmetric())
    widen(model)
    repvgg_hf.add_oabn(model, example, THRESHOLD)
    other = copy.deepcopy(model)
    train(model, 2, example)
    train(torch.compile(other, backend="aot_eager", fullgraph=True), 2, example)
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], tensor, msg=key)


def test_projecting_reads_no_values(example):
    """An accelerator would be waited for; tensors without values show it."""
    model = network(Asymmetric())
    repvgg_hf.add_oabn(model, example, THRESHOLD)
    model.to("meta").outlier_bounds.project(model)


def test_synchronized_norms_are_bounded(example):
    model = network(Asymmetric())
    report = repvgg_hf.add_oabn(model, example, THRESHOLD)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(model[2].row.norm, nn.SyncBatchNorm)
    widen(model)
    model[2].row.norm.weight.data.fill_(100.0)
    model.outlier_bounds.project(model)
    assert model[2].row.norm.weight.max() < 100
    assert report.bounded


def test_own_models_get_the_threshold_of_their_configuration(example):
    sizes = {"stem_hidden_size": 8, "hidden_sizes": [8], "depths": [2], "strides": [1]}
    config = repvgg_hf.RepVGGConfig(**sizes, num_labels=4, oabn=False)
    model = repvgg_hf.RepVGGForImageClassification(config)
    report = repvgg_hf.add_oabn(model, example, 3.0)
    blocks = [module for module in model.modules() if isinstance(module, repvgg_hf.ReparamConv2d)]
    assert len(report.bounded) == len(blocks) and all(block.oabn_threshold == 3.0 for block in blocks)
    assert (model.config.oabn, model.config.oabn_threshold) == (True, 3.0)


@pytest.mark.parametrize("name", ["repvit_m0_9"])
def test_a_norm_after_the_sum_is_reported(name):
    model = timm.create_model(name, num_classes=4)
    with pytest.raises(ValueError, match=r"token_mixer.*no batch norm of its own"):
        repvgg_hf.add_oabn(model, torch.randn(1, 3, 64, 64))
    assert not model._forward_pre_hooks


def test_what_is_left_is_said_beside_what_is_bounded(example):
    model = nn.Sequential(network(Asymmetric()), network(NormAfterSum(), 8)[2:])
    report = repvgg_hf.add_oabn(model, example)
    assert "2 branches of 1 sums are bounded" in str(report)
    assert "1.2.point has no batch norm of its own" in str(report)


@pytest.mark.parametrize(
    ("make", "threshold", "error", "message"),
    [
        (lambda: network(nn.Identity()), 6.0, ValueError, "no sum of branches"),
        (lambda: network(NormAfterSum()), 6.0, ValueError, "no batch norm of its own"),
        (
            lambda: network(frozen(Asymmetric())),
            6.0,
            ValueError,
            "the weight of 2.row.norm is no parameter that trains",
        ),
        (lambda: network(Asymmetric(4)), 6.0, ValueError, "does not run on the example"),
        (lambda: network(Asymmetric()), 0, ValueError, "threshold must be a positive"),
        (lambda: network(Asymmetric()), float("inf"), ValueError, "threshold must be a positive"),
        (lambda: network(Asymmetric()), "6", ValueError, "threshold must be a positive"),
        (lambda: network(Asymmetric()).to("meta"), 6.0, ValueError, "0.weight is offloaded"),
        (lambda: network(Decides()), 6.0, ValueError, r"2 \(Decides\) has data-dependent control flow"),
        (lambda: network(padded_by("mirror")), 6.0, ValueError, "2 has the unknown padding_mode 'mirror'"),
        (lambda: network(nn.LazyBatchNorm2d()), 6.0, ValueError, "2.weight is uninitialized"),
        (lambda: repvgg_hf.quantize(network(Asymmetric())), 6.0, ValueError, "is quantized already"),
        (lambda: repvgg_hf.prepare_qat(network(Asymmetric())), 6.0, ValueError, "or prepared for it"),
    ],
)
def test_what_cannot_be_bounded_is_a_named_error(make, threshold, error, message, example):
    model = make()
    with pytest.raises(error, match=message):
        repvgg_hf.add_oabn(model, example, threshold)
    assert not model._forward_pre_hooks and not hasattr(model, "outlier_bounds")


def test_a_dense_norm_without_a_weight_counts_as_ones(example):
    torch.manual_seed(0)
    model = network(Asymmetric())
    widen(model)
    model[2].square.norm.weight.data.fill_(1.0)
    before, plain = model[2].row.norm.weight.clone(), copy.deepcopy(model)
    plain[2].square.norm.weight = plain[2].square.norm.bias = None
    for other in (model, plain):
        repvgg_hf.add_oabn(other, example, THRESHOLD)
        other.train()(example)
    assert torch.equal(plain[2].row.norm.weight, model[2].row.norm.weight)
    assert not torch.equal(model[2].row.norm.weight, before)


def test_half_precision_is_projected_as_float32():
    """Squares of such entries are outside of what float16 can hold."""
    torch.manual_seed(0)
    model = network(Asymmetric())
    widen(model)
    model[2].square.conv.weight.data.normal_(0, 1e-4)
    model.half()
    exact = copy.deepcopy(model).float()
    for other in (model, exact):
        x = torch.randn(1, 3, 8, 8).to(other[0].weight.dtype)
        repvgg_hf.add_oabn(other, x, THRESHOLD)
        other.outlier_bounds.project(other)
    weights = [other[2].row.norm.weight for other in (model, exact)]
    torch.testing.assert_close(weights[0], weights[1].half(), rtol=2e-3, atol=1e-6)
    assert weights[0].ne(0).all()


@pytest.mark.parametrize("way", ["averaged", "loaded"])
def test_weights_that_were_overwritten_are_projected_in_evaluation(way, example):
    torch.manual_seed(0)
    model = network(Asymmetric())
    report = repvgg_hf.add_oabn(model, example, THRESHOLD)
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    widen(model)
    outlier_bounds, model.outlier_bounds = model.outlier_bounds, None  # so that what is taken over is not projected
    if way == "averaged":
        averaged.update_parameters(model)
        evaluated = averaged.module
    else:
        state, evaluated = copy.deepcopy(model.state_dict()), model
        for tensor in model.state_dict().values():
            tensor.data.zero_()
        model.outlier_bounds = outlier_bounds
        model.eval()(example)
        model.load_state_dict(state)
    evaluated.eval()(example)
    assert_within_bounds(evaluated, report.bounded, THRESHOLD)


def test_bounds_are_added_once(example):
    model = network(Asymmetric())
    repvgg_hf.add_oabn(model, example)
    with pytest.raises(ValueError, match="already"):
        repvgg_hf.add_oabn(model, example)


def test_fusing_takes_the_bounded_weights_and_ends_the_bounds(example):
    torch.manual_seed(0)
    model = network(Asymmetric())
    widen(model)
    repvgg_hf.add_oabn(model, example, THRESHOLD)
    train(model, 2, example)
    expected = copy.deepcopy(model)
    expected.outlier_bounds.project(expected)
    repvgg_hf.fuse(model.eval(), example)
    torch.testing.assert_close(model(example), expected.eval()(example))
    assert model.outlier_bounds is None
    model.state_dict()
    model.train()(example)


def test_quantizing_ends_the_bounds(example):
    model = network(Asymmetric())
    repvgg_hf.add_oabn(model, example, THRESHOLD)
    repvgg_hf.quantize(model.eval(), bits=4)
    before = [module.weight.clone() for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    model.state_dict()
    model.train()(example)
    after = [module.weight for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(map(torch.equal, before, after))


def train_on_a_rank(rank: int, folder: str) -> None:
    """Train on images of its own, with a state_dict in between, and save the parameters."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = network(Asymmetric())
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(rank))
    widen(model)
    repvgg_hf.add_oabn(model, images, THRESHOLD)
    bounds, parallel = model.outlier_bounds, nn.parallel.DistributedDataParallel(model)
    for step in range(4):
        train(parallel, 1, images * (1 + rank))
        before = copy.deepcopy(dict(model.named_parameters()))
        state = parallel.state_dict()
        assert_within_bounds(model, bounds.sums, THRESHOLD)  # by the rank's own statistics
        assert torch.equal(state["module.2.row.norm.weight"], model[2].row.norm.weight)
        assert step or any(not torch.equal(before[name], value) for name, value in model.named_parameters())
    train(parallel, 1, images)
    torch.save(dict(model.named_parameters()), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ranks_stay_equal_when_each_takes_a_state_dict(tmp_path):
    """As Accelerate's save_state does: statistics differ between ranks until the next forward pass."""
    commands = [[sys.executable, __file__, str(rank), str(tmp_path)] for rank in range(2)]
    ranks = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    for rank in ranks:
        errors = rank.communicate(timeout=300)[1]
        assert rank.returncode == 0, errors
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, parameter in first.items():
        assert torch.equal(parameter, second[name]), name


def test_evaluation_after_a_step_is_what_the_fused_model_computes(example):
    torch.manual_seed(0)
    model = network(Asymmetric())
    widen(model)
    repvgg_hf.add_oabn(model, example, THRESHOLD)
    train(model, 2, example)
    evaluated = model.eval()(example)
    before = [parameter.clone() for parameter in model.parameters()]
    model.outlier_bounds.project(model)
    assert all(map(torch.equal, before, model.parameters()))
    repvgg_hf.fuse(model, example)
    torch.testing.assert_close(model(example), evaluated)


def test_a_part_that_was_fused_by_itself_is_passed_over(example):
    torch.manual_seed(0)
    model = nn.Sequential(network(Asymmetric()), network(Asymmetric(), 8)[2:])
    widen(model)
    report = repvgg_hf.add_oabn(model, example, THRESHOLD)
    assert len(report.bounded) == 2
    repvgg_hf.fuse(model[0].eval(), example)
    model.state_dict()
    model[1].train()
    model.training = True
    model(example)
    model.state_dict()
    assert_within_bounds(model, report.bounded[1:], THRESHOLD)


if __name__ == "__main__":
    train_on_a_rank(int(sys.argv[1]), sys.argv[2])
