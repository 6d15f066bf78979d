"""What the studies share: where their data is, how they run other recipes, and rows of several networks and seeds."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from repvgg_hf.analysis.kernels import tail_figures


@dataclass(kw_only=True)
class StudyArguments:
    """Options of a study that runs other recipes."""

    dataset_name: str = field(metadata={"help": "CIFAR-10: a Hub dataset or a local folder of parquet files."})
    dataset_title: str = field(default="CIFAR-10", metadata={"help": "What to call the dataset in the tables."})
    image_column_name: str = field(default="img", metadata={"help": "Column with the images."})
    label_column_name: str = field(default="label", metadata={"help": "Column with the labels."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training images."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many evaluation images."})
    seed: int = field(
        default=0,
        metadata={"help": "Seed of all that is random: new weights, the choice of images, order, augmentation."},
    )

    def data_options(self) -> dict:
        """The options of every recipe that the study runs."""
        names = ("dataset_name", "image_column_name", "label_column_name", "max_eval_samples", "seed")
        return {name: getattr(self, name) for name in names}


def run_recipe(module: str, options: str, more: dict, **environment) -> None:
    """Run `repvgg_hf.recipes.<module>` in a process with `options` and `more` of them, of which `None` is left out."""
    command = [sys.executable, "-m", f"repvgg_hf.recipes.{module}", *options.split()]
    for option, value in more.items():
        if value is not None:
            command += [f"--{option}", str(value)]
    subprocess.run(command, check=True, env=os.environ | environment)


def require_same(path: Path, found: dict, asked: dict) -> None:
    """Raise `ValueError` if the file at `path` has figures, `found` there, of other settings than those `asked` for.

    The name of the recipe may be another: files of figures live longer.
    """
    other = [name for name in asked if name != "recipe" and found.get(name) != asked[name]]
    if other:
        was, now = (", ".join(f"{name}={settings.get(name)!r}" for name in other) for settings in (found, asked))
        raise ValueError(
            f"{path} has figures of {was}, and {now} is asked for: give the same options, or another place to write to."
        )


def split_checkpoints(models: list[str]) -> dict[str, tuple[str, dict]]:
    """Return {name: (folder, fields of its rows)} for entries `network/seed=folder`, such as `OABN/0=outputs/oabn`.

    The fields are `network`, under which a table stands, and `network_seed`, the seed of its float training or `None`;
    tables show means over the seeds. Raises `ValueError` for an entry without a folder.
    """
    found = {}
    for entry in models:
        name, _, folder = entry.partition("=")
        if not folder:
            raise ValueError(f"--models takes name/seed=folder, got {entry!r}.")
        network, _, seed = name.partition("/")
        found[name] = (folder, {"network": network, "network_seed": seed or None})
    return found


def rows_by_network(record: dict) -> dict[str, list[dict]]:
    """All rows of a study's record, by the network that they were measured on."""
    networks = {}
    for results in record["models"].values():
        for row in results.values():
            networks.setdefault(row["network"], []).append(row)
    return networks


def tails_of_convolutions(model: nn.Module) -> list[dict]:
    """The tails of the kernels that are larger than one pixel or mix channels: depthwise pointwise ones are scales."""
    convolutions = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    weights = {name: module.weight.detach() for name, module in convolutions.items() if module.weight[0].numel() > 1}
    return [{"name": name, **tail_figures(weight)} for name, weight in weights.items()]


def mean(rows: list[dict], figure: str = "top1") -> float:
    """The mean of one figure over some rows."""
    return sum(row[figure] for row in rows) / len(rows)
