"""What a type checker tells users: nothing about a correct script, and the line of every mistake."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

MISTAKES = """
from repvgg_hf import CalibrationConfig, ClusterConfig, QATConfig, RepVGGForImageClassification, update_codebooks

model = RepVGGForImageClassification.from_pretrained("folder")
model.quantize(bit=4)  # mistake
model.quantize(bits="4")  # mistake
model.quantize(granularity=8)  # mistake
model.quantize(bits=4, granularity="per_channel")
model.prepare_qat(bits=4, codebook_momentum=0.5)  # mistake
model.prepare_qat(bits=4, qat_config=QATConfig(momentum=0.5))  # mistake
model.prepare_qat(bits=4, qat_config=QATConfig(codebook_momentum=0.5))
ClusterConfig(bits=4, granularty="per_channel")  # mistake
CalibrationConfig(seeds=1)  # mistake
update_codebooks()  # mistake
model.quantise()  # mistake
"""


@pytest.mark.slow
def test_type_checker_finds_mistakes_alone(tmp_path):
    """One run checks both files, since reading torch's types takes most of its time."""
    wrong = tmp_path / "mistakes.py"
    wrong.write_text(MISTAKES)
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", "tests/packaging/typed_user.py", wrong]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV_")}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, env=environment)
    errors = re.findall(r"^(\S+):(\d+): error:", result.stdout, re.MULTILINE)
    assert {Path(path).name for path, _ in errors} == {"mistakes.py"}, result.stdout + result.stderr
    expected = {number for number, line in enumerate(MISTAKES.splitlines(), 1) if line.endswith("# mistake")}
    assert {int(line) for _, line in errors} == expected, result.stdout
