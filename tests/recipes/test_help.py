"""Every recipe explains each of its options, from a checkout and installed, and hides no library by its name."""

import json
import re

import pytest

RECIPES = [
    "train", "quantize", "qat", "evaluate", "publish", "convert", "export", "predict", "studies/oabn", "studies/ptq",
    "studies/qat", "studies/qat_dkm",
]  # fmt: skip


# Shows the help of all scripts of one folder, as if each were started by its path: the folder comes first on the path.
SHOW = """
import contextlib, io, json, os, runpy, sys

folder, names = sys.argv[1], sys.argv[2:]
sys.path[0] = folder
shown = {}
for name in names:
    script, *more = name.split()
    every = "--help" if script == "__main__.py" else "--help-all"  # the benchmarks have no other
    sys.argv, output = [script, *more, every], io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            runpy.run_path(os.path.join(folder, script), run_name="__main__")
    except SystemExit as end:
        assert not end.code, name
    shown[name] = output.getvalue()
print(json.dumps([shown, sorted({module.split(".")[0] for module in sys.modules})]))
"""


@pytest.fixture(scope="module", params=["recipes", "studies", "benchmarks"])
def shown(request, start, recipes) -> tuple[dict[str, str], set[str]]:
    """(by name what `--help-all` prints, names of all that is imported) of a folder's recipes, in a new process."""
    folder = {"recipes": recipes, "studies": recipes / "studies", "benchmarks": recipes / "benchmarks"}[request.param]
    names = [f"{name}.py" for name in RECIPES if "/" not in name]
    if request.param == "studies":
        names = [f"{name.partition('/')[2]}.py" for name in RECIPES if "/" in name]
    elif request.param == "benchmarks":
        pytest.importorskip("timm", reason="the benchmarks compare with timm")
        names = ["__main__.py qat"]
    done = start("-c", SHOW, folder, *names)
    assert done.returncode == 0, done.stderr[-2000:]
    printed, imported = json.loads(done.stdout)
    assert list(printed) == names
    return printed, set(imported)


def explanations(text: str) -> dict[str, str]:
    """What the output of `--help` says of each option, without its default."""
    found, option = {}, None
    for line in text.split("options:\n")[1].splitlines():
        if match := re.match(r" {2}(-h, )?(--\w+)", line):
            option = match[2]
            found[option] = re.sub(r"^ {2}.*? {2,}|^ {2}\S.*$", "", line)
        elif option is not None:
            found[option] += " " + line.strip()
    return {name: re.sub(r"\(default: .*\)$", "", text.strip(), flags=re.S).strip() for name, text in found.items()}


def test_explanations_are_found():
    """Or the test below would show nothing."""
    text = """usage: x
options:
  -h, --help            show this
  --bits BITS           Bits of
                        a code. (default: 4)
  --bare BARE           (default: 3)
  --long_name LONG_NAME, --long-name LONG_NAME
                        Explained. (default: [1, 'a
                        b'])
  --nothing NOTHING, --no-thing NOTHING
"""
    assert explanations(text) == {
        "--help": "show this", "--bits": "Bits of a code.", "--bare": "", "--long_name": "Explained.", "--nothing": "",
    }  # fmt: skip


def test_each_option_is_explained(shown):
    for name, printed in shown[0].items():
        options = explanations(printed)
        assert len(options) > 5
        for option, text in options.items():
            assert len(text.split()) >= 2, f"{name} does not explain {option}"
            assert not re.match(r"(Of|The same|Its|Their|With these)\b", text), (
                f"{name} {option}: {text} makes no sense alone"
            )


def test_shared_options_mean_the_same(shown):
    for name, printed in shown[0].items():
        options = explanations(printed)
        for option, beginning in {
            "--seed": "Seed of all that is random: ",
            "--calibration_images": ("Training images, without labels, to calibrate", "Random images to calibrate on"),
            "--output_dir": ("Folder for ", "New folder for "),
            "--momentum": "Momentum of SGD, in Nesterov's form; 0 for none.",
            "--output_json": ("File for the figures", "Write the figures to this JSON file"),
        }.items():
            assert option not in options or options[option].startswith(beginning), f"{name} {option}"


def test_no_recipe_hides_a_library(shown, recipes):
    """A recipe's folder comes first on Python's path, so `import evaluate` in a library would find `evaluate.py`."""
    _, imported = shown
    assert "torch" in imported
    own = {path.stem for path in recipes.rglob("*.py")} | {path.name for path in recipes.iterdir() if path.is_dir()}
    assert imported & (own - {"__init__", "__main__", "__pycache__"}) == set()


def test_recipes_are_installed(start):
    names = [f"repvgg_hf.recipes.{name.replace('/', '.')}" for name in RECIPES]
    done = start("-c", f"import {', '.join(names)}; [recipe.main for recipe in ({', '.join(names)})]")
    assert done.returncode == 0, done.stderr


def test_a_script_that_is_started_by_its_path(start, recipes):
    """As above, with nothing around it."""
    done = start(recipes / "qat.py", "--help")
    assert done.returncode == 0 and "--bits" in explanations(done.stdout), done.stderr
