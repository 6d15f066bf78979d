"""Measure ours against its named peer, side by side in one run.

    python -m repvgg_hf.recipes.benchmarks inference           fused, against timm's fused; 4 bit against float
    python -m repvgg_hf.recipes.benchmarks train_step          OABN against plain batch norm, both against timm
    python -m repvgg_hf.recipes.benchmarks load                a 4 bit checkpoint against the float one
    python -m repvgg_hf.recipes.benchmarks qat                 quantization-aware against float steps, and DKM
    python -m repvgg_hf.recipes.benchmarks quantize            clustering the weights, against four libraries
    python -m repvgg_hf.recipes.benchmarks calibrate           quantizing with calibration images: time and memory
    python -m repvgg_hf.recipes.benchmarks fuse                fusing any network, checks included, against timm's own
    python -m repvgg_hf.recipes.benchmarks any_network         other networks at 4 bits without data, three libraries
    python -m repvgg_hf.recipes.benchmarks engines             int8 on every engine, against timm's fused float
    python -m repvgg_hf.recipes.benchmarks browser             int8 against float in WebAssembly, in Chromium
    python -m repvgg_hf.recipes.benchmarks data                reading and augmenting JPEG files, against torchvision
    python -m repvgg_hf.recipes.benchmarks inference --help    the options of one of them

`python recipes/benchmarks inference` is the same from a checkout. Sides take turns, in a new order each time, and a
ratio is that of their medians, so that the machine's noise hits all alike. The JSON file has every single time. Needs
timm.
"""

import platform
import sys

import timm
import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser, set_seed

import repvgg_hf
from repvgg_hf.recipes.benchmarks import (
    any_network,
    browser,
    calibrate,
    data,
    engines,
    fuse,
    inference,
    load,
    qat,
    quantize,
    train_step,
)
from repvgg_hf.training.report import masked, write_json

BENCHMARKS = {
    "inference": (inference.InferenceArguments, inference.run),
    "train_step": (train_step.TrainStepArguments, train_step.run),
    "load": (load.LoadArguments, load.run),
    "qat": (qat.QATArguments, qat.run),
    "quantize": (quantize.QuantizeArguments, quantize.run),
    "calibrate": (calibrate.CalibrateArguments, calibrate.run),
    "fuse": (fuse.FuseArguments, fuse.run),
    "any_network": (any_network.AnyNetworkArguments, any_network.run),
    "engines": (engines.EnginesArguments, engines.run),
    "browser": (browser.BrowserArguments, browser.run),
    "data": (data.DataBenchmarkArguments, data.run),
}


def machine(device: str) -> dict:
    """What a time depends on besides the code: device, processor, threads and versions."""
    return {
        "device": device if device == "cpu" else torch.get_device_module(device).get_device_name(),
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, timm, repvgg_hf)},
    }


def show(record: dict) -> None:
    """Print a table with a line for each ratio."""
    table = Table(title=f"{record['benchmark']}, {record['device']}, {record['threads']} threads")
    for heading in ("run", "what", "against", "medians", "ratio", "quartiles", "bar"):
        table.add_column(heading, justify="left" if heading in ("run", "what", "against") else "right")
    for measured in record["runs"]:
        for line in measured["ratios"]:
            met = "" if line["bar"] is None else "met" if line["ratio"] <= line["bar"] else "MISSED"
            digits = 3 if measured["unit"] else 5
            bar = "" if line["bar"] is None else f"{line['bar']:.{digits}g} {met}"
            medians = [quantity(measured["medians"][line[side]], measured["unit"]) for side in ("name", "peer")]
            quartiles = "{:.3f} {:.3f}".format(*line["quartiles"])
            table.add_row(
                measured["setting"],
                line["name"],
                line["peer"],
                " / ".join(medians),
                f"{line['ratio']:.{digits}f}",
                quartiles,
                bar,
            )
        table.add_section()
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def quantity(value: float, unit: str) -> str:
    """A measured value in words, from seconds, bytes or a number without unit."""
    return {"s": f"{1000 * value:.1f} ms", "B": f"{value / 1e6:.2f} MB", "": f"{value:.5f}"}[unit]


def main(arguments: list[str] | None = None) -> dict:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] not in BENCHMARKS:
        raise SystemExit(f"{__doc__}\nSay first which benchmark to run: {', '.join(BENCHMARKS)}.")
    name = arguments[0]
    dataclass, run = BENCHMARKS[name]
    parser = HfArgumentParser(dataclass, prog=f"python -m repvgg_hf.recipes.benchmarks {name}")
    (args,) = parser.parse_args_into_dataclasses(arguments[1:])
    set_seed(args.seed)

    command = ["recipes/benchmarks", *masked(arguments)]
    record = {"benchmark": name, "command": command, "seed": args.seed, **machine(args.device), "runs": run(args)}
    show(record)
    write_json(args.output_json or f"outputs/benchmarks/{name}.json", record)
    return record


if __name__ == "__main__":
    main()
