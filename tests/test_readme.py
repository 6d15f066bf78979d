"""README's story on one's own photographs, and its Python, run in its order as it stands, on small drawn pictures."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from journey import PYTHON, STORY, blocks, prepare, tell  # noqa: E402

pytest.importorskip("onnxscript", reason="the story writes an ONNX file")

# what the Python section takes from the reader: some images with labels, and Trainer's arguments
READER = """
import torch
from transformers import Trainer, TrainingArguments
from transformers import AutoImageProcessor

processor = AutoImageProcessor.from_pretrained("outputs/photos")
dataset = [{"pixel_values": torch.randn(3, 32, 32), "labels": index % 2} for index in range(16)]
args = TrainingArguments("outputs/trainer", num_train_epochs=2, report_to="none", use_cpu=True, disable_tqdm=True)
"""
# the Hub is not there: what would be uploaded is written instead
UPLOAD, INSTEAD = "private=False)", 'dry_run=True, folder="outputs/published")'


def draw(folder: Path, count: int, seed: int) -> None:
    """Store pictures of stripes across and along, of random colors, in a folder for each class."""
    generator = np.random.default_rng(seed)
    for name in ("across", "along"):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            stripes = np.arange(32)[:, None] // 4 % 2 * np.ones((1, 32))
            stripes = (stripes if name == "across" else stripes.T)[..., None]
            colors = generator.integers(0, 256, (2, 3))
            pixels = np.where(stripes > 0, colors[0], colors[1]).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index:02}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with photos/ and photo.jpg, in which the whole story was told."""
    root = tmp_path_factory.mktemp("reader")
    draw(root / "drawn" / "train", 4, seed=0)  # the steps of the training are as many for few pictures, and quicker
    draw(root / "drawn" / "val", 10, seed=1)
    prepare(root / "drawn", root / "place")
    for language, text in blocks(STORY):
        tell(root / "place", language, text, OMP_NUM_THREADS="1")
    return root / "place"


@pytest.mark.slow
def test_the_story_leaves_what_it_says(place):
    assert "<html" in (place / "outputs/photos/report.html").read_text()
    card = (place / "outputs/card/README.md").read_text()
    assert "me/photos-w2" in card and "license: apache-2.0" in card
    assert list((place / "outputs/int8").glob("*/onnx/model_q4.onnx"))
    assert (place / "outputs/small/accuracy_bytes.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_python_of_the_readme(place):
    text = "\n".join(text for language, text in blocks(PYTHON) if language == "python")
    assert text.count(UPLOAD) == 1
    tell(place, "python", READER + text.replace(UPLOAD, INSTEAD), OMP_NUM_THREADS="1")
    assert (place / "outputs/w2/model.safetensors").is_file() and (place / "outputs/published/README.md").is_file()
