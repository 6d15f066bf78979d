"""The models that lie in the repository: a user's first lines run, and the packed one was made from the float one."""

import ast
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

import repvgg_hf  # noqa: F401  (which the models need)

sys.path.insert(0, str(Path(__file__).parent))
from journey import README, TRAINED, blocks, tell  # noqa: E402

MODELS = README.parent / "models"


@pytest.fixture(scope="module")
def packed():
    return AutoModelForImageClassification.from_pretrained(MODELS / "repvgg-a0-w4")


def test_the_first_lines_of_the_readme(tmp_path, packed):
    """In a fresh process, in a clone's folder with a picture in it."""
    (tmp_path / "models").symlink_to(MODELS)
    Image.linear_gradient("L").convert("RGB").resize((90, 70)).save(tmp_path / "photo.jpg")
    ((language, text),) = blocks(TRAINED)
    found = ast.literal_eval(tell(tmp_path, language, text, HF_HUB_OFFLINE="1").strip().splitlines()[-1])
    assert {line["label"] for line in found} <= set(packed.config.label2id) and 0 < found[0]["score"] <= 1
    # the pixels that the processor beside the weights makes, and the logits of this process
    with Image.open(tmp_path / "photo.jpg") as picture:
        pixel_values = AutoImageProcessor.from_pretrained(MODELS / "repvgg-a0-w4")(picture, return_tensors="pt")
    probabilities = packed(**pixel_values).logits.softmax(-1)[0]
    assert found[0]["score"] == pytest.approx(probabilities.max().item(), rel=1e-4)
    assert found[0]["label"] == packed.config.id2label[probabilities.argmax().item()]


@torch.inference_mode()
def test_the_packed_model_is_the_float_one(packed):
    trained = AutoModelForImageClassification.from_pretrained(MODELS / "repvgg-a0", dtype=torch.float32)
    assert trained.config.id2label == packed.config.id2label and not trained.config.deploy
    fused = trained.reparameterize().state_dict()
    decoded = AutoModelForImageClassification.from_pretrained(MODELS / "repvgg-a0-w4").dequantize().state_dict()
    assert decoded.keys() == fused.keys()
    for name, tensor in fused.items():
        if tensor.dim() > 1:  # biases make up for what the kernels have lost
            assert (decoded[name] - tensor).norm() < 0.3 * tensor.norm(), name


def test_a_clone_stays_small():
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) < 25e6
