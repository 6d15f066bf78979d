"""Publish a checkpoint, or a family of them, on the Hub, with a card made from the figures that the recipes measured.

    repvgg-hf publish --repo_id me/photos-w4 --models outputs/quantize/cluster-per_tensor-scale-w4-calibrated \\
        --quantize_json outputs/quantize/quantize_results.json --train_checkpoint outputs/photos \\
        --dataset_title "photos of bottles" --license cc-by-4.0 --visibility private
    repvgg-hf publish --repo_id me/photos --as_revisions --collection "RepVGG on photos" ... \\
        --models float=outputs/quantize/float w4=outputs/quantize/cluster-per_tensor-scale-w4-calibrated

`--dry_run --output_dir FOLDER` writes the files there (of a family in `FOLDER/<name>`) and stops. Log in first with
`hf auth login`. Figures need matplotlib; `--draw_plots False` leaves them out.
"""

import shlex
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from repvgg_hf.hub import About, Results, publish, publish_family
from repvgg_hf.hub.branch_kernels import branch_histograms, dense_branch_report
from repvgg_hf.hub.recipe_figures import (
    benchmark_latency,
    command_of,
    engine_results,
    merge_models,
    qat_models,
    quantize_models,
)
from repvgg_hf.hub.results import read_json
from repvgg_hf.interop.formats import FORMATS
from repvgg_hf.training.arguments import parse_arguments
from repvgg_hf.training.models import load_float
from repvgg_hf.training.report import masked, masked_text


@dataclass
class PublishArguments:
    """Options that say what to publish, where, and what was measured."""

    repo_id: str = field(metadata={"help": "The repository on the Hub, namespace/name; a family adds to it."})
    models: list[str] = field(metadata={"help": "What to publish: a checkpoint folder, or several as <name>=<folder>."})
    published: str | None = field(
        default=None, metadata={"help": "Name of the model among the results, where bits and bytes don't tell."}
    )
    results_json: str | None = field(
        default=None, metadata={"help": "A complete results file, instead of those of recipes."}
    )
    quantize_json: list[str] = field(
        default_factory=list, metadata={"help": "Files quantize_results.json that quantize.py wrote, one per seed."}
    )
    qat_json: list[str] = field(
        default_factory=list, metadata={"help": "Files qat_results.json that qat.py wrote, one per seed."}
    )
    benchmark_json: list[str] = field(
        default_factory=list, metadata={"help": "Files that the benchmark `inference` wrote, for latencies."}
    )
    engine_json: list[str] = field(
        default_factory=list, metadata={"help": "Files that evaluate.py --engines wrote, for the table of engines."}
    )
    formats: list[str] = field(
        default_factory=list,
        metadata={"help": f"Files for engines to publish with the model: {', '.join(FORMATS)}."},
    )
    train_checkpoint: str | None = field(
        default=None,
        metadata={"help": "Checkpoint with branches, for figures and a histogram of outliers before fusing."},
    )
    plain_checkpoint: str | None = field(
        default=None,
        metadata={"help": "Checkpoint trained likewise with --oabn False, to compare in the histogram of outliers."},
    )
    dataset_title: str | None = field(default=None, metadata={"help": "What to call the dataset on the card."})
    dataset_split: str = field(default="held out", metadata={"help": "Part of the dataset that was evaluated."})
    dataset_hub_id: str | None = field(default=None, metadata={"help": "The dataset's id on the Hub."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Commit of the dataset on the Hub."})
    description: str = field(default="", metadata={"help": "How the model was trained and calibrated."})
    commands: list[str] = field(
        default_factory=list, metadata={"help": "Further commands to show on the card, such as train.py's."}
    )
    plots: list[str] = field(default_factory=list, metadata={"help": "More images for the card, <caption>=<file>."})
    draw_plots: bool = field(
        default=True, metadata={"help": "Draw accuracy against bytes and the kernels' histogram; needs matplotlib."}
    )
    license: str | None = field(
        default=None,
        metadata={"help": "License of the weights, as the Hub spells it, such as cc-by-4.0; there is no default."},
    )
    visibility: str | None = field(
        default=None,
        metadata={"help": "Who sees the repository: public or private; there is no default, and --dry_run needs none."},
    )
    intended_use: str = field(default="", metadata={"help": "What the model is for, and what not, for the card."})
    training_data: str = field(default="", metadata={"help": "What the model was trained on, for the card."})
    training_data_license: str = field(default="", metadata={"help": "License of the training data, in words."})
    base_model: str | None = field(
        default=None, metadata={"help": "Hub id of the model that training started from, for the card."}
    )
    example: str | None = field(
        default=None, metadata={"help": "A picture to show on the card, with what the model says of it."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch to publish to."})
    tag: str | None = field(default=None, metadata={"help": "Tag to put on the commit."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead of changing main."})
    overwrite: bool = field(default=False, metadata={"help": "Publish into a repository with other content."})
    as_revisions: bool = field(default=False, metadata={"help": "Publish a family as branches of one repository."})
    collection: str | None = field(default=None, metadata={"help": "Collection on the Hub to put a family into."})
    commit_message: str | None = field(default=None, metadata={"help": "Message of the commit on the Hub."})
    output_dir: str | None = field(default=None, metadata={"help": "New folder for the files that are published."})
    dry_run: bool = field(default=False, metadata={"help": "Write the files to --output_dir and upload nothing."})
    card_json: str | None = field(
        default=None, metadata={"help": "Copy the card to this .json file and a .md beside it; needs --output_dir."}
    )


def check_answers(args: PublishArguments) -> None:
    """Raise `ValueError` if a question that only the publisher can answer was not answered."""
    if args.license is None:
        raise ValueError(
            "--license is not given: say under which license others may use the weights, such as apache-2.0, "
            "cc-by-nc-4.0 or other. That of the training data may decide."
        )
    if args.visibility not in ("public", "private") and not (args.dry_run and args.visibility is None):
        given = "not given" if args.visibility is None else repr(args.visibility)
        raise ValueError(
            f"--visibility is {given}: say public for a repository that everybody sees, or private for one that only "
            "you and your organization do."
        )


def gather_results(args: PublishArguments) -> Results | None:
    """The measured figures, from the files that the recipes wrote."""
    if args.results_json is not None:
        return Results.from_json(args.results_json)
    swept, trained = [{path: read_json(path) for path in paths} for paths in (args.quantize_json, args.qat_json)]
    if not swept and not trained:
        return None
    if args.dataset_title is None:
        raise ValueError("Give --dataset_title, the name of the dataset that the figures were measured on.")
    rows = [row for path, record in swept.items() for row in quantize_models(record, path)]
    rows += [row for path, record in trained.items() for row in qat_models(record, path)]
    models = merge_models(rows)
    measured = {path: read_json(path) for path in args.engine_json}
    kernels, histograms = [], []
    if args.train_checkpoint is not None:
        model = load_float(args.train_checkpoint, None)
        kernels, histograms = dense_branch_report(model), branch_histograms(model)
    if args.plain_checkpoint is not None:
        plain = load_float(args.plain_checkpoint, None)
        if plain.config.oabn:
            raise ValueError(f"--plain_checkpoint {args.plain_checkpoint} has OABN: train one with --oabn False.")
        histograms += branch_histograms(plain, before=False)
    return Results.from_dict(
        {
            "dataset": {
                "name": args.dataset_title,
                "split": args.dataset_split,
                "hub_id": args.dataset_hub_id,
                "revision": args.dataset_revision,
            },
            "models": models,
            "description": args.description,
            "commands": [
                *map(masked_text, args.commands),
                *(shown(command_of(record, path)) for path, record in (swept | trained | measured).items()),
            ],
            "kernels_before": kernels,
            "kernels_after": next(iter(swept.values())).get("float_kernels", []) if swept else [],
            "histograms": histograms,
            "latency": [row for path in args.benchmark_json for row in benchmark_latency(read_json(path), path)],
            "engines": [row for path, record in measured.items() for row in engine_results(record, models, path)],
        }
    )


def shown(command: list[str]) -> str:
    """A recipe's command line as others may see it, without secrets, and of a folder on this machine only the name."""
    return shlex.join(["python", *(Path(part).name if Path(part).is_absolute() else part for part in masked(command))])


def copy_card(folder: Path, card_json: Path) -> None:
    """Copy what the card is made of, the card, and the images it shows, which stay below it in `plots/`."""
    card_json.parent.mkdir(parents=True, exist_ok=True)
    for suffix, name in ((".json", "card.json"), (".md", "README.md")):
        shutil.copyfile(folder / name, card_json.with_suffix(suffix))
    if (folder / "plots").exists():
        shutil.copytree(folder / "plots", card_json.parent / "plots", dirs_exist_ok=True)


def pairs(entries: list[str], option: str) -> dict[str, str]:
    """The `<key>=<value>` entries as a dictionary. Raises `ValueError` naming the option for one without a key."""
    found = dict(entry.partition("=")[::2] for entry in entries)
    if len(found) != len(entries) or not all(found.values()):
        raise ValueError(f"--{option} takes <name>=<value> with different names, got {', '.join(entries)}.")
    return found


def load(folder: str):
    """Load a checkpoint into the class that saved it: a classifier, or a quantized model of another kind."""
    names = AutoConfig.from_pretrained(folder).architectures or []
    kind = getattr(transformers, names[0], None) if names else None
    return (kind or AutoModelForImageClassification).from_pretrained(folder)


def main(arguments: list[str] | None = None) -> None:
    (args,), _ = parse_arguments((PublishArguments,), arguments)
    if args.card_json is not None and args.output_dir is None:
        raise ValueError("--card_json copies the card from --output_dir: give that, too.")
    check_answers(args)
    results = gather_results(args)
    folders = pairs(args.models, "models") if len(args.models) > 1 else {"": args.models[0]}
    models = {name: load(folder) for name, folder in folders.items()}
    options = {
        "processor": AutoImageProcessor.from_pretrained(next(iter(folders.values()))),
        "plots": pairs(args.plots, "plots"),
        "draw_plots": args.draw_plots,
        "formats": args.formats,
        "license": args.license,
        "private": None if args.visibility is None else args.visibility == "private",
        "about": About(args.intended_use, args.training_data, args.training_data_license, args.base_model),
        "example": args.example,
        "overwrite": args.overwrite,
        "commit_message": args.commit_message,
        "folder": args.output_dir,
        "dry_run": args.dry_run,
    }
    if len(models) > 1:
        if args.card_json or args.published or args.revision or args.tag or args.create_pr:
            raise ValueError(
                "A family takes none of --card_json, --published, --revision, --tag and --create_pr: publish its "
                "models one by one for these."
            )
        where = publish_family(
            models, args.repo_id, results, as_revisions=args.as_revisions, collection=args.collection, **options
        )
        if where is None:
            print(f"Written to {args.output_dir}.")
        for name, place in (where or {}).items():
            print(f"{name}: {place.repo_id} at {place.revision}, {'new' if place.changed else 'no change'}")
        return
    place = publish(
        models[""],
        args.repo_id,
        results,
        published=args.published,
        revision=args.revision,
        tag=args.tag,
        create_pr=args.create_pr,
        **options,
    )
    if args.card_json is not None:
        copy_card(Path(args.output_dir), Path(args.card_json))
    print(
        f"Written to {args.output_dir}." if place is None else f"{place.repo_id}: {place.pull_request or place.commit}"
    )


if __name__ == "__main__":
    main()
