"""A training loop on Accelerate, for float and quantization-aware phases alike."""

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

import repvgg_hf
from repvgg_hf.compression.qat.prepare import diverged


@dataclass
class PhaseArguments:
    """What both phases share."""

    per_device_train_batch_size: int = field(default=64, metadata={"help": "Images in a batch, on each device."})
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "The same, for evaluation."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches in an optimizer step."})
    weight_decay: float = field(default=5e-4, metadata={"help": "Of kernels."})
    max_grad_norm: float = field(default=5.0, metadata={"help": "Largest norm of the gradient."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that load images."})
    ema_decay: float = field(
        default=0.0, metadata={"help": "Train on to the moving average of weights with this decay a step; 0 for none."}
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Less memory, a second forward pass."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, order and augmentation."})
    resume_from_checkpoint: bool = field(default=False, metadata={"help": "Go on from the last epoch saved."})


class MovingAverage:
    """The exponential moving average of a model's floating-point state over optimizer steps."""

    def __init__(self, model: torch.nn.Module, decay: float):
        self.decay = decay
        self.state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: torch.nn.Module) -> None:
        for name, tensor in model.state_dict().items():
            average = self.state[name]
            average.lerp_(tensor, 1 - self.decay) if tensor.is_floating_point() else average.copy_(tensor)


class Feed:
    """Iterates over `loader` and times how long that takes."""

    def __init__(self, loader: Iterable):
        self.loader, self.waited = loader, 0.0

    def __iter__(self) -> Iterator:
        batches = iter(self.loader)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch


def build_optimizer(model: torch.nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.SGD:
    """SGD with Nesterov momentum; weight decay on kernels only, not on codebooks, scales, norms and biases."""
    groups = {weight_decay: [], 0.0: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[weight_decay if parameter.dim() > 1 and "fake_quant" not in name else 0.0].append(parameter)
    groups = [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()]
    return torch.optim.SGD(groups, lr=learning_rate, momentum=0.9, nesterov=True)


def loss_on_labels(model, batch: dict) -> torch.Tensor:
    return model(**batch).loss


def train_phase(
    accelerator: Accelerator,
    model,
    data: tuple,
    phase: str,
    epochs: int,
    learning_rate: float,
    output_dir: Path | None,
    args: PhaseArguments,
    loss_of: Callable = loss_on_labels,
):
    """Train `model` for `epochs` with SGD, a short warm-up and a cosine decay; returns it, unwrapped.

    `data` is a dataset and its `collate_fn`, `loss_of(model, batch)` the loss. After each epoch the whole state is in
    `output_dir / "checkpoint" / phase`, if a folder is given. Gradients that are not finite stop the training with a
    `RuntimeError` that names step and parameter, before the optimizer uses them. Raises `ValueError` if the state to
    go on from was saved with other quantization settings.
    """
    dataset, collate = data
    loader = DataLoader(
        dataset, args.per_device_train_batch_size, shuffle=True, collate_fn=collate, drop_last=False,
        num_workers=args.dataloader_num_workers,
    )  # fmt: skip
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    settings = model.config.qat_config
    optimizer = build_optimizer(model, learning_rate, args.weight_decay)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    bare = accelerator.unwrap_model(model)
    average = MovingAverage(bare, args.ema_decay) if args.ema_decay else None
    steps_an_epoch = -(-len(loader) // args.gradient_accumulation_steps)
    steps = epochs * steps_an_epoch
    scheduler = accelerator.prepare(get_cosine_schedule_with_warmup(optimizer, steps // 20, steps))

    checkpoint = None if output_dir is None else output_dir / "checkpoint" / phase
    step = 0
    if checkpoint and args.resume_from_checkpoint and recover_state(accelerator, checkpoint):
        check_settings(checkpoint, settings)
        accelerator.load_state(checkpoint)
        if average is not None:
            average.state = torch.load(checkpoint / "average.pt", map_location=accelerator.device)
        step = scheduler.scheduler.last_epoch
        accelerator.print(f"{phase}: going on after step {step} of {steps}")

    bar = tqdm(total=steps, initial=step, desc=phase, disable=not accelerator.is_local_main_process)
    for epoch in range(step // steps_an_epoch, epochs):
        model.train()
        loader.set_epoch(epoch)
        total, feed, start = 0.0, Feed(loader), time.perf_counter()
        for batch in feed:
            with accelerator.accumulate(model):
                with accelerator.autocast():  # of all models that the loss needs
                    loss = loss_of(model, batch)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                    if accelerator.scaler is None and not norm.isfinite():  # a scaler skips such steps itself
                        raise RuntimeError(f"{diverged(bare, step + 1)} The last one is {checkpoint or 'not saved'}.")
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                scheduler.step()
                repvgg_hf.update_codebooks(bare)
                if average is not None:
                    average.update(bare)
                step += 1
                bar.update()
            total += loss.detach()
        mean_loss = accelerator.reduce(total / len(loader), "mean").item()
        seconds = time.perf_counter() - start
        figures = {
            "loss": mean_loss,
            "learning_rate": scheduler.get_last_lr()[0],
            "images_per_second": len(dataset) / seconds,
            "share_of_time_waiting_for_data": feed.waited / seconds,
        }
        accelerator.print(
            f"{phase} epoch {epoch + 1}: loss {mean_loss:.3f}, {figures['images_per_second']:.0f} images/s, "
            f"{feed.waited / seconds:.1%} of the time waiting for data"
        )
        accelerator.log({f"{phase}_{name}": value for name, value in figures.items()}, step=epoch + 1)
        if checkpoint:
            save_state(accelerator, checkpoint, settings, average)
    bar.close()
    # without the wrappers of autocast and compilation, which would stay on its forward method
    unwrapped = accelerator.unwrap_model(model, keep_fp32_wrapper=False, keep_torch_compile=False)
    accelerator.free_memory()  # forget this phase's optimizer and scheduler
    if average is not None:
        unwrapped.load_state_dict(average.state)
    if args.gradient_checkpointing:
        unwrapped.gradient_checkpointing_disable()
    return unwrapped


def check_settings(checkpoint: Path, settings: dict | None) -> None:
    """Raise `ValueError` if the state in `checkpoint` was saved with other quantization settings."""
    saved = json.loads((checkpoint / "qat_config.json").read_text())
    wanted = json.loads(json.dumps(settings))
    if saved == wanted:
        return
    parts = [(part, key) for part in wanted or {} for key in wanted[part]] if saved and wanted else []
    differing = [
        f"{key}={saved[a].get(key)!r}, now {wanted[a][key]!r}"
        for a, key in parts
        if saved[a].get(key) != wanted[a][key]
    ]
    raise ValueError(
        f"The checkpoint {checkpoint} was trained with other quantization options ({'; '.join(differing) or 'none'}): "
        "give the same ones to go on, or another --output_dir to begin anew."
    )


def save_state(
    accelerator: Accelerator, checkpoint: Path, settings: dict | None = None, average: MovingAverage | None = None
) -> None:
    """Save the whole state in the folder `checkpoint`, in such an order that an interruption leaves a complete one."""
    new, old = checkpoint.with_name(checkpoint.name + ".new"), checkpoint.with_name(checkpoint.name + ".old")
    accelerator.save_state(new)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (new / "qat_config.json").write_text(json.dumps(settings), encoding="utf-8")
        if average is not None:
            torch.save(average.state, new / "average.pt")
        shutil.rmtree(old, ignore_errors=True)
        if checkpoint.exists():
            checkpoint.rename(old)
        new.rename(checkpoint)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def recover_state(accelerator: Accelerator, checkpoint: Path) -> bool:
    """Whether there is a state in `checkpoint`; one that an interrupted `save_state` had set aside is put back."""
    old = checkpoint.with_name(checkpoint.name + ".old")
    if accelerator.is_main_process and not checkpoint.exists() and old.exists():
        old.rename(checkpoint)
    accelerator.wait_for_everyone()
    return checkpoint.exists()


@torch.inference_mode()
def predict(accelerator: Accelerator, model, loader: DataLoader) -> np.ndarray:
    """Logits `[images, classes]` of an unwrapped model for a prepared `loader`, on every process for all images."""
    model = model.to(accelerator.device).eval()
    logits = [accelerator.gather_for_metrics(model(batch["pixel_values"]).logits).cpu() for batch in loader]
    return torch.cat(logits).numpy()
