"""Measure ours against its named peer, side by side in one run.

    python recipes/benchmark.py inference                      fused, against timm's fused; 4 bit against float
    python recipes/benchmark.py train_step                     OABN against plain batch norm, both against timm
    python recipes/benchmark.py load                           a 4 bit checkpoint against the float one
    python recipes/benchmark.py qat                            quantization-aware against float steps, and DKM
    python recipes/benchmark.py quantize                       clustering the weights, against four libraries
    python recipes/benchmark.py calibrate                      quantizing with calibration images: time and memory
    python recipes/benchmark.py inference --help               the options of one of them

Sides take turns, in a new order each time, and a ratio is that of their medians, so that the machine's noise hits all
alike. The JSON file has every single time. Needs timm.
"""

import platform
import sys

import timm
import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser, set_seed

import benchmarks.calibrate
import benchmarks.inference
import benchmarks.load
import benchmarks.qat
import benchmarks.quantize
import benchmarks.train_step
import repvgg_hf
from repvgg_hf.training.report import write_json

BENCHMARKS = {
    "inference": (benchmarks.inference.InferenceArguments, benchmarks.inference.run),
    "train_step": (benchmarks.train_step.TrainStepArguments, benchmarks.train_step.run),
    "load": (benchmarks.load.LoadArguments, benchmarks.load.run),
    "qat": (benchmarks.qat.QATArguments, benchmarks.qat.run),
    "quantize": (benchmarks.quantize.QuantizeArguments, benchmarks.quantize.run),
    "calibrate": (benchmarks.calibrate.CalibrateArguments, benchmarks.calibrate.run),
}


def machine(device: str) -> dict:
    """What a time depends on."""
    return {
        "device": device if device == "cpu" else torch.get_device_module(device).get_device_name(),
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, timm, repvgg_hf)},
    }


def show(record: dict) -> None:
    """A line for each ratio."""
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
    return {"s": f"{1000 * value:.1f} ms", "B": f"{value / 1e6:.2f} MB", "": f"{value:.5f}"}[unit]


def main(arguments: list[str] | None = None) -> dict:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] not in BENCHMARKS:
        raise SystemExit(f"{__doc__}\nSay first which benchmark to run: {', '.join(BENCHMARKS)}.")
    name = arguments[0]
    dataclass, run = BENCHMARKS[name]
    parser = HfArgumentParser(dataclass, prog=f"benchmark.py {name}")
    (args,) = parser.parse_args_into_dataclasses(arguments[1:])
    set_seed(args.seed)

    command = ["recipes/benchmark.py", *arguments]
    record = {"benchmark": name, "command": command, "seed": args.seed, **machine(args.device), "runs": run(args)}
    show(record)
    write_json(args.output or f"outputs/benchmark_{name}.json", record)
    return record


if __name__ == "__main__":
    main()
