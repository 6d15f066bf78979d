"""A training loop on Accelerate, for float and quantisation-aware phases alike."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

import repvgg_hf
from data import collate
from modeling import build_sgd


@dataclass
class PhaseArguments:
    """What both phases share."""

    per_device_train_batch_size: int = field(default=64, metadata={"help": "Images in a batch, on each device."})
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "The same, for evaluation."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches in an optimiser step."})
    weight_decay: float = field(default=5e-4, metadata={"help": "Of kernels."})
    max_grad_norm: float = field(default=5.0, metadata={"help": "Largest norm of the gradient."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that load images."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, order and augmentation."})
    resume_from_checkpoint: bool = field(default=False, metadata={"help": "Go on from the last epoch saved."})


def train_phase(
    accelerator: Accelerator,
    model,
    dataset,
    phase: str,
    epochs: int,
    learning_rate: float,
    output_dir: Path,
    args: PhaseArguments,
):
    """Train `model` for `epochs` with SGD, a short warm-up and a cosine decay; returns it, unwrapped.

    After each epoch the whole state is in `output_dir / "checkpoint" / phase`. A loss that is not finite stops the
    training with a `RuntimeError` that says where, before it is saved.
    """
    loader = DataLoader(
        dataset, args.per_device_train_batch_size, shuffle=True, collate_fn=collate, drop_last=False,
        num_workers=args.dataloader_num_workers,
    )  # fmt: skip
    optimizer = build_sgd(model, learning_rate, args.weight_decay)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps_an_epoch = -(-len(loader) // args.gradient_accumulation_steps)
    steps = epochs * steps_an_epoch
    scheduler = accelerator.prepare(get_cosine_schedule_with_warmup(optimizer, steps // 20, steps))

    checkpoint = output_dir / "checkpoint" / phase
    steps_done = 0
    if args.resume_from_checkpoint and recover_state(accelerator, checkpoint):
        accelerator.load_state(checkpoint)
        steps_done = scheduler.scheduler.last_epoch
        accelerator.print(f"{phase}: going on after step {steps_done} of {steps}")

    bar = tqdm(total=steps, initial=steps_done, desc=phase, disable=not accelerator.is_local_main_process)
    for epoch in range(steps_done // steps_an_epoch, epochs):
        model.train()
        loader.set_epoch(epoch)
        total = 0.0
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                scheduler.step()
                repvgg_hf.update_codebooks(accelerator.unwrap_model(model))
                bar.update()
            total += loss.detach()
        mean_loss = accelerator.reduce(total / len(loader), "mean").item()
        if not np.isfinite(mean_loss):
            raise RuntimeError(
                f"The loss of {phase} epoch {epoch + 1} is {mean_loss}: lower the learning rate, now {learning_rate}. "
                f"The last good state is in {checkpoint}."
            )
        bar.set_postfix(loss=f"{mean_loss:.3f}")
        accelerator.log({f"{phase}_loss": mean_loss, "learning_rate": scheduler.get_last_lr()[0]}, step=epoch + 1)
        save_state(accelerator, checkpoint)
    bar.close()
    # without the wrappers of autocast and compilation, which would stay on its forward method
    unwrapped = accelerator.unwrap_model(model, keep_fp32_wrapper=False, keep_torch_compile=False)
    accelerator.free_memory()  # forget this phase's optimiser and scheduler
    return unwrapped


def save_state(accelerator: Accelerator, checkpoint: Path) -> None:
    """Save the whole state in the folder `checkpoint`, in such an order that an interruption leaves a complete one."""
    new, old = checkpoint.with_name(checkpoint.name + ".new"), checkpoint.with_name(checkpoint.name + ".old")
    accelerator.save_state(new)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
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
