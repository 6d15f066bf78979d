"""Command lines: dataclasses filled from options, or from one `.json` file."""

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


def parse_arguments(dataclasses: tuple, arguments: list[str] | None) -> tuple[tuple, list[str]]:
    """Return (instances of `dataclasses`, the arguments as a record may show them: with secrets masked).

    `None` takes the process's own arguments.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = HfArgumentParser(dataclasses)
    if len(arguments) == 1 and arguments[0].endswith(".json"):
        return parser.parse_json_file(arguments[0]), arguments
    parsed = parser.parse_args_into_dataclasses(arguments)
    fields = {name: value for instance in parsed for name, value in vars(instance).items()}
    # options may be shortened, so that the name that was given says nothing
    secrets = [value for name, value in fields.items() if is_secret(name)]
    return parsed, masked(arguments, [value for value in secrets if isinstance(value, str)])
