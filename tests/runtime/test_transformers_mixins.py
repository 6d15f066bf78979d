"""Transformers' own tests of a model pass for RepVGG in all of its forms, but for those that don't apply to it.

They come with the source distribution of the installed version, which is downloaded when it is not in the cache.
"""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import transformers

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "repvgg_hf" / "tests"
PASSED_AT_LEAST = 70  # for each form (of the quantized ones 72 and 74 do), or most were skipped


def download(folder: Path, *arguments: str) -> None:
    """Let pip fetch something into a folder; skip the test if it can't."""
    command = [sys.executable, "-m", "pip", *arguments, "--no-deps", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"pip can't get what is needed of the registry: {done.stderr.strip().splitlines()[-1]}")


@pytest.fixture(scope="session")
def transformers_tests() -> list[str]:
    """The folders to put on the path: transformers' source distribution, and `parameterized`, which its tests need."""
    name = f"transformers-{transformers.__version__}"
    source, extra = CACHE / name, CACHE / "packages"
    if not (source / "tests").is_dir():
        # --no-build-isolation: nothing is built, and asking for metadata would fetch what builds it
        options = ["--no-binary", ":all:", "--no-build-isolation", "--dest", str(CACHE)]
        download(CACHE, "download", *options, f"transformers=={transformers.__version__}")
        with tarfile.open(CACHE / f"{name}.tar.gz") as archive:
            archive.extractall(CACHE, filter="data")
    if not (extra / "parameterized").is_dir():
        download(extra, "install", "--target", str(extra), "parameterized")
    return [str(source), str(extra)]


@pytest.mark.slow
@pytest.mark.parametrize("forms", [("Branches", "QAT"), ("Fused", "Quantized")], ids="+".join)
def test_transformers_own_tests(forms, transformers_tests, tmp_path):
    tests = Path(__file__).with_name("transformers_mixins.py")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-c",
        os.devnull,
        "--rootdir",
        str(tmp_path),
        "-p",
        "no:cacheprovider",
    ]
    command += ["--import-mode=importlib", "--tb=short", "-rf", str(tests), "-k"]
    command.append(" or ".join(f"{form}{kind}" for form in forms for kind in ("Test", "BackboneTest")))
    path = os.pathsep.join([*transformers_tests, os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    # from the distribution's folder, where `tests` is transformers' and not ours
    done = subprocess.run(
        command, cwd=transformers_tests[0], env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= PASSED_AT_LEAST * len(forms)
