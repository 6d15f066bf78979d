"""Clustering a network's weights: ours against the libraries that do it, in time, error and memory."""

import importlib.util
import json
import logging
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from repvgg_hf import ClusterConfig
from repvgg_hf.compression.codebooks.weights import quantize_weight
from repvgg_hf.networks.timm import from_timm
from repvgg_hf.recipes.benchmarks.load import LAUNCHER
from repvgg_hf.recipes.benchmarks.measuring import BenchmarkArguments, compare, time_calls
from repvgg_hf.recipes.benchmarks.peers import timm_model

Weights = dict[str, torch.Tensor]  # of every layer, by its name
Method = Callable[[Weights, int, bool], Callable[[], Weights]]  # weights, bits, per channel: a function to time

OURS, OPTIMUM, NAMED_PEER = "ours", "kmeans1d", "coremltools"
PACKAGES = {"kmeans1d": "kmeans1d", "scikit-learn": "sklearn", "flash1dkmeans": "flash1dkmeans"}
PACKAGES |= {NAMED_PEER: "coremltools"}
GRANULARITIES = ("per tensor", "per channel")
# the largest ratios that we accept: of time to the named peer's, of error to the optimum, of memory to a layer's
TIME_BARS = {"per tensor": 0.4, "per channel": 0.1}
ERROR_BARS = {"per tensor": 1.0002, "per channel": 1.0005}
MEMORY_BAR = 6.0

# In a fresh process. A first small weight loads all that is loaded late; the peak counts from what is in use then.
PEAK_MEMORY = """
import json, resource, sys, psutil, torch
from repvgg_hf import ClusterConfig
from repvgg_hf.compression.codebooks.weights import quantize_weight

path, options = sys.argv[1], json.loads(sys.argv[2])
torch.set_num_threads(options.pop("threads"))
config = ClusterConfig(**options)
quantize_weight(torch.randn(8, 300), config.bits, config.groups_of("first", 8), config)
weights = torch.load(path)
before = psutil.Process().memory_info().rss
quantized = {
    name: quantize_weight(weight, config.bits, config.groups_of(name, len(weight)), config)
    for name, weight in weights.items()
}
unit = 1 if sys.platform == "darwin" else 1024
print(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@dataclass
class QuantizeArguments(BenchmarkArguments):
    """Options of this benchmark."""

    repeats: int = field(default=5, metadata={"help": "Times that ours is measured."})
    peer_repeats: int = field(default=1, metadata={"help": "Times that each peer is measured; some take a minute."})
    variants: list[str] = field(
        default_factory=lambda: ["a0"],
        metadata={"help": "Published variants, or 'cifar' for the study's network; the peers cluster only the first."},
    )
    layers: int | None = field(default=None, metadata={"help": "Only the first so many layers, for a quick look."})
    bits: int = field(default=4, metadata={"help": "Bits of a weight's code, 1 to 8."})
    peers: list[str] = field(
        default_factory=lambda: list(PACKAGES), metadata={"help": f"Libraries to compare with: {', '.join(PACKAGES)}."}
    )

    def __post_init__(self):
        super().__post_init__()
        unknown = [peer for peer in self.peers if peer not in PACKAGES]
        if unknown:
            raise ValueError(f"--peers takes {', '.join(PACKAGES)}, got {', '.join(unknown)}.")
        missing = [peer for peer in self.peers if importlib.util.find_spec(PACKAGES[peer]) is None]
        if missing:
            install = f"`pip install {' '.join(missing)}`"
            raise ValueError(f"{', '.join(missing)} not installed: {install}, or give --peers without.")


def network_weights(variant: str, layers: int | None, device: str) -> Weights:
    """The weights of a fused network with timm's random initialization."""
    model = from_timm(timm_model(variant)).reparameterize()
    weights = {
        name: layer.weight.detach().to(device)
        for name, layer in model.named_modules()
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear))
    }
    return dict(list(weights.items())[:layers])


def run(args: QuantizeArguments) -> list[dict]:
    records, times = [], {granularity: {} for granularity in GRANULARITIES}
    for variant in args.variants:
        weights = network_weights(variant, args.layers, args.device)
        count = sum(weight.numel() for weight in weights.values())
        peers = args.peers if variant == args.variants[0] else []
        for granularity in GRANULARITIES:
            setting = f"{variant}, {args.bits} bit {granularity}"
            seconds, errors = measure(weights, granularity, peers, args)
            times[granularity][variant] = [1e6 / count * value for value in seconds[OURS]]
            records += [time_record(setting, granularity, seconds), error_record(setting, granularity, errors, weights)]
        records.append(memory_record(variant, weights, args))
    first, *others = args.variants
    for granularity in GRANULARITIES if others else ():
        setting = f"{args.bits} bit {granularity}, a million weights"
        records.append(compare(setting, "s", times[granularity], [(variant, first, 1.0) for variant in others]))
    return records


def measure(weights: Weights, granularity: str, peers: list[str], args: QuantizeArguments):
    """(seconds of every call, squared error of every group `[groups]`) of ours and the peers, who take turns."""
    methods = {OURS: ours} | {peer: METHODS[peer] for peer in peers}
    per_channel = granularity == "per channel"
    name, first = next(iter(weights.items()))
    for method in methods.values():
        method({name: first}, args.bits, per_channel)()  # lazy initialization, compilation
    seconds, errors = {name: [] for name in methods}, {}
    order, shuffle = list(methods), random.Random(args.seed).shuffle
    for turn in range(max(args.repeats, args.peer_repeats if peers else 0)):
        shuffle(order)
        for name in order:
            if turn < (args.repeats if name == OURS else args.peer_repeats):
                cluster = methods[name](weights, args.bits, per_channel)
                quantized = {}
                seconds[name].append(time_calls(lambda: quantized.update(cluster()), 1))  # noqa: B023
                errors[name] = group_errors(weights, quantized, per_channel)
    return seconds, errors


def group_errors(weights: Weights, quantized: Weights, per_channel: bool) -> torch.Tensor:
    """The squared error of each codebook's weights, float64."""
    errors = []
    for name, weight in weights.items():
        difference = quantized[name].cpu().double() - weight.cpu().double()
        errors.append(difference.square().reshape(len(weight) if per_channel else 1, -1).sum(dim=1))
    return torch.cat(errors)


def time_record(setting: str, granularity: str, seconds: dict[str, list[float]]) -> dict:
    bars = {NAMED_PEER: TIME_BARS[granularity]}
    ratios = [(OURS, peer, bars.get(peer)) for peer in seconds if peer != OURS]
    return compare(setting, "s", seconds, ratios) | {"measured": {name: len(times) for name, times in seconds.items()}}


def error_record(setting: str, granularity: str, errors: dict[str, torch.Tensor], weights: Weights) -> dict:
    """`|w - w_q| / |w|` over all weights; that of the peers, too."""
    energy = sum(weight.double().square().sum().item() for weight in weights.values())
    relative = {name: [(error.sum().item() / energy) ** 0.5] for name, error in errors.items()}
    bars = {OPTIMUM: ERROR_BARS[granularity]}
    ratios = [(OURS, peer, bars.get(peer)) for peer in relative if peer != OURS]
    record = compare(f"{setting}, relative error", "", relative, ratios)
    if OPTIMUM in errors:
        lossy = errors[OPTIMUM] > 1e-9 * energy / len(errors[OPTIMUM])  # not clustered without loss
        record["mean_ratio_of_squared_errors"] = (errors[OURS] / errors[OPTIMUM])[lossy].mean().item()
    return record


def memory_record(variant: str, weights: Weights, args: QuantizeArguments) -> dict:
    """Peak memory of ours beyond the weights, codes of all layers included."""
    largest = max(weight.numel() * weight.element_size() for weight in weights.values())
    extra = {"largest layer": [largest]}
    scaled = {"per tensor": False, "per tensor, channel scale": True, "per channel": False}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/weights.pt"
        torch.save({name: weight.cpu().clone() for name, weight in weights.items()}, path)
        for name, channel_scale in scaled.items():
            options = {"bits": args.bits, "channel_scale": channel_scale, "threads": torch.get_num_threads()}
            options["granularity"] = name.split(",")[0].replace(" ", "_")
            command = [sys.executable, "-c", LAUNCHER, "-c", PEAK_MEMORY, path, json.dumps(options)]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            extra[name] = [int(printed)]
    ratios = [(name, "largest layer", MEMORY_BAR) for name in scaled]
    return compare(f"{variant}, {args.bits} bit, memory beyond the weights", "B", extra, ratios)


def ours(weights: Weights, bits: int, per_channel: bool) -> Callable[[], Weights]:
    config = ClusterConfig(bits=bits, granularity="per_channel" if per_channel else "per_tensor", channel_scale=False)
    return lambda: {
        name: quantize_weight(weight, bits, config.groups_of(name, len(weight)), config).decoded()
        for name, weight in weights.items()
    }


def by_group(cluster: Callable[[np.ndarray, int], np.ndarray]) -> Method:
    """The method that gives each codebook's weights `[n]` to `cluster`, which returns what they become."""

    def method(weights: Weights, bits: int, per_channel: bool) -> Callable[[], Weights]:
        arrays = {name: weight.cpu().numpy() for name, weight in weights.items()}

        def cluster_layer(array: np.ndarray) -> torch.Tensor:
            groups = array.reshape(len(array) if per_channel else 1, -1)
            quantized = [cluster(group, min(2**bits, len(group))) for group in groups]
            return torch.from_numpy(np.stack(quantized).reshape(array.shape))

        return lambda: {name: cluster_layer(array) for name, array in arrays.items()}

    return method


def kmeans1d_cluster(values: np.ndarray, k: int) -> np.ndarray:
    import kmeans1d

    clusters, centroids = kmeans1d.cluster(values, k)
    return np.array(centroids)[clusters]


def sklearn_cluster(values: np.ndarray, k: int) -> np.ndarray:
    from sklearn.cluster import KMeans

    fit = KMeans(k, random_state=0).fit(values[:, None])
    return fit.cluster_centers_[fit.labels_, 0]


def flash1dkmeans_cluster(values: np.ndarray, k: int) -> np.ndarray:
    from flash1dkmeans import kmeans_1d

    centroids, labels = kmeans_1d(values, k, random_state=0)
    return centroids[labels]


def coremltools_method(weights: Weights, bits: int, per_channel: bool) -> Callable[[], Weights]:
    """coremltools' `PostTrainingPalettizer` with its defaults, on layers of these weights."""
    from coremltools.optimize.torch.palettization import PostTrainingPalettizer, PostTrainingPalettizerConfig

    logging.getLogger("coremltools").setLevel(logging.WARNING)
    layers = torch.nn.ModuleList()
    for weight in weights.values():
        out, inputs, *kernel_size = weight.shape
        with torch.device("meta"):
            layer = torch.nn.Conv2d(inputs, out, kernel_size) if kernel_size else torch.nn.Linear(inputs, out)
        layer.weight = torch.nn.Parameter(weight.cpu().clone())
        layers.append(layer)
    options = {"n_bits": bits, "granularity": "per_tensor"}
    if per_channel:
        options |= {"granularity": "per_grouped_channel", "group_size": 1}
    palettizer = PostTrainingPalettizer(layers, PostTrainingPalettizerConfig.from_dict({"global_config": options}))

    def palettized() -> Weights:
        compressed = palettizer.compress(inplace=True)
        return {name: layer.weight.detach() for name, layer in zip(weights, compressed)}

    return palettized


METHODS = {
    "kmeans1d": by_group(kmeans1d_cluster),
    "scikit-learn": by_group(sklearn_cluster),
    "flash1dkmeans": by_group(flash1dkmeans_cluster),
    "coremltools": coremltools_method,
}
