"""Loading a 4 bit checkpoint against the float one that it replaces: time, peak memory and size."""

import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForImageClassification

from repvgg_hf import RepVGGConfig, RepVGGForImageClassification
from repvgg_hf.networks.timm import from_timm
from repvgg_hf.recipes.benchmarks.measuring import BenchmarkArguments, compare, time_alternately
from repvgg_hf.recipes.benchmarks.peers import timm_model
from repvgg_hf.runtime.cluster_layers import ClusterLayer

FLOAT, QUANTIZED = "float", "4 bit"
BITS = 4

# A process inherits the peak memory of the one that started it, and ours holds models: so a small one in between.
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]], check=True)"
# Printed before the exit, which needs more memory than a model. The first folder has all that is imported late.
LOAD = """
import resource, sys, repvgg_hf, transformers
for folder in sys.argv[1:]:
    transformers.AutoModelForImageClassification.from_pretrained(folder)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@dataclass
class LoadArguments(BenchmarkArguments):
    """Options of this benchmark."""

    variant: str = field(default="a0", metadata={"help": "A published variant, or 'cifar' for the study's network."})
    image_size: int = field(default=224, metadata={"help": "Side in pixels of the first image to classify."})
    method: str = field(
        default="cluster",
        metadata={
            "help": "How codebooks are chosen: cluster, or uniform, which is quicker to make and as fast to load."
        },
    )
    memory_repeats: int = field(default=3, metadata={"help": "Fresh processes that load each checkpoint."})


def run(args: LoadArguments) -> list[dict]:
    with tempfile.TemporaryDirectory() as parent:
        folders = {FLOAT: f"{parent}/float", QUANTIZED: f"{parent}/quantized"}
        model = from_timm(timm_model(args.variant)).reparameterize()
        model.save_pretrained(folders[FLOAT])
        model.quantize(args.method, bits=BITS, channel_scale=True).save_pretrained(folders[QUANTIZED])
        return [
            load_time(folders, args),
            first_prediction_time(folders, args),
            peak_memory(folders, args),
            file_size(folders, model, args),
        ]


def load_time(folders: dict[str, str], args: LoadArguments) -> dict:
    def load(folder):
        return lambda: AutoModelForImageClassification.from_pretrained(folder).to(args.device)

    times = time_alternately({name: load(folder) for name, folder in folders.items()}, args)
    return compare(f"{args.variant}, from_pretrained, cached files", "s", times, [(QUANTIZED, FLOAT, 1.2)])


def first_prediction_time(folders: dict[str, str], args: LoadArguments) -> dict:
    """Until the first image is classified: a float file is mapped, so that loading alone does not read it."""
    image = torch.randn(1, 3, args.image_size, args.image_size, device=args.device)

    @torch.inference_mode()
    def predict(folder):
        return AutoModelForImageClassification.from_pretrained(folder).to(args.device)(image)

    functions = {name: lambda folder=folder: predict(folder) for name, folder in folders.items()}
    times = time_alternately(functions, args)
    setting = f"{args.variant}, from_pretrained and one {args.image_size} px image"
    return compare(setting, "s", times, [(QUANTIZED, FLOAT, None)])


def peak_memory(folders: dict[str, str], args: LoadArguments) -> dict:
    """Peak resident memory of loading in a fresh process, above that of loading next to nothing before."""
    extra = {name: [] for name in folders}
    with tempfile.TemporaryDirectory() as tiny:
        config = RepVGGConfig(stem_hidden_size=8, hidden_sizes=[8], depths=[1], strides=[2], num_labels=2, deploy=True)
        RepVGGForImageClassification(config).quantize("uniform", bits=BITS).save_pretrained(tiny)
        for _ in range(args.memory_repeats):
            for name, folder in folders.items():
                extra[name].append(process_peak(tiny, folder))
    return compare(f"{args.variant}, peak memory of from_pretrained", "B", extra, [(QUANTIZED, FLOAT, None)])


def process_peak(tiny: str, folder: str) -> int:
    """By how many bytes the peak memory of a fresh process grows when it loads `folder` after `tiny`."""
    command = [sys.executable, "-c", LAUNCHER, "-c", LOAD, tiny, folder]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    before, after = map(int, printed.split()[-2:])
    return (after - before) * (1 if sys.platform == "darwin" else 1024)


def file_size(folders: dict[str, str], model, args: LoadArguments) -> dict:
    """The bytes of the weights' files; ours may be 2 % and 40 kB more than the codes alone."""
    sizes = {name: [(Path(folder) / "model.safetensors").stat().st_size] for name, folder in folders.items()}
    layers = [layer for layer in model.modules() if isinstance(layer, ClusterLayer)]
    weights = sum(math.prod(layer.weight_shape) for layer in layers)
    sizes["allowed"] = [1.02 * BITS / 8 * weights + 40_000]
    ratios = [(QUANTIZED, FLOAT, None), (QUANTIZED, "allowed", 1.0)]
    record = compare(f"{args.variant}, model.safetensors", "B", sizes, ratios)
    return record | {"quantized_weights": weights}
