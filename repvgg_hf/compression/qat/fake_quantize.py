"""What the fake quantizers of all methods share: blending, counting optimizer steps, loading.

A fake quantizer maps a float kernel to its *quantized value*, the weight that its codes and codebook stand for, and
lets gradients pass: so the kernel trains on, as if it were quantized already.
"""

from collections.abc import Callable

import torch
from torch import nn

from ...runtime.cluster_layers import CODEBOOK_DTYPES
from ...runtime.quantization_cluster import ClusterConfig
from ..codebooks.codes import from_rows, to_rows
from ..codebooks.weights import QuantizedWeight
from .config import QATConfig


def power_of_two(values: torch.Tensor) -> torch.Tensor:
    """The power of two next to each of some positive `values`: dividing by it rounds nothing."""
    return torch.exp2(values.clamp_min(2.0**-100).log2().round())


class FakeQuantize(nn.Module):
    """Maps a kernel `[out, ...]` to its quantized value. Base of `ClusterFakeQuantize` and `UniformFakeQuantize`.

    Subclasses are made from `(weight, config, qat_config)`, where a [`QuantizedWeight`] is the start. In the first
    `blend_steps` optimizer steps training goes over to the quantized value from the float kernel, of which the output
    has a linearly falling share (alpha-blending, arXiv 1903.01061). The state is persistent, part of every checkpoint;
    it includes a count of steps.

    Args:
        config: how weights are quantized. The forward pass rounds to its `codebook_dtype`, so that what is trained is
            what is stored.
        qat_config: how they train.
    """

    def __init__(self, config: ClusterConfig, qat_config: QATConfig):
        super().__init__()
        self.first_kernel: float | None = None  # a figure of the kernel that it was made for, if it is known
        self.codebook_dtype = CODEBOOK_DTYPES[config.codebook_dtype]
        self.blend_steps = qat_config.blend_steps
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._forget_steps()

    def _forget_steps(self) -> None:
        """Take the count of steps from the buffer again when it is needed, as it may have changed."""
        self.known_steps: int | None = None  # the buffer's value, known without a wait for the device
        self.blends = self.blend_steps > 0

    def forward(self, kernel: torch.Tensor) -> torch.Tensor:
        quantized = self.fake_quantize(kernel)
        if not (self.blends and self.training):
            return quantized
        return kernel.lerp(quantized, (self.steps / self.blend_steps).clamp_max(1).to(kernel.dtype))

    def fake_quantize(self, kernel: torch.Tensor) -> torch.Tensor:
        """The quantized value of `kernel`, with gradients for it and for what is learned of codebook and scale."""
        raise NotImplementedError

    def stored(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The codebook `[groups, 2**bits]` in the dtype that it is saved in, and the scale `[out]` or `None`."""
        raise NotImplementedError

    def codes(self, rows: torch.Tensor) -> torch.Tensor:
        """The uint8 codes `[out, n]` of a kernel's float32 `rows` `[out, n]`."""
        raise NotImplementedError

    @torch.no_grad()
    def quantized(self, kernel: torch.Tensor) -> QuantizedWeight:
        """Codes, codebook and scale for `kernel`, as they are saved."""
        codes = self.codes(to_rows(kernel.detach()).float())
        return QuantizedWeight(from_rows(codes, kernel.shape).contiguous(), *self.stored())

    def steps_taken(self) -> int:
        """How many optimizer steps were taken."""
        if self.known_steps is None:
            self.known_steps = int(self.steps)
        return self.known_steps

    @property
    def needs_steps(self) -> bool:
        """Whether training relies on [`step`] being called."""
        return self.blend_steps > 0

    def is_due(self) -> bool:
        """Whether the next [`step`] needs the kernel."""
        return False

    @torch.no_grad()
    def step(self, kernel: Callable[[], torch.Tensor]) -> None:
        """Do what is to be done after an optimizer step; `kernel` computes the new kernel, if that is needed."""
        due = self.is_due()
        self.known_steps = self.steps_taken() + 1
        self.steps += 1
        self.blends = self.known_steps < self.blend_steps
        if due:
            self.update(kernel())

    def update(self, kernel: torch.Tensor) -> None:
        """Move codebook and scale towards what suits `kernel`."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name, tensor in [*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]:
            loaded = state_dict.get(prefix + name)
            if loaded is not None and loaded.shape != tensor.shape:
                raise ValueError(
                    f"{prefix}{name} of the checkpoint is {list(loaded.shape)}, the model's {list(tensor.shape)}: it "
                    "was trained with other bits or another granularity. Call prepare_qat() with the options of the "
                    "checkpoint (qat_config in its config.json), or begin anew from a float checkpoint."
                )
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._forget_steps()
