"""The command `repvgg-hf`: finds the recipe to run, and shows its errors in one line.

It stands beside the package, whose import brings PyTorch: the list of commands and a mistyped one need neither.
"""

import difflib
import importlib
import importlib.util
import os
import sys
import traceback
from pathlib import Path

# name: (module among the recipes, what it does)
COMMANDS = {
    "train": ("train", "train a float classifier on a folder of pictures or a dataset"),
    "quantize": ("quantize", "quantize a float checkpoint without training, in one or many ways, and compare"),
    "qat": ("qat", "train on with quantized weights, then pack"),
    "evaluate": ("evaluate", "measure accuracy and size of a checkpoint"),
    "predict": ("predict", "tell what pictures show"),
    "export": ("export", "write a checkpoint as a file of another engine"),
    "convert": ("convert", "convert checkpoints of timm or of the authors"),
    "benchmark": ("benchmarks.__main__", "measure time and memory against other libraries"),
    "publish": ("publish", "put a checkpoint with its card on the Hub"),
}
DEBUG = "REPVGG_HF_DEBUG"  # the environment variable that asks for tracebacks
USAGE = """usage: repvgg-hf [--debug] COMMAND [options]

{commands}

repvgg-hf COMMAND --help shows the options that matter first, --help-all every one. After an error --debug, or
{debug}=1 in the environment, shows where in the code it came from.
"""


def recipes_folder() -> Path:
    """Return the folder of the recipes, installed or in a checkout, without importing the package."""
    package = Path(importlib.util.find_spec("repvgg_hf").origin).parent
    return package / "recipes" if (package / "recipes").is_dir() else package.parent / "recipes"


def commands() -> dict[str, tuple[str, str]]:
    """Return those of `COMMANDS` whose recipe is there."""
    folder = recipes_folder()
    return {name: entry for name, entry in COMMANDS.items() if (folder / f"{entry[0].replace('.', '/')}.py").is_file()}


def usage() -> str:
    """Return the text of `repvgg-hf --help`."""
    lines = [f"  {name:<11}{what}" for name, (_, what) in commands().items()]
    return USAGE.format(commands="\n".join(lines), debug=DEBUG)


def one_line(error: BaseException) -> str:
    """Return the text of an error without line breaks, or its kind if it has none; and what to install."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.split(".")[0] != "repvgg_hf":
        text += ': the commands need pip install "repvgg-hf[train]"'
    return text


def is_expected(error: Exception) -> bool:
    """Tell whether an error is about what the user gave, which its own text explains, and not a fault of the code."""
    if isinstance(error, (ValueError, ImportError, OSError)):
        return True
    last = traceback.extract_tb(error.__traceback__)[-1].filename  # where it was raised
    ours = (Path(importlib.util.find_spec("repvgg_hf").origin).parent, recipes_folder())
    return isinstance(error, RuntimeError) and any(Path(last).is_relative_to(folder) for folder in ours)


def hide_short_bars() -> None:
    """Show no progress of files that are read and written in a moment, but that of downloads."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    logging.disable_progress_bar()
    if os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") is None:
        enable_progress_bars()


def run(name: str, arguments: list[str]) -> int:
    """Run a command; returns the exit code of the process."""
    sys.argv = [f"repvgg-hf {name}", *arguments]  # what the recipe's own texts call it
    module = importlib.import_module(f"repvgg_hf.recipes.{COMMANDS[name][0]}")
    hide_short_bars()
    module.main(arguments)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the arguments name, `None` for the process's own; returns the exit code of the process."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = os.environ.get(DEBUG, "0") not in ("", "0")
    if arguments[:1] == ["--debug"]:
        debug = True
        del arguments[0]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0 if arguments else 2
    name, *arguments = arguments
    if name not in commands():
        similar = difflib.get_close_matches(name, commands(), n=1)
        hint = f"did you mean {similar[0]}?" if similar else f"there are {', '.join(commands())}."
        print(f"error: there is no command {name!r}, {hint}", file=sys.stderr)
        return 2
    try:
        return run(name, arguments)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or flushing it at the end would fail, too
        return 141
    except Exception as error:
        if debug or not is_expected(error):
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
