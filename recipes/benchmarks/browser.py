"""The packed int8 file in a browser against the float one, and its agreement with PyTorch.

Both are run by onnxruntime-web in WebAssembly, one thread, in a headless Chromium on this machine, by turns. With
`--model_name_or_path` and `--dataset_name` the network is a trained one, and the images are real.
"""

import base64
import math
import random
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

import repvgg_hf
from repvgg_hf.hub.space import check_runtime
from repvgg_hf.interop.agreement import agreement, in_batches
from repvgg_hf.networks.timm import from_timm
from repvgg_hf.recipes.benchmarks.chromium import Chromium, find_chromium, find_onnxruntime_web, serve
from repvgg_hf.recipes.benchmarks.measuring import BenchmarkArguments, compare
from repvgg_hf.recipes.benchmarks.peers import timm_model
from repvgg_hf.training.batches import evaluation_data
from repvgg_hf.training.splits import DataArguments, load_splits

PAGE = Path(__file__).with_name("browser.html")
FLOAT, PACKED = "wasm, float", "wasm, packed int8"
TIMES_BAR = 2  # as fast as float, of A0 at 224 px


@dataclass
class BrowserArguments(BenchmarkArguments):
    """Options of this benchmark."""

    variant: str = field(
        default="a0", metadata={"help": "A published variant, or 'cifar' for the study's network, with new weights."}
    )
    image_size: int = field(default=224, metadata={"help": "Side of the images in pixels."})
    bits: int = field(default=4, metadata={"help": "Bits of a weight's code; activations have 8."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A float checkpoint of this package to run instead of --variant."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Pictures to calibrate on and to agree on; random pixels by default."}
    )
    image_column_name: str | None = field(default=None, metadata={"help": "The column of the pictures."})
    images: int = field(default=64, metadata={"help": "Images on which the answers are compared with PyTorch's."})
    onnxruntime_web: str | None = field(
        default=None, metadata={"help": "Folder of the npm package onnxruntime-web; by default where npm puts it."}
    )

    def __post_init__(self):
        self.device = "cpu"
        super().__post_init__()
        if find_chromium() is None:
            raise ValueError("There is no Chromium: install it, or name its program in the variable CHROMIUM.")
        self.onnxruntime_web = str(check_runtime(self.onnxruntime_web or find_onnxruntime_web() or "onnxruntime-web"))
        if self.dataset_name and not self.model_name_or_path:
            raise ValueError("--dataset_name needs --model_name_or_path, a network that was trained on such pictures.")


def run(args: BrowserArguments) -> list[dict]:
    """The record of the times, with the agreement of both files' logits."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent)
        model, images = model_and_images(args)
        expected = {FLOAT: logits_of(model, images)}
        sources = {FLOAT: repvgg_hf.export_onnx(model, folder, "float", image_size=args.image_size)}
        # neither time nor agreement depends on how good the codes are
        quick = repvgg_hf.CalibrationConfig(sensitivity="none", error_compensation=False, bias_correction=False)
        calibration = {"calibration": [torch.from_numpy(images[:16])], "calibration_config": quick}
        model.quantize(bits=args.bits, activation_bits=8, **calibration).eval()
        expected[PACKED] = logits_of(model, images)
        sources[PACKED] = repvgg_hf.export_onnx(model, folder, "packed", image_size=args.image_size)
        (folder / "index.html").write_bytes(PAGE.read_bytes())
        (folder / "ort").symlink_to(Path(args.onnxruntime_web).resolve() / "dist")
        with serve(folder) as (address, _), Chromium(find_chromium()) as browser:
            browser.open(f"{address}/index.html")
            for name, path in sources.items():
                browser.evaluate(f"load({name!r}, {path.relative_to(folder).as_posix()!r})")
            found = {name: in_batches(engine_in(browser, name), images, 1) for name in sources}
            times = measure(browser, list(sources), args)
            version = browser.evaluate("ort.env.versions.web")
    with_bar = (args.variant, args.image_size, args.model_name_or_path) == ("a0", 224, None)
    setting = f"{args.model_name_or_path or args.variant}, {args.image_size} px, batch 1, 1 thread"
    record = compare(setting, "s", times, [(PACKED, FLOAT, 1 / TIMES_BAR if with_bar else None)])
    logits = {name: agreement(found[name], expected[name]) for name in sources}
    return [record | {"onnxruntime-web": version, "images": len(images), "logits": logits}]


def model_and_images(args: BrowserArguments):
    """Return a fused float model in eval mode, and images for it, float32 `[count, 3, height, width]`."""
    if args.model_name_or_path is None:
        images = torch.randn(max(16, args.images), 3, args.image_size, args.image_size)
        branches = timm_model(args.variant)
        with torch.no_grad():
            branches.train()(images[:16])  # statistics: with the initial ones all outputs would all but vanish
        return from_timm(branches.eval()).reparameterize().eval(), images.numpy()
    model = AutoModelForImageClassification.from_pretrained(args.model_name_or_path).eval().reparameterize()
    if args.dataset_name is None:
        return model, torch.randn(max(16, args.images), 3, args.image_size, args.image_size).numpy()
    options = DataArguments(dataset_name=args.dataset_name, image_column_name=args.image_column_name)
    split = load_splits(options, seed=args.seed, train=False)["validation"]
    data = evaluation_data(split, options, AutoImageProcessor.from_pretrained(args.model_name_or_path))
    count = min(args.images, len(data))
    return model, torch.stack([data[index]["pixel_values"] for index in range(count)]).numpy()


@torch.inference_mode()
def logits_of(model, images: np.ndarray) -> np.ndarray:
    return in_batches(lambda batch: model(torch.from_numpy(batch)).logits.numpy(), images, 50)


def engine_in(browser: Chromium, name: str):
    """Return a function that runs one image `[1, 3, height, width]` in the page."""

    def call(image: np.ndarray) -> np.ndarray:
        data = base64.b64encode(np.ascontiguousarray(image, dtype="<f4").tobytes()).decode()
        return np.array(browser.evaluate(f"run({name!r}, {list(image.shape)}, {data!r})"), dtype=np.float32)[None]

    return call


def measure(browser: Chromium, names: list[str], args: BrowserArguments) -> dict[str, list[float]]:
    """Return the seconds per image of each side, which take turns in a new order each time."""
    times: dict[str, list[float]] = {name: [] for name in names}
    calls = {name: max(1, math.ceil(args.seconds / browser.evaluate(f"time({name!r}, 1)"))) for name in names}
    order, shuffle = list(names), random.Random(args.seed).shuffle
    for _ in range(args.repeats):
        shuffle(order)
        for name in order:
            times[name].append(browser.evaluate(f"time({name!r}, {calls[name]})", wait=600))
    return times
