"""The quantized model as an int8 program on every engine, against timm's fused float model in PyTorch.

Every side is a process of its own, all with the same number of threads, and they take turns. ONNX Runtime's own
`quantize_static` of the float model is one of them. OpenVINO runs with all instructions of the processor, and with
fewer (`ONEDNN_MAX_CPU_ISA`). The record has the processor's flags, and how the logits agree with PyTorch's simulation.
"""

import math
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from timm.utils.model import reparameterize_model

from repvgg_hf import CalibrationConfig, export_onnx
from repvgg_hf.interop.agreement import agreement
from repvgg_hf.interop.extras import require
from repvgg_hf.interop.formats import export_format, file_bytes
from repvgg_hf.interop.processor import ISA, processor_facts
from repvgg_hf.networks.timm import from_timm
from repvgg_hf.recipes.benchmarks.engine_side import TIMM, Side
from repvgg_hf.recipes.benchmarks.measuring import BenchmarkArguments, compare, computing_with
from repvgg_hf.recipes.benchmarks.peers import timm_model

PEER, OURS = "timm, fused, float", "ours, fused, float"
ORT_FLOAT, ORT_STATIC = "ONNX Runtime, float", "ONNX Runtime, quantize_static"
ORT, ORT_INT8 = "ONNX Runtime, packed", "ONNX Runtime, int8"
OV_FLOAT, OV, INDUCTOR = "OpenVINO, float", "OpenVINO, packed", "inductor, int8"
SIMULATED = "simulated in PyTorch"
PACKAGES = {
    "onnxruntime": ("onnxruntime", "onnx"),
    "openvino": ("openvino", "openvino"),
    "inductor": ("torchao", "inductor"),
}
# bars for A0 at 224 px with one thread: how many times as fast as timm's, by batch size
FASTER = {1: {ORT: 4.5, INDUCTOR: 6}, 16: {INDUCTOR: 10}}
BY_ISA = {"amx_int8": 11, "avx512_vnni": 4.5, "avx_vnni": 4.5, "avx2": 2.2}  # of OpenVINO, the best that there is
OF_ISA = {"AVX512_CORE_VNNI": 4.5, "AVX2_VNNI": 4.5, "AVX2": 2.2}
STATIC_BAR = 1.05  # time of ours by that of ONNX Runtime's own
LOAD_SECONDS = 0.2  # of processor time
SIZE_BARS = {4: 1.03, 3: 1.04, 2: 1.06}  # bytes of the packed file by those of the checkpoint, by bits


@dataclass
class EnginesArguments(BenchmarkArguments):
    """Options of this benchmark."""

    variant: str = field(default="a0", metadata={"help": "A published variant, or 'cifar' for the study's network."})
    image_size: int = field(default=224, metadata={"help": "Side of the images in pixels."})
    batch_sizes: list[int] = field(
        default_factory=lambda: [1, 16], metadata={"help": "Images per batch; each is one run."}
    )
    threads: int = field(default=1, metadata={"help": "Threads of every side."})
    clock: str = field(
        default="wall",
        metadata={
            "help": "What is measured: wall, or cpu, the processor's time, which with one thread says the same where "
            "others use the machine, too."
        },
    )
    bits: int = field(default=4, metadata={"help": "Bits of a weight's code; activations have 8."})
    method: str = field(default="cluster", metadata={"help": "How codebooks are chosen: cluster, or uniform."})
    engines: list[str] = field(
        default_factory=lambda: list(PACKAGES), metadata={"help": f"Engines to measure: {', '.join(PACKAGES)}."}
    )
    isas: list[str] = field(
        default_factory=lambda: ["AVX512_CORE_VNNI", "AVX2"],
        metadata={"help": f"Values of {ISA} with which OpenVINO runs, too."},
    )

    def __post_init__(self):
        self.device = self.device or "cpu"
        super().__post_init__()
        if self.device != "cpu":
            raise ValueError(f"--device must be cpu, on which these engines run integers, got {self.device}.")
        if self.clock not in ("wall", "cpu") or (self.clock == "cpu" and self.threads > 1):
            raise ValueError(f"--clock must be wall, or with one thread cpu, got {self.clock}, {self.threads} threads.")
        if unknown := [name for name in self.engines if name not in PACKAGES]:
            raise ValueError(f"--engines takes {', '.join(PACKAGES)}, got {', '.join(unknown)}.")
        for name in self.engines:
            require(PACKAGES[name][0], extra=PACKAGES[name][1])


@dataclass
class Files:
    """Where the models of the sides are."""

    timm: Path
    floating: Path
    quantized: Path
    float_onnx: Path | None = None
    static: Path | None = None


def run(args: EnginesArguments) -> list[dict]:
    """The records of each batch size, of loading and of the files' bytes."""
    with tempfile.TemporaryDirectory() as folder, computing_with(args.threads):
        files = make_files(args, Path(folder))
        with started(sides(args, files)) as running:
            records = [measure(args, running, size, Path(folder)) for size in args.batch_sizes]
            if "onnxruntime" in args.engines:
                records.append(measure_loading(args, running))
        return [*records, measure_bytes(args, files)]


def make_files(args: EnginesArguments, folder: Path) -> Files:
    """Make the float and the quantized model, with the same weights as timm's, and their files for engines."""
    images = torch.randn(16, 3, args.image_size, args.image_size)
    branches = timm_model(args.variant)
    with torch.no_grad():
        branches.train()(images)  # batch norm statistics: with the initial ones all outputs would all but vanish
    files = Files(folder / "timm.safetensors", folder / "float", folder / "quantized")
    model = from_timm(branches.eval()).reparameterize()
    save_file(reparameterize_model(branches).state_dict(), files.timm)
    model.save_pretrained(files.floating)
    if set(args.engines) & {"onnxruntime", "openvino"}:
        files.float_onnx = export_onnx(model, files.floating, "float", image_size=args.image_size)
    if "onnxruntime" in args.engines:
        files.static = quantize_statically(files.float_onnx, folder / "static.onnx", images[:8].numpy())
    # the time of an engine does not depend on how good the codes are
    quick = CalibrationConfig(sensitivity="none", error_compensation=False, bias_correction=False)
    options = {"bits": args.bits, "activation_bits": 8, "calibration": [images[:8]], "calibration_config": quick}
    model.quantize(args.method, **options).eval()
    model.save_pretrained(files.quantized)
    if "onnxruntime" in args.engines:
        for weights in ("packed", "int8"):
            export_format(model, files.quantized, "onnx", weights, image_size=args.image_size)
    if "openvino" in args.engines:
        export_format(model, files.quantized, "openvino", image_size=args.image_size)
    return files


def quantize_statically(source: Path, target: Path, images: np.ndarray) -> Path:
    """Let ONNX Runtime quantize a float file as its documentation says for this kind of processor."""
    tools = require("onnxruntime.quantization", extra="onnx")

    class Reader(tools.CalibrationDataReader):
        """Gives the images once."""

        def __init__(self):
            self.batches = iter([{"pixel_values": images}])

        def get_next(self):
            return next(self.batches, None)

    kinds = {"activation_type": tools.QuantType.QUInt8, "weight_type": tools.QuantType.QInt8}
    tools.quantize_static(source, target, Reader(), quant_format=tools.QuantFormat.QDQ, per_channel=True, **kinds)
    return target


def sides(args: EnginesArguments, files: Files) -> dict[str, tuple[dict, dict]]:
    """(what it is, its environment) of each side, by its name."""
    packed, int8 = packed_file(files, args.bits), files.quantized / "onnx" / "model_int8.onnx"
    chosen = {
        PEER: ({"engine": TIMM, "path": files.timm, "variant": args.variant}, {}),
        OURS: ({"engine": "pytorch", "path": files.floating}, {}),
        SIMULATED: ({"engine": "pytorch", "path": files.quantized}, {}),
    }
    if "onnxruntime" in args.engines:
        for name, path in {ORT_FLOAT: files.float_onnx, ORT_STATIC: files.static, ORT: packed, ORT_INT8: int8}.items():
            chosen[name] = ({"engine": "onnxruntime", "path": path}, {})
    if "openvino" in args.engines:
        ir = files.quantized / "openvino" / "openvino_model.xml"
        chosen[OV_FLOAT] = ({"engine": "openvino", "path": files.float_onnx}, {})
        for name, environment in ({OV: {}} | {f"{OV}, {isa}": {ISA: isa} for isa in args.isas}).items():
            chosen[name] = ({"engine": "openvino", "path": ir}, environment)
    if "inductor" in args.engines:
        chosen[INDUCTOR] = ({"engine": "inductor", "path": files.quantized}, {})
    shared = {"threads": args.threads}
    return {name: ({**what, "path": str(what["path"])} | shared, more) for name, (what, more) in chosen.items()}


def packed_file(files: Files, bits: int) -> Path:
    return files.quantized / "onnx" / ("model_quantized.onnx" if bits == 8 else f"model_q{bits}.onnx")


@contextmanager
def started(chosen: dict[str, tuple[dict, dict]]) -> Iterator[dict[str, Side]]:
    """Start a process for each side, and end them all."""
    running: dict[str, Side] = {}
    try:
        for name, (what, environment) in chosen.items():
            running[name] = Side(what, environment)
        yield running
    finally:
        for side in running.values():
            side.close()


def measure(args: EnginesArguments, running: dict[str, Side], batch_size: int, folder: Path) -> dict:
    """The record of one batch size."""
    path = folder / "images.npy"
    np.save(path, torch.randn(batch_size, 3, args.image_size, args.image_size).numpy())
    calls, logits = {}, {}
    for name, side in running.items():
        side.ask(do="images", path=str(path))
        side.ask(do="logits", path=str(folder / "logits.npy"))
        logits[name] = np.load(folder / "logits.npy")
        calls[name] = max(1, math.ceil(args.seconds / side.ask(do="time", calls=1)["wall"]))
    times: dict[str, list[float]] = {name: [] for name in running}
    order, shuffle = list(running), random.Random(args.seed).shuffle
    for _ in range(args.repeats):
        shuffle(order)
        for name in order:
            times[name].append(running[name].ask(do="time", calls=calls[name])[args.clock])
    setting = f"{args.variant}, {args.image_size} px, batch {batch_size}, {args.threads} thread(s)"
    expected = {name: logits[SIMULATED if is_quantized(name) else PEER] for name in running}
    facts = {
        **processor_facts(),
        "clock": args.clock,
        "engine_versions": {name: version_of(*PACKAGES[name]) for name in args.engines},
        "logits": {name: agreement(found, expected[name]) for name, found in logits.items()},
    }
    return compare(setting, "s", times, ratios(args, list(running), batch_size)) | facts


def is_quantized(name: str) -> bool:
    """Whether a side computes the quantized model, which PyTorch simulates."""
    return name in (SIMULATED, ORT, ORT_INT8, INDUCTOR) or name.startswith(OV)


def ratios(args: EnginesArguments, names: list[str], batch_size: int) -> list[tuple[str, str, float | None]]:
    """What is compared, with the bars for A0 at 224 px and one thread."""
    with_bars = (args.variant, args.image_size, args.threads) == ("a0", 224, 1)
    faster = dict(FASTER.get(batch_size, {}))
    if batch_size == 1:
        flags = processor_facts()["cpu_flags"]
        faster[OV] = next((times for flag, times in BY_ISA.items() if flag in flags), None)
        faster |= {f"{OV}, {isa}": times for isa, times in OF_ISA.items()}
    lines: list[tuple[str, str, float | None]] = []
    for name in names:
        if name != PEER:
            times = faster.get(name) if with_bars else None
            lines.append((name, PEER, 1 / times if times else None))
    if ORT in names:
        lines.append((ORT, ORT_STATIC, STATIC_BAR if with_bars and batch_size == 1 else None))
    return lines


def measure_loading(args: EnginesArguments, running: dict[str, Side]) -> dict:
    """The record of the processor time that ONNX Runtime takes to load the packed file, and the float one."""
    times: dict[str, list[float]] = {ORT: [], ORT_FLOAT: []}
    for _ in range(args.repeats):
        for name, seconds in times.items():
            seconds.append(running[name].ask(do="load")["seconds"])
    times["allowed"] = [LOAD_SECONDS] * args.repeats
    bar = 1.0 if args.variant == "a0" else None
    return compare(f"{args.variant}, loading", "s", times, [(ORT, "allowed", bar), (ORT, ORT_FLOAT, None)])


def measure_bytes(args: EnginesArguments, files: Files) -> dict:
    """The record of the sizes of the files."""
    name, checkpoint = f"{args.variant}, {args.bits} bits, size of the files", "safetensors"
    sizes = {checkpoint: [(files.quantized / "model.safetensors").stat().st_size]}
    lines: list[tuple[str, str, float | None]] = []
    if "onnxruntime" in args.engines:
        sizes[ORT] = [packed_file(files, args.bits).stat().st_size]
        lines.append((ORT, checkpoint, SIZE_BARS.get(args.bits) if args.variant == "a0" else None))
    if "openvino" in args.engines:
        sizes[OV] = [file_bytes(files.quantized / "openvino" / "openvino_model.xml")]
        lines.append((OV, checkpoint, None))
    return compare(name, "B", sizes, lines)


def version_of(package: str, extra: str) -> str:
    return str(getattr(require(package, extra=extra), "__version__", "unknown"))
