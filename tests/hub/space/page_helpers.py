"""What the tests of the page share: its models' bits, pictures, and reading what it shows."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter
from transformers import BitImageProcessor

SIZE = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
NORMAL = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
PROCESSOR = BitImageProcessor(**SIZE, **NORMAL, resample=2)
BITS = (8, 4, 2, 1)
DONE = "document.body.dataset.done === {!r}"  # of the key of a picture and the name of a model
GRAY_LEVELS = """
(async () => {{
  const [pixels, pictures] = [await import('./pixels.js'), await import('./pictures.js')];
  const blob = await (await fetch({address!r})).blob();
  const settings = {settings};
  const input = pixels.normalize(pixels.toGrayLevels(await pictures.decode(blob, 'it'), settings), settings);
  return {{shape: input.shape, values: Array.from(input.values)}};
}})()
"""


def draw(seed: int, width: int, height: int) -> Image.Image:
    """A picture with edges, smooth shades and noise."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((width, height), 3)
    pen = ImageDraw.Draw(coarse)
    for _ in range(6):
        x, y = random.integers(0, width), random.integers(0, height)
        fill = tuple(int(value) for value in random.integers(0, 256, 3))
        pen.ellipse((x, y, x + width // 4, y + height // 3), fill=fill)
    noise = random.normal(0, 12, (height, width, 3))
    noisy = np.clip(np.asarray(coarse.filter(ImageFilter.GaussianBlur(0.7))) + noise, 0, 255)
    return Image.fromarray(noisy.astype(np.uint8))


def text(browser, selector: str) -> str:
    return browser.evaluate(f"document.querySelector({selector!r}).innerText.trim()")


def answers(browser) -> list[tuple[str, float]]:
    rows = "[...document.querySelectorAll('#answers li')].map((row) => row.innerText)"
    found = [row.split("\n") for row in browser.evaluate(rows)]
    return [(lines[0], float(lines[-1].removesuffix("%"))) for lines in found]


def expected_answers(models, logits: np.ndarray) -> list[tuple[str, float]]:
    labels = models["w8"].config.id2label
    shares = torch.softmax(torch.from_numpy(logits), 0)
    return [(labels[index], 100 * shares[index].item()) for index in shares.argsort(descending=True)[:5].tolist()]


def pixels_on_the_page(browser, address: str, settings: dict) -> np.ndarray:
    """What the page's scripts make of a picture: float32 [1, channels, height, width]."""
    seen = browser.evaluate(GRAY_LEVELS.format(address=address, settings=json.dumps(settings)))
    return np.array(seen["values"], np.float32).reshape(seen["shape"])


def assert_same_answers(shown, expected):
    """The same classes in the same order, with the same percent as far as they are shown."""
    assert [share for _, share in shown] == pytest.approx([share for _, share in expected], abs=0.15)
    assert [label for label, share in shown if share > 1] == [label for label, share in expected if share > 1]
