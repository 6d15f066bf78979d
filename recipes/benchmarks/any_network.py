"""Quantizing networks that are not of this package to 4 bits without data: ours, and three libraries.

Every turn makes a network of timm with new random weights, batch norms with the statistics of what they see, fused by
`repvgg_hf.fuse`; every side then quantizes a copy of the same fused network as its documentation says. What a library
refuses stands under `refused` in the record, with its error.
"""

import copy
import importlib.util
import logging
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import timm
import torch
from torch import nn

from repvgg_hf import fuse, quantize
from repvgg_hf.recipes.benchmarks.measuring import BenchmarkArguments, compare, computing_with, time_calls
from repvgg_hf.runtime.cluster_layers import cluster_layers

BITS = 4
OURS_TENSOR, OURS_CHANNEL = "ours, tensor + scale", "ours, channel"
# what to import of each library
PACKAGES = {"coremltools": "coremltools", "nncf": "nncf", "optimum-quanto": "optimum.quanto"}

# of each quantized layer: the bits of a weight's code, and the bits stored for all of its weight
Layers = dict[str, tuple[float, float]]
# (fused float model that it may change, images [batch, 3, height, width]) -> quantized model
Method = Callable[[nn.Module, torch.Tensor], nn.Module]


@dataclass
class Side:
    """One way to quantize.

    Args:
        quantize: does it.
        layers: quantized model -> its quantized layers.
        ours: the side of ours that it is compared with; `None` for ours.
        peer: the library; `None` for ours.
    """

    quantize: Method
    layers: Callable[[nn.Module], Layers]
    ours: str | None = None
    peer: str | None = None


@dataclass
class AnyNetworkArguments(BenchmarkArguments):
    """Options of this benchmark."""

    repeats: int = field(default=5, metadata={"help": "Times that each side quantizes, each time new weights."})
    architectures: list[str] = field(
        default_factory=lambda: ["resnet18", "mobileone_s0"], metadata={"help": "Names of timm's models."}
    )
    image_size: int = field(default=224, metadata={"help": "Side in pixels of the random images."})
    images: int = field(default=8, metadata={"help": "Random images whose logits are compared."})
    threads: int = field(default=1, metadata={"help": "Threads to compute with."})
    peers: list[str] = field(
        default_factory=lambda: list(PACKAGES),
        metadata={"help": f"Libraries to compare with: {', '.join(PACKAGES)}; or 'none'."},
    )

    def __post_init__(self):
        super().__post_init__()
        self.peers = [] if self.peers == ["none"] else self.peers
        unknown = [peer for peer in self.peers if peer not in PACKAGES]
        if unknown:
            raise ValueError(f"--peers takes {', '.join(PACKAGES)}, or none, got {', '.join(unknown)}.")
        missing = [peer for peer in self.peers if not is_installed(PACKAGES[peer])]
        if missing:
            install = f"`pip install {' '.join(missing)}`"
            raise ValueError(f"{', '.join(missing)} not installed: {install}, or give --peers without, or none.")


def is_installed(module: str) -> bool:
    """Whether `module` can be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # no parent package; a module that was made None
        return False


def run(args: AnyNetworkArguments) -> list[dict]:
    """The records of time, error and size of each network."""
    with computing_with(args.threads):
        return [record for name in args.architectures for record in measure(name, args)]


def measure(architecture: str, args: AnyNetworkArguments) -> list[dict]:
    """Quantize a network `args.repeats` times by every side, who take turns in a new order each time."""
    sides = {name: side for name, side in SIDES.items() if side.peer is None or side.peer in args.peers}
    figures, refused = {name: [] for name in sides}, {}
    order, shuffle = list(sides), random.Random(args.seed).shuffle
    for turn in range(-1, args.repeats):  # the first is not counted: lazy initialization, compilation
        model, images = fused_network(architecture, args, seed=args.seed + max(turn, 0))
        with torch.no_grad():
            expected = model(images)
        shuffle(order)
        for name in [name for name in order if name not in refused]:
            try:
                taken, quantized = timed(sides[name].quantize, model, images)
                error = relative_error(quantized, images, expected)
            except Exception as problem:  # a library may raise whatever it likes; ours is to work
                if sides[name].peer is None:
                    raise
                refused[name] = f"{type(problem).__name__}: {problem}"
            else:
                figures[name].append((taken, error, *stored_and_shares(model, sides[name].layers(quantized))))
    counted = {name: figures[name][1:] for name in sides if name not in refused}
    setting = f"{architecture}, {args.image_size} px, {args.threads} thread(s)"
    records = make_records(setting, counted)
    records[-1] |= {"share_by_bits": {name: rows[-1][3] for name, rows in counted.items()}, "refused": refused}
    print_shares(records[-1])
    return records


def make_records(setting: str, figures: dict[str, list[tuple]]) -> list[dict]:
    """The records of time, error and size, from each side's `(seconds, error, bits stored, ...)` of every turn."""
    ratios = [(OURS_CHANNEL, OURS_TENSOR, None)] + [
        (SIDES[name].ours, name, None) for name in figures if SIDES[name].ours
    ]
    columns = enumerate((("time", "s"), ("error of logits", ""), ("bits stored per weight", "")))
    return [
        compare(f"{setting}, {what}", unit, {name: [row[i] for row in rows] for name, rows in figures.items()}, ratios)
        for i, (what, unit) in columns
    ]


def print_shares(record: dict) -> None:
    """Print how many bits the weights have by each side, and what was refused."""
    for name, shares in record["share_by_bits"].items():
        said = ", ".join(f"{100 * share:.1f} % of the weights at {bits} bits" for bits, share in shares.items())
        print(f"{record['setting']}, {name}: {said}")
    for name, problem in record["refused"].items():
        print(f"{record['setting']}, {name}: refused, {problem}")


def fused_network(architecture: str, args: AnyNetworkArguments, seed: int) -> tuple[nn.Module, torch.Tensor]:
    """A fused network in eval mode, and random images `[images, 3, image_size, image_size]`."""
    torch.manual_seed(seed)
    model = timm.create_model(architecture).to(args.device)
    images = torch.randn(args.images, 3, args.image_size, args.image_size, device=args.device)
    fuse(with_statistics(model, images), images[:1])
    return model, images


@torch.no_grad()
def with_statistics(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """Give every batch norm random scales and shifts, and statistics of what it sees; returns the model in eval mode.

    With arbitrary statistics a deep network forgets its input, and its logits would agree with anything's.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.weight.uniform_(0.6, 1.0)
        norm.bias.normal_(0, 0.2)
        norm.momentum = None  # the mean of all batches: here of one
    model.train()(images)
    return model.eval()


def timed(quantize_model: Method, model: nn.Module, images: torch.Tensor) -> tuple[float, nn.Module]:
    """(seconds, what became of a copy of `model`)."""
    model, results = copy.deepcopy(model), []
    return time_calls(lambda: results.append(quantize_model(model, images)), 1), results[0]


@torch.no_grad()
def relative_error(quantized: nn.Module, images: torch.Tensor, expected: torch.Tensor) -> float:
    """`|y_q - y| / |y|` of the logits `y` `[images, classes]`. Raises `ValueError` if it is not finite."""
    error = ((quantized(images) - expected).norm() / expected.norm()).item()
    if not error < float("inf"):  # also true for NaN
        raise ValueError(f"The quantized model's logits differ by {error}.")
    return error


def stored_and_shares(model: nn.Module, layers: Layers) -> tuple[float, dict[str, float]]:
    """(bits stored per weight, {bits: share of the weights}) of the float `model`'s convolutions and linear layers."""
    counts, total, stored = {}, 0, 0
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            count, itemsize = layer.weight.numel(), layer.weight.element_size()
            bits, stored_bits = layers.get(name, (8 * itemsize, 8 * itemsize * count))
            counts[f"{bits:g}"] = counts.get(f"{bits:g}", 0) + count
            total, stored = total + count, stored + stored_bits
    return stored / total, {bits: count / total for bits, count in sorted(counts.items())}


def bits_of(*tensors: torch.Tensor | None) -> int:
    """The bits that tensors take."""
    return 8 * sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def by_ours(**options) -> Method:
    return lambda model, images: quantize(model, bits=BITS, **options)


def our_layers(model: nn.Module) -> Layers:
    return {
        name: (layer.bits, bits_of(layer.weight_codes, layer.weight_codebook, layer.weight_scale))
        for name, layer in cluster_layers(model).items()
    }


def by_coremltools(**options) -> Method:
    """Core ML Tools' k-means, with the defaults of everything but `options`."""

    def palettize(model: nn.Module, images: torch.Tensor) -> nn.Module:
        from coremltools.optimize.torch.palettization import PostTrainingPalettizer, PostTrainingPalettizerConfig

        logging.getLogger("coremltools.optimize.torch").setLevel(logging.WARNING)  # it tells of every layer
        config = PostTrainingPalettizerConfig.from_dict({"global_config": {"n_bits": BITS, **options}})
        return PostTrainingPalettizer(model, config).compress(inplace=True)

    return palettize


def coremltools_layers(model: nn.Module) -> Layers:
    """Codes, and tables and scales in float16 as in a Core ML package; the layers themselves hold decoded weights."""
    layers = {}
    for name, layer in model.named_modules():
        buffers = {key.removeprefix("_COREML_/weight/"): value for key, value in layer.named_buffers(recurse=False)}
        if "lut" in buffers:
            bits = (buffers["lut"].shape[-2] - 1).bit_length()  # of the table's entries
            tables = [buffers[key].half() for key in ("lut", "palettization_scale") if key in buffers]
            layers[name] = (bits, bits * layer.weight.numel() + bits_of(*tables))
    return layers


def by_nncf(**options) -> Method:
    """NNCF's 4 bit mode with zero points and a scale for 128 inputs, its default; it traces the model with an image."""

    def compress(model: nn.Module, images: torch.Tensor) -> nn.Module:
        import nncf

        logging.getLogger("nncf").setLevel(logging.WARNING)  # it prints a table of bits
        data = nncf.Dataset([images[:1]])
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT4_ASYM, dataset=data, **options)

    return compress


def nncf_layers(model: nn.Module) -> Layers:
    """Codes, scales and zero points, as the compressed PyTorch model holds them."""
    layers = {}
    for hook, decompressor in model.named_modules():
        found = re.fullmatch(r"__nncf_hooks\.post_hooks\.(.+):weight__0\.0", hook)
        if found:
            name = found[1].replace(":", ".")
            weight = model.get_submodule(name).weight
            count = decompressor(weight).numel()
            layers[name] = (bits_of(weight) / count, bits_of(weight, *decompressor.buffers()))
    return layers


def by_quanto(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """optimum-quanto's integers with a range for each channel, or for 128 inputs of a channel."""
    from optimum import quanto

    quanto.quantize(model, weights=quanto.qint4)
    quanto.freeze(model)
    return model


def quanto_layers(model: nn.Module) -> Layers:
    """Codes, scales and shifts, as the model's state has them."""
    layers = {}
    for name, layer in model.named_modules():
        qtype = getattr(getattr(layer, "weight", None), "qtype", None)
        if qtype is not None:
            tensors = [value for key, value in layer.state_dict().items() if key.startswith("weight.")]
            layers[name] = (qtype.bits, bits_of(*tensors))
    return layers


CHANNEL = {"granularity": "per_grouped_channel", "group_size": 1}
SIDES = {
    OURS_TENSOR: Side(by_ours(granularity="per_tensor", channel_scale=True), our_layers),
    OURS_CHANNEL: Side(by_ours(granularity="per_channel"), our_layers),
    "coremltools, tensor": Side(by_coremltools(), coremltools_layers, OURS_TENSOR, "coremltools"),
    "coremltools, tensor + scale": Side(
        by_coremltools(enable_per_channel_scale=True), coremltools_layers, OURS_TENSOR, "coremltools"
    ),
    "coremltools, channel": Side(by_coremltools(**CHANNEL), coremltools_layers, OURS_CHANNEL, "coremltools"),
    "nncf": Side(by_nncf(), nncf_layers, OURS_CHANNEL, "nncf"),
    "nncf, all layers": Side(by_nncf(all_layers=True), nncf_layers, OURS_CHANNEL, "nncf"),
    "quanto": Side(by_quanto, quanto_layers, OURS_CHANNEL, "optimum-quanto"),
}
