"""A small family of models, its page, and a browser that shows it.

Needs Chromium (the variable CHROMIUM, or on the path) and the npm package onnxruntime-web (the variable
ONNXRUNTIME_WEB, or where `npm install --global` puts it).
"""

import functools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from repvgg_hf import RepVGGConfig, RepVGGForImageClassification
from repvgg_hf.hub import DatasetInfo, ModelResult, Results, write_space
from repvgg_hf.hub.space import HEADERS
from repvgg_hf.recipes.benchmarks.chromium import Chromium, find_chromium, find_onnxruntime_web, serve

sys.path.insert(0, str(Path(__file__).parent))
from page_helpers import BITS, DONE, PROCESSOR, draw  # noqa: E402


@pytest.fixture(scope="session")
def program() -> str:
    if (found := find_chromium()) is None:
        pytest.skip("needs Chromium: `apt install chromium`, or name it in the variable CHROMIUM")
    return found


@pytest.fixture(scope="session")
def package():
    if (found := find_onnxruntime_web()) is None:
        pytest.skip("needs `npm install --global onnxruntime-web`, or its folder in the variable ONNXRUNTIME_WEB")
    return found


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> dict:
    """Files by caption: of all shapes and kinds, one smaller than the crop, one that its camera turned."""
    folder, files = tmp_path_factory.mktemp("pictures"), {}
    sizes = {"wide.png": (301, 173), "tall.jpg": (97, 240), "large.webp": (900, 700), "small.png": (20, 17)}
    for seed, (name, size) in enumerate(sizes.items()):
        files[name.partition(".")[0]] = folder / name
        draw(seed, *size).save(folder / name, **({"quality": 92} if name.endswith("jpg") else {}))
    return files


@pytest.fixture(scope="session")
def models(pictures) -> dict[str, RepVGGForImageClassification]:
    """Untrained classifiers with 8 to 1 bits, whose answers differ from picture to picture."""
    labels = dict(enumerate(["apple, an apple", "pear", "plum", "fig", "kiwi <b>", "lime"]))
    sizes = {"stem_hidden_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "stem_stride": 1, "strides": [2, 2]}
    pixels = PROCESSOR([Image.open(path).convert("RGB") for path in pictures.values()], return_tensors="pt")
    made = {}
    for bits in BITS:
        torch.manual_seed(0)
        model = RepVGGForImageClassification(RepVGGConfig(**sizes, id2label=labels)).eval().reparameterize()
        with torch.no_grad():
            hidden = model.base_model(**pixels).pooler_output.flatten(1)
            # a random classifier of what differs between the pictures, of logits that lie some units apart
            weight, bias = model.classifier.weight, model.classifier.bias
            weight.mul_(3 / ((hidden - hidden.mean(0)) @ weight.T).std())
            bias.copy_(-weight @ hidden.mean(0))
        options = {"activation_bits": 8, "codebook_dtype": "int8", "channel_scale": True, "calibration": [dict(pixels)]}
        made[f"w{bits}"] = model.quantize(bits=bits, **options)
    return made


@pytest.fixture(scope="session")
def page(program, package, tmp_path_factory, models, pictures):
    """The page's folder, with figures for its plot."""
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name)
    rows = [ModelResult("float", "float", 32, 91.0, 90_000, 32.0, 1000, 0)]
    for bits, top1 in zip(BITS, (90.5, 89.25, 71.0, 40.0)):
        options = {"granularity": "per_channel", "channel_scale": True, "activation_bits": 8}
        rows.append(ModelResult(f"cluster-w{bits}", "cluster", bits, top1, 3000 * bits, bits, 1000, 0, **options))
        rows.append(
            ModelResult(f"uniform-w{bits}", "uniform", bits, top1 / 2, 2900 * bits, bits, 1000, 0, "per_tensor")
        )
    results, folder = Results(DatasetInfo("fruit", "test"), rows), tmp_path_factory.mktemp("space") / "page"
    write_space(
        folder, models, results, images=pictures, processor=PROCESSOR, onnxruntime_web=package, title="Fruit in bits",
        license="mit",
    )  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def run_onnx(page):
    """`run_onnx(model, pixels)`: logits of ONNX Runtime in Python, for float32 [1, 3, height, width]."""
    import onnxruntime

    @functools.cache
    def session(name: str):
        return onnxruntime.InferenceSession(page / "models" / f"{name}.onnx", providers=["CPUExecutionProvider"])

    return lambda name, pixels: session(name).run(None, {"pixel_values": np.asarray(pixels, np.float32)})[0][0]


@pytest.fixture(scope="session")
def references(run_onnx, models, pictures) -> dict[str, np.ndarray]:
    """Logits of ONNX Runtime for the processor's pixels, by model and picture."""
    found = {}
    for number, path in enumerate(pictures.values(), 1):
        pixels = PROCESSOR(Image.open(path).convert("RGB"), return_tensors="np")["pixel_values"]
        found |= {f"{name} images/{number}{path.suffix}": run_onnx(name, pixels) for name in models}
    return found


@pytest.fixture(scope="session")
def server(page):
    with serve(page, HEADERS) as (url, asked):
        yield url, asked


@pytest.fixture(scope="session")
def open_browser(program):
    with Chromium(program) as browser:
        yield browser


@pytest.fixture
def browser(open_browser):
    """The browser; the test fails if the page's console had anything to say."""
    open_browser.log.clear()
    yield open_browser
    assert open_browser.log == []


@pytest.fixture
def show(browser, server):
    """`show(hash, ...)` opens the page at a bit-width and waits for the answer to the first picture."""

    def run(model: str = "w4", **options) -> Chromium:
        browser.open(f"{server[0]}/#{model}", **options)
        browser.wait_for(DONE.format(f"sample-0 {model}"))
        return browser

    return run
