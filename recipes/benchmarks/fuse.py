"""Fusing networks of timm by `repvgg_hf.fuse`, its checks included, against timm's own unchecked fusing."""

import copy
import time
from dataclasses import dataclass, field

import timm
import torch
from timm.utils.model import reparameterize_model

from repvgg_hf import fuse
from repvgg_hf.networks.fusing import count_layers
from repvgg_hf.recipes.benchmarks.measuring import BenchmarkArguments, compare, computing_with, synchronize

OURS, TIMM = "repvgg_hf.fuse", "timm"
SECONDS = 1.0  # allowed for RepVGG-A0
MORE_LAYERS = 1.05  # than timm's, allowed


@dataclass
class FuseArguments(BenchmarkArguments):
    """Options of this benchmark."""

    repeats: int = field(default=5, metadata={"help": "Times that each network is fused, a fresh copy each time."})
    architectures: list[str] = field(
        default_factory=lambda: ["repvgg_a0", "mobileone_s1", "fastvit_t8", "repvit_m0_9", "ghostnetv3_050"],
        metadata={"help": "Names of timm's models; the first is to be fused within a second."},
    )
    image_size: int = field(default=224, metadata={"help": "Side in pixels of the image that is recorded."})
    threads: int = field(default=1, metadata={"help": "Threads to compute with."})


def run(args: FuseArguments) -> list[dict]:
    """The records of time and layers of each network."""
    with computing_with(args.threads):
        return [record for name in args.architectures for record in measure(name, args)]


def measure(name: str, args: FuseArguments) -> list[dict]:
    """Fuse a network `args.repeats` times by both."""
    model = timm.create_model(name).eval().to(args.device)
    image = torch.randn(1, 3, args.image_size, args.image_size, device=args.device)
    times, layers = {OURS: [], TIMM: []}, {OURS: [], TIMM: []}
    for _ in range(args.repeats):
        ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
        times[OURS].append(seconds_of(lambda ours=ours: fuse(ours, image)))
        times[TIMM].append(seconds_of(lambda theirs=theirs: reparameterize_model(theirs, inplace=True)))
        layers[OURS].append(count_layers(ours))
        layers[TIMM].append(count_layers(theirs))
    report = fuse(copy.deepcopy(model), image)
    errors = {
        "region_error": max(region.error for region in report.fused),  # in float64
        "model_error": report.error,
        "left": len(report.left),
    }
    ratios = [(OURS, TIMM, None)]
    if name == args.architectures[0]:
        times["allowed"] = [SECONDS] * args.repeats
        ratios.append((OURS, "allowed", 1.0))
    setting = f"{name}, {args.image_size} px, {args.threads} thread(s)"
    return [
        compare(f"{setting}, time", "s", times, ratios) | errors,
        compare(f"{setting}, layers with weights", "", layers, [(OURS, TIMM, MORE_LAYERS)]),
    ]


def seconds_of(function) -> float:
    """The seconds that one call takes."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start
