"""A training loop on Accelerate, for float and quantization-aware phases alike."""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

import repvgg_hf
from repvgg_hf.compression.qat.callback import GradientWatch
from repvgg_hf.training.arguments import RunArguments
from repvgg_hf.training.batches import leaves_one_image
from repvgg_hf.training.checkpoints import RunFolder, check_finite, resume_field
from repvgg_hf.training.optimizer import MovingAverage, build_sgd


@dataclass
class PhaseArguments(RunArguments):
    """Options of a training phase, float or quantization-aware."""

    per_device_train_batch_size: int = field(
        default=64, metadata={"help": "Images per batch in training, on each device."}
    )
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches per optimizer step."})
    momentum: float = field(default=0.9, metadata={"help": "Momentum of SGD, in Nesterov's form; 0 for none."})
    weight_decay: float = field(default=5e-4, metadata={"help": "Weight decay of kernels; nothing else decays."})
    max_grad_norm: float = field(default=5.0, metadata={"help": "Larger gradients are scaled down to this norm."})
    ema_decay: float = field(
        default=0.0,
        metadata={"help": "End with the moving average of the weights, which decays so much per step; 0 for none."},
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Save memory by a second forward pass instead of stored activations."}
    )
    resume_from_checkpoint: str | None = resume_field()


class TimedLoader:
    """Iterates over `loader` and adds up in `seconds` how long that made the training wait for its batches."""

    def __init__(self, loader: Iterable):
        self.loader, self.seconds = loader, 0.0

    def __iter__(self) -> Iterator:
        batches = iter(self.loader)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.seconds += time.perf_counter() - start
            if batch is None:
                return
            yield batch


def loss_on_labels(model, batch: dict) -> torch.Tensor:
    """The model's own loss of a batch, 0-dim."""
    return model(**batch).loss


def optimizer_steps(batches: int, args: PhaseArguments) -> int:
    """How many optimizer steps `batches` on each device make."""
    return -(-batches // args.gradient_accumulation_steps)


def phase_seed(seed: int, phase: str) -> int:
    """The seed of a phase: each has its own, so that one that was done before an interruption leaves no trace."""
    return int.from_bytes(hashlib.sha256(f"{seed} {phase}".encode()).digest()[:4], "big") >> 1


def train_phase(
    accelerator: Accelerator,
    model,
    data: tuple,
    phase: str,
    epochs: int,
    learning_rate: float,
    run: RunFolder | None,
    args: PhaseArguments,
    loss_of: Callable = loss_on_labels,
):
    """Train `model` for `epochs` with SGD, a short warm-up and a cosine decay; returns it, unwrapped.

    `data` is a dataset and its `collate_fn`, `loss_of(model, batch)` the loss. After each epoch the whole state is
    saved in the folder `run`, if there is one, and the phase goes on from a state that was there when the run began.
    All that is random depends on `args.seed`, the phase's name and the number of processes alone. Gradients that are
    not finite stop the training with a `RuntimeError` that names step and parameter, before a state is saved that they
    have spoiled (see `GradientWatch`), and so do weights at its end. No step waits for an accelerator.
    """
    dataset, collate = data
    batch_size = args.per_device_train_batch_size
    drop_last = leaves_one_image(len(dataset), batch_size, accelerator.num_processes)
    on_cuda = accelerator.device.type == "cuda"
    loader = DataLoader(
        dataset, batch_size, shuffle=True, collate_fn=collate, drop_last=drop_last,
        num_workers=args.dataloader_num_workers, pin_memory=on_cuda,
    )  # fmt: skip
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = build_sgd(model, learning_rate, args.weight_decay, args.momentum)
    average = MovingAverage(model, args.ema_decay, accelerator.device) if args.ema_decay else None
    seed = phase_seed(args.seed, phase)
    set_seed(seed, device_specific=True)  # each process augments its images in its own way
    # the order of the images comes from a generator of its own: that of all processes is one, and can be resumed
    accelerator.dataloader_config.use_seedable_sampler = True
    accelerator.dataloader_config.data_seed = seed
    accelerator.dataloader_config.non_blocking = on_cuda  # copying a batch does not wait for the step before
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    bare = accelerator.unwrap_model(model)
    steps_per_epoch = optimizer_steps(len(loader), args)
    steps = epochs * steps_per_epoch
    scheduler = accelerator.prepare(get_cosine_schedule_with_warmup(optimizer, steps // 20, steps))

    step = 0
    if run is not None and phase in run.states:
        run.load_state(phase, average)
        step = scheduler.scheduler.last_epoch
        accelerator.print(f"{phase}: going on after step {step} of {steps}")

    watch = GradientWatch()
    bar = tqdm(total=steps, initial=step, desc=phase, disable=not accelerator.is_local_main_process)
    for epoch in range(step // steps_per_epoch, epochs):
        model.train()
        loader.set_epoch(epoch)
        total, batches, start = 0.0, TimedLoader(loader), time.perf_counter()
        for batch in batches:
            with accelerator.accumulate(model):
                with accelerator.autocast():  # of all models that the loss needs
                    loss = loss_of(model, batch)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    if accelerator.scaler is None:  # a scaler skips steps with gradients that are not finite itself
                        watch.look(bare, step + 1)
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                scheduler.step()
                repvgg_hf.update_codebooks(bare)
                if average is not None:
                    average.update_parameters(bare)
                step += 1
                bar.update()
            total += loss.detach()
        watch.read()
        seconds = time.perf_counter() - start
        figures = {
            "loss": accelerator.reduce(total / len(loader), "mean").item(),
            "learning_rate": scheduler.get_last_lr()[0],
            "images_per_second": len(dataset) / seconds,
            "share_of_time_waiting_for_data": batches.seconds / seconds,
        }
        accelerator.print(
            f"{phase} epoch {epoch + 1}: loss {figures['loss']:.3f}, {figures['images_per_second']:.0f} images/s, "
            f"{figures['share_of_time_waiting_for_data']:.1%} of the time waiting for data"
        )
        accelerator.log({f"{phase}_{name}": value for name, value in figures.items()}, step=epoch + 1)
        check_finite(bare)
        if run is not None:
            run.save_state(phase, bare, average)
    bar.close()
    # without the wrappers of autocast and compilation, which would stay on its forward method
    unwrapped = accelerator.unwrap_model(model, keep_fp32_wrapper=False, keep_torch_compile=False)
    accelerator.free_memory()  # forget this phase's optimizer and scheduler
    if average is not None:
        unwrapped.load_state_dict(average.module.state_dict())
    check_finite(unwrapped)
    if args.gradient_checkpointing:
        unwrapped.gradient_checkpointing_disable()
    return unwrapped


@torch.inference_mode()
def predict(accelerator: Accelerator, model, loader: DataLoader) -> np.ndarray:
    """Logits `[images, classes]` of an unwrapped model for a prepared `loader`, on every process for all images."""
    model = model.to(accelerator.device).eval()
    logits = [accelerator.gather_for_metrics(model(batch["pixel_values"]).logits).cpu() for batch in loader]
    return torch.cat(logits).numpy()
