"""One training step of the branches: forward, loss, backward, SGD."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from repvgg_hf import add_oabn
from repvgg_hf.networks.timm import from_timm
from repvgg_hf.recipes.benchmarks.measuring import BenchmarkArguments, compare, time_alternately
from repvgg_hf.recipes.benchmarks.peers import channels_last, check_agreement, timm_model, with_oabn

OABN, PLAIN = "ours, OABN", "ours, plain batch norm"
TIMM, TIMM_CHANNELS_LAST = "timm", "timm, channels_last"
TIMM_BOUNDED = "timm, channels_last, add_oabn"


@dataclass
class TrainStepArguments(BenchmarkArguments):
    """Options of this benchmark."""

    variants: list[str] = field(
        default_factory=lambda: ["a0", "cifar"],
        metadata={"help": "Published variants, or 'cifar' for the study's network. Each is one run."},
    )
    image_sizes: list[int] = field(
        default_factory=lambda: [224, 32], metadata={"help": "Side of the images in pixels, for each of --variants."}
    )
    batch_sizes: list[int] = field(
        default_factory=lambda: [16, 128], metadata={"help": "Images per batch, for each of --variants."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not len(self.variants) == len(self.image_sizes) == len(self.batch_sizes):
            raise ValueError("Give one entry of --image_sizes and one of --batch_sizes for each of --variants.")


def training_step(model: torch.nn.Module, loss_of: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A function that takes one step on the loss; the same optimizer for all."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=1e-4)

    def step():
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def run(args: TrainStepArguments) -> list[dict]:
    return [run_one(args, *setting) for setting in zip(args.variants, args.image_sizes, args.batch_sizes)]


def run_one(args: TrainStepArguments, variant: str, image_size: int, batch_size: int) -> dict:
    theirs = timm_model(variant).to(args.device).train()
    theirs_channels_last = channels_last(theirs)
    plain = from_timm(theirs).to(args.device)
    bounded = with_oabn(plain).to(args.device)

    images = torch.randn(batch_size, 3, image_size, image_size, device=args.device)
    theirs_bounded = copy.deepcopy(theirs)
    add_oabn(theirs_bounded, images[:1])
    theirs_bounded = channels_last(theirs_bounded)  # the layout that ours has
    labels = torch.randint(plain.config.num_labels, (batch_size,), device=args.device)
    images_channels_last = images.contiguous(memory_format=torch.channels_last)
    steps = {
        OABN: training_step(bounded, lambda: bounded(images, labels=labels).loss),
        TIMM: training_step(theirs, lambda: F.cross_entropy(theirs(images), labels)),
        PLAIN: training_step(plain, lambda: plain(images, labels=labels).loss),
        TIMM_CHANNELS_LAST: training_step(
            theirs_channels_last, lambda: F.cross_entropy(theirs_channels_last(images_channels_last), labels)
        ),
        TIMM_BOUNDED: training_step(
            theirs_bounded, lambda: F.cross_entropy(theirs_bounded(images_channels_last), labels)
        ),
    }
    # the second loss, which saw a backward pass and a step; OABN is another function of the same weights
    losses = {name: [step() for _ in range(2)][1] for name, step in steps.items()}
    error = check_agreement(losses[PLAIN], losses[TIMM])
    record = compare(
        f"{variant}, {image_size} px, batch {batch_size}",
        "s",
        time_alternately(steps, args),
        [
            (OABN, PLAIN, 1.03),
            (OABN, TIMM, 1.0),
            (OABN, TIMM_CHANNELS_LAST, 1.0),
            (TIMM_BOUNDED, OABN, 1.1),
            (PLAIN, TIMM, 1.0),
            (PLAIN, TIMM_CHANNELS_LAST, None),
        ],
    )
    return record | {"largest_difference_of_losses": error}
