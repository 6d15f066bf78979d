"""Branches, their fusion and OABN, against impulse responses, brute force and PyTorch's own batch norm."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.detr.modeling_detr import replace_batch_norm

from repvgg_hf import ReparamConv2d, RepVGGForImageClassification
from repvgg_hf.runtime.oabn import _BoundedWeight, outlier_bounded_weight
from repvgg_hf.runtime.reparameterization import ConvBranch, parse_branch

REPVGG = ("3x3", "1x1", "identity")
BRANCHES = {
    "repvgg": REPVGG,
    "acnet": ("3x3", "1x3", "3x1"),
    "mobileone": ("3x3", "3x3", "1x1", "identity"),
    "dense": ("3x3",),
    "two_identities": ("3x3", "identity", "identity"),
}


@pytest.fixture
def make_block(randomize_batch_norms, generator):
    """A block with weights and batch norms as after some training; a small threshold makes OABN clip."""

    def make(branches=REPVGG, in_channels=8, out_channels=8, oabn_threshold=1.0, **kwargs):
        block = ReparamConv2d(in_channels, out_channels, branches=branches, oabn_threshold=oabn_threshold, **kwargs)
        with torch.no_grad():
            for module in block.modules():
                if isinstance(module, nn.Conv2d):
                    module.weight.normal_(0, 0.2, generator=generator)
        return randomize_batch_norms(block, generator)

    return make


def impulse_response(block):
    """The kernel and bias that the block applies, measured: what an impulse in the middle adds to each output."""
    size = 2 * block.kernel_size[0] + 1
    zero = torch.zeros(block.in_channels, block.in_channels, size, size)
    impulses = zero.clone()
    index = torch.arange(block.in_channels)
    impulses[index, index, size // 2, size // 2] = 1
    response = block(impulses) - block(zero)  # [in, out, size, size]
    radius = block.kernel_size[0] // 2
    window = slice(size // 2 - radius, size // 2 + radius + 1)
    kernel = response[:, :, window, window].flip(2, 3).transpose(0, 1)  # convolution layers correlate
    return kernel, block(zero)[0, :, size // 2, size // 2]


def ungrouped(kernel, groups):
    """A grouped kernel `[out, in / groups, k, k]` as a dense one `[out, in, k, k]`, zero between groups."""
    out_per_group, in_per_group = kernel.shape[0] // groups, kernel.shape[1]
    dense = kernel.new_zeros(kernel.shape[0], in_per_group * groups, *kernel.shape[2:])
    for group in range(groups):
        rows = slice(group * out_per_group, (group + 1) * out_per_group)
        dense[rows, group * in_per_group : (group + 1) * in_per_group] = kernel[rows]
    return dense


class TestFusion:
    @pytest.mark.parametrize("oabn_threshold", [None, 1.0], ids=["bn", "oabn"])
    @pytest.mark.parametrize("groups", [1, 2, 8])
    @pytest.mark.parametrize("branches", BRANCHES.values(), ids=BRANCHES)
    def test_equivalent_kernel_is_the_impulse_response(
        self, make_block, relative_error, branches, groups, oabn_threshold
    ):
        block = make_block(branches, groups=groups, oabn_threshold=oabn_threshold).eval()
        with torch.no_grad():
            kernel, bias = block.equivalent()
            measured_kernel, measured_bias = impulse_response(block)
        assert relative_error(ungrouped(kernel, groups), measured_kernel) < 1e-5
        assert relative_error(bias, measured_bias) < 1e-5

    @pytest.mark.parametrize("oabn_threshold", [None, 1.0], ids=["bn", "oabn"])
    @pytest.mark.parametrize("shape", [(8, 8, 1, 1), (8, 8, 2, 1), (8, 8, 2, 4), (8, 12, 1, 2), (4, 16, 2, 1)], ids=str)
    @pytest.mark.parametrize("branches", BRANCHES.values(), ids=BRANCHES)
    def test_fused_output_is_the_branches_output(
        self, make_block, relative_error, generator, branches, shape, oabn_threshold
    ):
        in_channels, out_channels, stride, groups = shape
        block = make_block(
            branches, in_channels, out_channels, oabn_threshold=oabn_threshold, stride=stride, groups=groups
        ).eval()
        x = torch.randn(2, in_channels, 7, 10, generator=generator)
        fused = block.fuse()
        assert type(fused) is nn.Conv2d
        assert relative_error(fused(x), block(x)) < 1e-5

    def test_larger_kernels(self, make_block, relative_error, generator):
        block = make_block(("5x5", "3x3", "1x5", "identity"), kernel_size=5).eval()
        x = torch.randn(2, 8, 9, 9, generator=generator)
        assert relative_error(block.fuse()(x), block(x)) < 1e-5

    def test_identity_is_left_out_where_the_shape_changes(self):
        assert list(ReparamConv2d(8, 8, stride=2).branches) == ["3x3", "1x1"]
        assert list(ReparamConv2d(8, 16).branches) == ["3x3", "1x1"]
        assert list(ReparamConv2d(8, 8).branches) == ["3x3", "1x1", "identity"]

    @pytest.mark.parametrize("oabn_threshold", [None, 1.0], ids=["bn", "oabn"])
    def test_equivalent_kernel_has_the_branches_gradients(self, make_block, relative_error, generator, oabn_threshold):
        block = make_block(oabn_threshold=oabn_threshold).eval()
        twin = copy.deepcopy(block)
        x = torch.randn(2, 8, 6, 6, generator=generator)
        block(x).square().sum().backward()
        kernel, bias = twin.equivalent()
        F.conv2d(x, kernel, bias, padding=1).square().sum().backward()
        for (name, parameter), other in zip(block.named_parameters(), twin.parameters()):
            assert parameter.grad.abs().max() > 0, name
            assert relative_error(other.grad, parameter.grad) < 1e-4, name

    def test_fusing_leaves_the_block_alone(self, make_block):
        block = make_block()
        before = copy.deepcopy(block.state_dict())
        block.fuse()
        assert block.training
        assert all(torch.equal(before[name], tensor) for name, tensor in block.state_dict().items())

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
    @pytest.mark.parametrize("field", ["weight", "bias", "running_mean", "running_var"])
    def test_broken_norms_are_refused(self, make_block, field, value):
        block = make_block()
        getattr(block.branches["3x3"].norm, field).data[3] = value
        if (field, value) == ("running_var", float("inf")) or (field != "running_var" and value == -1.0):
            assert block.fuse().weight.isfinite().all()  # a channel switched off, or an ordinary value
            return
        with pytest.raises(ValueError, match="differs from its branches by nan.*look for NaN"):
            block.fuse()

    def test_a_wrong_fusion_is_refused(self, make_block, monkeypatch):
        block = make_block()
        kernel, bias = block.equivalent()
        monkeypatch.setattr(ReparamConv2d, "equivalent", lambda self: (kernel.detach() * 1.01, bias.detach()))
        with pytest.raises(ValueError, match=r"differs from its branches by \d.*e-0[23] of the largest output"):
            block.fuse()

    @pytest.mark.parametrize("name", ["", "3", "3x", "x3", "2x3", "3x4", "3x3x3", "Identity", "-1x1"])
    def test_unknown_branch_names(self, name):
        with pytest.raises(ValueError, match=f"Unknown branch {name!r}"):
            parse_branch(name)

    def test_branch_names(self):
        assert (parse_branch("identity"), parse_branch("1x3"), parse_branch("11x7")) == (None, (1, 3), (11, 7))


class TestOutlierAwareBatchNorm:
    @pytest.mark.parametrize("threshold", [0.5, 2.0, 6.0])
    @pytest.mark.parametrize("groups", [1, 4])
    @pytest.mark.parametrize("branches", BRANCHES.values(), ids=BRANCHES)
    def test_bound_holds_for_every_contribution(self, make_block, branches, groups, threshold):
        block = make_block(branches, oabn_threshold=threshold, groups=groups)
        with torch.no_grad():
            plain = {name: branch.equivalent()[0] for name, branch in block.branches.items()}
            variance = sum(plain[name].double().std() ** 2 for name in block.dense_names)
            bound = threshold * variance.sqrt()
            for name, branch in block.branches.items():
                kernel, _ = branch.equivalent(block.bounds()[name])
                if name in block.dense_names:
                    assert torch.equal(kernel, plain[name])
                else:
                    rows = plain[name].abs().amax(dim=(1, 2, 3))
                    clipped = rows > bound
                    assert kernel.abs().max() <= bound * (1 + 1e-5)
                    # a row beyond the bound shrinks to it as a whole, any other row is unchanged
                    torch.testing.assert_close(kernel[~clipped], plain[name][~clipped])
                    shrink = (bound / rows[clipped]).float().view(-1, 1, 1, 1)
                    torch.testing.assert_close(kernel[clipped], plain[name][clipped] * shrink)

    def test_the_random_blocks_have_both_clipped_and_free_channels(self, make_block):
        """Or the test above would show nothing."""
        block = make_block(oabn_threshold=2.0)
        for name in ("1x1", "identity"):
            free = block.branches[name].norm_weight(block.bounds()[name]) == block.branches[name].norm.weight
            assert 0 < free.sum() < len(free) or name == "identity"

    def test_kernels_with_a_mean(self, make_block):
        """Parallel branches that are far from independent still leave a bound that is not zero."""
        block = make_block(("3x3", "3x3", "1x1"), oabn_threshold=1.0)
        with torch.no_grad():
            for name in block.dense_names:
                block.branches[name].conv.weight.abs_().add_(1)
                block.branches[name].norm.weight.abs_()
            dense = [block.branches[name].equivalent()[0].std() for name in block.dense_names]
        torch.testing.assert_close(block.outlier_bound(), torch.stack(dense).square().sum().sqrt())

    def test_gradient_rule(self):
        weight = torch.tensor([0.5, -0.5, 2.0, 2.0, -2.0, -2.0, 1.0], requires_grad=True)
        limit = torch.ones(7)
        bounded = _BoundedWeight.apply(weight, limit)
        assert bounded.tolist() == [0.5, -0.5, 1, 1, -1, -1, 1]
        # descent subtracts the gradient: +3 brings 2.0 back inside and takes -2.0 further out
        bounded.backward(torch.tensor([3.0, 3.0, 3.0, -3.0, 3.0, -3.0, -3.0]))
        assert weight.grad.tolist() == [3, 3, 3, 0, 0, -3, -3]

    def test_clipped_weights_return_by_descent(self):
        """Plain clipping would leave 5.0 there for ever; passing every gradient would send -5.0 away for ever."""
        weight = nn.Parameter(torch.tensor([5.0, -5.0]))
        target = torch.tensor([0.5, -3.0])
        optimizer = torch.optim.SGD([weight], lr=0.1)
        for _ in range(200):
            optimizer.zero_grad()
            (_BoundedWeight.apply(weight, torch.ones(2)) - target).square().sum().backward()
            optimizer.step()
        torch.testing.assert_close(weight.detach(), torch.tensor([0.5, -5.0]))

    def test_limit_formula(self, generator):
        norm = nn.BatchNorm2d(4, eps=1e-3)
        norm.running_var.uniform_(0.5, 2, generator=generator)
        norm.weight.data.fill_(100.0)
        kernel_max = torch.tensor([0.5, 1.0, 2.0, 4.0])
        weight = outlier_bounded_weight(norm, kernel_max, torch.tensor(0.3))
        contribution = weight / (norm.running_var + 1e-3).sqrt() * kernel_max
        torch.testing.assert_close(contribution, torch.full((4,), 0.3))

    def test_a_bound_out_of_reach_is_plain_batch_norm_exactly(self, make_block, generator):
        bounded = make_block(oabn_threshold=1e6)
        plain = copy.deepcopy(bounded)
        plain.oabn_threshold = None
        for step in range(3):
            x = torch.randn(4, 8, 6, 6, generator=generator)
            outputs = []
            for block in (bounded, plain):
                block.zero_grad()
                outputs.append(block(x))
                outputs[-1].square().mean().backward()
            assert torch.equal(*outputs), step
            for (name, parameter), other in zip(bounded.named_parameters(), plain.parameters()):
                assert torch.equal(parameter.grad, other.grad), name
            for (name, buffer), other in zip(bounded.named_buffers(), plain.buffers()):
                assert torch.equal(buffer, other), name
        assert bounded.branches["identity"].norm.num_batches_tracked == 3
        assert torch.equal(bounded.eval()(x), plain.eval()(x))

    def test_cumulative_average_of_the_statistics(self, make_block, generator):
        """`momentum=None`, which PyTorch handles outside of `F.batch_norm`."""
        bounded = make_block(oabn_threshold=1e6, momentum=None)
        plain = copy.deepcopy(bounded)
        plain.oabn_threshold = None
        for _ in range(2):
            x = torch.randn(4, 8, 6, 6, generator=generator)
            assert torch.equal(bounded(x), plain(x))
        for (name, buffer), other in zip(bounded.named_buffers(), plain.buffers()):
            assert torch.equal(buffer, other), name

    def test_training_output_uses_the_bounded_weight(self, make_block, generator, relative_error):
        """Against PyTorch's batch norm with the clipped gamma as its own parameter."""
        block = make_block()
        bounds = block.bounds()
        plain = copy.deepcopy(block)
        plain.oabn_threshold = None
        with torch.no_grad():
            for name, branch in plain.branches.items():
                branch.norm.weight.copy_(branch.norm_weight(bounds[name]))
        x = torch.randn(4, 8, 6, 6, generator=generator)
        output = block(x)
        assert relative_error(output, plain(x)) < 1e-6
        plain.branches["identity"].norm.weight.data.mul_(2)
        assert relative_error(output, plain(x)) > 1e-2

    def test_state_survives_saving(self, make_block, generator):
        block = make_block()
        block(torch.randn(4, 8, 6, 6, generator=generator))
        other = ReparamConv2d(8, 8, oabn_threshold=1.0)
        other.load_state_dict(block.state_dict())
        x = torch.randn(4, 8, 6, 6, generator=generator)
        assert torch.equal(other.eval()(x), block.eval()(x))
        plain = ReparamConv2d(8, 8)  # OABN has no state of its own
        plain.load_state_dict(block.state_dict())


class TestTools:
    """What others do to a model's batch norms and forward passes keeps the bound."""

    @pytest.mark.parametrize("replace", [nn.SyncBatchNorm.convert_sync_batchnorm, replace_batch_norm])
    def test_replaced_batch_norms(self, make_block, generator, relative_error, replace):
        block = make_block().eval()
        x = torch.randn(2, 8, 6, 6, generator=generator)
        expected = block(x)
        replaced = copy.deepcopy(block)
        with torch.no_grad():
            replaced = replace(replaced) or replaced  # one returns the model, the other changes it in place
        assert all(type(branch.norm) is not nn.BatchNorm2d for branch in replaced.branches.values())
        assert relative_error(replaced(x), expected) < 1e-6
        assert relative_error(replaced.fuse()(x), expected) < 1e-5
        replaced.oabn_threshold = None
        assert relative_error(replaced(x), expected) > 1e-2  # the clip was at work

    def test_frozen_batch_norms_train(self, make_block, generator):
        block = make_block().eval()
        with torch.no_grad():
            replace_batch_norm(block)
        block.train()(torch.randn(2, 8, 6, 6, generator=generator)).square().mean().backward()
        assert {name for name, _ in block.named_parameters()} == {
            f"branches.{size}.conv.weight" for size in ("3x3", "1x1")
        }
        assert all(parameter.grad.abs().max() > 0 for parameter in block.parameters())

    @pytest.mark.parametrize("oabn_threshold", [None, 1.0], ids=["bn", "oabn"])
    def test_compiled_training(self, make_block, generator, relative_error, oabn_threshold):
        eager = make_block(oabn_threshold=oabn_threshold)
        twin = copy.deepcopy(eager)
        compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
        x = torch.randn(4, 8, 6, 6, generator=generator)
        expected, actual = eager(x), compiled(x)
        assert relative_error(actual, expected) < 1e-5
        expected.square().mean().backward()
        actual.square().mean().backward()
        for (name, parameter), other in zip(eager.named_parameters(), twin.named_parameters()):
            assert relative_error(other[1].grad, parameter.grad) < 1e-4, name
        for (name, buffer), other in zip(eager.named_buffers(), twin.buffers()):
            torch.testing.assert_close(other, buffer, msg=name)

    def test_bfloat16_autocast(self, make_block, generator, relative_error):
        block = make_block()
        full = copy.deepcopy(block)
        x = torch.randn(4, 8, 6, 6, generator=generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = block(x)
        output.float().square().mean().backward()
        assert relative_error(output, full(x)) < 0.03
        for name, parameter in block.named_parameters():
            assert parameter.grad.dtype == torch.float32
            assert parameter.grad.isfinite().all(), name

    def test_repr_names_the_block(self):
        text = repr(ReparamConv2d(4, 8, stride=2, oabn_threshold=6.0))
        assert "4, 8, kernel_size=(3, 3), stride=2, groups=1, oabn_threshold=6.0" in text


@pytest.mark.parametrize("size", [(16, 16), (15, 9)], ids=str)
def test_strided_pointwise_branch_equals_the_convolution_it_holds(size, generator):
    """It runs on a part of the input instead, and does so with the channels last, too."""
    branch = ConvBranch(3, 8, (1, 1), stride=2)
    x = torch.randn(2, 3, *size, generator=generator).contiguous(memory_format=torch.channels_last)
    expected = branch.norm(branch.conv(x))
    torch.testing.assert_close(branch(x), expected)


@pytest.mark.parametrize("training", [True, False])
def test_a_fused_model_stays_in_its_mode(tiny_config, training):
    model = RepVGGForImageClassification(tiny_config()).train(training).reparameterize()
    assert {module.training for module in model.modules()} == {training}
