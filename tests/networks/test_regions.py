"""Windows of convolutions against brute force, and kernels in fewer groups against the convolutions that they are."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from repvgg_hf.networks.equivalent import closed_form, error_of, in_groups
from repvgg_hf.networks.recording import record
from repvgg_hf.networks.regions import Graph, Window

windows = st.builds(Window, st.integers(1, 4), st.integers(1, 3), st.integers(0, 4))


def reads(window: Window, stride: int = 1, output: int = 0) -> set[int]:
    """The inputs that an output reads."""
    return {stride * output - window.padding + window.dilation * tap for tap in range(window.size)}


@given(windows, windows)
def test_union_covers_both(first, second):
    union = first.union(second)
    both = reads(first) | reads(second)
    assert both <= reads(union) and min(both) == min(reads(union)) and max(both) == max(reads(union))
    if union.dilation > 1:
        assert {first.dilation, second.dilation} & {union.dilation}


@given(windows, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2))
def test_window_of_two_convolutions_in_a_row(first, stride, size, dilation, padding):
    total = first.then(stride, size, dilation, padding)
    middle = reads(Window(size, dilation, padding))
    expected = set().union(*(reads(first, stride, position) for position in middle))
    assert expected <= reads(total)
    assert min(expected) == min(reads(total)) and max(expected) == max(reads(total))


@pytest.mark.parametrize("before, groups", [(4, 1), (4, 2), (6, 3), (12, 1), (12, 12), (3, 1)])
def test_in_groups(before, groups):
    weight, x = torch.randn(24, 12 // before, 3, 2), torch.randn(2, 12, 7, 7)
    expected = F.conv2d(x, weight, groups=before)
    torch.testing.assert_close(F.conv2d(x, in_groups(weight, before, groups), groups=groups), expected)


CHAINS = list(itertools.product([1, 2, 3], [1, 2], [1, 2], [1, 2, 4], [1, 4]))


@pytest.mark.parametrize("size, stride, dilation, first_groups, second_groups", CHAINS)
def test_two_convolutions_in_a_row(size, stride, dilation, first_groups, second_groups):
    """Whether or not one convolution would cost more."""
    model = nn.Sequential(
        nn.Conv2d(4, 8, 2, stride, groups=first_groups, bias=True),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 4, size, (1, 2), dilation=dilation, groups=second_groups),
    ).eval()
    model[1].running_mean.normal_()
    graph = Graph(record(model, torch.randn(1, 4, 17, 18)))
    form = graph.forms[3][0]
    region = type("Region", (), {"result": 3, "form": form})()
    kernel = closed_form(graph, region)
    assert error_of(graph, region, kernel) <= 1e-14
    assert kernel.weight.shape[1] * kernel.groups == 4
