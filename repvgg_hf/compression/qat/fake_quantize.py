"""Computing with a kernel's quantized value while the kernel trains."""

from collections.abc import Callable

import torch
from torch import nn

from ..codebooks.codes import (
    BINS_AN_ENTRY,
    decode_rows,
    from_rows,
    lookup_rows,
    lookup_table,
    quantize_rows,
    sums_by_code,
    to_rows,
)
from ..ptq.gptq import free_directions
from .oscillation import OscillationFreezing
from ..codebooks.weights import TINY, QuantizedWeight

CODEBOOK_UPDATES = ("kmeans", "gradient", "both")


class _Decode(torch.autograd.Function):
    """The rows that uint8 `codes` `[out, n]` were `decoded` to, as the kernel's quantized value.

    The kernel's gradient is that of its quantized value (straight-through), also outside the codebook's range: a weight
    there can come back. An entry's is the mean over the weights that it stands for, a channel scale's the mean over its
    channel, over the mean square of what it scales: a step of gradient descent then moves an entry as far as it moves
    those weights on average, and a scale so far that they grow as much. (The root of the number of weights in the place
    of the number, as LSQ has it for its steps, arXiv 1902.08153, makes training with SGD diverge.)
    """

    @staticmethod
    def forward(ctx, kernel, codebook, scale, codes, decoded, stored, project):
        ctx.project = project
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(codes, stored, scale)
        return from_rows(decoded, kernel.shape).to(kernel.dtype)

    @staticmethod
    def backward(ctx, grad_output):
        if not ctx.needs_input_grad[1]:
            return grad_output, None, None, None, None, None, None
        codes, codebook, scale = ctx.saved_tensors
        (out, n), (groups, k) = codes.shape, codebook.shape
        (sums,) = sums_by_code([to_rows(grad_output.float())], codes, k)  # [out, k]
        grad_scale, by_entry = None, sums
        if scale is not None:
            entries = codebook.repeat_interleave(out // groups, dim=0)
            square = (scale[:, None] * entries).square().mean(dim=1).clamp_min(TINY)
            grad_scale = (sums * entries).sum(dim=1) / (square * n)
            by_entry = sums * scale[:, None]
        weights_an_entry = max(1, out * n / (groups * k))
        grad_codebook = by_entry.view(groups, -1, k).sum(dim=1) / weights_an_entry
        return grad_output, ctx.project(grad_codebook), grad_scale, None, None, None, None


def power_of_two(values: torch.Tensor) -> torch.Tensor:
    """The power of two next to each of some positive `values`: dividing by it rounds nothing."""
    return torch.exp2(values.clamp_min(2.0**-100).log2().round())


class FakeQuantize(nn.Module):
    """Maps a kernel `[out, ...]` to its quantized value. Base of [`ClusterFakeQuantize`] and `UniformFakeQuantize`.

    In the first `blend_steps` steps training goes over to it from the float kernel, of which it is given a linearly
    falling share (alpha-blending, arXiv 1903.01061). Its state, a count of steps among it, is persistent: part of every
    checkpoint.
    """

    def __init__(
        self,
        codebook_dtype: torch.dtype,
        update_every: int = 1,
        freezing: OscillationFreezing | None = None,
        blend_steps: int = 0,
    ):
        super().__init__()
        self.codebook_dtype, self.update_every, self.freezing = codebook_dtype, update_every, freezing
        self.blend_steps, self.blends = blend_steps, blend_steps > 0
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.known_steps: int | None = 0  # the same without a wait for the device; None after loading

    def forward(self, kernel: torch.Tensor) -> torch.Tensor:
        quantized = self.fake_quantized(kernel)
        if not (self.blends and self.training):
            return quantized
        return kernel.lerp(quantized, (self.steps / self.blend_steps).clamp_max(1).to(kernel.dtype))

    def fake_quantized(self, kernel: torch.Tensor) -> torch.Tensor:
        """The quantized value of `kernel`, with gradients for it and for what is learned of codebook and scale."""
        raise NotImplementedError

    def stored(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The codebook `[groups, 2**bits]` in the dtype that it is saved in, and the scale `[out]` or `None`."""
        raise NotImplementedError

    def nearest(self, rows, codebook, scale) -> torch.Tensor:
        """uint8 codes of `rows` `[out, n]` with a float32 codebook."""
        raise NotImplementedError

    @torch.no_grad()
    def codes(self, kernel, codebook, scale) -> torch.Tensor:
        """uint8 codes `[out, n]` of `kernel`; those of frozen weights stay as they were."""
        codes = self.nearest(to_rows(kernel.detach()).float(), codebook, scale)
        return codes if self.freezing is None else self.freezing(codes)

    @torch.no_grad()
    def quantized(self, kernel: torch.Tensor) -> QuantizedWeight:
        """Codes, codebook and scale for `kernel`, as they are saved."""
        codebook, scale = self.stored()
        codes = self.codes(kernel, codebook.float(), scale)
        return QuantizedWeight(from_rows(codes, kernel.shape).contiguous(), codebook, scale)

    def count(self) -> int:
        """How many optimizer steps were taken."""
        if self.known_steps is None:
            self.known_steps = int(self.steps)
        return self.known_steps

    def is_due(self) -> bool:
        """Whether [`step`] needs the kernel next time."""
        return self.freezing is not None or (self.count() + 1) % self.update_every == 0

    @torch.no_grad()
    def step(self, kernel: Callable[[], torch.Tensor]) -> None:
        """What is to be done after an optimizer step; `kernel` computes the new kernel, if that is needed."""
        if self.is_due():
            kernel = kernel()
        self.known_steps = self.count() + 1
        self.steps += 1
        self.blends = self.known_steps < self.blend_steps
        if self.known_steps % self.update_every == 0:
            self.update(kernel)
        if self.freezing is not None:
            codebook, scale = self.stored()
            self.freezing.observe(self.nearest(to_rows(kernel.detach()).float(), codebook.float(), scale))

    def update(self, kernel: torch.Tensor) -> None:
        """What is done every `update_every` steps."""

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
        self.known_steps, self.blends = None, self.blend_steps > 0


class ClusterFakeQuantize(FakeQuantize):
    """Maps a kernel `[out, ...]` to its quantized value, with a codebook that follows the kernel as it trains.

    Args:
        weight: how post-training quantization codes the kernel; its codebook and scale are the start.
        codebook_dtype: in which the codebook will be stored. The forward pass rounds to it, so that what is trained is
            what is shipped.
        codebook_update: `"kmeans"`: [`update`] moves the entries and scales towards the least squared weight error;
            `"gradient"`: they are parameters that the optimizer moves; `"both"`.
        momentum: of the moving average of the codebook and the channel scale over optimizer steps, for k-means.
        update_every: steps between updates, which are as large as that many would be together.
        symmetric, preserve_zero: what the codebook must keep to, see `ClusterConfig`.
        freezing: state of the freezing of oscillating weights.
        blend_steps: in which training goes over from the float kernel.

    The float32 codebook `[groups, 2**bits]` and scale `[out]` are persistent. They are kept in such units that entries
    are as large as weights and scales are near 1, whatever the stored ones are: so the learning rate of a kernel, with
    SGD or Adam, suits them. A gradient step may put entries out of order: the forward pass sorts them.
    """

    def __init__(
        self,
        weight: QuantizedWeight,
        codebook_dtype: torch.dtype,
        codebook_update: str = "kmeans",
        momentum: float = 0.9,
        update_every: int = 1,
        symmetric: bool = False,
        preserve_zero: bool = False,
        freezing: OscillationFreezing | None = None,
        blend_steps: int = 0,
    ):
        super().__init__(codebook_dtype, update_every, freezing, blend_steps)
        self.codebook_update, self.momentum = codebook_update, momentum
        self.symmetric, self.preserve_zero = symmetric, preserve_zero
        self.out, self.weights = len(weight.codes), weight.codes.numel()
        self.kept = None  # what constants() returned last
        codebook, scale = weight.codebook.float().clone(), None
        if weight.scale is not None:
            groups = len(codebook)
            unit = power_of_two(weight.scale.view(groups, -1).amax(dim=1))
            self.register_buffer("unit", unit)  # [groups]
            codebook, scale = codebook * unit[:, None], weight.scale / self.channel_unit()
        if codebook_update == "kmeans":
            self.register_buffer("codebook", codebook)
            self.register_buffer("scale", scale)
        else:
            self.codebook = nn.Parameter(codebook)
            self.scale = None if scale is None else nn.Parameter(scale)

    def channel_unit(self) -> torch.Tensor:
        """The unit of each channel's scale, `[out]`."""
        return self.unit.repeat_interleave(self.out // len(self.unit))

    def ascending(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The codebook in order, and the positive scale: a gradient step may have swapped or negated some."""
        codebook = self.codebook.sort(dim=1).values
        if self.scale is None:
            return codebook, None
        return codebook / self.unit[:, None], (self.scale * self.channel_unit()).clamp_min(TINY)

    def rounded(self, codebook: torch.Tensor) -> torch.Tensor:
        """An ascending `codebook` in the dtype that it is saved in."""
        if self.codebook_dtype == torch.int8:
            return codebook.round().clamp(-127, 127).to(torch.int8)
        return codebook.to(self.codebook_dtype)

    @torch.no_grad()
    def stored(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        codebook, scale = self.ascending()
        return self.rounded(codebook), scale

    @torch.no_grad()
    def constants(self) -> tuple[torch.Tensor, torch.Tensor | None, tuple | None]:
        """What forward passes need between two updates of `"kmeans"`: codebook and scale as [`stored`], in float32, and
        the codebook's [`lookup_table`] if it stands for enough weights to be worth one.
        """
        state = [self.codebook] if self.scale is None else [self.codebook, self.scale]
        known = not torch.compiler.is_compiling() and not self.codebook.is_inference()
        versions = [(tensor, tensor._version) for tensor in state] if known else None
        if known and self.kept is not None and all(a is c and b == d for (a, b), (c, d) in zip(versions, self.kept[0])):
            return self.kept[1]
        codebook, scale = self.stored()
        codebook = codebook.float()
        constants = codebook, scale, self.table(codebook)
        self.kept = (versions, constants) if known else None
        return constants

    def table(self, codebook: torch.Tensor) -> tuple | None:
        """The [`lookup_table`] of a float32 `codebook`, `None` if comparing weights with the borders is quicker."""
        groups, k = codebook.shape
        return lookup_table(codebook) if groups == 1 and self.weights >= BINS_AN_ENTRY * k else None

    def nearest(self, rows, codebook, scale) -> torch.Tensor:
        table = self.table(codebook)
        if table is None:
            return quantize_rows(rows, codebook, scale, with_decoded=False)[0]
        return lookup_rows(rows, scale, table)

    def fake_quantized(self, kernel: torch.Tensor) -> torch.Tensor:
        if self.codebook_update == "kmeans" and self.freezing is None:
            codebook, scale, table = self.constants()
            rows = to_rows(kernel.detach()).float()
            with torch.no_grad():
                if table is None:
                    _, decoded = quantize_rows(rows, codebook, scale)
                else:
                    decoded = lookup_rows(rows, scale, table, decode=True)
            return _Decode.apply(kernel, None, None, None, decoded, None, None)
        codebook, scale = self.ascending()
        stored = self.rounded(codebook.detach()).float()
        detached = None if scale is None else scale.detach()
        codes = self.codes(kernel, stored, detached)
        decoded = decode_rows(codes, stored, detached)
        return _Decode.apply(kernel, codebook, scale, codes, decoded, stored, free_directions(stored, self))

    @torch.no_grad()
    def update(self, kernel: torch.Tensor) -> None:
        """One k-means step on `kernel`: move the entries towards the means of their weights, then the scales.

        An entry that stands for no weight gets half of the weights of the entry with the largest squared error.
        """
        rows = to_rows(kernel.detach())
        codebook, scale = self.ascending()
        (out, _), (groups, k) = rows.shape, codebook.shape
        codes = self.nearest(rows.float(), codebook, scale)
        rows = rows.double()  # as a GPU adds in any order and ranks should agree
        counts, sums = sums_by_code([rows.new_ones(1, 1).expand(rows.shape), rows], codes, k)  # [out, k]
        factor = rows.new_ones(out, 1) if scale is None else scale.double()[:, None]

        def by_group(values):
            return values.view(groups, -1, k).sum(dim=1)

        # the least squares entry of sum_i (w_i - s_i c)^2
        denominator = by_group(factor.square() * counts)
        means = torch.where(denominator > 0, by_group(factor * sums) / denominator.clamp_min(1e-300), codebook.double())
        project = free_directions(codebook, self)
        share = 1 - self.momentum**self.update_every
        if self.codebook_update != "gradient":
            codebook = codebook + project(means.float() - codebook) * share
        if scale is not None and self.codebook_update != "gradient":
            entries = codebook.double().repeat_interleave(out // groups, dim=0)
            fitted = (sums * entries).sum(dim=1) / (counts * entries.square()).sum(dim=1).clamp_min(1e-300)
            self.scale.copy_(torch.where(fitted > 0, scale.lerp(fitted.float(), share), scale) / self.channel_unit())
        if (denominator == 0).any():
            squares = by_group(*sums_by_code([rows.square()], codes, k))
            codebook = codebook + project(self._revival(codebook, means, denominator, squares))
        codebook = codebook if scale is None else codebook * self.unit[:, None]
        self.codebook.copy_(codebook.sort(dim=1).values)

    @staticmethod
    def _revival(codebook, means, denominator, squares) -> torch.Tensor:
        """The step that takes one unused entry of each codebook a standard deviation above the mean of the worst."""
        errors = squares - means.square() * denominator  # of the weights of each entry, [groups, k]
        error, worst = errors.max(dim=1, keepdim=True)
        unused = denominator == 0
        first = unused & (unused.cumsum(dim=1) == 1)
        # less than rounding makes is no error: an entry for each distinct weight has none
        first &= error > 1e-10 * squares.sum(dim=1, keepdim=True)
        deviation = (error.clamp_min(0) / denominator.gather(1, worst).clamp_min(1e-300)).sqrt()
        target = means.gather(1, worst) + deviation
        return torch.where(first, target - codebook, 0.0).float()

    def extra_repr(self) -> str:
        scale = ", channel_scale" if self.scale is not None else ""
        return f"codebooks={list(self.codebook.shape)}{scale}, {self.codebook_update}, momentum={self.momentum}"
