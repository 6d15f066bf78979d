"""Publishing models on the Hub: one folder, one commit, nothing half-done."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from ..interop.formats import check_formats
from .about import About
from .card import ModelCard
from .folder import complete_folder, write_card, write_folder
from .names import check_license, check_private, check_ref, check_repo_id
from .results import Results
from .upload import MODEL, Published, RepoKind, repeat, upload


def publish(
    model,
    repo_id: str,
    results: Results | None = None,
    *,
    processor,
    published: str | None = None,
    plots: dict[str, str | Path] | None = None,
    draw_plots: bool = True,
    formats: Sequence[str] = (),
    license: str,
    private: bool | None = None,
    about: About | None = None,
    example: str | Path | None = None,
    revision: str | None = None,
    tag: str | None = None,
    create_pr: bool = False,
    overwrite: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
    folder: str | Path | None = None,
    dry_run: bool = False,
) -> Published | None:
    """Publish a model on the Hub in one commit: weights, configuration, processor, card, results, runtime code.

    No code goes with a quantized model of another architecture: its card says that loading needs this package.
    Publishing the same again uploads nothing and makes no commit.

    Args:
        model ([`RepVGGForImageClassification`] or `PreTrainedModel`): the classifier, float or quantized, or any
            other quantized model of Transformers.
        repo_id (`str`): `"namespace/name"`; the repository is created if there is none.
        results ([`Results`], *optional*): what was measured; the card shows these figures and no others.
        processor: the image processor that the model was evaluated with.
        published (`str`, *optional*): name of this model in `results.models`; by default the one with its method, bits
            and bytes.
        plots (`dict[str, str | Path]`, *optional*): more image files for the card, by caption.
        draw_plots (`bool`, defaults to `True`): draw accuracy against bytes, and the distribution of the kernels'
            entries if `results` has it, for the card; needs matplotlib. `False` makes a card of text.
        formats (sequence of `str`, *optional*): files for engines that go into folders of the repository, such as
            `("onnx", "openvino")`, see [`~repvgg_hf.interop.formats.export_format`]; the card lists them, with what
            `results.engines` has of them.
        license (`str`): license of the weights, as the Hub spells it, such as `"cc-by-4.0"`.
        private (`bool`): whether the repository is private. An existing one that is not so is refused. Only a dry run
            needs no answer.
        about ([`About`], *optional*): what the model is for and what it was trained on, for the card.
        example (`str` or `Path`, *optional*): a picture to show on the card, small and without its metadata, with what
            the model says of it.
        revision (`str`, *optional*): branch to publish to, created (empty) if there is none; `main` by default.
        tag (`str`, *optional*): tag to put on the commit.
        create_pr (`bool`, defaults to `False`): open a pull request instead of changing the branch.
        overwrite (`bool`, defaults to `False`): publish into a repository with other content than a RepVGG model. Its
            other files stay.
        commit_message (`str`, *optional*): first line of the commit, "Publish <name>" by default.
        token (`str` or `bool`, *optional*): as in `huggingface_hub`; by default the one that you logged in with.
        folder (`str` or `Path`, *optional*): new folder in which a copy of the files is kept.
        dry_run (`bool`, defaults to `False`): write `folder` and stop.

    Returns where the model is, as [`Published`], or `None` after a dry run.

    Raises `ValueError` for a bad argument, before anything is sent, and for a repository that is not ours to change;
    `ImportError` without matplotlib; `HfHubHTTPError` if the Hub refuses; `ConnectionError` if it can't be reached. The
    branch is then as before, and publishing again sends only what is missing.
    """
    check_destination(dry_run, folder, private)
    if create_pr and (revision or tag):
        raise ValueError("create_pr proposes a change of main: leave out revision and tag.")
    check_ref(revision, "revision")
    check_ref(tag, "tag")
    options = {"processor": processor, "published": published, "revision": revision, "plots": plots}
    options |= {"draw_plots": draw_plots, "license": license, "formats": formats, "about": about, "example": example}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "repo" if folder is None else Path(folder)
        card = write_folder(model, folder, repo_id, results, **options)
        if dry_run:
            return None
        options = {"private": private, "revision": revision, "tag": tag, "create_pr": create_pr, "overwrite": overwrite}
        options["kind"] = kind_of(model)
        return upload(folder, repo_id, commit_message or f"Publish {card.name}", token=token, **options)


def publish_family(
    models: dict,
    repo_id: str,
    results: Results | None = None,
    *,
    processor,
    as_revisions: bool = False,
    collection: str | None = None,
    published: dict[str, str] | None = None,
    plots: dict[str, str | Path] | None = None,
    draw_plots: bool = True,
    formats: Sequence[str] = (),
    license: str,
    private: bool | None = None,
    about: About | None = None,
    example: str | Path | None = None,
    overwrite: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
    folder: str | Path | None = None,
    dry_run: bool = False,
) -> dict[str, Published] | None:
    """Publish models that differ in their weights, such as `{"float": ..., "w8": ..., "w4": ...}`; returns where.

    Each goes into a repository of its own, `<repo_id>-<name>`, or with `as_revisions` into a branch `<name>` of
    `repo_id`, whose `main` gets the first model last, when the others are there. Nothing is sent before the files of
    all of them are written.

    Args:
        models (`dict[str, RepVGGForImageClassification]`): the models, by the name that each has in its repository or
            branch.
        as_revisions (`bool`, defaults to `False`): publish into branches of one repository.
        collection (`str`, *optional*): title of a collection to put the repositories into, created if there is none.
        published (`dict[str, str]`, *optional*): name in `results.models`, by name of the model.
        folder (`str` or `Path`, *optional*): new folder in which a copy of the files is kept, those of each model in
            `<folder>/<name>`.
        dry_run (`bool`, defaults to `False`): write `folder` and stop.

    The other arguments, and what is raised, are those of [`publish`].
    """
    check_destination(dry_run, folder, private)
    if as_revisions and "main" in models:
        raise ValueError("main is the branch that gets the first model: call the model 'main' something else.")
    places = {name: (repo_id, name) if as_revisions else (f"{repo_id}-{name}", None) for name in models}
    if as_revisions:
        places["main"] = (repo_id, None)
    for repo, revision in places.values():  # before any work
        check_repo_id(repo)
        check_ref(revision, "the branch of the model")
    check_license(license)
    check_formats(formats)
    options = {"processor": processor, "plots": plots, "draw_plots": draw_plots, "license": license, "formats": formats}
    options |= {"about": about, "example": example}
    first, published = next(iter(models)), published or {}
    with tempfile.TemporaryDirectory() as temporary:
        folder, cards = Path(temporary) / "family" if folder is None else Path(folder), {}
        with complete_folder(folder) as root:
            for name, (repo, revision) in places.items():
                model = name if name in models else first
                more = {"published": published.get(model), "revision": revision}
                cards[name] = write_folder(models[model], root / name, repo, results, **more, **options)
            for name, card in cards.items():
                card.links = links_between(cards, places)
                write_card(card, root / name)
        if dry_run:
            return None
        done, options = {}, {"private": private, "overwrite": overwrite, "token": token, "kind": kind_of(models[first])}
        for name, (repo, revision) in places.items():
            message = commit_message or f"Publish {cards[name].name}"
            done[name] = upload(folder / name, repo, message, revision=revision, **options)
    if collection is not None:
        collect(collection, [where.repo_id for where in done.values()], private=bool(private), token=token)
    return done


def kind_of(model) -> RepoKind:
    """Return what tells a repository with models like `model` from others."""
    model_type = model.config.model_type
    words = MODEL.words if model_type == MODEL.mark[1] else f"a model of type {model_type}"
    return replace(MODEL, words=words, mark=("model_type", model_type))


def links_between(cards: dict[str, ModelCard], places: dict[str, tuple[str, str | None]]) -> dict[str, str] | None:
    """Return the addresses of the models of a family, by their names in the results; `None` without results."""
    links = {}
    for name, card in cards.items():
        repo, revision = places[name]
        if card.published is not None and revision != "main":
            links.setdefault(
                card.published, f"https://huggingface.co/{repo}" + (f"/tree/{revision}" if revision else "")
            )
    return links or None


def check_destination(dry_run: bool, folder: str | Path | None, private: bool | None) -> None:
    """Raise `ValueError` for a dry run that would keep nothing, or if nobody said who may see the repository."""
    if dry_run and folder is None:
        raise ValueError("dry_run writes the files and stops: say where with folder=<new folder>.")
    if not dry_run:
        check_private(private)


def collect(title: str, repos: list[str], private: bool, token: str | bool | None) -> None:
    """Put repositories of one namespace into a collection, which is created if there is none of this title."""
    api, namespace = HfApi(token=token), repos[0].split("/")[0]
    try:
        collection = repeat(lambda: api.create_collection(title, namespace=namespace, private=private, exists_ok=True))
        for repo in dict.fromkeys(repos):
            repeat(partial(api.add_collection_item, collection.slug, repo, "model", exists_ok=True))
    except HTTPError as error:
        note = f"The models are published, the collection {title!r} is not complete: publish again to complete it."
        if isinstance(error, HfHubHTTPError):
            error.append_to_message("\n" + note)
            raise
        raise ConnectionError(f"{note} ({type(error).__name__}: {error})") from error
