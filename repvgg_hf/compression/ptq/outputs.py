"""What a model puts out, in whatever form: its floating point tensors, how far two sets of them are apart, a loss."""

import dataclasses
import inspect
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from .model_inputs import ModelInputs


def floating_outputs(outputs) -> list[torch.Tensor]:
    """List the floating point tensors, complex ones left out, in the outputs of a model: a tensor, a tuple, a mapping.

    A data class counts as the mapping of its fields, and so on inside of these.
    """
    if isinstance(outputs, torch.Tensor):
        return [outputs] if outputs.is_floating_point() else []
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    elif dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        outputs = [getattr(outputs, field.name) for field in dataclasses.fields(outputs)]
    if not isinstance(outputs, (list, tuple)):
        return []
    return [tensor for entry in outputs for tensor in floating_outputs(entry)]


def logits_of(model: nn.Module, outputs) -> torch.Tensor | None:
    """Return the `[batch, classes]` scores of a classifier, a model whose configuration has classes; else `None`.

    Only for these is it known that the outputs are scores before a softmax.
    """
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    classes = getattr(getattr(model, "config", None), "num_labels", 0)
    is_classifier = isinstance(logits, torch.Tensor) and logits.dim() == 2 and classes and classes > 1
    regression = getattr(getattr(model, "config", None), "problem_type", None) == "regression"
    return logits if is_classifier and not regression else None


def require_finite_outputs(model: nn.Module, outputs) -> None:
    """Raise `ValueError` if the first floating point tensor that `model` puts out is not finite."""
    found = floating_outputs(outputs)
    if found and not found[0].isfinite().all():
        raise ValueError(
            f"{type(model).__name__} puts out NaN or infinite values for the first calibration examples: look for "
            "extreme values in its weights and batch norms, and train or load it again."
        )


def comparable_outputs(model: nn.Module, outputs) -> list[torch.Tensor]:
    """List what outputs are compared by: a classifier's scores alone, or all floating point tensors.

    Raises `ValueError` if there are none.
    """
    logits = logits_of(model, outputs)
    found = floating_outputs(outputs) if logits is None else [logits]
    if not found:
        raise ValueError(
            f"{type(model).__name__} puts out a {type(outputs).__name__} without a floating point tensor, and how far "
            "outputs move can't be measured: wrap it in a module that returns tensors, a tuple or a mapping."
        )
    return found


def class_distance(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the mean Kullback-Leibler divergence of predictions from the `wanted` ones, logits `[batch, classes]`."""
    expected = wanted.log_softmax(dim=1)
    return F.kl_div(logits.log_softmax(dim=1), expected, log_target=True, reduction="batchmean")


def relative_error(outputs: list[torch.Tensor], wanted: list[torch.Tensor]) -> torch.Tensor:
    """Return the squared error of each output over the mean square of the `wanted` one, mean over the outputs.

    An output that is not finite, such as the scores of places that a mask excludes, is left out.
    """
    errors = [
        F.mse_loss(output, expected) / expected.square().mean().clamp_min(1e-30)
        for output, expected in zip(outputs, wanted)
        if output.shape == expected.shape and expected.isfinite().all()
    ]
    return torch.stack(errors).mean()


def calibration_loss(model: nn.Module, inputs: ModelInputs, generator: torch.Generator) -> torch.Tensor:
    """Return the loss, 0-dim, whose gradients say how much a weight matters for these `inputs`.

    With labels it is the model's own, or the cross-entropy for a model without a loss that puts out scores `[batch,
    classes]`. Without labels a classifier takes what it predicts. For any other model it is a random combination of
    each output over the output's norm: the expected square of its gradient is what a change of a weight by one changes
    the outputs by, as their [`relative_error`].
    """
    names = inspect.signature(model.forward).parameters
    takes_labels = inputs.labels and all(name in names for name in inputs.labels)
    outputs = inputs.run(model, with_labels=bool(takes_labels))
    if takes_labels:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if loss is None:
            raise ValueError(
                f"{type(model).__name__} gives no loss for the labels {', '.join(inputs.labels)} of the calibration "
                "data: leave them out, and the outputs themselves are measured."
            )
        return loss
    if inputs.labels:
        return _cross_entropy(model, floating_outputs(outputs), inputs.labels)
    logits = logits_of(model, outputs)
    if logits is not None:
        return F.cross_entropy(logits, logits.argmax(dim=1))
    return _random_combination(model, comparable_outputs(model, outputs), generator)


def _random_combination(model: nn.Module, outputs: list[torch.Tensor], generator: torch.Generator) -> torch.Tensor:
    """Return the sum of each output times random signs, over its norm; 0-dim."""
    usable = [output for output in outputs if output.requires_grad and output.isfinite().all()]
    if not usable:
        raise ValueError(
            f"The outputs of {type(model).__name__} have no gradient, or are not finite, and the sensitivity of its "
            "weights can't be measured: use sensitivity='none'."
        )
    parts = []
    for output in usable:
        signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
        parts.append((signs * output).sum() / output.detach().norm().clamp_min(1e-30))
    return torch.stack(parts).sum()


def _cross_entropy(model: nn.Module, outputs: list[torch.Tensor], labels: dict) -> torch.Tensor:
    """Return the cross-entropy of a plain module's scores. Raises `ValueError` if they and the labels don't fit."""
    target = labels.get("labels")
    fits = (
        outputs
        and outputs[0].dim() == 2
        and isinstance(target, torch.Tensor)
        and target.dim() == 1
        and not target.is_floating_point()
        and len(target) == len(outputs[0])
    )
    if not fits:
        found = list(outputs[0].shape) if outputs else "no floating point tensor"
        raise ValueError(
            f"{type(model).__name__}.forward takes no {', '.join(labels)}, and puts out {found}, which is no class "
            "scores for integer labels: leave the labels out of the calibration data, and the outputs themselves are "
            "measured."
        )
    return F.cross_entropy(outputs[0], target)
