"""Inference of the fused model, against timm's."""

import copy
from dataclasses import dataclass, field

import torch
from timm.utils.model import reparameterize_model

from repvgg_hf.networks.timm import from_timm
from repvgg_hf.recipes.benchmarks.measuring import BenchmarkArguments, compare, time_alternately
from repvgg_hf.recipes.benchmarks.peers import check_agreement, timm_model

OURS, QUANTIZED = "ours, fused", "ours, 4 bit"
TIMM, TIMM_CHANNELS_LAST = "timm, fused", "timm, fused, channels_last"


@dataclass
class InferenceArguments(BenchmarkArguments):
    """Options of this benchmark."""

    variant: str = field(default="a0", metadata={"help": "A published variant, or 'cifar' for the study's network."})
    image_size: int = field(default=224, metadata={"help": "Side of the images in pixels."})
    batch_sizes: list[int] = field(
        default_factory=lambda: [1, 16], metadata={"help": "Images per batch; each is one run."}
    )
    method: str = field(
        default="cluster",
        metadata={
            "help": "How codebooks are chosen: cluster, or uniform, which is quicker to make and as fast to run."
        },
    )


@torch.inference_mode()
def run(args: InferenceArguments) -> list[dict]:
    branches = timm_model(args.variant).to(args.device)
    # batch norm statistics of a real forward pass: with the initial ones every layer's output would all but vanish
    branches.train()(torch.randn(16, 3, args.image_size, args.image_size, device=args.device))
    branches.eval()

    ours = from_timm(branches).to(args.device).reparameterize()
    quantized = copy.deepcopy(ours).quantize(args.method, bits=4, channel_scale=True)
    theirs = reparameterize_model(branches)
    channels_last = copy.deepcopy(theirs).to(memory_format=torch.channels_last)

    records = []
    for batch_size in args.batch_sizes:
        images = torch.randn(batch_size, 3, args.image_size, args.image_size, device=args.device)
        images_channels_last = images.contiguous(memory_format=torch.channels_last)
        error = check_agreement(ours(images).logits, theirs(images))
        functions = {
            OURS: lambda images=images: ours(images),
            TIMM: lambda images=images: theirs(images),
            TIMM_CHANNELS_LAST: lambda images=images_channels_last: channels_last(images),
            QUANTIZED: lambda images=images: quantized(images),
        }
        record = compare(
            f"{args.variant}, {args.image_size} px, batch {batch_size}",
            "s",
            time_alternately(functions, args),
            [(OURS, TIMM, 1.02), (OURS, TIMM_CHANNELS_LAST, 1.02), (QUANTIZED, OURS, 1.02)],
        )
        records.append(record | {"largest_difference_of_logits": error})
    return records
