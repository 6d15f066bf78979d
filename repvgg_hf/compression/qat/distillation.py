"""Training a quantized model on the outputs of the float model (arXiv 1503.02531, 1711.05852)."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from ...runtime.marker import has_own_code


def distillation_loss(logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """The Kullback-Leibler divergence of the student's class probabilities from the teacher's, mean over the images.

    Both logits are `[batch, classes]`. The result, 0-dim, is multiplied by `temperature**2`, which keeps the size of
    the gradient (arXiv 1503.02531).
    """
    student, teacher = (F.log_softmax(values.float() / temperature, dim=-1) for values in (logits, teacher_logits))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def feature_loss(features: tuple[torch.Tensor, ...], teacher_features: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The mean squared difference of feature maps over the teacher's mean square, mean over the maps; 0-dim.

    Each map is `[batch, channels, height, width]`.
    """
    losses = [
        F.mse_loss(feature.float(), wanted.float()) / wanted.float().square().mean().clamp_min(1e-12)
        for feature, wanted in zip(features, teacher_features)
    ]
    return torch.stack(losses).mean()


class Distillation:
    """The loss of a student that learns from its labels and from a teacher, which is the float model it began as.

    It is no module, so that the teacher gets into no checkpoint.

    Args:
        teacher: a float classifier, whose outputs have `logits` or are them; it is copied, and the copy frozen and, if
            it has blocks of branches, fused.
        weight: share of the teacher in the loss, 0 to 1; the labels have the rest.
        temperature: what both logits are divided by before their probabilities are compared.
        features: weight of the stages' outputs in the loss, added to both, see [`feature_loss`]; 0 for none.

    Raises `ValueError` that names the argument and what it accepts.

    Example:
    ```python
    >>> import torch
    >>> from repvgg_hf import Distillation, RepVGGConfig, RepVGGForImageClassification

    >>> model = RepVGGForImageClassification(RepVGGConfig())
    >>> distillation = Distillation(model)  # of the float model
    >>> model = model.prepare_qat(bits=2).train()

    >>> batch = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
    >>> outputs = model(**batch, output_hidden_states=distillation.needs_features)
    >>> distillation(outputs, batch["pixel_values"]).backward()
    ```

    With `Trainer`, the last two lines are a subclass's `compute_loss`.
    """

    def __init__(self, teacher: nn.Module, weight: float = 1.0, temperature: float = 2.0, features: float = 0.0):
        if not 0 <= weight <= 1:
            raise ValueError(f"weight must be from 0 (labels alone) to 1 (teacher alone), got {weight!r}.")
        if not temperature > 0 or features < 0:
            raise ValueError(
                f"temperature must be positive and features at least 0, got {temperature!r} and {features!r}."
            )
        self.teacher = copy.deepcopy(teacher).eval()
        if has_own_code(self.teacher):
            self.teacher.reparameterize()
        self.teacher.requires_grad_(False)
        self.weight, self.temperature, self.features = weight, temperature, features
        self.needs_features = features > 0

    def __call__(self, outputs, pixel_values: torch.Tensor) -> torch.Tensor:
        """The loss, 0-dim, for the student's `outputs` on `pixel_values`; `outputs.loss` is that of the labels."""
        if next(self.teacher.parameters()).device != pixel_values.device:
            self.teacher.to(pixel_values.device)
        with torch.no_grad():
            options = {"output_hidden_states": True} if self.needs_features else {}
            wanted = self.teacher(pixel_values, **options)
        logits, wanted_logits = _logits_of(outputs), _logits_of(wanted)
        if wanted_logits.shape != logits.shape:
            raise ValueError(
                f"The teacher has {wanted_logits.shape[-1]} classes, the student {logits.shape[-1]}: distill "
                "from a model with the same head."
            )
        loss = self.weight * distillation_loss(logits, wanted_logits, self.temperature)
        if self.weight < 1:
            if getattr(outputs, "loss", None) is None:
                raise ValueError(
                    f"weight={self.weight} gives the labels a share of the loss, and the student's outputs have none: "
                    "pass it labels, or add their loss yourself and set weight=1."
                )
            loss = loss + (1 - self.weight) * outputs.loss
        if self.needs_features:
            loss = loss + self.features * feature_loss(outputs.hidden_states, wanted.hidden_states)
        return loss


def _logits_of(outputs) -> torch.Tensor:
    return outputs if isinstance(outputs, torch.Tensor) else outputs.logits
