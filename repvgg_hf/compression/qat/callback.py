"""What a training loop does in each optimizer step of quantization-aware training."""

import contextlib
import math

import torch
from torch import nn
from transformers import TrainerCallback

from ...runtime.logs import get_logger
from .distributed import gathered
from .layers import qat_layers

logger = get_logger(__name__)


@torch.no_grad()
def update_codebooks(model: nn.Module) -> None:
    """Move what is to be moved after an optimizer step. Call it once after each one, on every rank.

    Kernels that `fully_shard` (FSDP) has spread over the ranks are gathered for it.
    """
    layers = qat_layers(model).values()
    due = any(layer.weight_fake_quant.is_due() for layer in layers)
    with gathered(model) if due else contextlib.nullcontext():
        for layer in layers:
            layer.weight_fake_quant.step(layer.kernel)


def figure_of(kernel: torch.Tensor) -> float | None:
    """Return a figure that is another one when `kernel` was trained; `None` if there is none without other ranks."""
    if kernel.is_meta or hasattr(kernel, "full_tensor"):
        return None
    return kernel.detach().double().square().sum().item()


def _roundings(layer) -> float:
    """Return by how much, relatively, the figure of a kernel may change if it is stored in another dtype."""
    dtypes = [parameter.dtype for parameter in layer.parameters() if parameter.is_floating_point()]
    return max([1e-7, *(torch.finfo(dtype).eps for dtype in dtypes if dtype != torch.float32)])


@torch.no_grad()
def warn_of_unmoved_codebooks(model: nn.Module) -> None:
    """Log if a prepared `model` was trained without [`update_codebooks`], which its codebooks or blending rely on."""
    layers = {name: layer for name, layer in qat_layers(model).items() if layer.weight_fake_quant.needs_steps}
    if not layers or any(layer.weight_fake_quant.steps_taken() for layer in layers.values()):
        return
    for name, layer in layers.items():
        before, now = layer.weight_fake_quant.first_kernel, figure_of(layer.kernel())
        if before is not None and now is not None and not math.isclose(before, now, rel_tol=_roundings(layer)):
            logger.warning(
                "The kernel of %r was trained and its codebook stayed as prepare_qat() made it, as in all %d layers: "
                "call repvgg_hf.update_codebooks(model) after each optimizer step, or give Trainer a QATCallback().",
                name, len(layers),
            )  # fmt: skip
            return


def check_gradients(model: nn.Module, step: int) -> None:
    """Raise `RuntimeError` naming the step and the layer if a gradient is NaN or infinite.

    Call it before the optimizer uses them: the parameters are then still good.
    """
    GradientCheck(model, step).require_finite()


class GradientCheck:
    """Which gradients of `model` are not finite, before the optimizer's `step` takes them.

    An accelerator finds it out by and by: nothing here waits for it until the result is asked for.
    """

    def __init__(self, model: nn.Module, step: int):
        self.step = step
        gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        self.names = list(gradients)
        self.good, self.copied = None, None
        if not gradients:
            return
        norms = [norm.to(next(iter(gradients.values())).device) for norm in torch._foreach_norm([*gradients.values()])]
        norms = torch.stack(norms)
        # that of all, too, by which they are clipped: it overflows before they do
        good = torch.cat([norms, torch.linalg.vector_norm(norms)[None]]).isfinite()
        good = good.full_tensor() if hasattr(good, "full_tensor") else good  # of parameters spread over ranks
        self.good = good.to("cpu", non_blocking=True)
        if good.device.type != "cpu":
            self.copied = torch.Event(good.device)
            self.copied.record()

    def require_finite(self, step_was_taken: bool = False) -> None:
        """Raise `RuntimeError` if they are not, and wait for the answer if it has not come yet."""
        if self.copied is not None:
            self.copied.synchronize()
        if self.good is not None and not self.good.all():
            bad = [name for name, good in zip(self.names, self.good.tolist()) if not good]
            raise _error(bad, self.step, step_was_taken)


class GradientWatch:
    """Stops training with a `RuntimeError` when gradients are not finite, without waiting for an accelerator.

    On a CPU it stops before the step is taken. What an accelerator finds of one step's gradients is read before the
    next step: the model in memory is then spoiled, and what is saved after a [`read`] never is.
    """

    def __init__(self):
        self.unread: GradientCheck | None = None

    def look(self, model: nn.Module, step: int) -> None:
        """Look at the gradients that the optimizer is about to take in `step`; call it before each one."""
        self.read()
        check = GradientCheck(model, step)
        if check.copied is None:  # known already
            check.require_finite()
        else:
            self.unread = check

    def read(self) -> None:
        """Raise the error if the last step's gradients were not finite; call it before anything is saved."""
        check, self.unread = self.unread, None
        if check is not None:
            check.require_finite(step_was_taken=True)


def _error(names: list[str], step: int, step_was_taken: bool) -> RuntimeError:
    """The error that `names` the parameters whose gradients are not finite in a `step`."""
    where = f"of {names[0]} and {len(names) - 1} other parameters" if names else "as a whole"
    end = "This step was not taken, checkpoints before it are good."
    if step_was_taken:
        end = "The step was taken before that was known, and spoiled the model in memory; all checkpoints are good."
    return RuntimeError(
        f"The gradients {where} are NaN or infinite in optimizer step {step}: lower the learning rate, or go on from "
        f"an earlier checkpoint. {end}"
    )


def require_resumed(model: nn.Module, step: int) -> None:
    """Raise `RuntimeError` if training goes on after `step` and a fake quantizer of `model` was not loaded.

    `Trainer` only warns of tensors that a checkpoint does not have under the model's names.
    """
    for name, layer in qat_layers(model).items():
        taken = layer.weight_fake_quant.steps_taken()
        if taken < step:
            raise RuntimeError(
                f"Training resumes after step {step}, and the fake quantizer of {name!r} has taken {taken}: the "
                "checkpoint is of a model that was not prepared for QAT, or has other names for its layers. Call "
                "prepare_qat() with the options of that training, and resume from a checkpoint that it saved."
            )


class QATCallback(TrainerCallback):
    """Moves the codebooks after every optimizer step of a `Trainer`, and stops it with a `RuntimeError` if it diverges.

    On a CPU it stops before the step is taken. An accelerator is not waited for (see [`GradientWatch`]): what it finds
    is read before the next step, and before anything is evaluated or saved. The model in memory is then spoiled, and
    no checkpoint is.

    (With fp16 a loss scaler skips steps whose gradients are too large: there nothing is checked.)
    """

    def __init__(self):
        self.watch = GradientWatch()

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.watch = GradientWatch()
        require_resumed(model, state.global_step)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not args.fp16:
            self.watch.look(model, state.global_step + 1)

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        update_codebooks(model)

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save or control.should_evaluate or control.should_training_stop:
            self.watch.read()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.watch.read()

    def on_train_end(self, args, state, control, **kwargs):
        self.watch.read()
