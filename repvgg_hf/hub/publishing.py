"""Put models on the Hub: one folder, one commit, nothing half-done."""

import tempfile
from pathlib import Path

from huggingface_hub import HfApi

from .card import check_repo_id
from .folder import write_folder
from .results import Results
from .upload import Published, upload


def publish(
    model,
    repo_id: str,
    results: Results | None = None,
    *,
    processor,
    published: str | None = None,
    plots: dict[str, str | Path] | None = None,
    license: str = "apache-2.0",
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    create_pr: bool = False,
    overwrite: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
    folder: str | Path | None = None,
    dry_run: bool = False,
) -> Published | None:
    """Publish a classifier on the Hub in one commit: weights, configuration, processor, card, results, runtime code.

    Publishing the same again uploads nothing and makes no commit.

    Args:
        model: a `RepVGGForImageClassification`, float or quantised.
        repo_id: `"namespace/name"`; the repository is created if there is none.
        results: what was measured; the card shows these figures and no others.
        processor: the image processor that the model was evaluated with.
        published: name in `results.models` of this model; default the one with its method, bits and bytes.
        plots: image files by caption, for the card (such as those of `repvgg_hf.analysis`).
        license: of the weights, as the Hub spells it.
        private: for a new repository. With `True` an existing public one is refused.
        revision: branch to publish to, created (empty) if there is none; default `main`.
        tag: to put on the commit.
        create_pr: open a pull request instead of changing the branch.
        overwrite: publish into a repository with other content than a RepVGG model. Its other files stay.
        commit_message: default "Publish <name>".
        token: as in `huggingface_hub`; default the one that you logged in with.
        folder: keep a copy of the files in this new folder.
        dry_run: write `folder` and stop.

    Raises `ValueError` for a bad argument, before anything is sent, and for a repository that is not ours to change;
    `HfHubHTTPError` if the Hub refuses; `ConnectionError` if it can't be reached. The branch is then as before, and
    publishing again sends only what is missing.
    """
    if dry_run and folder is None:
        raise ValueError("dry_run writes the files and stops: say where with folder=<new folder>.")
    if create_pr and (revision or tag):
        raise ValueError("create_pr proposes a change of main: leave out revision and tag.")
    options = {"processor": processor, "published": published, "revision": revision, "plots": plots, "license": license}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "repo" if folder is None else Path(folder)
        card = write_folder(model, folder, repo_id, results, **options)
        if dry_run:
            return None
        options = {"private": private, "revision": revision, "tag": tag, "create_pr": create_pr, "overwrite": overwrite}
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
    private: bool | None = None,
    token: str | bool | None = None,
    **options,
) -> dict[str, Published]:
    """Publish models that differ in their weights, such as `{"float": ..., "w8": ..., "w4": ...}`; returns where.

    Each goes into a repository of its own, `<repo_id>-<name>`, or with `as_revisions` into a branch `<name>` of
    `repo_id`, whose `main` gets the first model last, when the others are there.

    Args:
        collection: title of a collection to put the repositories into, created if there is none.
        published: name in `results.models`, by name of the model.
        options: more arguments of [`publish`].
    """
    for name in models:  # before the first upload
        check_repo_id(f"{repo_id}-{name}")
    shared = {"processor": processor, "private": private, "token": token, **options}
    done, published = {}, published or {}
    for name, model in models.items():
        place = {"repo_id": repo_id, "revision": name} if as_revisions else {"repo_id": f"{repo_id}-{name}"}
        done[name] = publish(model, results=results, published=published.get(name), **place, **shared)
    if as_revisions:
        first = next(iter(models))
        done["main"] = publish(models[first], repo_id, results, published=published.get(first), **shared)
    if collection is not None:
        api = HfApi(token=token)
        namespace = repo_id.split("/")[0]
        slug = api.create_collection(collection, namespace=namespace, private=bool(private), exists_ok=True).slug
        for repo in dict.fromkeys(where.repo_id for where in done.values()):
            api.add_collection_item(slug, repo, "model", exists_ok=True)
    return done
