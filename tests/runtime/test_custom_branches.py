"""Branches that the package does not have: whoever writes one derives it from `Branch` and gives it to a block."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from repvgg_hf import ReparamConv2d
from repvgg_hf.runtime.reparameterization import (
    Branch,
    ConvBranch,
    IdentityBranch,
    batch_norm,
    fused_convolutions,
    outlier_bounded_weight,
)

CHANNELS = 8


class AveragePool(Branch):
    """The mean over 3x3 pixels, normalized: every entry of its kernel on the diagonal is a ninth."""

    kernel_size = (3, 3)
    diagonal = True

    def __init__(self, channels: int = CHANNELS, stride: int = 1):
        super().__init__()
        self.stride, self.norm = stride, nn.BatchNorm2d(channels)

    def gamma(self, bound):
        return self.norm.weight if bound is None else outlier_bounded_weight(self.norm, 1 / 9, bound)

    def forward(self, x, bound=None):
        return batch_norm(self.norm, F.avg_pool2d(x, 3, self.stride, padding=1), self.gamma(bound))

    def equivalent(self, bound=None):
        scale = self.gamma(bound) / (self.norm.running_var + self.norm.eps).sqrt()
        kernel = torch.diag(scale)[:, :, None, None].expand(-1, -1, 3, 3) / 9
        return kernel, self.norm.bias - self.norm.running_mean * scale


class Depthwise(Branch):
    """A convolution of each channel alone, with a bias and without a norm: clipped entry by entry."""

    kernel_size = (3, 3)
    diagonal = True

    def __init__(self, channels: int = CHANNELS, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels)

    def kernel(self, bound):
        weight = self.conv.weight
        return weight if bound is None else torch.maximum(torch.minimum(weight, bound), -bound)

    def forward(self, x, bound=None):
        conv = self.conv
        return F.conv2d(x, self.kernel(bound), conv.bias, conv.stride, 1, groups=conv.groups)

    def equivalent(self, bound=None):
        diagonal = torch.eye(self.conv.groups, dtype=self.conv.weight.dtype, device=self.conv.weight.device)
        return diagonal[:, :, None, None] * self.kernel(bound), self.conv.bias


class PlainConv(Branch):
    """A dense convolution, whose weight itself is its kernel."""

    kernel_size = (3, 3)

    def __init__(self, channels: int = CHANNELS, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride, padding=1)

    def forward(self, x, bound=None):
        return self.conv(x)

    def equivalent(self, bound=None):
        return self.conv.weight, self.conv.bias


class Skip(Branch):
    """The input as it is."""

    diagonal = True

    def forward(self, x, bound=None):
        return x if bound is None else x * bound.clamp_max(1)

    def equivalent(self, bound=None):
        one = torch.ones(CHANNELS) if bound is None else bound.clamp_max(1).expand(CHANNELS)
        return torch.diag(one)[:, :, None, None], torch.zeros(CHANNELS)


def make_block(*branches, oabn_threshold=1.0, stride=1):
    return ReparamConv2d(CHANNELS, CHANNELS, stride=stride, branches=branches, oabn_threshold=oabn_threshold)


@pytest.fixture
def trained(randomize_batch_norms, generator):
    """`trained(block)`: weights and norms as after some training, with contributions large enough to be clipped."""

    def train(block):
        with torch.no_grad():
            for module in block.modules():
                if isinstance(module, nn.Conv2d):
                    module.weight.normal_(0, 0.2, generator=generator)
        randomize_batch_norms(block, generator)
        for branch in block.branches.values():
            if isinstance(branch, AveragePool):
                branch.norm.weight.data *= 5
            if isinstance(branch, Depthwise):
                branch.conv.weight.data *= 3
        return block.eval()

    return train


BLOCKS = {
    "average pool": lambda stride: ["3x3", "1x1", AveragePool(stride=stride)],
    "depthwise": lambda stride: [Depthwise(stride=stride), "3x3"],
    "plain dense": lambda stride: ["1x1", PlainConv(stride=stride)],
    "plain dense alone": lambda stride: [PlainConv(stride=stride)],
    "all": lambda stride: [AveragePool(stride=stride), PlainConv(stride=stride), Depthwise(stride=stride), "1x3"],
}


@pytest.mark.parametrize("oabn_threshold", [None, 0.5], ids=["bn", "oabn"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("branches", BLOCKS.values(), ids=BLOCKS)
def test_custom_branches_fuse(branches, stride, oabn_threshold, trained, relative_error, generator):
    block = trained(make_block(*branches(stride), oabn_threshold=oabn_threshold, stride=stride))
    before = copy.deepcopy(block.state_dict())
    x = torch.randn(2, CHANNELS, 7, 10, generator=generator)
    fused = block.fuse()
    bounds = block.bounds()
    expected = sum(branch(x, bounds[name]) for name, branch in block.branches.items())
    assert relative_error(fused(x), expected) < 1e-5
    assert relative_error(block(x), expected) < 1e-6
    assert all(torch.equal(before[name], tensor) for name, tensor in block.state_dict().items())
    model = nn.Sequential(block, nn.ReLU())
    assert torch.equal(fused_convolutions(model)["0"].weight, fused.weight)


@pytest.mark.parametrize("branches", BLOCKS.values(), ids=BLOCKS)
def test_the_equivalent_kernel_has_their_gradients(branches, trained, relative_error, generator):
    block = trained(make_block(*branches(1)))
    twin = copy.deepcopy(block)
    x = torch.randn(2, CHANNELS, 6, 6, generator=generator)
    block(x).square().sum().backward()
    twin.convolve(x, *twin.equivalent()).square().sum().backward()
    for (name, parameter), other in zip(block.named_parameters(), twin.parameters()):
        assert relative_error(other.grad, parameter.grad) < 1e-4, name
    assert all(torch.equal(tensor, twin.state_dict()[name]) for name, tensor in block.state_dict().items())


@pytest.mark.parametrize("branch", [AveragePool, Depthwise])
def test_oabn_bounds_a_custom_branch(branch, trained):
    """What it adds to the fused kernel is at most `threshold` deviations of the dense branch's contribution."""
    block = trained(make_block("3x3", branch(), oabn_threshold=0.5))
    with torch.no_grad():
        dense, _ = block.branches["3x3"].equivalent()
        bound = 0.5 * dense.double().std()
        added = block.equivalent()[0].double() - dense
        free = block.branches[branch.__name__].equivalent()[0]
    assert free.abs().max() > 1.5 * bound
    assert added.abs().max() == pytest.approx(bound.item(), rel=1e-4)
    assert block.bounds()["3x3"] is None
    block.oabn_threshold = None
    torch.testing.assert_close(block.equivalent()[0], dense + free)


def test_custom_dense_branches_set_the_measure(trained):
    block = trained(make_block("3x3", PlainConv(), AveragePool(), "identity", oabn_threshold=2.0))
    assert block.dense_names == ["3x3", "PlainConv"]
    with torch.no_grad():
        variances = [block.branches[name].equivalent()[0].double().var() for name in block.dense_names]
    assert block.outlier_bound().item() == pytest.approx(2 * sum(variances).sqrt().item(), rel=1e-5)


def test_a_branch_that_returns_its_input_leaves_it_alone(trained, relative_error, generator):
    block = trained(make_block(Skip(), "3x3", oabn_threshold=None))
    x = torch.randn(2, CHANNELS, 6, 6, generator=generator)
    before = x.clone()
    output = block(x)
    assert torch.equal(x, before)
    assert relative_error(block.fuse()(x), output) < 1e-5
    assert relative_error(output, x + block.branches["3x3"](x)) < 1e-6


def test_several_of_a_class_are_told_apart(trained):
    block = trained(make_block("3x3", AveragePool(), AveragePool(), "3x3"))
    assert list(block.branches) == ["3x3", "AveragePool", "AveragePool_2", "3x3_3"]
    block.fuse()


@pytest.mark.parametrize(
    "module, missing",
    [(nn.Identity(), "kernel_size"), (nn.Conv2d(8, 8, 3, padding=1), "diagonal"), (nn.BatchNorm2d(8), "kernel_size")],
    ids=lambda value: type(value).__name__,
)
def test_a_module_that_is_no_branch_is_refused(module, missing):
    message = f"^{type(module).__name__} is no branch, it has no '{missing}': derive it from repvgg_hf's Branch"
    with pytest.raises(ValueError, match=message):
        make_block("3x3", module)


def test_other_blocks_that_make_no_sense():
    class Large(AveragePool):
        kernel_size = (5, 5)

    with pytest.raises(ValueError, match="^Branch 'Large' is larger than the 3x3 block it is part of"):
        make_block("3x3", Large())
    with pytest.raises(ValueError, match="needs a dense 3x3 branch"):
        make_block(AveragePool(), Depthwise(), "1x1", "identity")


def test_a_branch_whose_equivalent_is_wrong_is_found(trained):
    class Wrong(AveragePool):
        def equivalent(self, bound=None):
            kernel, bias = super().equivalent(bound)
            return kernel * 1.1, bias

    with pytest.raises(ValueError, match="differs from its branches by"):
        trained(make_block("3x3", Wrong())).fuse()


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("size", [(3, 3), (1, 1), (1, 3)], ids=str)
def test_contribution_variance_is_that_of_the_equivalent_kernel(size, groups, randomize_batch_norms, generator):
    branch = randomize_batch_norms(ConvBranch(8, 12, size, groups=groups), generator)
    for mean in (0.0, 0.3):
        branch.conv.weight.data.normal_(mean, 0.2, generator=generator)
        with torch.no_grad():
            expected = branch.equivalent()[0].double().var().item()
        assert branch.contribution_variance().item() == pytest.approx(expected, rel=1e-4)
        assert branch.contribution_variance().shape == ()


def test_contribution_variance_of_other_branches(randomize_batch_norms, generator):
    for branch in (IdentityBranch(8), AveragePool(), Depthwise(), Skip()):
        randomize_batch_norms(branch, generator)
        expected = branch.equivalent()[0].double().var().item()
        assert branch.contribution_variance().item() == pytest.approx(expected, rel=1e-5)
