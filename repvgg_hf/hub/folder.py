"""Writing a folder with all that a Hub repository of a model holds."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ..analysis import checkpoint_bytes
from ..interop.formats import check_formats
from ..runtime.checkpoints import weight_files, weights_checksum
from ..runtime.marker import has_own_code
from ..runtime.saving import give_ordinary_modes
from .about import About, make_example
from .card import ModelCard, write_text
from .drawing import draw_figures
from .engines import check_measured, write_engine_files
from .names import check_license, check_ref, check_repo_id
from .network_card import NetworkCard, float_source
from .results import FLOAT, Results
from .runtime_files import auto_map, runtime_files


def write_folder(
    model,
    folder: str | Path,
    repo_id: str,
    results: Results | None = None,
    *,
    processor,
    published: str | None = None,
    revision: str | None = None,
    plots: dict[str, str | Path] | None = None,
    draw_plots: bool = True,
    license: str,
    formats: Sequence[str] = (),
    about: About | None = None,
    example: str | Path | None = None,
) -> ModelCard:
    """Write weights, configuration, processor, card and runtime code into a new folder; returns the card.

    A model of another architecture than RepVGG has no code of this package to go with it.

    `card.json` there holds what the card was made of: `python -m repvgg_hf.hub card.json` makes it and its figures
    again. The folder appears when it is complete.

    Args:
        folder (`str` or `Path`): the new folder.

    The other arguments are those of [`~repvgg_hf.hub.publish`]. Raises `ValueError` if the folder holds something
    already, and what `publish` raises before it sends anything.
    """
    check_repo_id(repo_id)
    check_ref(revision, "revision")
    check_license(license)
    check_formats(formats)
    check_model(model)
    own = has_own_code(model)
    image_size = processor_image_size(processor) if own else None
    with complete_folder(folder) as target:
        model.save_pretrained(target)
        processor.save_pretrained(target)
        config = json.loads((target / "config.json").read_text(encoding="utf-8"))
        if own:
            config = add_code(model, config, target)
        if results is not None:
            published = published or find_published(config, results, checkpoint_bytes(target))
        files = write_engine_files(model, target, formats, image_size)
        check_measured(files, results, published)
        captions = draw_figures(results, repo_id, target, published=published) if draw_plots else {}
        about = about or About()
        if about.base_model is None and not own:
            about = replace(about, base_model=float_source(model))
        card = (ModelCard if own else NetworkCard)(
            repo_id=repo_id,
            config=config,
            image_size=image_size,
            results=results,
            published=published,
            revision=revision,
            plots=captions | copy_plots(plots or {}, target),
            license=license,
            files=files or None,
            about=about if about != About() else None,
        )
        if example is not None:
            card.example = make_example(model, processor, example, target, repo_id.rpartition("/")[2])
        write_card(card, target)
        if (entries := card.eval_results_yaml()) is not None:
            (target / ".eval_results").mkdir()
            name = re.sub(r"[^A-Za-z0-9]+", "-", results.dataset.hub_id)
            write_text(target / ".eval_results" / f"{name}.yaml", entries)
    return card


def write_card(card: ModelCard, folder: Path) -> None:
    """Write a card, and what it is made of, into `folder`."""
    write_text(folder / "README.md", str(card))
    card.to_json(folder / "card.json")


def add_code(model, config: dict, target: Path) -> dict:
    """Put the runtime code into `target`, and what points to it into its `config.json`; returns that."""
    config = config | {"auto_map": auto_map()}
    if "quantization_config" not in config:  # which has a checksum of its own
        config["weights_checksum"] = weights_checksum(weight_files(target), model.config)
    write_text(target / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    for path in runtime_files():
        shutil.copyfile(path, target / path.name)
    return config


@contextmanager
def complete_folder(folder: str | Path) -> Iterator[Path]:
    """Give a folder to fill, which becomes `folder` at the end of the `with` block, unless something raised.

    Raises `ValueError` if `folder` holds something already.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: give a new folder, or remove it first.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        target = Path(temporary) / "new"
        target.mkdir()
        yield target
        give_ordinary_modes(target)
        if folder.exists():
            folder.rmdir()
        os.replace(target, folder)


def copy_plots(plots: dict[str, str | Path], target: Path) -> dict[str, str]:
    """Copy images, given by caption, into `target`; returns captions by path there.

    Raises `ValueError` for a path that is no image file, or for two files of one name.
    """
    captions = {}
    for caption, path in plots.items():
        path = Path(path)
        if not path.is_file() or path.suffix not in (".png", ".svg", ".jpg"):
            raise ValueError(f"The plot {caption!r} must be a .png, .svg or .jpg file, got {path}: make it first.")
        (target / "plots").mkdir(exist_ok=True)
        if (target / "plots" / path.name).exists():
            raise ValueError(f"The plot {caption!r} is the second one called {path.name}: rename {path}.")
        shutil.copyfile(path, target / "plots" / path.name)
        captions[f"plots/{path.name}"] = caption
    return captions


def check_model(model) -> None:
    """Raise `ValueError` unless `model` can be published as it is: a RepVGG classifier, or another quantized model."""
    if getattr(model, "config", None) is None or not hasattr(model, "push_to_hub"):
        raise ValueError(
            f"publish() takes a model of Transformers, got {type(model).__name__}: save a plain module with "
            "save_quantized() and upload that folder."
        )
    # no isinstance: the class may be of a copy of the code that came with a checkpoint
    own = has_own_code(model)
    if own and model.base_model is model:  # a model without a head is its own base
        raise ValueError(
            f"publish() takes a RepVGGForImageClassification, got {type(model).__name__}: backbones and headless "
            "models load from the classifier's repository."
        )
    if getattr(model.config, "qat_config", None) is not None:
        raise ValueError("The model is being trained with quantized weights: call quantize() before publishing it.")
    if not own and not getattr(model, "is_quantized", False):
        raise ValueError(
            f"{type(model).__name__} is float: quantize it before, or publish it with its own push_to_hub()."
        )


def processor_image_size(processor) -> int:
    """Return the side in pixels of the square images that `processor` hands to the model.

    Raises `ValueError` if they are not square.
    """
    size = getattr(processor, "crop_size", None) or getattr(processor, "size", None) or {}
    size = dict(size)
    height, width = size.get("height"), size.get("width")
    if height is None or height != width:
        raise ValueError(
            f"processor must make square images, with crop_size or size of equal height and width, got {size}: give "
            "the image processor that the model was evaluated with."
        )
    return height


def find_published(config: dict, results: Results, weight_bytes: int) -> str:
    """Return the name in `results.models` of the model that `config` and the size of its weight files describe.

    Raises `ValueError` if none fits, or several do.
    """
    quantization = config.get("quantization_config") or {"method": FLOAT, "bits": 32}
    method, bits = quantization["method"], quantization["bits"]
    mixed = bool(quantization.get("bits_overrides"))  # figures then name the mean
    of_its_kind = [row for row in results.models if row.method == method and (mixed or row.bits == bits)]
    names = {result.model for result in of_its_kind if result.bytes == weight_bytes}
    if len(names) == 1:
        return names.pop()
    measured = ", ".join(f"{result.model} ({result.bytes} bytes)" for result in of_its_kind) or "none"
    raise ValueError(
        f"results.models must have one model with method {method}, {bits} bits and {weight_bytes} bytes, the one that "
        f"is published; of this method and bits it has {measured}. Measure this checkpoint, or pass published=<name>."
    )
