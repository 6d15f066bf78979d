"""The package without the libraries of its extras, and what importing it costs."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("core_alone.py")
EXTRAS = ["accelerate", "datasets", "evaluate", "matplotlib", "rich", "scipy", "sklearn", "timm", "torchvision"]


def output(*arguments: str) -> list[str]:
    """The words that a new Python process prints."""
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_core_dependencies_are_enough():
    """Build, fuse, save, load, quantize, train quantized and classify, where the extras can't be imported."""
    assert output(str(SCRIPT), *EXTRAS) == ["float", "fused", "uniform", "cluster", "trained"]


def test_import_loads_none_of_the_extras():
    """Where they are installed, too: importing torchvision or datasets takes longer than all of this package."""
    loaded = output("-c", "import sys, repvgg_hf; print(*{name.split('.')[0] for name in sys.modules})")
    assert "repvgg_hf" in loaded and not set(EXTRAS) & set(loaded)


WITHOUT_TORCHVISION = """
import sys, warnings
warnings.simplefilter("error")
sys.modules["torchvision"] = None  # which makes it look as if it were not installed
import repvgg_hf
from transformers import AutoImageProcessor, BitImageProcessorPil

config = repvgg_hf.RepVGGConfig()
BitImageProcessorPil(size={"shortest_edge": 9}).save_pretrained(sys.argv[1])
config.save_pretrained(sys.argv[1])
processor = AutoImageProcessor.from_pretrained(sys.argv[1])
print(type(processor).__name__, processor.size["shortest_edge"])
"""


def test_nothing_warns_where_torchvision_is_not_installed(tmp_path):
    command = [sys.executable, "-c", WITHOUT_TORCHVISION, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert (result.stdout, result.stderr) == ("BitImageProcessorPil 9\n", "")
