"""Quantizing with calibration data: time and peak memory, for a model and images of the usual size."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .measuring import BenchmarkArguments, compare

# In a fresh process, whose peak memory is that of this alone; a kibibyte is the unit of ru_maxrss on Linux.
CALIBRATE = """
import json, resource, sys, time, torch
from repvgg_hf.interop.timm import from_timm
from benchmarks.peers import timm_model

options = json.loads(sys.argv[1])
torch.manual_seed(options["seed"])
torch.set_num_threads(options["threads"])
model = from_timm(timm_model(options["variant"])).reparameterize().to(options["device"]).eval()
images = torch.randn(options["images"], 3, options["image_size"], options["image_size"])
model(images[:1].to(options["device"]))
unit = 1 if sys.platform == "darwin" else 1024
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
limits = {name: options[name] for name in ("tuning_steps", "activation_memory")}
model.quantize(bits=4, calibration=images, calibration_batch_size=32, **limits)
seconds = time.perf_counter() - start
print(json.dumps([seconds, unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)]))
"""


def measure(command: list[str]) -> list[float]:
    """(seconds, bytes) that a process printed last."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(result.stdout.splitlines()[-1])


@dataclass
class CalibrateArguments(BenchmarkArguments):
    repeats: int = field(default=1, metadata={"help": "Fresh processes for each setting."})
    variant: str = field(default="a0", metadata={"help": "A published variant, or 'cifar' for the study's network."})
    images: int = field(default=256, metadata={"help": "Calibration images."})
    image_size: int = field(default=224, metadata={"help": "Their side in pixels."})
    tuning_steps: list[int] = field(default_factory=lambda: [0, 200], metadata={"help": "Settings to measure."})
    activation_memory: list[float] = field(
        default_factory=lambda: [4.0, 0.25], metadata={"help": "GiB for activations, each with each of --tuning_steps."}
    )


def run(args: CalibrateArguments) -> list[dict]:
    setting = f"{args.variant}, 4 bit, {args.images} images of {args.image_size} px"
    measured = {}
    for steps, memory in itertools.product(args.tuning_steps, args.activation_memory):
        options = {name: getattr(args, name) for name in ("seed", "variant", "device", "images", "image_size")}
        options |= {"tuning_steps": steps, "activation_memory": memory, "threads": torch.get_num_threads()}
        command = [sys.executable, "-c", CALIBRATE, json.dumps(options)]
        measured[f"{steps} tuning steps, {memory} GiB"] = [measure(command) for _ in range(args.repeats)]
    first, *others = measured
    ratios = [(name, first, None) for name in others]
    return [
        compare(
            f"{setting}, {what}", unit, {name: [pair[i] for pair in pairs] for name, pairs in measured.items()}, ratios
        )
        for i, (what, unit) in enumerate([("time", "s"), ("peak memory beside model and images", "B")])
    ]
