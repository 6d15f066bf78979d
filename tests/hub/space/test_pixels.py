"""What the network sees on the page: the image processor's pixels, and of the same pixels ONNX Runtime's logits."""

import numpy as np
import pytest
from page_helpers import NORMAL, PROCESSOR, SIZE, pixels_on_the_page
from PIL import Image
from transformers import BitImageProcessor

from repvgg_hf.hub.space_pixels import pixel_settings

LOGITS = """
(async () => {
  const worker = new Worker('./engine.js', {type: 'module'});
  const ask = (values) => new Promise((resolve, reject) => {
    worker.onmessage = ({data: {progress, error, result}}) => {
      if (error) reject(new Error(error));
      else if (!progress) resolve(result);
    };
    worker.postMessage({id: 1, ...values});
  });
  const family = await (await fetch('space.json')).json();
  await ask({action: 'start', engine: family.engine, settings: family.pixels});
  const pictures = await import('./pictures.js');
  const found = {};
  for (const model of family.models) {
    await ask({action: 'load', model});
    for (const {file} of family.images) {
      const picture = await pictures.decode(await (await fetch(file)).blob(), file);
      await ask({action: 'prepare', key: file, picture});
      found[`${model.name} ${file}`] = (await ask({action: 'run', key: file, model, once: true})).logits;
    }
  }
  worker.terminate();
  return found;
})()
"""


def test_logits_of_the_same_pixels_are_equal(show, run_onnx, models, pictures):
    browser = show()
    found = browser.evaluate(LOGITS, wait=120)
    for number, path in enumerate(pictures.values(), 1):
        file = f"images/{number}{path.suffix}"
        pixels = pixels_on_the_page(browser, file, pixel_settings(PROCESSOR, 3))
        for name in models:
            logits = run_onnx(name, pixels)
            assert found[f"{name} {file}"] == pytest.approx(logits.tolist(), abs=1e-4 * float(logits.std())), file


PROCESSORS = {
    "bilinear": (PROCESSOR, "RGB"),
    "bicubic": (BitImageProcessor(**SIZE, **NORMAL, resample=3), "RGB"),
    "nearest": (BitImageProcessor(**SIZE, **NORMAL, resample=0), "RGB"),
    "squeezed": (BitImageProcessor(size={"height": 30, "width": 44}, do_center_crop=False, resample=2), "RGB"),
    "padded": (BitImageProcessor(**SIZE | {"crop_size": {"height": 51, "width": 47}}, resample=2), "RGB"),
    "odd crop": (BitImageProcessor(**SIZE | {"crop_size": {"height": 31, "width": 33}}, resample=2), "RGB"),
    "as they are": (BitImageProcessor(do_resize=False, crop_size={"height": 64, "width": 64}), "RGB"),
    "no scaling": (BitImageProcessor(**SIZE, do_rescale=False, do_normalize=False, resample=2), "RGB"),
    "gray": (
        BitImageProcessor(**SIZE, image_mean=[0.449], image_std=[0.226], resample=2, do_convert_rgb=False), "L",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_the_processors(show, pictures, name):
    processor, mode = PROCESSORS[name]
    browser = show()
    settings = pixel_settings(processor, len(mode))
    scale = settings["scale"] / np.array(settings["std"]).reshape(1, -1, 1, 1)
    for number, path in enumerate(pictures.values(), 1):
        seen = pixels_on_the_page(browser, f"images/{number}{path.suffix}", settings)
        image = np.array(Image.open(path).convert(mode))
        image = image[..., None] if mode == "L" else image
        expected = processor(image, input_data_format="channels_last", return_tensors="np")["pixel_values"]
        assert seen.shape == expected.shape
        levels = np.abs(seen - np.asarray(expected)) / scale
        assert levels.max() <= 1.01, f"{path.name}: {levels.max()} gray levels"
        assert levels.mean() <= 0.1, f"{path.name}: {levels.mean()} gray levels on average"
