"""Fixtures of the tests of quantization-aware training."""

import pytest
import torch

from repvgg_hf import update_codebooks


@pytest.fixture
def train():
    """`train(model, batch, steps, optimizer, learning_rate)`: the losses before each step; by default SGD's."""

    def run(model, batch, steps=3, optimizer=None, learning_rate=0.05) -> list[float]:
        optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
        losses = []
        for _ in range(steps):
            loss = model.train()(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            update_codebooks(model)
            losses.append(loss.item())
        return losses

    return run


@pytest.fixture
def logits():
    """`logits(model, batch)`: in eval mode."""

    @torch.no_grad()
    def run(model, batch) -> torch.Tensor:
        return model.eval()(batch["pixel_values"]).logits

    return run


@pytest.fixture
def assert_same_state():
    """`assert_same_state(actual, expected)`: two state dicts are equal in names and values."""

    def check(actual: dict, expected: dict) -> None:
        assert actual.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(actual[name], tensor), name

    return check
