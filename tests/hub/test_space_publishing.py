"""Publishing a page as a Space on a loopback Hub: commits, refusals, and what is left after a fault."""

import json

import pytest
from huggingface_hub.errors import HfHubHTTPError
from loopback_store import PUBLIC, READ_TOKEN

from repvgg_hf.hub import publish_space

REPO = "org/page"
KEPT = f"spaces/{REPO}"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)


@pytest.fixture
def push(family, package):
    def run(models=None, **options):
        options = {"onnxruntime_web": package, **PUBLIC} | options
        return publish_space(REPO, family if models is None else models, **options)

    return run


def test_published_in_one_commit_and_again_not_at_all(hub, push, package, picture):
    first = push(images={"A cat": picture}, title="Bits")
    assert first.changed and len(hub.repos[KEPT].commits) == 2 and list(hub.repos) == [KEPT]
    files = hub.files(KEPT)
    assert {"README.md", "index.html", "page.js", "space.json", "models/w4.onnx", "images/1.jpg"} <= files.keys()
    assert (
        files["onnxruntime/ort-wasm-simd-threaded.wasm"]
        == (package / "dist" / "ort-wasm-simd-threaded.wasm").read_bytes()
    )
    assert json.loads(files["space.json"])["title"] == "Bits"
    hub.requests.clear()
    second = push(images={"A cat": picture}, title="Bits")
    assert not second.changed and second.commit == first.commit and len(hub.repos[KEPT].commits) == 2
    assert [entry for entry in hub.requests if entry.method == "PUT" or "/commit/" in entry.path] == []


def test_what_an_earlier_page_had_goes(hub, push, family, picture):
    push(images={"A cat": picture})
    hub.put(KEPT, hub.files(KEPT) | {"notes.md": b"mine"})
    push({"w4": family["w4"]})
    files = hub.files(KEPT)
    assert "models/w2.onnx" not in files and "images/1.jpg" not in files
    assert {"models/w4.onnx", "notes.md"} <= files.keys()


def test_other_content_is_refused(hub, push):
    hub.put(KEPT, {"app.py": b"import gradio"})
    with pytest.raises(ValueError, match=r"holds something else than a Space of these pages \(app.py\)"):
        push()
    assert "index.html" not in hub.files(KEPT)
    push(overwrite=True)
    assert {"app.py", "index.html"} <= hub.files(KEPT).keys()


def test_a_page_of_someone_else_is_refused_and_the_hubs_own_template_is_not(hub, push):
    repo = hub.create(KEPT)
    head = repo.find("main")
    head.files |= dict.fromkeys(("index.html", "style.css", "README.md"), head.files[".gitattributes"])
    push()  # of the first commit, which the Hub makes
    assert "space.json" in hub.files(KEPT)
    hub.repos.clear()
    hub.put(KEPT, {"index.html": b"mine"})
    with pytest.raises(ValueError, match=r"something else than a Space of these pages \(index.html\)"):
        push()


def test_a_public_space_is_not_taken_for_a_private_one(hub, push):
    push()
    with pytest.raises(ValueError, match=r"private=True, repo_type='space'\)"):
        push(private=True)
    with pytest.raises(ValueError, match="private is not given: say private=False"):
        push(private=None)


def test_after_a_fault_the_space_is_as_it_was(hub, push, family):
    push({"w4": family["w4"]})
    before = hub.files(KEPT)
    hub.fail("POST", "/commit/", 500, times=9)
    with pytest.raises(HfHubHTTPError, match="main is as it was"):
        push()
    assert hub.files(KEPT) == before
    hub.faults.clear()
    push()
    assert "models/w2.onnx" in hub.files(KEPT)


def test_a_token_without_permission_is_named(hub, push):
    with pytest.raises(HfHubHTTPError, match="may not write to org/page"):
        push(token=READ_TOKEN)


def test_nothing_is_sent_for_bad_arguments(hub, push):
    with pytest.raises(ValueError, match="npm install"):
        push(onnxruntime_web="elsewhere")
    assert hub.requests == []
