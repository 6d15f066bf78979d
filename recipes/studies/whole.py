"""The study at strength: everything that is claimed of the method, measured by one command.

    python -m repvgg_hf.recipes.studies.whole --cifar10 <on the Hub or a parquet folder> \\
        --tiny_imagenet <the same> --output_dir outputs/study

Of the training images 5,000 are held out, on which everything is chosen; the test images are looked at by `--split
test` alone, once for each row. What has been measured is a file for each cell, see `cells.py`, and not measured again;
`report.md` and its figures are made from these files.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path

from repvgg_hf.recipes.qat import QATArguments
from repvgg_hf.recipes.studies import oabn, qat
from repvgg_hf.recipes.studies.cells import Cell, read_cells, run_cells
from repvgg_hf.recipes.studies.ptq import EQUALIZED
from repvgg_hf.recipes.studies.whole_report import write_report
from repvgg_hf.recipes.studies.whole_tables import ACTIVATIONS, MAIN, SHARED_OUT, TUNED
from repvgg_hf.training.arguments import parse_arguments
from repvgg_hf.training.splits import DataArguments

QAT_LINES = ("uniform (LSQ)", "ClusterQAT", "ClusterQAT, all switches")
ABLATED = ("uniform, tensor", "uniform, channel", "k-means, tensor and scale", "k-means, tensor and scale, calibrated")
# of all trainings that go on from a float network: of 0.03, 0.01, 0.004 and 0.0015 the best at 2 bits on held-out
# images, and at 1 bit of 0.04, 0.02, 0.012 and 0.004
RATE, RATES = 0.004, {1: 0.012}
TRAINED_TARGETS = {2.1: RATE, 1.2: RATES[1]}  # stored bits per weight, shared out by layer: learning rate
AFTER_TRAINING = (*ABLATED, "uniform, channel, calibrated", "k-means, channel", "k-means, channel, + bias correction")


@dataclass(frozen=True)
class Task:
    """Images and the network that is trained on them.

    Attributes:
        title: what the images are called.
        column: of the images in the dataset.
        network, training: options of the recipe `train`.
        further: options of every training that goes on from a float network, with quantized weights or without.
        qat_bits: bits of the trainings with quantized weights.
        thresholds: of OABN, beside that of the main network.
    """

    title: str
    column: str
    network: str
    training: str
    further: str
    qat_bits: tuple[int, ...]
    thresholds: tuple[float, ...]


FURTHER = "--augmentation crop_flip --per_device_train_batch_size"
TASKS = {
    "cifar10": Task(
        "CIFAR-10",
        "img",
        oabn.NETWORK,
        "--augmentation crop_flip --mixing cutmix --mixing_alpha 1.0 --label_smoothing_factor 0.1 --learning_rate 0.4 "
        "--per_device_train_batch_size 512",
        f"{FURTHER} 128",
        (4, 3, 2, 1),
        (2, 3, 4, 8, 12),
    ),
    "tiny_imagenet": Task(
        "Tiny-ImageNet",
        "image",
        "--variant a0 --image_size 64",
        "--augmentation crop_flip --label_smoothing_factor 0.1 --learning_rate 0.8 --per_device_train_batch_size 1024 "
        "--cache_gigabytes 4",
        f"{FURTHER} 512 --cache_gigabytes 4",
        (4, 3, 2),
        (6, 48),
    ),
}


@dataclass(kw_only=True)
class WholeArguments:
    """Options that say what to measure, and how long to train."""

    cifar10: str | None = field(
        default=None, metadata={"help": "CIFAR-10: a Hub dataset or a folder of parquet files, with its test images."}
    )
    tiny_imagenet: str | None = field(default=None, metadata={"help": "Tiny-ImageNet, likewise."})
    held_out: int = field(default=5000, metadata={"help": "Training images to hold out."})
    split: str = field(default="validation", metadata={"help": "What to evaluate on: validation (held out), or test."})
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of network and training on CIFAR-10."}
    )
    epochs: int = field(default=120, metadata={"help": "Epochs of a float training on CIFAR-10."})
    tiny_epochs: int = field(default=36, metadata={"help": "Epochs of a float training on Tiny-ImageNet, of one seed."})
    qat_epochs: int = field(default=5, metadata={"help": "Epochs with quantized weights, or of further float ones."})
    peers: list[str] = field(
        default_factory=list,
        metadata={"help": "Libraries to compare with after training: coremltools, nncf, onnxruntime."},
    )
    only: list[str] = field(
        default_factory=list, metadata={"help": "Run the cells with one of these in their names, and what they need."}
    )
    show: bool = field(default=False, metadata={"help": "Print the cells and which have run, and run none."})
    parallel: int = field(default=1, metadata={"help": "How many cells to run at once."})
    options: list[str] = field(
        default_factory=list,
        metadata={
            "help": "More for every training, as name=value, such as bf16=True or max_train_samples=1000. With "
            "quantized weights mixed precision is Accelerate's: ACCELERATE_MIXED_PRECISION=bf16."
        },
    )
    output_dir: str = field(default="outputs/whole_study", metadata={"help": "Folder for all of it."})

    def __post_init__(self):
        if self.split not in ("validation", "test"):
            raise ValueError(f"--split must be validation or test, got {self.split!r}.")
        if self.cifar10 is None and self.tiny_imagenet is None:
            raise ValueError("Nothing to study: give --cifar10, --tiny_imagenet or both.")
        wrong = next((option for option in self.options if "=" not in option), None)
        if wrong is not None:
            raise ValueError(f"--options takes name=value, such as bf16=True, got {wrong!r}.")

    def extra(self) -> list[str]:
        """The options of every training as a command has them."""
        return [part for option in self.options for part in ("--" + option.split("=")[0], option.split("=", 1)[1])]


def plan(args: WholeArguments) -> list[Cell]:
    """Return all cells of the study, those that others need before them."""
    cells = []
    for name, source in (("cifar10", args.cifar10), ("tiny_imagenet", args.tiny_imagenet)):
        if source is not None:
            cells += Planner(name, source, args).cells()
    return cells


class Planner:
    """Makes the cells of one task."""

    def __init__(self, name: str, source: str, args: WholeArguments):
        self.name, self.task, self.args = name, TASKS[name], args
        self.source = str(Path(source).resolve()) if Path(source).exists() else source
        self.is_main = name == "cifar10"
        self.epochs = args.epochs if self.is_main else args.tiny_epochs
        self.data = ("--dataset_name", f"data/{name}", "--image_column_name", self.task.column)
        self.measured = (*self.data, "--validation_split_name", args.split)

    def cells(self) -> list[Cell]:
        cells = [self.held_out()]
        for seed in self.args.seeds if self.is_main else self.args.seeds[:1]:
            for norm in ("BN", MAIN[self.name]):
                cells += [self.network(norm, seed), *self.quantized(norm, seed)]
        for threshold in self.task.thresholds:
            norm, seed = f"OABN, k {threshold:g}", self.args.seeds[0]
            cells.append(self.network(norm, seed))
            lines = ("--bits", "4", "3", "--others", "False", "--methods", *ABLATED)
            cells.append(self.after_training("ptq", norm, seed, lines))
        return [*cells, self.overhead()] if self.is_main else cells

    def held_out(self) -> Cell:
        options = ("--dataset_name", self.source, *self.data[2:], "--held_out", str(self.args.held_out))
        return Cell(f"{self.name}/data", "studies.hold_out", (*options, "--output_dir", f"data/{self.name}"))

    def cell(self, what: str, norm: str, seed: int, module: str, options: tuple, result: str, needs: str, **facts):
        name = f"{self.name}/{_slug(norm)}-{seed}/{_slug(what)}"
        facts = {"task": self.name, "norm": norm, "seed": seed, "kind": what} | facts
        return Cell(name, module, (*options, "--seed", str(seed)), result, (f"{self.name}/{needs}",), facts)

    def network(self, norm: str, seed: int) -> Cell:
        folder = self.folder(norm, seed)
        kind, _, threshold = norm.partition(", k ")
        text = f"{self.task.network} {self.task.training} --oabn {kind == 'OABN'}"
        text += f" --oabn_threshold {threshold}" if threshold else ""
        text += f" --num_train_epochs {self.epochs} --report False --resume_from_checkpoint True"
        options = (*self.data, *text.split(), "--output_dir", folder, *self.args.extra())
        return self.cell("train", norm, seed, "train", options, f"{folder}/train_results.json", "data")

    def quantized(self, norm: str, seed: int) -> list[Cell]:
        """What becomes of a trained network: quantized after training, trained on in float, and quantized."""
        widths = ("--bits", "8", "4", "3", "2")
        cells = [self.after_training("ptq", norm, seed, (*widths, "--methods", *AFTER_TRAINING))]
        lines = (
            "--bits",
            "3",
            "2",
            "--methods",
            TUNED,
            "--others",
            "False",
            "--tuned_targets",
            "1.5",
            "1.75",
            "2.1",
            "2.33",
        )
        cells.append(self.after_training("tuned", norm, seed, lines))
        lines = ("--methods", "none", "--others", "False", "--activations", *EQUALIZED)
        cells.append(self.after_training("equalized", norm, seed, lines))
        for library in self.args.peers:
            lines = (*widths, "--methods", "none", "--others", "False", "--peers", library)
            cells.append(self.after_training(library, norm, seed, lines))
        cells.append(self.further(norm, seed))
        for bits in self.task.qat_bits:
            for line in QAT_LINES if self.is_main else QAT_LINES[::2]:
                text = f"{qat.METHODS[line]} --bits {bits} --learning_rate {RATES.get(bits, RATE)}"
                cells.append(self.trained(line, norm, seed, text, bits=bits))
        for target, rate in TRAINED_TARGETS.items():
            text = f"{qat.SWITCHES} --calibration_images 512 --target_bits_per_weight {target} --learning_rate {rate}"
            cells.append(self.trained(f"{SHARED_OUT} {target}", norm, seed, text, bits=None))
        text = f"{qat.ACTIVATIONS['W4A8']} --learning_rate {RATE}"
        return cells + [self.trained(ACTIVATIONS, norm, seed, text, bits=4, activation_bits=8)]

    def folder(self, norm: str, seed: int) -> str:
        return f"train/{self.name}/{_slug(norm)}-{seed}"

    def after_training(self, what: str, norm: str, seed: int, lines: tuple[str, ...]) -> Cell:
        """Quantized without labels: the table's lines, those of the library `what`, or others that take longer."""
        path = f"{what}/{self.name}/{_slug(norm)}-{seed}-{self.args.split}.json"
        model = ("--models", f"{norm}/{seed}={self.folder(norm, seed)}", "--dataset_title", self.task.title)
        options = (*self.measured, *model, *lines, "--output_json", path)
        trained, split = f"{_slug(norm)}-{seed}/train", self.args.split
        kind = "ptq" if what == "ptq" else "more"
        return self.cell(f"{what} {split}", norm, seed, "studies.ptq", options, path, trained, kind=kind, split=split)

    def overhead(self) -> Cell:
        """What a step with quantized weights takes, in time and memory, of random images: alone on the machine."""
        path = "overhead.json"
        options = ("qat", "--variants", "cifar", "--image_sizes", "32", "--batch_sizes", "128", "--output_json", path)
        return Cell(f"{self.name}/overhead", "benchmarks", options, path, facts={"kind": "overhead"})

    def further(self, norm: str, seed: int) -> Cell:
        """The same epochs as with quantized weights, in float: what a drop is held against, too."""
        folder, split = f"further/{self.name}/{_slug(norm)}-{seed}-{self.args.split}", self.args.split
        text = f"{self.task.further} --learning_rate {RATE} --num_train_epochs {self.args.qat_epochs} --report False"
        options = (*self.measured, "--model_name_or_path", self.folder(norm, seed), *text.split())
        options = (*options, "--resume_from_checkpoint", "True", "--output_dir", folder, *self.args.extra())
        trained = f"{_slug(norm)}-{seed}/train"
        result, facts = f"{folder}/train_results.json", {"kind": "further", "split": split}
        return self.cell(f"further {split}", norm, seed, "train", options, result, trained, **facts)

    def trained(self, line: str, norm: str, seed: int, text: str, **facts) -> Cell:
        width = "" if facts["bits"] is None else f"w{facts['bits']}"
        what, split = f"{line} {width} {self.args.split}", self.args.split
        folder = f"qat/{self.name}/{_slug(norm)}-{seed}/{_slug(what)}"
        text = f"{text} {self.task.further} --granularity per_channel --num_train_epochs {self.args.qat_epochs}"
        options = (*self.measured, "--model_name_or_path", self.folder(norm, seed), *text.split())
        options = (*options, "--resume_from_checkpoint", "True", "--output_dir", folder, *self._of_qat())
        result, facts = f"{folder}/qat_results.json", {"kind": "qat", "line": line, "split": split} | facts
        return self.cell(what, norm, seed, "qat", options, result, f"{_slug(norm)}-{seed}/train", **facts)

    def _of_qat(self) -> list[str]:
        """The options of every training that the recipe `qat` has, too: others, such as `bf16`, are Trainer's."""
        extra = self.args.extra()
        known = {f"--{option.name}" for kind in (QATArguments, DataArguments) for option in fields(kind)}
        return [part for pair in zip(extra[::2], extra[1::2]) if pair[0] in known for part in pair]


def _slug(text: str) -> str:
    """A name for files, such as `oabn-k-4` of `OABN, k 4`."""
    kept = "".join(letter if letter.isalnum() or letter == "." else " " for letter in text.lower())
    return "-".join(kept.split())


def choose(cells: list[Cell], only: list[str]) -> list[Cell]:
    """Return the cells with one of the words `only` in their names, and those that they need; all without words."""
    if not only:
        return cells
    by_name = {cell.name: cell for cell in cells}
    wanted = [cell.name for cell in cells if any(word in cell.name for word in only)]
    if not wanted:
        raise ValueError(f"--only {' '.join(only)} is in the name of no cell: --show True prints them all.")
    for name in wanted:
        wanted += [needed for needed in by_name[name].needs if needed not in wanted]
    return [cell for cell in cells if cell.name in wanted]


def main(arguments: list[str] | None = None) -> list[dict]:
    (args,), _ = parse_arguments((WholeArguments,), arguments)
    folder = Path(args.output_dir).resolve()
    cells = choose(plan(args), args.only)
    if args.show:
        for cell in cells:
            print(f"{cell.name}: {cell.state(folder) or 'to run'}")
        return []
    folder.mkdir(parents=True, exist_ok=True)
    try:
        run_cells(cells, folder, args.parallel)
    finally:
        records = read_cells(folder)
        if any(record.get("kind") for record in records):
            print(write_report(records, folder, args.split))
    return records


if __name__ == "__main__":
    main()
