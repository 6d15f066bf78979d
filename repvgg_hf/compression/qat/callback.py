"""What a training loop does in each optimizer step of quantization-aware training."""

import contextlib

import torch
from torch import nn
from transformers import TrainerCallback

from .distributed import gathered
from .layers import qat_layers


@torch.no_grad()
def update_codebooks(model: nn.Module) -> None:
    """Move what is to be moved after an optimizer step. Call it once after each one, on every rank.

    Kernels that `fully_shard` (FSDP) has spread over the ranks are gathered for it. FSDP takes contiguous parameters
    only: call `model.to(memory_format=torch.contiguous_format)` after `prepare_qat`.
    """
    layers = qat_layers(model).values()
    due = any(layer.weight_fake_quant.is_due() for layer in layers)
    with gathered(model) if due else contextlib.nullcontext():
        for layer in layers:
            layer.weight_fake_quant.step(layer.kernel)


def check_gradients(model: nn.Module, step: int) -> None:
    """Raise `RuntimeError` naming the step and the layer if a gradient is NaN or infinite.

    Call it before the optimizer uses them: the parameters are then still good.
    """
    named = [(name, parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None]
    if named and not nn.utils.get_total_norm([gradient for _, gradient in named]).isfinite():
        raise diverged(model, step)


def diverged(model: nn.Module, step: int) -> RuntimeError:
    """The error, to be raised, that names where the gradients of `model` are not finite."""
    names = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not parameter.grad.isfinite().all()
    ]
    where = f"of {names[0]} and {len(names) - 1} other parameters" if names else "as a whole"
    return RuntimeError(
        f"The gradients {where} are NaN or infinite in optimizer step {step}: lower the learning rate, or go on from "
        "an earlier checkpoint. This step was not taken, checkpoints before it are good."
    )


class QATCallback(TrainerCallback):
    """Moves the codebooks after every optimizer step of a `Trainer`, and stops it with a `RuntimeError` if it diverges.

    (With fp16 a loss scaler skips steps whose gradients are too large: there nothing is checked.)
    """

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not args.fp16:
            check_gradients(model, state.global_step + 1)

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        update_codebooks(model)
