"""Command lines: dataclasses filled from options, or from one `.json` file."""

import argparse
import dataclasses
import difflib
import json
import os
import sys
from dataclasses import dataclass, field

from transformers import HfArgumentParser

from repvgg_hf.training.report import is_secret, masked


@dataclass
class RunArguments:
    """Options of every recipe that looks at images: how to load them, and the seed."""

    per_device_eval_batch_size: int = field(
        default=256, metadata={"help": "Images per batch in evaluation, on each device."}
    )
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that load images."})
    seed: int = field(
        default=0,
        metadata={"help": "Seed of all that is random: new weights, the choice of images, order, augmentation."},
    )


class OptionHelp(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each option once, in one spelling, and a default where there is one."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28, width=min(120, int(os.environ.get("COLUMNS", 120))))

    def _format_action_invocation(self, action):
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        optional = action.nargs == "?" and action.const is not None
        value = self._format_args(action, "VALUE") if not optional else "[VALUE]"
        return f"{action.option_strings[0]} {value}"

    def _get_help_string(self, action):
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


class OptionParser(HfArgumentParser):
    """Fills dataclasses from options, and says what an unknown option may have been meant to be.

    `--help` shows the options that matter first, `--help-all` every one. First are those that our own dataclasses
    declare, which Trainer's do not, without those in the dataclass's `RARE`.

    Args:
        kinds: the dataclasses.
        positional: a field that a first argument without a name may give, and its explanation.
    """

    def __init__(self, kinds: tuple, positional: tuple[str, str] | None = None):
        prog = os.path.basename(sys.argv[0])
        usage = prog + (f" [{positional[0].upper()}]" if positional else "") + " [--option value ...]"
        super().__init__(kinds, prog=prog, usage=usage, formatter_class=OptionHelp)
        if positional:
            self.add_argument(positional[0], metavar=positional[0].upper(), nargs="?", help=positional[1])
        self.add_argument("--help-all", nargs=0, action=_ShowAll, help="Show the options that are seldom needed, too.")
        self.rare = [action for action in self._actions if self._is_rare(action)]
        for action in self._actions:
            if action.option_strings and isinstance(action, argparse._StoreFalseAction):
                action.help = argparse.SUPPRESS  # --no_plot, which is --plot False

    def _is_rare(self, action) -> bool:
        for kind in self.dataclass_types:
            if action.dest in {field.name for field in dataclasses.fields(kind)}:
                ours = [
                    base for base in kind.__mro__ if base.__module__.split(".")[0] not in ("transformers", "builtins")
                ]
                declared = {name for base in ours for name in base.__dict__.get("__annotations__", {})}
                return action.dest not in declared or action.dest in getattr(kind, "RARE", ())
        return False

    def format_help(self) -> str:
        """Return the text of `--help`."""
        texts = {action: action.help for action in self.rare if action.help != argparse.SUPPRESS}
        self.epilog = f"{len(texts)} more options, which are seldom needed, are shown by --help-all." if texts else None
        try:
            for action in texts:
                action.help = argparse.SUPPRESS
            return super().format_help()
        finally:
            for action, text in texts.items():
                action.help = text

    def format_all(self) -> str:
        """Return the text of `--help-all`."""
        self.epilog = None
        return super().format_help()

    def error(self, message: str):
        """End the process with the exit code 2 and one line."""
        self.exit(2, f"error: {message} ({self.prog} --help shows the options)\n")

    def parse(self, arguments: list[str]) -> tuple[argparse.Namespace, set[str]]:
        """Return (the values of all options, names of those that were given)."""
        absent = object()
        marked = argparse.Namespace(**{action.dest: absent for action in self._actions})
        found, unknown = self.parse_known_args(arguments, marked)
        given = {name for name, value in vars(found).items() if value is not absent and value is not None}
        if unknown:
            self.error(self._unknown(unknown[0]))
        for action in self._actions:
            if getattr(found, action.dest) is absent:
                default = self.get_default(action.dest)
                setattr(found, action.dest, self._get_value(action, default) if isinstance(default, str) else default)
        return found, given

    def _unknown(self, argument: str) -> str:
        if not argument.startswith("-"):
            return f"{argument!r} belongs to no option: write --option value, and quote a value that has spaces"
        name = argument.partition("=")[0]
        known = {option.replace("-", "_"): option for action in self._actions for option in action.option_strings[:1]}
        similar = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
        return f"there is no option {name}" + (f", did you mean {known[similar[0]]}?" if similar else "")


class _ShowAll(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        parser._print_message(parser.format_all(), sys.stdout)
        parser.exit()


def parse_arguments(kinds: tuple, arguments: list[str] | None) -> tuple[tuple, list[str]]:
    """Return (instances of the dataclasses `kinds`, the arguments as a record may show them: with secrets masked).

    `None` takes the process's own arguments. An unknown option ends the process with the exit code 2 and a suggestion.
    """
    parsed, recorded, _ = parse_given(kinds, arguments)
    return parsed, recorded


def parse_given(
    kinds: tuple, arguments: list[str] | None, positional: tuple[str, str, str] | None = None
) -> tuple[tuple, list[str], set[str]]:
    """[`parse_arguments`], and the names of the options that were given.

    `positional` is (what a first argument without a name is called, its explanation, the option that it stands for).
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = OptionParser(kinds, None if positional is None else positional[:2])
    if len(arguments) == 1 and arguments[0].endswith(".json"):
        values = _read_options(arguments[0], kinds)
        return parser.parse_dict(values), arguments, set(values)
    found, given = parser.parse(arguments)
    values = vars(found)
    if positional is not None and values[positional[0]] is not None:
        name, _, option = positional
        if option in given:
            parser.error(f"{values[name]} and --{option} {values[option]} say the same: give one of them")
        values[option] = values[name]
        given.add(option)
    parsed = tuple(kind(**{name: values[name] for name in _names(kind)}) for kind in kinds)
    # options may be shortened, so that the name that was given says nothing
    secrets = [value for name, value in values.items() if is_secret(name)]
    return parsed, masked(arguments, [value for value in secrets if isinstance(value, str)]), given


def _names(kind) -> list[str]:
    return [field.name for field in dataclasses.fields(kind) if field.init]


def _read_options(path: str, kinds: tuple) -> dict:
    """The options in a `.json` file; raises `ValueError` for one that there is not."""
    with open(path, encoding="utf-8") as file:
        try:
            values = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no JSON ({error}): correct it there.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object of options and their values.")
    known = [name for kind in kinds for name in _names(kind)]
    for name in values:
        if name not in known:
            similar = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {similar[0]!r}?" if similar else "remove it."
            raise ValueError(f"{path} has {name!r}, which is no option: {hint}")
    return values
