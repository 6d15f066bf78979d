"""Fixtures of all tests. Nothing here needs the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from repvgg_hf import RepVGGConfig

# the tensors are small: more threads would mostly wait for each other, above all on a machine that does other work
torch.set_num_threads(1)


# of what a run with --full tries, others try a sample; hypothesis tries 100 examples unless told otherwise
settings.register_profile("ci", max_examples=25, deadline=None)
settings.register_profile("full", max_examples=200, deadline=None)


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the tests marked `full` as well, and more examples")


def pytest_configure(config):
    settings.load_profile("full" if config.getoption("--full") else "ci")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full"):
        left_out = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("full")]


@pytest.fixture(autouse=True)
def seed():
    """New layers get the same weights in every run."""
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def tiny_config():
    """`tiny_config(**fields)`: two stages of a few channels, with a grouped layer, OABN and five labels."""

    def make(**fields) -> RepVGGConfig:
        defaults = {"stem_hidden_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "strides": [2, 2], "groups": 2}
        return RepVGGConfig(**(defaults | {"num_labels": 5} | fields))

    return make


@pytest.fixture(scope="session")
def randomize_batch_norms():
    """`randomize_batch_norms(model, generator)`: statistics and parameters as after some training.

    Gammas of both signs; means and biases of a quarter leave the image its say in the output of deep models.
    """

    @torch.no_grad()
    def randomize(model: nn.Module, generator: torch.Generator) -> nn.Module:
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                signs = torch.randint(0, 2, norm.weight.shape, generator=generator) * 2 - 1
                norm.weight.uniform_(0.3, 0.8, generator=generator).mul_(signs)
                norm.bias.normal_(0, 0.25, generator=generator)
                norm.running_mean.normal_(0, 0.25, generator=generator)
                norm.running_var.uniform_(0.5, 2, generator=generator)
        return model

    return randomize


@pytest.fixture(scope="session")
def keep_signal():
    """`keep_signal(model, layer_class)`: normalize every layer's output.

    Random weights and statistics let a deep model forget its input, whose logits would then agree with anything's; in
    D2se they saturate the gates. Between normalized layers an error of 1 % in an early kernel moves the logits by 0.03
    to 17 % (measured on A0, B0, B1g4 and D2se).
    """

    def normalize(module, inputs, output):
        return F.layer_norm(output, output.shape[1:])

    def keep(model: nn.Module, layer_class: type) -> nn.Module:
        for module in model.modules():
            if isinstance(module, layer_class):
                module.register_forward_hook(normalize)
        return model

    return keep


@pytest.fixture(scope="session")
def relative_error():
    """`relative_error(actual, expected)`: largest difference over largest expected value; NaN if either has one."""

    def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
        assert actual.shape == expected.shape
        actual, expected = actual.double(), expected.double()
        return ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()

    return error


# what reads a value, or makes a tensor whose size depends on one
WAITING = {
    "_local_scalar_dense", "item", "is_nonzero", "nonzero", "nonzero_numpy", "masked_select", "equal", "allclose",
    "unique_dim", "_unique", "_unique2", "unique_consecutive", "bincount", "histc", "repeat_interleave",
}  # fmt: skip


class WaitingOperations(TorchDispatchMode):
    """Records the names of those operations that would wait for an accelerator, and counts all."""

    def __init__(self):
        super().__init__()
        self.found, self.count = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        self.count += 1
        by_mask = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else [])
        )
        if name in WAITING or by_mask:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="session")
def waiting_operations() -> type[WaitingOperations]:
    """A context that records what would wait for an accelerator: its `found` has names, its `count` is of all."""
    return WaitingOperations
