"""Checking what a publication is sent under: repository, branches and tags, license, who sees it."""

import difflib
import re

from huggingface_hub.utils import validate_repo_id

# identifiers that the Hub knows, as its documentation lists them: https://huggingface.co/docs/hub/repositories-licenses
LICENSES = (
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m "
    "afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 "
    "cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 "
    "cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 "
    "cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl "
    "gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr "
    "mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr "
    "deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 "
    "grok2-community gemma unknown other"
).split()

# what `git check-ref-format --branch` refuses
_BAD_IN_REF = re.compile(
    r"[\x00-\x20\x7f~^:?*\[\\]"  # control characters, space, and what git gives a meaning
    r"|\.\.|@\{|//|/\.|\.lock(/|$)"
    r"|^[-./]|[./]$|^@$"
)


def check_repo_id(repo_id: str) -> None:
    """Raise `ValueError` unless `repo_id` is `namespace/name` with characters that the Hub allows."""
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(f"repo_id {repo_id!r} can't be one: {error} Give 'namespace/name'.") from error
    if repo_id.count("/") != 1:
        raise ValueError(
            f"repo_id must be 'namespace/name', got {repo_id!r}: put your user name or organization first."
        )


def check_ref(name: str | None, argument: str) -> None:
    """Raise `ValueError` naming the `argument` if `name` can't be a branch or a tag of a git repository."""
    if name is None:
        return
    bad = _BAD_IN_REF.search(name)
    if not name or bad is not None:
        found = f" with {bad[0]!r} at {bad.start()}" if bad is not None else ""
        raise ValueError(
            f"{argument} {name!r} can't be a branch or tag{found}: give letters, digits, '-', '_' and '.', such as "
            "'w4' or 'v1.0'."
        )


def check_private(private: bool | None) -> None:
    """Raise `ValueError` if nobody said who may see a repository."""
    if private is None:
        raise ValueError(
            "private is not given: say private=False for a repository that everybody sees, or private=True for one "
            "that only you and your organization do."
        )


def check_license(license: str) -> None:
    """Raise `ValueError` unless `license` is an identifier that the Hub knows."""
    if not isinstance(license, str):
        raise ValueError(f"license must be one of the Hub's identifiers, such as apache-2.0 or mit, got {license!r}.")
    if license not in LICENSES:
        similar = difflib.get_close_matches(license.lower(), LICENSES, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(similar)}?" if similar else "such as apache-2.0 or mit."
        raise ValueError(
            f"license {license!r} is none of the Hub's identifiers: {hint} The list is at "
            "https://huggingface.co/docs/hub/repositories-licenses; 'other' is for one that is not there."
        )
