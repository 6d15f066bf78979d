"""Hold out training images, so that what is chosen on them is not chosen on the test images that are reported.

    python -m repvgg_hf.recipes.studies.hold_out --dataset_name <on the Hub or a parquet folder> --output_dir data

Writes parquet files of the splits `train`, `validation` (the images held out, drawn by `--seed`) and `test` (what the
dataset evaluates on), which all recipes read: they evaluate on `validation` by default, and on the others by
`--validation_split_name test`.
"""

from dataclasses import dataclass, field
from pathlib import Path

from repvgg_hf.runtime.saving import finish, replace_files
from repvgg_hf.training.arguments import parse_arguments
from repvgg_hf.training.sources import load_named_dataset
from repvgg_hf.training.splits import HELD_OUT


@dataclass(kw_only=True)
class HoldOutArguments:
    """Options that say what is held out of which dataset."""

    dataset_name: str = field(metadata={"help": "A Hub dataset or a local folder of parquet files."})
    image_column_name: str = field(default="image", metadata={"help": "Column with the images."})
    label_column_name: str = field(default="label", metadata={"help": "Column with the labels."})
    held_out: int = field(default=5000, metadata={"help": "Training images to hold out."})
    seed: int = field(default=0, metadata={"help": "Seed of the choice."})
    output_dir: str = field(metadata={"help": "Folder for the parquet files."})


def main(arguments: list[str] | None = None) -> dict[str, int]:
    (args,), _ = parse_arguments((HoldOutArguments,), arguments)
    loaded = load_named_dataset(args.dataset_name, None, (args.image_column_name, args.label_column_name))
    tested = next((name for name in ("test", *HELD_OUT) if name in loaded), None)
    if tested is None or "train" not in loaded:
        raise ValueError(f"{args.dataset_name} has the splits {', '.join(loaded)}: it needs train and one to test on.")
    images = len(loaded["train"])
    if not 0 < args.held_out < images:
        raise ValueError(f"--held_out must be from 1 to {images - 1}, the training images less one: {args.held_out}.")
    parts = loaded["train"].train_test_split(args.held_out, seed=args.seed)
    splits = {"train": parts["train"], "validation": parts["test"], "test": loaded[tested]}
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    finish(folder)
    with replace_files(folder) as new:
        for name, split in splits.items():
            split.to_parquet(new / f"{name}.parquet")
    counts = {name: len(split) for name, split in splits.items()}
    print(", ".join(f"{count:,} images in {name}" for name, count in counts.items()), f"of {folder}")
    return counts


if __name__ == "__main__":
    main()
