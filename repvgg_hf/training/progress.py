"""What a training says while it runs: one line for each evaluation, and a sentence at its end."""

import shlex
import time

from transformers import TrainerCallback

from repvgg_hf.analysis.uncertainty import wilson_interval


class ProgressLines(TrainerCallback):
    """Prints a line with epoch, loss, accuracy, speed and the time that is left, on the main process.

    Args:
        images_per_step: of all processes in an optimizer step.
    """

    def __init__(self, images_per_step: int):
        self.images_per_step = images_per_step
        self.loss: float | None = None
        self.validated = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = self.since = time.perf_counter()
        self.first_step = self.last_step = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is None or "loss" not in logs:
            return
        self.loss = float(logs["loss"])
        self.trained = time.perf_counter()
        if not control.should_evaluate:
            self._print(state, "")

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if self.loss is not None:
            self._print(state, f"  validation {metrics['eval_top1']:5.1f} %")

    def _print(self, state, validation: str) -> None:
        now, steps = time.perf_counter(), state.global_step - self.last_step
        speed = steps * self.images_per_step / max(self.trained - self.since, 1e-9)
        left = (
            (now - self.started) / max(state.global_step - self.first_step, 1) * (state.max_steps - state.global_step)
        )
        if state.is_world_process_zero and steps > 0:
            print(
                f"epoch {_number(state.epoch):>4} of {_number(state.num_train_epochs)}  loss {self.loss:.3f}"
                f"{validation}  {speed:,.0f} images/s  {clock(left)} left",
                flush=True,
            )
        self.loss, self.since, self.last_step = None, now, state.global_step


def _number(epochs: float) -> str:
    return f"{epochs:.0f}" if abs(epochs - round(epochs)) < 0.05 else f"{epochs:.1f}"


def clock(seconds: float) -> str:
    """Return a time as `m:ss` or `h:mm:ss`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def closing_sentence(top1: float, images: int, folder: str, chosen_of: int = 0) -> str:
    """Return how accurate the model in `folder` is, and how sure that is of so few images.

    `chosen_of` is the number of evaluations of which it is the best one, on the same images.
    """
    right = round(top1 / 100 * images)
    low, high = wilson_interval(right, images)
    best = f", which is the best of {chosen_of} evaluations of them and so a little too good" if chosen_of > 1 else ""
    return (
        f"The model in {folder} is right on {top1:.1f} % of {images:,} validation images (95 % interval {low:.1f} to "
        f"{high:.1f} %{best})."
    )


def next_command(folder: str, data: list[str]) -> str:
    """Return the command that quantizes the model in `folder`, on the images that the options `data` name."""
    options = ["--model_name_or_path", folder, *data]
    return f"Next: repvgg-hf quantize {shlex.join(options)}"
