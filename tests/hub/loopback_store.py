"""What the loopback Hub keeps, repositories as commits of files, and the table of its routes."""

import hashlib
import re
from dataclasses import dataclass, field

WRITE_TOKEN, READ_TOKEN = "hf_" + "w" * 34, "hf_" + "r" * 34
PUBLIC = {"token": WRITE_TOKEN, "license": "mit", "private": False}  # what publishing asks for


@dataclass
class Blob:
    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """What the Hub compares: SHA-256 of an LFS file, git's SHA-1 of any other."""
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Commit:
    oid: str
    files: dict[str, Blob]
    title: str
    parent: str | None


@dataclass
class Repo:
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # branches, tags and pull requests to commits
    tags: set[str] = field(default_factory=set)

    def commit(self, ref: str, files: dict[str, Blob], title: str, parent: str | None) -> Commit:
        oid = hashlib.sha1(f"{len(self.commits)} {ref} {title}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, files, title, parent)
        self.refs[ref] = oid
        return self.commits[oid]

    def find(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))


@dataclass
class Fault:
    method: str
    path: str  # a regular expression
    action: object  # a status code, "reset", "truncate" or "tamper"
    times: int


@dataclass
class Request:
    method: str
    path: str
    status: int | None  # None: the connection was reset
    received: int  # bytes of the bodies
    sent: int


def is_lfs(path: str, sample: bytes) -> bool:
    return path.endswith(".safetensors") or b"\0" in sample[:512]


ROUTES = []


def route(method: str, pattern: str):
    def register(function):
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


REPO, REVISION = r"(?P<repo_id>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"


class Refusal(Exception):
    """An answer that is no success: status, reason, and the code by which the client knows what is missing."""

    def __init__(self, status: int, reason: str, code: str | None = None, **headers):
        self.status, self.body, self.headers = status, {"error": reason}, headers
        self.headers |= {"X-Error-Code": code} if code else {"X-Error-Message": reason}
