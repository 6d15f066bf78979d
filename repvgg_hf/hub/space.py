"""A page that shows a family of models in the browser, as a static Space on the Hub or a folder for any web server.

Visitors give it a picture, or the camera, and move a slider from many bits per weight to few; ONNX Runtime Web runs
the models on their device. The page's own files are in `space_files/`.
"""

import json
import re
import shutil
import tempfile
from importlib.resources import as_file, files
from pathlib import Path

from huggingface_hub import SpaceCardData
from PIL import Image

from .card import write_text
from .drawing import accuracy_rows
from .folder import complete_folder
from .names import check_license, check_private, check_repo_id
from .results import FLOAT, Results, check_text, read_json
from .space_models import SpaceModel, describe_models, find_measured
from .space_pixels import pixel_settings
from .tables import by_model, file_size, table
from .upload import Published, RepoKind, upload

PACKAGE = "onnxruntime-web"
RUNTIME_FILES = {"module": "ort.wasm.bundle.min.mjs", "wasm": "ort-wasm-simd-threaded.wasm"}
SPACE_FILE = "space.json"
IMAGE_FORMATS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}
# without these a page has no memory that threads share
HEADERS = {
    "cross-origin-embedder-policy": "require-corp",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "cross-origin",
}
SPACE = RepoKind(
    type="space",
    words="a Space of these pages",
    marker=SPACE_FILE,
    mark=("made_by", "repvgg_hf"),
    stale=re.compile(r"(models|images|onnxruntime)/[^/]*|[^/]*\.(js|css|svg)"),
    creation={"space_sdk": "static"},
    template=frozenset({"index.html", "style.css"}),
)


def publish_space(
    repo_id: str,
    models: dict,
    results: Results | None = None,
    *,
    images: dict[str, str | Path] | None = None,
    processor=None,
    onnxruntime_web: str | Path = f"node_modules/{PACKAGE}",
    title: str | None = None,
    measured: dict[str, str] | None = None,
    license: str,
    private: bool | None,
    overwrite: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
    folder: str | Path | None = None,
) -> Published:
    """Publish a static Space that shows a family of models in the browser, in one commit; returns where it is.

    Publishing the same again uploads nothing and makes no commit.

    Args:
        repo_id (`str`): `"namespace/name"` of the Space, which is created if there is none.
        title (`str`, *optional*): the page's heading, by default the name in `repo_id`.
        private (`bool`): whether the Space is private. An existing one that is not so is refused.
        overwrite (`bool`, defaults to `False`): publish into a Space that holds something else. Its other files stay.
        commit_message (`str`, *optional*): first line of the commit, "Publish <title>" by default.
        token (`str` or `bool`, *optional*): as in `huggingface_hub`; by default the one that you logged in with.
        folder (`str` or `Path`, *optional*): new folder in which a copy of the files is kept.

    The other arguments are those of [`write_space`]. Raises what it raises, before anything is sent, and as
    [`~repvgg_hf.hub.publish`] does `ValueError` for a Space that is not ours to change, `HfHubHTTPError` if the Hub
    refuses and `ConnectionError` if it can't be reached.
    """
    check_repo_id(repo_id)
    check_private(private)
    title = repo_id.rpartition("/")[2] if title is None else title
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "space" if folder is None else Path(folder)
        write_space(
            folder,
            models,
            results,
            images=images,
            processor=processor,
            onnxruntime_web=onnxruntime_web,
            title=title,
            measured=measured,
            license=license,
        )
        message = commit_message or f"Publish {title}"
        return upload(folder, repo_id, message, private=private, overwrite=overwrite, token=token, kind=SPACE)


def write_space(
    folder: str | Path,
    models: dict,
    results: Results | None = None,
    *,
    images: dict[str, str | Path] | None = None,
    processor=None,
    onnxruntime_web: str | Path = f"node_modules/{PACKAGE}",
    title: str = "RepVGG in few bits",
    measured: dict[str, str] | None = None,
    license: str,
) -> dict:
    """Write the page of a family of models into a new folder, for any web server; returns what `space.json` holds.

    `python -m http.server --directory FOLDER` shows it. It needs nothing from other servers. The folder appears when it
    is complete.

    Args:
        folder (`str` or `Path`): the new folder.
        models (`dict`): the classifiers, or their checkpoint folders, by name, such as `{"w8": ..., "w4": ...}`; each
            of other bits. Their ONNX files are exported, or taken from `onnx/` in the checkpoint folder.
        results ([`Results`], *optional*): what was measured, for the plot of accuracy against bytes.
        images (`dict[str, str | Path]`, *optional*): sample pictures by caption, JPEG, PNG or WebP files.
        processor (*optional*): the image processor that the models were evaluated with; by default the one in the first
            checkpoint folder.
        onnxruntime_web (`str` or `Path`): folder of the npm package onnxruntime-web; by default where
            `npm install onnxruntime-web` puts it.
        title (`str`, *optional*): the page's heading.
        measured (`dict[str, str]`, *optional*): name in `results.models`, by name of the model, where name, method and
            bits don't tell.
        license (`str`): license of the models, as the Hub spells it.

    Raises `ValueError` naming the argument for bad input, `ImportError` if a model has to be exported and
    `pip install 'repvgg-hf[onnx]'` is missing.

    Example:
    ```python
    >>> from repvgg_hf.hub import write_space

    >>> write_space("page", {"w8": "my-model-w8", "w4": "my-model-w4"}, images={"A cat": "cat.jpg"}, license="mit")
    ```"""
    check_license(license)
    check_title(title)
    family = describe_models(models)
    unknown = set(measured or {}) - {model.name for model in family}
    if unknown:
        raise ValueError(f"measured names {', '.join(sorted(unknown))}, and models has {', '.join(models)}.")
    pixels = pixel_settings(processor or find_processor(family), family[0].config.get("num_channels", 3))
    package = check_runtime(onnxruntime_web)
    with complete_folder(folder) as target:
        copy_page(target)
        values = {
            "made_by": "repvgg_hf",
            "title": title,
            "labels": family[0].labels,
            "pixels": pixels,
            "models": write_models(family, results, measured or {}, target),
            "images": copy_images(images or {}, target),
            "engine": copy_runtime(package, target),
            "accuracy": accuracy_points(results),
        }
        values["float_bytes"] = float_bytes(values["models"], results)
        write_text(target / SPACE_FILE, json.dumps(values, indent=1, ensure_ascii=False) + "\n")
        write_text(target / "README.md", readme(values, license))
    return values


def check_title(title: str) -> None:
    """Raise `ValueError` for a title that is empty or can't be shown on one line."""
    check_text(title, "title")
    if not title.strip() or "\n" in title:
        raise ValueError(f"title must be a line of text, got {title!r}.")


def find_processor(family: list[SpaceModel]):
    """Return the image processor of the first checkpoint folder. Raises `ValueError` if there is none."""
    from transformers import AutoImageProcessor

    folders = [model.source for model in family if isinstance(model.source, Path)]
    if not folders or not (folders[0] / "preprocessor_config.json").is_file():
        where = f"{folders[0]} has no preprocessor_config.json" if folders else "no model is given as a folder"
        raise ValueError(f"{where}: pass processor=, the image processor that the models were evaluated with.")
    return AutoImageProcessor.from_pretrained(folders[0])


def check_runtime(package: str | Path) -> Path:
    """Return the folder of onnxruntime-web. Raises `ValueError` naming the npm command if it is not there."""
    package = Path(package)
    install = f"`npm install {PACKAGE}` puts it into node_modules/{PACKAGE}"
    if not (package / "package.json").is_file() or read_json(package / "package.json").get("name") != PACKAGE:
        raise ValueError(f"onnxruntime_web must be the folder of the npm package {PACKAGE}, got {package}: {install}.")
    for name in RUNTIME_FILES.values():
        if not (package / "dist" / name).is_file():
            version = read_json(package / "package.json").get("version")
            raise ValueError(f"{package} ({PACKAGE} {version}) has no dist/{name}: `npm install {PACKAGE}@latest`.")
    return package


def copy_runtime(package: Path, target: Path) -> dict:
    """Copy ONNX Runtime Web's files into `target`; returns where they are."""
    (target / "onnxruntime").mkdir()
    for name in RUNTIME_FILES.values():
        shutil.copyfile(package / "dist" / name, target / "onnxruntime" / name)
    places = {key: f"onnxruntime/{name}" for key, name in RUNTIME_FILES.items()}
    size = (target / places["wasm"]).stat().st_size
    return places | {"version": read_json(package / "package.json").get("version", ""), "bytes": size}


def copy_page(target: Path) -> None:
    """Copy the page's own files into `target`."""
    with as_file(files(__package__) / "space_files") as source:
        for path in sorted(Path(source).iterdir()):
            if path.suffix in (".html", ".css", ".js", ".svg"):
                shutil.copyfile(path, target / path.name)


def write_models(family: list[SpaceModel], results: Results | None, measured: dict, target: Path) -> list[dict]:
    """Write the ONNX files into `target`; returns an entry for each stop of the slider."""
    (target / "models").mkdir()
    entries = []
    for model in family:
        path = target / "models" / f"{model.name}.onnx"
        model.write(path)
        name = find_measured(model, results, measured)
        rows = results.select(name) if name is not None else []
        top1 = sum(row.top1 for row in rows) / len(rows) if rows else None
        entry = {"name": model.name, "bits": model.bits, "file": f"models/{path.name}", "bytes": path.stat().st_size}
        entries.append(entry | {"measured": name, "top1": top1})
    return entries


def copy_images(images: dict[str, str | Path], target: Path) -> list[dict]:
    """Copy pictures, given by caption, into `target`; returns an entry for each.

    Raises `ValueError` for a file that is no picture that browsers show.
    """
    (target / "images").mkdir()
    entries = []
    for number, (caption, path) in enumerate(images.items(), 1):
        check_text(caption, "the caption of an image")
        try:
            with Image.open(path) as image:
                image.load()
                kind = image.format
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"images[{caption!r}] is {path}, which can't be read ({error}): give a picture."
            ) from error
        if kind not in IMAGE_FORMATS:
            raise ValueError(f"images[{caption!r}] is a {kind} file, {path}: give a JPEG, PNG or WebP file.")
        name = f"images/{number}{IMAGE_FORMATS[kind]}"
        shutil.copyfile(path, target / name)
        entries.append({"file": name, "caption": caption})
    return entries


def accuracy_points(results: Results | None) -> dict | None:
    """Return the points of the plot of accuracy against bytes, averaged over seeds; `None` without quantized models."""
    if results is None or not any(row.quantized for row in results.models):
        return None
    names = by_model(results.models)
    points = [{"model": name, **row} for name, row in zip(names, accuracy_rows(results))]
    return {"dataset": f"{results.dataset.name}, {results.dataset.split}", "points": points}


def float_bytes(entries: list[dict], results: Results | None) -> float | None:
    """Return the bytes of the float model: of the one that was measured, else of the one on the slider, if any."""
    measured = [row.bytes for row in results.models if row.method == FLOAT] if results is not None else []
    there = [entry["bytes"] for entry in entries if entry["bits"] == 32]
    return next(iter(measured + there), None)


def readme(values: dict, license: str) -> str:
    """Return the Space's README, whose head tells the Hub what kind of page it is."""
    card = SpaceCardData(
        title=values["title"],
        emoji="🎚️",
        colorFrom="green",
        colorTo="yellow",
        sdk="static",
        app_file="index.html",
        pinned=False,
        license=license,
        short_description="Fewer bits per weight, live in your browser",
        custom_headers=HEADERS,
    )
    rows = [[entry["name"], f"{entry['bits']:g}", file_size(entry["bytes"])] for entry in values["models"]]
    return (
        f"---\n{card.to_yaml()}\n---\n\n"
        "A picture, a slider from many bits per weight to few, and what the network sees: everything runs in the "
        "visitor's browser, and no picture leaves it.\n\n"
        f"{table(['model', 'bits per code', 'bytes'], rows)}\n\n"
        "`python -m http.server` in a copy of this folder shows the page without the Hub. It was made by "
        "`repvgg_hf.hub.publish_space`; `onnxruntime/` holds files of "
        f"[ONNX Runtime Web](https://www.npmjs.com/package/{PACKAGE}) {values['engine']['version']} (MIT license).\n"
    )
