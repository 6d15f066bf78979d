"""Tuning a calibrated model end to end: what codes stand for follows the gradient of the float model's outputs.

Calibration settles one layer after the other, and each of them for its own output. Here the codes stay as they are, and
the codebooks, channel scales and biases of all layers are trained together, on the calibration data alone and without
labels: for the outputs of the float model, and for those of its layers, so that few examples are enough. It is what
EfficientQAT (arXiv 2407.11062) does with steps after its training block by block, and AQLM (arXiv 2401.06118) with
codebooks.
"""

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from transformers.utils import logging

from ...runtime.layer_swaps import LastMap
from ...runtime.logs import get_logger
from ...runtime.quantization_cluster import ClusterConfig
from ..codebooks.bias import settle_bias
from ..codebooks.codes import decode, sums_by_code
from ..layers import QuantizedLayer
from .config import CalibrationConfig
from .data import CalibrationData
from .hooks import every_layer_runs, round_input, round_output
from .model_inputs import ModelInputs
from .outputs import class_distance, comparable_outputs, logits_of

logger = get_logger(__name__)

LEAST = 1e-3  # share of a layer's mean square over all data that an error is at least divided by
EXACT = 1e-12  # loss of a model that needs no tuning
NEAR = 1e-4  # distance of outputs below which it may grow for the layers' sake


class _Decode(torch.autograd.Function):
    """The weight that `codes` `[out, ...]` stand for, with gradients for the codebook and the scale."""

    @staticmethod
    def forward(ctx, codebook, scale, codes):
        ctx.save_for_backward(codebook, scale, codes)
        return decode(codes, codebook, scale)

    @staticmethod
    def backward(ctx, grad_output):
        codebook, scale, codes = ctx.saved_tensors
        (groups, k), out = codebook.shape, len(codes)
        rows = grad_output.contiguous().flatten(1)
        sums = sums_by_code([rows], codes.flatten(1), k)[0].view(groups, out // groups, k)
        grad_scale = None
        if scale is not None:
            grad_scale = (sums * codebook[:, None]).sum(dim=2).view(out)
            sums = sums * scale.view(groups, -1, 1)
        return sums.sum(dim=1), grad_scale, None


class TunedLayer:
    """The parameters of one layer, each a change in units of what is there: Adam moves all by as much.

    Args:
        layer: as calibration left it.
        evenly_spaced: whether the entries of its codebook stay evenly spaced, so that one factor moves all of them;
            that of integers stays as it is in any case.
    """

    def __init__(self, layer: QuantizedLayer, evenly_spaced: bool):
        weight = layer.weight
        self.layer, self.codebook = layer, weight.codebook.float()
        self.is_free = weight.codebook.is_floating_point() and not evenly_spaced
        self.has_factor = weight.codebook.is_floating_point() and evenly_spaced and weight.scale is None
        self.parameters: dict[str, nn.Parameter] = {}
        if self.is_free:
            self.codebook_unit = self.codebook.abs().mean(dim=1, keepdim=True)
            self._add("codebook", self.codebook)
        elif self.has_factor:
            self._add("factor", self.codebook[:, :1])
        if weight.scale is not None:
            self._add("scale", weight.scale)
        if layer.bias is not None:
            # a layer without biases so far: as much as an output of its weights
            size = layer.bias.float().abs().mean()
            self.bias_unit = torch.where(size > 0, size, weight.decoded().flatten(1).norm(dim=1).mean())
            self._add("bias", layer.bias)

    def _add(self, name: str, like: torch.Tensor) -> None:
        self.parameters[name] = nn.Parameter(torch.zeros_like(like, dtype=torch.float32))

    def values(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Return (codebook, scale, bias) as they are now, float32; differentiable."""
        change, codebook, layer = self.parameters, self.codebook, self.layer
        if self.is_free:
            codebook = codebook + self.codebook_unit * change["codebook"]
        elif self.has_factor:
            codebook = codebook * change["factor"].exp()
        scale = None if layer.weight.scale is None else layer.weight.scale * change["scale"].exp()
        bias = None if layer.bias is None else layer.bias.float() + self.bias_unit * change["bias"]
        return codebook, scale, bias

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Return weight and bias of the layer `name`, under their names in the model; differentiable."""
        codebook, scale, bias = self.values()
        weight = _Decode.apply(codebook, scale, self.layer.weight.codes)
        return {f"{name}.weight": weight} | ({} if bias is None else {f"{name}.bias": bias})

    @torch.no_grad()
    def result(self) -> QuantizedLayer:
        """Return the layer with what its parameters have become."""
        codebook, scale, bias = self.values()
        weight = replace(self.layer.weight, scale=scale)
        if self.is_free or self.has_factor:
            weight = weight.with_codebook(codebook)
        if self.layer.input_range is not None:
            weight, bias = settle_bias(weight, bias, self.layer.input_range[0])
        return replace(self.layer, weight=weight, bias=bias)


class Calls:
    """What the layers of a network put out in a forward pass, by name and number of the call."""

    def __init__(self):
        self.outputs: dict[tuple[str, int], torch.Tensor] = {}
        self.counts: Counter[str] = Counter()

    def add(self, name: str, output: torch.Tensor) -> None:
        self.outputs[name, self.counts[name]] = output
        self.counts[name] += 1

    def clear(self) -> None:
        self.outputs.clear()
        self.counts.clear()


class Tuning:
    """Compares a network with the float one that it is a copy of, with some layers' tensors in place of its own.

    Args:
        float_model: in eval mode.
        layers: its quantized layers by name.
        config: has the bits of inputs, if these are quantized.
        last_map: what else is rounded, see `calibrate`.
    """

    def __init__(
        self, float_model: nn.Module, layers: dict[str, QuantizedLayer], config: ClusterConfig, last_map: LastMap | None
    ):
        self.float_model, self.model = float_model, copy.deepcopy(float_model).requires_grad_(False)
        self.wanted, self.found = Calls(), Calls()
        self.least: dict[str, torch.Tensor] = {}
        for name, layer in layers.items():
            quantized = self.model.get_submodule(name)
            if layer.input_range is not None:
                round_input(quantized, _rounding(*layer.input_range, config.activation_bits))
            if layer.output_range is not None and last_map is not None:
                round_output(quantized, _rounding(*layer.output_range, config.activation_bits))
        self.names = list(layers)

    @contextlib.contextmanager
    def watching(self, data: CalibrationData) -> Iterator[None]:
        """A context in which both networks leave what their layers put out in `wanted` and `found`.

        What the float layers put out for all data is looked at first: its mean square bounds what an error is divided
        by, as a layer may put out nothing at all for some batch.
        """
        handles = []
        for model, calls in ((self.float_model, self.wanted), (self.model, self.found)):
            for name in self.names:

                def keep(module, args, output, calls=calls, name=name):
                    calls.add(name, output)

                handles.append(model.get_submodule(name).register_forward_hook(keep))
        try:
            with every_layer_runs():
                self._measure(data)
                yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _measure(self, data: CalibrationData) -> None:
        squares: dict[str, list[torch.Tensor]] = {}
        for batch in data.batches:
            self.wanted.clear()
            batch.run(self.float_model)
            for (name, _), output in self.wanted.outputs.items():
                squares.setdefault(name, []).append(output.square().mean())
        means = {name: torch.stack(found).nanmean() for name, found in squares.items()}
        self.least = {name: LEAST * mean for name, mean in means.items() if mean > 0}

    def loss(self, batch: ModelInputs, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return how far the network with these `tensors` is from the float one on a batch: outputs, layers; 0-dim.

        Layers that are not called as often, or with as many examples (an expert of a mixture, say), are left out, and
        so are those that never put out anything but zero.
        """
        self.wanted.clear()
        self.found.clear()
        with torch.no_grad():
            outputs = batch.run(self.float_model)
            wanted, is_classifier = comparable_outputs(self.float_model, outputs), logits_of(self.float_model, outputs)
        # a layer that is tied to one that stays float is quantized by itself
        outputs = functional_call(self.model, tensors, batch.args, batch.kwargs, tie_weights=False)
        found = comparable_outputs(self.model, outputs)
        distance = _output_error(found, wanted) if is_classifier is None else class_distance(found[0], wanted[0])
        errors = []
        for call, output in self.found.outputs.items():
            expected = self.wanted.outputs.get(call)
            if expected is not None and expected.shape == output.shape and output.numel() and call[0] in self.least:
                square = expected.square().mean().maximum(self.least[call[0]])
                errors.append(F.mse_loss(output, expected) / square)
        return distance, torch.stack(errors).mean() if errors else torch.zeros_like(distance)


def _output_error(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> torch.Tensor:
    """Return the mean relative squared error of outputs, at the places where the `wanted` ones are finite; 0-dim."""
    errors = [torch.zeros((), device=wanted[0].device)]
    for output, expected in zip(found, wanted):
        if output.shape == expected.shape:
            finite = expected.isfinite()
            expected = torch.where(finite, expected, 0.0)
            difference = torch.where(finite, output, 0.0) - expected
            errors.append(difference.square().mean() / expected.square().mean().clamp_min(1e-12))
    return torch.stack(errors).sum() / max(1, len(errors) - 1)


def _rounding(scale: float, zero_point: int, bits: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the rounding of `fake_quantize`, with the gradient of the identity inside the range."""
    return lambda x: torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, 2**bits - 1)


def tune(
    model: nn.Module,
    layers: dict[str, QuantizedLayer],
    config: ClusterConfig,
    data: CalibrationData,
    options: CalibrationConfig,
    last_map: LastMap | None = None,
) -> dict[str, QuantizedLayer]:
    """Train codebooks, scales and biases of the quantized `layers` of the float `model` for `options.tuning_steps`.

    Each step takes a batch of the data, in an order that is the same in every run; the learning rate of Adam falls to
    zero with a cosine. Returns the layers as they came, with a warning, if the loss over all data has not become less.
    """
    evenly_spaced = config.quantization_method.evenly_spaced
    tuned = {name: TunedLayer(layer, evenly_spaced) for name, layer in layers.items()}
    parameters = [parameter for layer in tuned.values() for parameter in layer.parameters.values()]
    tuning, generator = Tuning(model, layers, config, last_map), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(parameters, options.tuning_learning_rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.tuning_steps)
    with tuning.watching(data):
        before = _mean_loss(tuning, data, layers)
        if sum(before) < EXACT:
            return layers
        with torch.enable_grad():
            for batch in logging.tqdm(_batches(data, options.tuning_steps, generator), desc="Tuning"):
                tensors = [layer.tensors(name) for name, layer in tuned.items()]
                loss = sum(tuning.loss(batch, {name: tensor for part in tensors for name, tensor in part.items()}))
                if not loss.requires_grad:
                    raise ValueError(
                        f"The outputs of {type(model).__name__} have no gradient, as where forward runs under "
                        "torch.no_grad(), and tuning follows it: leave tuning_steps out."
                    )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
        results = {name: layer.result() for name, layer in tuned.items()}
        after = _mean_loss(tuning, data, results)
    if not (after[0] <= max(before[0], NEAR) and sum(after) < sum(before)):
        logger.warning(
            "Tuning for %d steps has not brought outputs nearer to the float model's (a distance of %.3g before, %.3g "
            "after; of the layers' outputs %.3g and %.3g), and is undone: lower tuning_learning_rate, or leave "
            "tuning_steps out.",
            options.tuning_steps, before[0], after[0], before[1], after[1],
        )  # fmt: skip
        return layers
    return results


def _batches(data: CalibrationData, steps: int, generator: torch.Generator) -> list[ModelInputs]:
    """Return as many batches of the data as there are steps: all of them in turns, each time in another order."""
    epochs = -(-steps // len(data.batches))
    order = [index for _ in range(epochs) for index in torch.randperm(len(data.batches), generator=generator).tolist()]
    return [data.batches[index] for index in order[:steps]]


@torch.no_grad()
def _mean_loss(tuning: Tuning, data: CalibrationData, layers: dict[str, QuantizedLayer]) -> tuple[float, float]:
    """Return the mean losses of the quantized `layers` over all data: of the outputs, and of the layers."""
    tensors = {f"{name}.weight": layer.weight.decoded() for name, layer in layers.items()}
    tensors |= {f"{name}.bias": layer.bias for name, layer in layers.items() if layer.bias is not None}
    losses = torch.stack([torch.stack(tuning.loss(batch, tensors)) for batch in data.batches])  # [batches, 2]
    weights = torch.tensor([len(batch) for batch in data.batches], dtype=losses.dtype, device=losses.device)
    distance, error = ((losses * weights[:, None]).sum(dim=0) / weights.sum()).tolist()
    return distance, error
