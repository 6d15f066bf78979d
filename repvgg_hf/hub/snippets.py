"""The code on a card that runs a published model, each by its means."""

import json
from pathlib import Path

from .tables import code_block, details

# transformers.js's name of the numbers in an ONNX file, by the end of its name; others are loaded by that itself
_DTYPES = {"": "fp32", "_quantized": "q8", "_q4": "q4", "_q2": "q2", "_q1": "q1", "_int8": "int8"}


def usage_section(name: str, revision: str | None) -> str:
    """Return the section that shows how to load a classifier whose code lies in its repository.

    Args:
        name (`str`): of the repository.
        revision (`str`, *optional*): branch or tag of the model.
    """
    option = f", revision={json.dumps(revision, ensure_ascii=False)}" if revision else ""
    pipeline = (
        "from transformers import pipeline\n\n"
        f'name = "{name}"\n'
        f'classifier = pipeline("image-classification", name{option}, trust_remote_code=True)\n'
        'print(classifier("image.png"))'
    )
    loaded = (
        "import torch\n"
        "from PIL import Image\n"
        "from transformers import AutoImageProcessor, AutoModelForImageClassification\n\n"
        f'name = "{name}"\n'
        f"processor = AutoImageProcessor.from_pretrained(name{option})\n"
        f"model = AutoModelForImageClassification.from_pretrained(name{option}, trust_remote_code=True)\n"
        'inputs = processor(Image.open("image.png").convert("RGB"), return_tensors="pt")\n'
        "with torch.inference_mode():\n"
        "    probabilities = model(**inputs).logits.softmax(-1)[0]\n"
        "print(model.config.id2label[probabilities.argmax().item()], probabilities.max().item())"
    )
    whole = details("With AutoModelForImageClassification and the image processor", code_block(loaded, "python"))
    return (
        f"## Use\n\n{code_block(pipeline, 'python')}\n\n"
        "`trust_remote_code=True` runs the modeling code in this repository; without it Transformers asks, or ends "
        "with an error that names it. With `pip install repvgg-hf` and `import repvgg_hf` first, the installed code "
        "runs instead and the argument can go. `AutoModel`, `AutoModelForImageClassification` and `AutoBackbone` load "
        f"it likewise.\n\n{whole}"
    )


def onnx_runtime(name: str, revision: str | None, path: str) -> str:
    """Return the lines that classify a picture with an ONNX file of a repository, by ONNX Runtime."""
    option = f", revision={json.dumps(revision, ensure_ascii=False)}" if revision else ""
    return (
        "import onnxruntime\n"
        "from huggingface_hub import hf_hub_download\n"
        "from PIL import Image\n"
        "from transformers import AutoImageProcessor\n\n"
        f'name = "{name}"\n'
        f"processor = AutoImageProcessor.from_pretrained(name{option})\n"
        f'session = onnxruntime.InferenceSession(hf_hub_download(name, "{path}"{option}))\n'
        'inputs = processor(Image.open("image.png").convert("RGB"), return_tensors="np")\n'
        '(logits,) = session.run(None, {"pixel_values": inputs["pixel_values"]})\n'
        "print(logits[0].argmax())"
    )


def javascript(name: str, revision: str | None, path: str) -> str:
    """Return the lines that classify a picture with an ONNX file of a repository, by transformers.js."""
    stem = Path(path).stem
    end = stem.removeprefix("model")
    options = {"dtype": _DTYPES[end]} if end in _DTYPES else {"model_file_name": stem, "dtype": "fp32"}
    options |= {"revision": revision} if revision else {}
    of_processor = f", {_object({'revision': revision})}" if revision else ""
    return (
        'import { AutoModel, AutoProcessor, ImageClassificationPipeline } from "@huggingface/transformers";\n\n'
        f"const name = {json.dumps(name)};\n"
        f"const model = await AutoModel.from_pretrained(name, {_object(options)});\n"
        f"const processor = await AutoProcessor.from_pretrained(name{of_processor});\n"
        'const classifier = new ImageClassificationPipeline({ task: "image-classification", model, processor });\n'
        'console.log(await classifier("image.png"));'
    )


def _object(values: dict) -> str:
    return "{ " + ", ".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()) + " }"
