"""Quantizing with calibration data: time and peak memory, for a model and images of the usual size."""

import json
import subprocess
import sys
from dataclasses import dataclass, field

import torch

from repvgg_hf.recipes.benchmarks.measuring import BenchmarkArguments, compare

# In a fresh process, whose peak memory is that of this alone; a kibibyte is the unit of ru_maxrss on Linux.
CALIBRATE = """
import json, resource, sys, time, torch
from repvgg_hf.compression.ptq.config import CalibrationConfig
from repvgg_hf.networks.timm import from_timm
from repvgg_hf.recipes.benchmarks.peers import timm_model

options = json.loads(sys.argv[1])
torch.manual_seed(options["seed"])
torch.set_num_threads(options["threads"])
model = from_timm(timm_model(options["variant"])).reparameterize().to(options["device"]).eval()
images = torch.randn(options["calibration_images"], 3, options["image_size"], options["image_size"])
model(images[:1].to(options["device"]))
unit = 1 if sys.platform == "darwin" else 1024
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
settings = CalibrationConfig(calibration_batch_size=32, activation_memory=options["activation_memory"])
model.quantize(bits=4, calibration=images, calibration_config=settings)
seconds = time.perf_counter() - start
print(json.dumps([seconds, unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)]))
"""


def measure(command: list[str]) -> list[float]:
    """(seconds, bytes) that a process printed last."""
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.splitlines()[-1])


@dataclass
class CalibrateArguments(BenchmarkArguments):
    """Options of this benchmark."""

    repeats: int = field(default=1, metadata={"help": "Fresh processes for each setting."})
    variant: str = field(default="a0", metadata={"help": "A published variant, or 'cifar' for the study's network."})
    calibration_images: int = field(default=256, metadata={"help": "Random images to calibrate on."})
    image_size: int = field(default=224, metadata={"help": "Side of the images in pixels."})
    activation_memory: list[float] = field(
        default_factory=lambda: [4.0, 0.25], metadata={"help": "GiB of memory for activations; each is a side."}
    )


def run(args: CalibrateArguments) -> list[dict]:
    """The records of time and of peak memory, which the first setting is compared with the others in."""
    setting = f"{args.variant}, 4 bit, {args.calibration_images} images of {args.image_size} px"
    measured = {}
    names = ("seed", "variant", "device", "calibration_images", "image_size")
    for memory in args.activation_memory:
        options = {name: getattr(args, name) for name in names}
        options |= {"activation_memory": memory, "threads": torch.get_num_threads()}
        command = [sys.executable, "-c", CALIBRATE, json.dumps(options)]
        measured[f"{memory} GiB"] = [measure(command) for _ in range(args.repeats)]
    first, *others = measured
    ratios = [(name, first, None) for name in others]
    return [
        compare(
            f"{setting}, {what}", unit, {name: [pair[i] for pair in pairs] for name, pairs in measured.items()}, ratios
        )
        for i, (what, unit) in enumerate([("time", "s"), ("peak memory beside model and images", "B")])
    ]
