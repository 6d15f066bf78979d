"""The card's lines for transformers.js, run by Node against the Hub.

Needs `node` and the npm package @huggingface/transformers (its folder in the variable TRANSFORMERS_JS, or where
`npm install --global` puts it).
"""

import copy
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from loopback_store import PUBLIC
from PIL import Image

from repvgg_hf.hub import publish

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
REPO, NAME = "org/tiny", "@huggingface/transformers"
FILES = {8: "model_quantized.onnx", 4: "model_q4.onnx", 3: "model_q3.onnx"}


@pytest.fixture
def node_modules() -> Path:
    """The folder that the npm package is in."""
    if not all(map(shutil.which, ("node", "npm"))):
        pytest.skip("needs Node: `apt install nodejs npm`")
    package = os.environ.get("TRANSFORMERS_JS")
    if package is None:
        root = subprocess.run(["npm", "root", "--global"], capture_output=True, text=True, check=True).stdout.strip()
        package = f"{root}/{NAME}"
    if not Path(package, "package.json").is_file():
        pytest.skip(f"needs `npm install --global {NAME}`, or its folder in the variable TRANSFORMERS_JS")
    return Path(package).parents[1]


@pytest.mark.parametrize("bits", FILES)
def test_the_cards_lines(hub, tiny_model, processor, picture, tmp_path, node_modules, bits):
    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = copy.deepcopy(tiny_model()).quantize(bits=bits, activation_bits=8, calibration=[images])
    publish(model, REPO, processor=processor, formats=("onnx",), **PUBLIC)
    card = hub.files(REPO)["README.md"].decode()
    (code,) = [block.split("```")[0] for block in card.split("```js\n")[1:]]
    (tmp_path / "node_modules").symlink_to(node_modules)
    settings = f'import {{ env }} from "{NAME}";\nenv.remoteHost = "{hub.url}"; env.cacheDir = "{tmp_path}/cache";\n'
    code = code.replace("image.png", str(picture)).replace("console.log(await", "const found = (await")
    program = tmp_path / "program.mjs"
    program.write_text(f"{settings}{code}\nconsole.log(JSON.stringify(found));\n")
    done = subprocess.run(["node", program], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        logits = model(**processor(Image.open(picture), return_tensors="pt")).logits[0]
    best = json.loads(done.stdout)[0]
    assert best["label"] == model.config.id2label[logits.argmax().item()]
    assert best["score"] == pytest.approx(logits.softmax(0).max().item(), abs=1e-3)
    assert any(request.path.endswith(f"/onnx/{FILES[bits]}") for request in hub.requests)
