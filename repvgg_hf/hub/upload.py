"""Making a branch on the Hub hold the files of a folder: in one commit, or not at all."""

import json
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HTTPError
from huggingface_hub.utils import sha

from ..interop.formats import FORMATS
from ..runtime.configuration_repvgg import RepVGGConfig
from ..runtime.saving import PREFIX
from .names import check_ref, check_repo_id

ATTEMPTS = 5  # of a commit, when the Hub or the network fails for the moment
TRANSIENT = (429, 500, 502, 503, 504)
# what an earlier publication may have left and this one would not replace: weights under other names, older plots
_STALE = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|plots/.*")
_CARD = "card.json"  # which lists the files for engines that were published with a model


@dataclass(frozen=True)
class RepoKind:
    """A kind of repository that is published, and how one of ours is told from other people's.

    Attributes:
        type (`str`): the type, as the Hub calls it.
        words (`str`): what one of ours holds.
        marker (`str`): JSON file that each of ours has.
        mark (`tuple[str, str]`): key and value in it.
        stale (`re.Pattern`): files that go when the new ones don't have them.
        creation (`dict`): more arguments of `create_repo`.
        template (`frozenset[str]`): files that the Hub itself puts into a new repository.
    """

    type: str
    words: str
    marker: str
    mark: tuple[str, str]
    stale: re.Pattern
    creation: dict = field(default_factory=dict)
    template: frozenset[str] = frozenset()


MODEL = RepoKind("model", "a RepVGG model", "config.json", ("model_type", RepVGGConfig.model_type), _STALE)


@dataclass
class Published:
    """The place on the Hub where a model is.

    Attributes:
        repo_id (`str`): the repository.
        revision (`str`): the branch.
        commit (`str`): the commit that holds the files.
        changed (`bool`): whether the commit is a new one.
        pull_request (`str`, *optional*): address of the pull request, if one was opened.
    """

    repo_id: str
    revision: str
    commit: str
    changed: bool
    pull_request: str | None = None


def upload(
    folder: Path,
    repo_id: str,
    commit_message: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    create_pr: bool = False,
    overwrite: bool = False,
    token: str | bool | None = None,
    kind: RepoKind = MODEL,
) -> Published:
    """Make a branch of a repository of some `kind` hold the files of `folder`, in one commit.

    The other arguments, and what is raised, are those of [`~repvgg_hf.hub.publish`].
    """
    check_repo_id(repo_id)
    check_ref(revision, "revision")
    check_ref(tag, "tag")
    api, branch, repo_type = HfApi(token=token), revision or "main", kind.type
    commit = None
    try:
        repeat(lambda: api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True, **kind.creation))
        check_visibility(api, repo_id, private, repo_type)
        if branch != "main":
            repeat(lambda: create_empty_branch(api, repo_id, branch, repo_type))
        head = repeat(lambda: api.repo_info(repo_id, revision=branch, repo_type=repo_type).sha)
        if not overwrite:
            repeat(lambda: check_content(api, repo_id, head, kind))
        if tag is not None:
            changed = bool(repeat(lambda: changes(api, folder, repo_id, head, kind)))
            check_tag(api, repo_id, tag, head, changed, repo_type)
        commit, pull_request = commit_folder(api, folder, repo_id, branch, head, commit_message, create_pr, kind)
        if tag is not None:
            repeat(lambda: api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=True, repo_type=repo_type))
    except HfHubHTTPError as error:
        error.append_to_message("\n" + advice(error, repo_id, branch, commit))
        raise
    except (HTTPError, RuntimeError) as error:
        reason = error.__cause__ or error
        raise ConnectionError(
            f"Publishing to {repo_id} failed ({error} {type(reason).__name__}: {reason}). {state(branch, commit)} "
            "Publish again; files that arrived are not sent twice."
        ) from error
    return Published(repo_id, branch, commit, commit != head, pull_request)


def state(branch: str, commit: str | None) -> str:
    """Say what is on the Hub after a fault."""
    return f"{branch} is as it was." if commit is None else "The files are published, the tag is not set."


def advice(error: HfHubHTTPError, repo_id: str, branch: str, commit: str | None) -> str:
    """Say what to do about a refusal of the Hub."""
    status = error.response.status_code
    if status == 401:
        todo = "The token is missing, wrong or expired: log in with `hf auth login`, or pass another token."
    elif status == 403:
        todo = f"The token may not write to {repo_id}: use one with write permission for {repo_id.split('/')[0]}."
    elif status == 412:
        todo = f"Someone else changed {branch} in the meantime: look at their commit, then publish again."
    elif status in TRANSIENT:
        todo = f"The Hub failed {ATTEMPTS} times: publish again later; files that arrived are not sent twice."
    else:
        todo = "Publish again when the reason above is gone."
    return f"{state(branch, commit)} {todo}"


def commit_folder(
    api: HfApi, folder: Path, repo_id: str, branch: str, head: str, message: str, create_pr: bool, kind: RepoKind
) -> tuple[str, str | None]:
    """Commit the files on top of `head`, if they differ; returns (commit that holds them, address of the pull request).

    A commit names its parent, so that it can be tried again after a lost answer, and loses against another publisher
    instead of mixing files with theirs.
    """

    def attempt():
        operations = changes(api, folder, repo_id, branch, kind)
        if not operations:  # nothing new; or the commit was made and its answer was lost
            return repeat(lambda: api.repo_info(repo_id, revision=branch, repo_type=kind.type).sha), None
        info = api.create_commit(
            repo_id,
            operations,
            commit_message=message,
            revision=branch,
            parent_commit=head,
            create_pr=create_pr,
            repo_type=kind.type,
        )
        return info.oid, info.pr_url

    return attempt() if create_pr else repeat(attempt)  # a second attempt might open a second pull request


def changes(api: HfApi, folder: Path, repo_id: str, revision: str, kind: RepoKind) -> list:
    """Return the operations that turn the files of `revision` into those of `folder`; files of other kinds stay."""
    remote = {}
    for entry in api.list_repo_tree(repo_id, revision=revision, recursive=True, repo_type=kind.type):
        if hasattr(entry, "blob_id"):  # a file, not a folder
            remote[entry.path] = entry.lfs.sha256 if entry.lfs else entry.blob_id
    operations, local = [], {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    for name, path in local.items():
        if path.is_file() and not name.startswith(PREFIX):  # else of an interrupted save
            content = path.read_bytes()
            if remote.get(name) not in (sha.git_hash(content), sha.sha_fileobj(path.open("rb")).hex()):
                operations.append(CommitOperationAdd(name, path))
    gone = [name for name in remote if name not in local]
    stale = [name for name in gone if kind.stale.fullmatch(name)]
    stale += files_for_engines(api, repo_id, revision, gone, kind)
    return operations + [CommitOperationDelete(name) for name in stale]


def files_for_engines(api: HfApi, repo_id: str, revision: str, names: list[str], kind: RepoKind) -> list[str]:
    """Return those of the files `names` that an earlier publication made for engines, of its weights: its card says so.

    Other people's files in the same folders are not among them.
    """
    inside = [name for name in names if name.partition("/")[0] in FORMATS]
    if kind.type != MODEL.type or not inside:
        return []
    try:
        path = api.hf_hub_download(repo_id, _CARD, revision=revision, repo_type=kind.type)
        listed = json.loads(Path(path).read_text(encoding="utf-8")).get("files") or {}
    except (EntryNotFoundError, UnicodeDecodeError, json.JSONDecodeError):
        return []
    # an .xml has a .bin, and a package is a folder
    return [
        name
        for name in inside
        if name in listed
        or name.removesuffix(".bin") + ".xml" in listed
        or any(name.startswith(f"{one}/") for one in listed)
    ]


def repeat(function):
    """Return `function()`, called again after a pause while the Hub or the network fails for the moment."""
    for attempt in range(ATTEMPTS - 1):
        try:
            return function()
        except (HTTPError, RuntimeError) as error:  # RuntimeError: what uploading a file makes of an error
            reason = error.__cause__ if isinstance(error, RuntimeError) else error
            if isinstance(reason, HfHubHTTPError) and reason.response.status_code not in TRANSIENT:
                raise
        time.sleep(2**attempt / 2)  # 0.5, 1, 2, 4 s
    return function()


def check_visibility(api: HfApi, repo_id: str, private: bool | None, repo_type: str) -> None:
    """Raise `ValueError` if an existing repository is public and should be private, or the other way round."""
    if private is None:
        return
    found = bool(api.repo_info(repo_id, repo_type=repo_type).private)
    if found != private:
        of_type = "" if repo_type == "model" else f", repo_type={repo_type!r}"
        raise ValueError(
            f"{repo_id} is {'private' if found else 'public'} and private={private} was asked for: change that first, "
            f"with HfApi().update_repo_settings({repo_id!r}, private={private}{of_type}), or say private={found}."
        )


def create_empty_branch(api: HfApi, repo_id: str, branch: str, repo_type: str) -> None:
    """Start a branch at the repository's first commit, so that it never shows another model under this name."""
    if branch not in [entry.name for entry in api.list_repo_refs(repo_id, repo_type=repo_type).branches]:
        first = api.list_repo_commits(repo_id, repo_type=repo_type)[-1].commit_id
        api.create_branch(repo_id, branch=branch, revision=first, exist_ok=True, repo_type=repo_type)


def check_tag(api: HfApi, repo_id: str, tag: str, head: str, changed: bool, repo_type: str) -> None:
    """Raise `ValueError` if the tag exists and would have to move."""
    tags = repeat(lambda: api.list_repo_refs(repo_id, repo_type=repo_type)).tags
    there = [entry.target_commit for entry in tags if entry.name == tag]
    if there and (changed or there != [head]):
        raise ValueError(
            f"{repo_id} has a tag {tag!r} on other files: choose another tag, or remove it with "
            f"HfApi().delete_tag({repo_id!r}, tag={tag!r})."
        )


def check_content(api: HfApi, repo_id: str, head: str, kind: RepoKind) -> None:
    """Raise `ValueError` unless the commit is empty, but for what the Hub put there, or one of ours."""
    tree = api.list_repo_tree(repo_id, revision=head, repo_type=kind.type)
    names = {entry.path for entry in tree} - {".gitattributes", "README.md"}
    if not names:
        return
    if names <= kind.template and len(api.list_repo_commits(repo_id, revision=head, repo_type=kind.type)) == 1:
        return
    key, value = kind.mark
    found = None
    if kind.marker in names:
        path = api.hf_hub_download(repo_id, kind.marker, revision=head, repo_type=kind.type)
        found = json.loads(Path(path).read_text(encoding="utf-8")).get(key)
    if found != value:
        raise ValueError(
            f"{repo_id} holds something else than {kind.words} ({', '.join(sorted(names)[:5])}): choose another "
            f"repo_id, or pass overwrite=True to add {kind.words} beside these files, in place of those of the same "
            "name."
        )
