"""Publish a page that shows a family of models in the browser as a static Space, or write it into a folder.

npm install onnxruntime-web
python -m repvgg_hf.hub space --output_dir page --models w8=outputs/w8 w4=outputs/w4 w2=outputs/w2 \\
    --images "A cat=cat.jpg" --results_json model_cards/repvgg-cifar10-w4.json --license apache-2.0
python -m http.server --directory page
python -m repvgg_hf.hub space --repo_id me/repvgg-in-few-bits --models ... \\
    --license apache-2.0 --visibility public     # log in first with `hf auth login`
"""

import argparse
from pathlib import Path

from .results import Results, read_json
from .space import PACKAGE, publish_space, write_space


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = argparse.ArgumentParser(
        "python -m repvgg_hf.hub space", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=FOLDER", help="checkpoint folders by name")
    parser.add_argument("--repo_id", help="the Space on the Hub, namespace/name")
    parser.add_argument("--output_dir", type=Path, help="new folder for the files; without --repo_id they stay there")
    parser.add_argument("--images", nargs="+", default=[], metavar="CAPTION=FILE", help="sample pictures")
    parser.add_argument("--results_json", type=Path, help="results, or the JSON of a card, for the plot of accuracy")
    parser.add_argument("--measured", nargs="+", default=[], metavar="NAME=MODEL", help="names among the results")
    parser.add_argument(
        "--onnxruntime_web",
        type=Path,
        default=Path("node_modules") / PACKAGE,
        help=f"folder of the npm package, by default %(default)s, where `npm install {PACKAGE}` puts it",
    )
    parser.add_argument("--title", help="the page's heading")
    parser.add_argument("--license", required=True, help="license of the models, as the Hub spells it")
    parser.add_argument(
        "--visibility", choices=("public", "private"), help="who sees the Space; asked for by --repo_id"
    )
    parser.add_argument("--overwrite", action="store_true", help="publish into a Space with other content")
    parser.add_argument("--commit_message", help="message of the commit on the Hub")
    return parser


def pairs(parser: argparse.ArgumentParser, entries: list[str], option: str) -> dict[str, str]:
    """Return `<key>=<value>` entries as a dictionary; ends the command, naming the option, for one without a key."""
    found = dict(entry.partition("=")[::2] for entry in entries)
    if len(found) != len(entries) or not all(found) or not all(found.values()):
        parser.error(f"--{option} takes <name>=<value> with different names, got {', '.join(entries)}")
    return found


def read_results(path: Path | None) -> Results | None:
    """Read results from a file of their own, or from that of a card."""
    if path is None:
        return None
    values = read_json(path)
    return Results.from_dict(values.get("results") or values)


def main(arguments: list[str]) -> None:
    """Run the command."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    if args.repo_id is None and args.output_dir is None:
        parser.error("give --repo_id to publish the page, or --output_dir to write it into a folder")
    if args.repo_id is not None and args.visibility is None:
        parser.error("--visibility is not given: say public or private")
    options = {
        "models": pairs(parser, args.models, "models"),
        "results": read_results(args.results_json),
        "images": pairs(parser, args.images, "images"),
        "measured": pairs(parser, args.measured, "measured"),
        "onnxruntime_web": args.onnxruntime_web,
        "license": args.license,
    }
    if args.title is not None:
        options["title"] = args.title
    if args.repo_id is None:
        write_space(args.output_dir, **options)
        print(f"Written to {args.output_dir}: `python -m http.server --directory {args.output_dir}` shows it.")
        return
    private = args.visibility == "private"
    upload_options = {"private": private, "overwrite": args.overwrite, "folder": args.output_dir}
    place = publish_space(args.repo_id, commit_message=args.commit_message, **upload_options, **options)
    print(f"{place.repo_id} at {place.commit}, {'new' if place.changed else 'no change'}")
