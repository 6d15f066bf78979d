"""Every recipe explains each of its options, from a checkout and installed, and hides no library by its name."""

import re

import pytest

RECIPES = [
    "train", "quantize", "qat", "evaluate", "publish", "studies/oabn", "studies/ptq", "studies/qat", "studies/qat_dkm",
]  # fmt: skip


@pytest.fixture(scope="module", params=[*RECIPES, "benchmarks"])
def shown(request, start, recipes) -> tuple[str, str]:
    """(name, what `--help` prints) of a recipe that is started by its path; on stderr are the imported modules."""
    name = request.param
    if name == "benchmarks":
        pytest.importorskip("timm", reason="the benchmarks compare with timm")
        done = start("-X", "importtime", recipes / name, "qat", "--help")
    else:
        done = start("-X", "importtime", recipes / f"{name}.py", "--help")
    assert done.returncode == 0, done.stderr[-2000:]
    return name, done.stdout, done.stderr


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
    name, printed, _ = shown
    options = explanations(printed)
    assert len(options) > 5
    for option, text in options.items():
        assert len(text.split()) >= 2, f"{name} does not explain {option}"
        assert not re.match(r"(Of|The same|Its|Their|With these)\b", text), (
            f"{name} {option}: {text} makes no sense alone"
        )


def test_shared_options_mean_the_same(shown):
    _, printed, _ = shown
    options = explanations(printed)
    for option, beginning in {
        "--seed": "Seed of all that is random: ",
        "--calibration_images": ("Training images, without labels, to calibrate on", "Random images to calibrate on"),
        "--output_dir": ("Folder for ", "New folder for "),
        "--momentum": "Momentum of SGD, in Nesterov's form; 0 for none.",
        "--output_json": ("File for the figures", "Write the figures to this JSON file"),
    }.items():
        assert option not in options or options[option].startswith(beginning)


def test_no_recipe_hides_a_library(shown, recipes):
    """A recipe's folder comes first on Python's path, so `import evaluate` in a library would find `evaluate.py`."""
    _, _, imports = shown
    imported = {line.rsplit("|", 1)[1].strip() for line in imports.splitlines() if line.startswith("import time:")}
    assert "torch" in imported
    own = {path.stem for path in recipes.rglob("*.py")} | {path.name for path in recipes.iterdir() if path.is_dir()}
    assert imported & (own - {"__init__", "__main__"}) == set()


@pytest.mark.parametrize("name", [name.replace("/", ".") for name in RECIPES])
def test_recipes_are_installed(name, start):
    code = f"import repvgg_hf.recipes.{name} as recipe; recipe.main"
    done = start("-c", code)
    assert done.returncode == 0, done.stderr
