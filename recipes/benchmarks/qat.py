"""A step of quantization-aware training against a float step, in time and peak memory; coremltools' DKM beside it."""

import copy
import itertools
import json
import subprocess
import sys
from dataclasses import dataclass, field

import torch

from repvgg_hf import RepVGGForImageClassification, update_codebooks
from repvgg_hf.networks.timm import from_timm
from repvgg_hf.recipes.benchmarks.measuring import BenchmarkArguments, compare, time_alternately
from repvgg_hf.recipes.benchmarks.peers import timm_model, with_oabn
from repvgg_hf.recipes.benchmarks.train_step import training_step
from repvgg_hf.recipes.peers import peer_methods

FUSED, BRANCHES, UNIFORM = "float, fused", "float, branches", "uniform (LSQ) 4 bit, fused"
# bars of the ratio to the float fused step, by batch size
BARS = {64: 1.08, 128: 1.03}
MEMORY_BAR, BRANCHES_BAR = 1.03, 0.75


@dataclass
class QATArguments(BenchmarkArguments):
    """Options of this benchmark."""

    variants: list[str] = field(
        default_factory=lambda: ["cifar", "cifar", "a0"],
        metadata={"help": "Published variants, or 'cifar' for the study's network. Each is one run."},
    )
    image_sizes: list[int] = field(
        default_factory=lambda: [32, 32, 224],
        metadata={"help": "Side of the images in pixels, for each of --variants."},
    )
    batch_sizes: list[int] = field(
        default_factory=lambda: [64, 128, 64], metadata={"help": "Images per batch, for each of --variants."}
    )
    compiled: bool = field(default=False, metadata={"help": "Measure with torch.compile, too."})
    dkm: bool = field(default=True, metadata={"help": "Measure coremltools' DKMPalettizer, too, if it is installed."})
    time: bool = field(default=True, metadata={"help": "Measure the time of a step."})
    memory_repeats: int = field(
        default=3, metadata={"help": "Times that each side's peak memory is measured, in processes of their own."}
    )
    side: str | None = field(
        default=None, metadata={"help": "Print only the peak memory of this side, for the benchmark's own use."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not len(self.variants) == len(self.image_sizes) == len(self.batch_sizes):
            raise ValueError("Give one entry of --image_sizes and one of --batch_sizes for each of --variants.")


def has_dkm() -> bool:
    try:
        peer_methods("coremltools")
    except ImportError:
        return False
    return True


def sides(args: QATArguments) -> dict[str, tuple[str, dict]]:
    """(form, how it is prepared) of each side, by its name."""
    chosen = {FUSED: ("fused", {}), BRANCHES: ("branches", {}), UNIFORM: ("fused", {"method": "uniform", "bits": 4})}
    chosen[UNIFORM][1]["channel_scale"] = True
    for bits, form in itertools.product((4, 2), ("fused", "branches")):
        chosen[f"ClusterQAT {bits} bit, {form}"] = (form, {"bits": bits})
    if args.dkm and has_dkm():
        chosen |= {f"DKM {bits} bit, fused": ("dkm", {"bits": bits}) for bits in (4, 2)}
    return chosen


def make_step(name: str, args: QATArguments, base: RepVGGForImageClassification, batch: dict, compiled: bool = False):
    """A function that takes one training step of the side called `name`."""
    form, options = sides(args)[name]
    model = copy.deepcopy(base)
    if form != "branches":
        model.reparameterize()
    palettizer = None
    if form == "dkm":
        from repvgg_hf.recipes.peers.dkm import prepare_dkm

        model, palettizer = prepare_dkm(model, options["bits"])
    elif options:
        model.prepare_qat(**options)
    model.train()
    forward = torch.compile(model) if compiled else model
    step = training_step(model, lambda: forward(**batch).loss)
    if palettizer is not None:
        return lambda: (step(), palettizer.step())[0]
    return lambda: (step(), update_codebooks(model))[0]


def setting_of(args: QATArguments, index: int) -> tuple[RepVGGForImageClassification, dict]:
    """(the float model with branches, a batch) of one run."""
    base = with_oabn(from_timm(timm_model(args.variants[index]))).to(args.device)
    size, images = args.image_sizes[index], args.batch_sizes[index]
    pixel_values = torch.randn(images, 3, size, size, device=args.device)
    labels = torch.randint(base.config.num_labels, (images,), device=args.device)
    return base, {"pixel_values": pixel_values, "labels": labels}


def peak_memory(args: QATArguments, name: str, index: int) -> int:
    """Bytes at most in use during three steps, measured in a fresh process; on a CPU what it has resident."""
    single = {"variants": args.variants, "image_sizes": args.image_sizes, "batch_sizes": args.batch_sizes}
    options = [f"--{key}={value[index]}" for key, value in single.items()]
    module = ["-m", "repvgg_hf.recipes.benchmarks", "qat"]
    command = [sys.executable, *module, *options, "--device", args.device, "--side", name]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])["peak"]


def print_peak(args: QATArguments) -> None:
    """Print the peak memory of this process after three steps of `args.side`."""
    import resource

    base, batch = setting_of(args, 0)
    step = make_step(args.side, args, base, batch)
    for _ in range(3):
        step()
    if args.device == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    else:
        peak = torch.get_device_module(args.device).max_memory_allocated()
    print(json.dumps({"peak": peak}))


def run(args: QATArguments) -> list[dict]:
    if args.side is not None:
        print_peak(args)
        sys.exit()
    records = []
    for index in range(len(args.variants)):
        if args.time:
            records.append(run_one(args, index, compiled=False))
        if args.compiled:
            records.append(run_one(args, index, compiled=True))
        if args.memory_repeats:
            records.append(run_memory(args, index))
    return records


def describe(args: QATArguments, index: int) -> str:
    return f"{args.variants[index]}, {args.image_sizes[index]} px, batch {args.batch_sizes[index]}"


def run_one(args: QATArguments, index: int, compiled: bool) -> dict:
    base, batch = setting_of(args, index)
    steps = {
        name: make_step(name, args, base, batch, compiled)
        for name in sides(args)
        if not (compiled and name.startswith("DKM"))
    }
    ratios = []
    for name in steps:
        if name.endswith("fused") and name != FUSED:
            ours = name.startswith("ClusterQAT")
            ratios.append((name, FUSED, BARS.get(args.batch_sizes[index]) if ours else None))
            if ours:
                ratios.append((name, BRANCHES, BRANCHES_BAR))
        elif name.endswith("branches") and name != BRANCHES:
            ratios.append((name, BRANCHES, BRANCHES_BAR if args.batch_sizes[index] in BARS else None))
    setting = describe(args, index) + (", torch.compile" if compiled else "")
    return compare(setting, "s", time_alternately(steps, args), ratios)


def run_memory(args: QATArguments, index: int) -> dict:
    # by turns, as what a CPU process has resident varies by some percent
    turns = [{name: peak_memory(args, name, index) for name in sides(args)} for _ in range(args.memory_repeats)]
    peaks = {name: [turn[name] for turn in turns] for name in turns[0]}
    ratios = [
        (name, FUSED, MEMORY_BAR if name.startswith("ClusterQAT") else None)
        for name in peaks
        if name.endswith("fused") and name != FUSED
    ]
    return compare(f"{describe(args, index)}, peak memory", "B", peaks, ratios)
