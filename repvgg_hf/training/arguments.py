"""Command lines: dataclasses filled from options, or from one `.json` file."""

import sys

from transformers import HfArgumentParser


def parse_arguments(dataclasses: tuple, arguments: list[str] | None) -> tuple[tuple, list[str]]:
    """(instances of `dataclasses`, the arguments as given). `None` takes the process's own arguments."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = HfArgumentParser(dataclasses)
    if len(arguments) == 1 and arguments[0].endswith(".json"):
        return parser.parse_json_file(arguments[0]), arguments
    return parser.parse_args_into_dataclasses(arguments), arguments
