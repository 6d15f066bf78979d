"""A Hub on this machine that speaks the real one's HTTP interface, as far as `huggingface_hub` uses it for models.

Repositories live in memory. `hub.requests` lists what was asked, `hub.fail(...)` makes an answer go wrong.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from loopback_store import (
    READ_TOKEN,
    REPO,
    REVISION,
    ROUTES,
    WRITE_TOKEN,
    Blob,
    Commit,
    Fault,
    Refusal,
    Repo,
    Request,
    is_lfs,
    route,
)

DATE = "2026-01-01T00:00:00.000Z"


class LoopbackHub:
    """`with LoopbackHub() as hub:` serves on `hub.url` until the end of the block."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.collections: dict[str, dict] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.before_commit = None  # called once when a commit arrives, before it is looked at
        self.lock = threading.RLock()

    def __enter__(self) -> "LoopbackHub":
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def fail(self, method: str, path: str, action, times: int = 1) -> None:
        """Answer the next `times` requests whose path matches the expression by `action`: a status code,
        `"reset"` (in the middle of a body), `"truncate"` (half of a whole body) or `"tamper"` (one bit turned)."""
        self.faults.append(Fault(method, path, action, times))

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return {path: blob.content for path, blob in self.repos[repo_id].find(revision).files.items()}

    def put(self, repo_id: str, files: dict[str, bytes], title: str = "by another") -> str:
        """Commit `files` to main without HTTP, as another publisher would; returns the commit."""
        repo = self.repos.get(repo_id) or self.create(repo_id)
        head = repo.find("main")
        changed = {path: Blob(content, is_lfs(path, content)) for path, content in files.items()}
        return repo.commit("main", head.files | changed, title, head.oid).oid

    def create(self, repo_id: str, private: bool = False) -> Repo:
        repo = self.repos[repo_id] = Repo(private)
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        repo.commit("main", {".gitattributes": Blob(attributes, False)}, "initial commit", None)
        return repo


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *arguments):
        pass

    def handle_any(self):
        self.answered, self.sent, self.body = None, 0, b""
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        fault = self.take_fault(url.path)
        length = int(self.headers.get("Content-Length", 0))
        if fault == "reset" and length:
            self.rfile.read(length // 2)
            return self.reset(url.path)
        self.body = self.rfile.read(length) if "Transfer-Encoding" not in self.headers else self.read_chunks()
        self.damage = fault if isinstance(fault, str) else None
        try:
            self.answer(*self.respond(url.path, fault))
        except (ConnectionError, BrokenPipeError):
            self.close_connection = True
        self.hub.requests.append(Request(self.command, url.path, self.answered, len(self.body), self.sent))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def respond(self, path: str, fault) -> tuple:
        try:
            if isinstance(fault, int):
                raise Refusal(fault, "on purpose", **{"Retry-After": "0"})
            self.check_token()
            return self.dispatch(path)
        except Refusal as refusal:
            return refusal.status, refusal.body, refusal.headers

    def read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def take_fault(self, path: str):
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.times and fault.method == self.command and re.search(fault.path, path):
                    fault.times -= 1
                    return fault.action

    def reset(self, path: str):
        self.drop()
        self.hub.requests.append(Request(self.command, path, None, 0, self.sent))

    def drop(self):
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def check_token(self):
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        if self.token not in (None, WRITE_TOKEN, READ_TOKEN):
            raise Refusal(401, "Invalid credentials in Authorization header")

    def dispatch(self, path: str) -> tuple:
        # a Space is kept as `spaces/<repo_id>`, and has the addresses of a model but for this
        self.kept_as = "spaces/" if re.match("/(api/)?spaces/", path) else ""
        path = path.replace("/api/spaces/", "/api/models/").removeprefix("/spaces")
        for method, pattern, function in ROUTES:
            match = pattern.fullmatch(path)
            if match and method == ("GET" if self.command == "HEAD" else self.command):
                found = {key: unquote(value) for key, value in match.groupdict().items() if value}
                with self.hub.lock:
                    return function(self, **found)
        raise Refusal(404, f"the loopback Hub has no {self.command} {path}")

    def answer(self, status: int, body, headers: dict | None = None):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Length": str(len(content))} | (headers or {})
        self.answered = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.damage in ("reset", "truncate"):
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.sent += len(content) // 2
            self.close_connection = True
            if self.damage == "reset":
                self.answered = None
                self.drop()
            return
        if self.damage == "tamper":
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.wfile.write(content)
        self.sent += len(content)

    def find_repo(self, repo_id: str, write: bool = False) -> Repo:
        repo = self.hub.repos.get(self.kept_as + repo_id)
        if repo is None or (repo.private and self.token is None):
            raise Refusal(401 if self.token is None else 404, "no repo", "RepoNotFound")
        if write:
            self.require_write_token()
        return repo

    def find_commit(self, repo_id: str, revision: str) -> tuple[Repo, Commit]:
        repo = self.find_repo(repo_id)
        commit = repo.find(revision)
        if commit is None:
            raise Refusal(404, "Invalid rev id", "RevisionNotFound")
        return repo, commit

    def require_write_token(self):
        if self.token is None:
            raise Refusal(401, "Invalid username or password.")
        if self.token != WRITE_TOKEN:
            raise Refusal(403, "you don't have the rights to write to this repo")

    @route("GET", "/api/whoami-v2")
    def whoami(self):
        self.require_write_token()
        return 200, {"type": "user", "name": "org", "auth": {"accessToken": {"role": "write"}}, "orgs": []}

    @route("POST", "/api/repos/create")
    def create_repo(self):
        payload = json.loads(self.body)
        self.require_write_token()
        repo_id = f"{payload.get('organization') or 'org'}/{payload['name']}"
        if payload.get("type") == "space":
            if payload.get("sdk") != "static":
                raise Refusal(400, "a Space needs an sdk")
            repo_id = f"spaces/{repo_id}"
        url = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repos:
            return 409, url | {"error": "You already created this model repo"}
        self.hub.create(repo_id, private=payload.get("visibility") == "private")
        return 200, url

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self):
        content = json.loads(self.body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            valid = isinstance(yaml.safe_load(match[1]), dict)
        except (TypeError, yaml.YAMLError) as error:
            return 400, {"errors": [{"message": str(error)}], "warnings": []}
        return (200 if valid else 400), {"errors": [], "warnings": []}

    @route("POST", f"/api/models/{REPO}/preupload/{REVISION}")
    def preupload(self, repo_id, revision):
        repo = self.find_repo(repo_id, write=True)
        files = []
        remote = (repo.find(revision) or repo.find("main")).files
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if is_lfs(file["path"], base64.b64decode(file["sample"])) else "regular"
            oid = remote[file["path"]].oid if file["path"] in remote else None
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": files}

    @route("POST", f"/{REPO}.git/info/lfs/objects/batch")
    def lfs_batch(self, repo_id):
        self.find_repo(repo_id, write=True)
        objects = []
        for item in json.loads(self.body)["objects"]:
            if item["oid"] not in self.hub.lfs:
                actions = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
                item["actions"] = actions | {"verify": {"href": f"{self.hub.url}/lfs/{item['oid']}/verify"}}
            objects.append(item)
        return 200, {"transfer": "basic", "objects": objects}

    @route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "the content is not what was announced")
        self.hub.lfs[oid] = self.body
        return 200, b""

    @route("POST", "/lfs/(?P<oid>[0-9a-f]{64})/verify")
    def lfs_verify(self, oid):
        return (200 if len(self.hub.lfs.get(oid, b"")) == json.loads(self.body)["size"] else 404), {}

    @route("POST", f"/api/models/{REPO}/commit/{REVISION}")
    def commit(self, repo_id, revision):
        self.find_repo(repo_id, write=True)
        if self.hub.before_commit:
            action, self.hub.before_commit = self.hub.before_commit, None
            action()
        repo, head = self.find_commit(repo_id, revision)
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        if header["value"].get("parentCommit", head.oid) != head.oid:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for line in operations:
            path = line["value"]["path"]
            if line["key"] == "file":
                files[path] = Blob(base64.b64decode(line["value"]["content"]), False)
            elif line["key"] == "lfsFile":
                if line["value"]["oid"] not in self.hub.lfs:
                    raise Refusal(400, f"{path} was not uploaded")
                files[path] = Blob(self.hub.lfs[line["value"]["oid"]], True)
            elif line["key"] == "deletedFile":
                if files.pop(path, None) is None:
                    raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            else:
                raise Refusal(400, f"unknown operation {line['key']}")
        pull_request = self.query.get("create_pr") == "1"
        ref = f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in repo.refs)}" if pull_request else revision
        done = repo.commit(ref, files, header["value"]["summary"], head.oid)
        number = ref.rpartition("/")[2]
        return 200, {
            "success": True,
            "commitOid": done.oid,
            "commitUrl": f"{self.hub.url}/{repo_id}/commit/{done.oid}",
            "pullRequestUrl": f"{self.hub.url}/{repo_id}/discussions/{number}" if pull_request else None,
        }

    @route("GET", f"/api/models/{REPO}(/revision/{REVISION})?")
    def model_info(self, repo_id, revision="main"):
        repo, commit = self.find_commit(repo_id, revision)
        siblings = [{"rfilename": path} for path in commit.files]
        return 200, {
            "id": repo_id,
            "modelId": repo_id,
            "sha": commit.oid,
            "private": repo.private,
            "siblings": siblings,
        }

    @route("GET", f"/api/models/{REPO}/tree/{REVISION}")
    def tree(self, repo_id, revision):
        _, commit = self.find_commit(repo_id, revision)
        entries = []
        for path, blob in commit.files.items():
            entry = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid}
            if blob.lfs:
                entry["lfs"] = {"oid": blob.oid, "size": len(blob.content), "pointerSize": 130}
            entries.append(entry)
        return 200, entries

    @route("GET", f"/api/models/{REPO}/refs")
    def refs(self, repo_id):
        repo = self.find_repo(repo_id)
        entries = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
        for name, oid in repo.refs.items():
            kind = "tags" if name in repo.tags else "pullRequests" if name.startswith("refs/") else "branches"
            entries[kind].append({"name": name, "ref": name, "targetCommit": oid})
        return 200, entries

    @route("GET", f"/api/models/{REPO}/commits/{REVISION}")
    def commits(self, repo_id, revision):
        repo = self.find_repo(repo_id)
        entries, commit = [], repo.find(revision)
        while commit:
            entry = {"id": commit.oid, "title": commit.title, "message": "", "date": DATE, "authors": []}
            entries.append(entry)
            commit = repo.commits.get(commit.parent)
        return 200, entries

    @route("POST", f"/api/models/{REPO}/(?P<kind>tag|branch)/{REVISION}")
    def create_ref(self, repo_id, kind, revision):
        repo = self.find_repo(repo_id, write=True)
        payload = json.loads(self.body or b"{}")
        name = payload["tag"] if kind == "tag" else revision
        if name in repo.refs:
            return 409, {"error": f"{name} exists"}
        repo.refs[name] = repo.find(revision if kind == "tag" else payload.get("startingPoint", "main")).oid
        if kind == "tag":
            repo.tags.add(name)
        return 200, {}

    @route("POST", "/api/collections")
    def create_collection(self):
        payload = json.loads(self.body)
        self.require_write_token()
        slug = f"{payload['namespace']}/{re.sub('[^a-z0-9]+', '-', payload['title'].lower())}-{'0' * 24}"
        if slug in self.hub.collections:
            return 409, {"error": "exists", "slug": slug}
        self.hub.collections[slug] = {
            "slug": slug, "title": payload["title"], "owner": {"name": payload["namespace"]}, "items": [],
            "lastUpdated": DATE, "position": 0, "private": bool(payload.get("private")), "theme": "blue", "upvotes": 0,
        }  # fmt: skip
        return 200, self.hub.collections[slug]

    @route("GET", "/api/collections/(?P<slug>[^/]+/[^/]+)")
    def get_collection(self, slug):
        return 200, self.hub.collections[slug]

    @route("POST", "/api/collections/(?P<slug>[^/]+/[^/]+)/items")
    def add_collection_item(self, slug):
        item, items = json.loads(self.body)["item"], self.hub.collections[slug]["items"]
        if item["id"] in [present["id"] for present in items]:
            return 409, {"error": "already there"}
        items.append({"_id": str(len(items)), "position": len(items), **item})
        return 200, self.hub.collections[slug]

    @route("GET", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)")
    def resolve(self, repo_id, revision, path):
        _, commit = self.find_commit(repo_id, revision)
        headers = {"X-Repo-Commit": commit.oid}
        blob = commit.files.get(path)
        if blob is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", **headers)
        headers |= {"ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-ETag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.content))}
        if requested := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, last = int(requested[1]), int(requested[2] or len(blob.content) - 1)
            headers["Content-Range"] = f"bytes {start}-{last}/{len(blob.content)}"
            return 206, blob.content[start : last + 1], headers
        return 200, blob.content, headers
