"""A loopback Hub, fresh processes that use it, and a small family of models to publish."""

import functools
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from transformers import BitImageProcessor

import repvgg_hf
from repvgg_hf import RepVGGConfig, RepVGGForImageClassification
from repvgg_hf.hub import DatasetInfo, ModelResult, Results

sys.path.insert(0, str(Path(__file__).parent))
from loopback_hub import LoopbackHub  # noqa: E402


def hub_environment(url: str, home: Path) -> dict[str, str]:
    """Variables for a process that talks to the Hub at `url` and keeps its cache in `home`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    ours = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return inherited | ours | {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


@pytest.fixture(scope="session")
def fresh_process():
    """`fresh_process(code, url, home)` runs `code` in a new Python and returns what it prints.

    `python` is another interpreter, `offline` forbids the network, `cwd` is where it runs, `expect` its exit code.
    """

    def run(code: str, url: str, home: Path, python=sys.executable, offline=False, cwd=None, expect=0) -> str:
        variables = hub_environment(url, home) | ({"HF_HUB_OFFLINE": "1"} if offline else {})
        if python == sys.executable:  # the package that is tested, whichever is installed
            variables["PYTHONPATH"] = str(Path(repvgg_hf.__file__).parents[1])
        command = [str(python), "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=cwd, timeout=300)
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout if expect == 0 else done.stdout + done.stderr

    return run


@pytest.fixture
def use_hub(monkeypatch, tmp_path):
    """`use_hub(hub)`: this process talks to that Hub, too, until the test ends."""

    def use(hub: LoopbackHub) -> LoopbackHub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # it remembers the endpoint
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        return hub

    return use


@pytest.fixture
def hub(use_hub):
    """A new, empty Hub that this process talks to."""
    with LoopbackHub() as hub:
        yield use_hub(hub)


@pytest.fixture(scope="session")
def python_without_package(tmp_path_factory) -> Path:
    """A Python that has what this one has, but not repvgg_hf."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, symlinks=True)
    (target,) = folder.glob("lib/python*/site-packages")
    for source in [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]:
        for path in Path(source).iterdir():
            # an editable install is a .pth file and the finder that it starts
            if "repvgg" not in path.name and path.suffix != ".pth" and not (target / path.name).exists():
                (target / path.name).symlink_to(path)
    return folder / "bin" / "python"


@pytest.fixture(scope="session")
def processor() -> BitImageProcessor:
    return BitImageProcessor(
        size={"shortest_edge": 8},
        crop_size={"height": 8, "width": 8},
        resample=2,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


@pytest.fixture(scope="session")
def tiny_model():
    """`tiny_model(bits)`: an untrained classifier of digits, fused, with weights of `bits` or float (`None`)."""

    @functools.cache
    def make(bits: int | None = None) -> RepVGGForImageClassification:
        torch.manual_seed(0)
        config = RepVGGConfig(
            stem_hidden_size=8, hidden_sizes=[8, 16], depths=[1, 1], stem_stride=1, strides=[1, 2], num_labels=10
        )
        model = RepVGGForImageClassification(config).eval().reparameterize()
        return model if bits is None else model.quantize(bits=bits)

    return make


@pytest.fixture
def results() -> Results:
    """Figures of a float and two 4 bit models; the bytes are those of `tiny_model`."""
    rows = [
        ModelResult("float", "float", 32, 96.5, 9736, 32.0, 360, 0, top5=99.9, loss=0.12),
        ModelResult("uniform-w4", "uniform", 4, 80.25, 2800, 4.0, 360, 0, "per_tensor", top5=99.0, loss=0.7),
        ModelResult("cluster-w4", "cluster", 4, 95.0, 3108, 4.4, 360, 0, "per_tensor", True, top5=99.5, loss=0.2),
    ]
    return Results(DatasetInfo("digits", "held out"), rows)


@pytest.fixture
def package(tmp_path) -> Path:
    """A folder that looks like the npm package."""
    folder = tmp_path / "node_modules" / "onnxruntime-web"
    (folder / "dist").mkdir(parents=True)
    (folder / "package.json").write_text('{"name": "onnxruntime-web", "version": "9.8.7"}')
    (folder / "dist" / "ort.wasm.bundle.min.mjs").write_text("export {};")
    (folder / "dist" / "ort-wasm-simd-threaded.wasm").write_bytes(b"\0asm not really")
    return folder


@pytest.fixture
def family(tmp_path, tiny_model, processor) -> dict[str, Path]:
    """Checkpoint folders, given in no order, with something in place of their ONNX files."""
    folders = {name: tmp_path / name for name in ("w2", "float", "w4")}
    for (name, folder), bits in zip(folders.items(), (2, None, 4)):
        tiny_model(bits).save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / "onnx").mkdir()
        (folder / "onnx" / "model.onnx").write_bytes(b"\0onnx of " + name.encode())
    return folders


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "A cat #1.jpeg"
    Image.new("RGB", (40, 30), "orange").save(path)
    return path
