"""Publishing on a loopback Hub: what arrives, what a second time sends, and what is left after a fault."""

import copy
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from loopback_store import PUBLIC, READ_TOKEN, WRITE_TOKEN

from repvgg_hf.hub import publish, publish_family
from repvgg_hf.hub.upload import _STALE

REPO = "org/tiny"
WRITES = ("POST", "PUT", "DELETE")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)


@pytest.fixture
def push(tiny_model, processor):
    """`push(...)` publishes a new 4 bit model as org/tiny."""

    def run(bits=4, repo_id=REPO, **options):
        return publish(tiny_model(bits), repo_id, **({"processor": processor, **PUBLIC} | options))

    return run


def uploads(hub) -> list:
    """Requests that changed something or sent a file."""
    return [entry for entry in hub.requests if entry.method == "PUT" or "/commit/" in entry.path]


def is_whole(files: dict) -> bool:
    return {"model.safetensors", "config.json", "README.md", "modeling_repvgg.py"} <= files.keys()


def is_untouched(hub, revision="main") -> bool:
    return REPO not in hub.repos or list(hub.files(REPO, revision)) == [".gitattributes"]


def test_all_files_in_one_commit(hub, push, results):
    where = push(results=results)
    repo = hub.repos[REPO]
    assert len(repo.commits) == 2 and where.commit == repo.refs["main"] and where.changed
    files = hub.files(REPO)
    assert is_whole(files) and "preprocessor_config.json" in files
    config = json.loads(files["config.json"])
    for name in ("AutoConfig", "AutoModel", "AutoModelForImageClassification", "AutoBackbone"):
        module, _, class_name = config["auto_map"][name].rpartition(".")
        assert f"class {class_name}(" in files[f"{module}.py"].decode()


def test_again_uploads_nothing(hub, push):
    first = push()
    hub.requests.clear()
    second = push()
    assert uploads(hub) == [] and not second.changed and second.commit == first.commit
    assert len(hub.repos[REPO].commits) == 2


def test_other_bits_replace_only_what_differs(hub, push):
    push()
    code_before = hub.files(REPO)["modeling_repvgg.py"]
    hub.put(REPO, {"model-00001-of-00002.safetensors": b"old", "notes.txt": b"mine", "plots/old.png": b"\0"})
    hub.requests.clear()
    push(bits=8)
    (commit,) = [entry for entry in hub.requests if "/commit/" in entry.path]
    assert commit.received < 20_000  # the runtime code alone is larger
    files = hub.files(REPO)
    assert files["modeling_repvgg.py"] == code_before and files["notes.txt"] == b"mine"
    assert "model-00001-of-00002.safetensors" not in files and "plots/old.png" not in files


def test_private_revision_tag_and_pull_request(hub, push):
    push(private=True, revision="w4", tag="v1")
    repo = hub.repos[REPO]
    assert repo.private and repo.refs["v1"] == repo.refs["w4"] and is_whole(hub.files(REPO, "w4"))
    assert is_untouched(hub)
    push(private=True, revision="w4", tag="v1")  # nothing new: the tag stays
    with pytest.raises(ValueError, match="has a tag 'v1' on other files.*delete_tag"):
        push(bits=8, private=True, revision="w4", tag="v1")
    proposed = push(private=True, create_pr=True)
    assert proposed.pull_request.endswith("/discussions/1") and is_untouched(hub)
    assert is_whole(hub.files(REPO, "refs/pr/1"))
    assert json.loads(hub.files(REPO, "w4")["config.json"])["quantization_config"]["bits"] == 4


def test_dry_run_writes_the_folder_and_stops(hub, push, tmp_path):
    assert push(folder=tmp_path / "repo", dry_run=True, token=None) is None
    assert hub.requests == [] and is_whole({path.name: path for path in (tmp_path / "repo").iterdir()})
    with pytest.raises(ValueError, match="is not empty: give a new folder"):
        push(folder=tmp_path / "repo", dry_run=True)


@pytest.fixture
def push_family(tiny_model, processor):
    """`push_family(...)` publishes a float and a 4 bit model."""

    def run(**options):
        models = {"float": tiny_model(), "w4": tiny_model(4)}
        return publish_family(models, REPO, **({"processor": processor, **PUBLIC} | options))

    return run


@pytest.mark.parametrize("as_revisions, names", [(False, ["float", "w4"]), (True, ["float", "main", "w4"])])
def test_dry_run_of_a_family_writes_what_would_be_uploaded(hub, push_family, tmp_path, as_revisions, names):
    root = tmp_path / "family"
    assert push_family(folder=root, dry_run=True, token=None, as_revisions=as_revisions) is None
    assert hub.requests == [] and sorted(path.name for path in root.iterdir()) == names
    push_family(as_revisions=as_revisions)
    for name in names:
        written = {path.relative_to(root / name).as_posix(): path for path in (root / name).rglob("*")}
        place = (REPO, name) if as_revisions else (f"{REPO}-{name}", "main")
        files = hub.files(*place)
        del files[".gitattributes"]
        assert files == {path: written[path].read_bytes() for path in files} and is_whole(files)
    with pytest.raises(ValueError, match="family is not empty: give a new folder"):
        push_family(folder=root, dry_run=True)
    with pytest.raises(ValueError, match="dry_run writes the files and stops: say where"):
        push_family(dry_run=True)


@pytest.mark.parametrize("as_revisions", [False, True])
def test_cards_of_a_family_link_to_each_other(push_family, results, tmp_path, as_revisions):
    root, names = tmp_path / "family", {"float": "float", "w4": "cluster-w4"}
    push_family(folder=root, dry_run=True, as_revisions=as_revisions, results=results, published=names)
    addresses = {name: f"{REPO}/tree/{name}" if as_revisions else f"{REPO}-{name}" for name in names}
    assert f"| [float](https://huggingface.co/{addresses['float']}) |" in (root / "w4" / "README.md").read_text()
    card = (root / "float" / "README.md").read_text()
    assert "| **float\N{NO-BREAK SPACE}(this)** |" in card
    assert f"| [4](https://huggingface.co/{addresses['w4']}) |" in card


def test_nothing_is_sent_before_all_of_a_family_is_written(hub, push_family, results, tmp_path):
    """The second model has no measurement."""
    results.models = results.models[:1]
    with pytest.raises(ValueError, match="method cluster, 4 bits and .* it has none"):
        push_family(results=results, published={"float": "float"}, folder=tmp_path / "family")
    assert hub.requests == [] and list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="call the model 'main' something else"):
        publish_family({"main": None}, REPO, processor=None, as_revisions=True, **PUBLIC)


def test_a_fault_in_the_middle_of_a_family_leaves_main_as_it_was(hub, push_family):
    """The first model is on its branch, complete; main follows when the others are there, the next time."""
    hub.fail("POST", "/commit/w4", 500, times=1000)
    with pytest.raises(HfHubHTTPError, match="w4 is as it was.*publish again later"):
        push_family(as_revisions=True)
    assert is_whole(hub.files(REPO, "float")) and is_untouched(hub) and is_untouched(hub, "w4")
    hub.faults.clear()
    where = push_family(as_revisions=True)
    assert [name for name, place in where.items() if place.changed] == ["w4", "main"]
    assert is_whole(hub.files(REPO)) and is_whole(hub.files(REPO, "w4"))


@pytest.mark.parametrize(
    "method, path, action, times",
    [
        ("PUT", "/lfs/", "reset", 1),
        ("PUT", "/lfs/", 500, 2),
        ("POST", "/lfs/.*/verify", 429, 1),
        ("POST", "/preupload/", 500, 1),
        ("POST", "/objects/batch", 429, 1),
        ("POST", "/commit/", 500, 2),
        ("POST", "/commit/", 429, 2),
        ("POST", "/commit/", "reset", 1),
        ("POST", "/repos/create", 500, 1),
        ("GET", "/tree/", 500, 1),
    ],
)
def test_passing_faults_are_overcome(hub, push, method, path, action, times):
    hub.fail(method, path, action, times)
    push()
    assert hub.faults[0].times == 0, "the fault did not happen"
    assert is_whole(hub.files(REPO)) and len(hub.repos[REPO].commits) == 2


def test_lost_answer_makes_no_second_commit(hub, push):
    """The Hub committed, but the client never heard of it."""

    def lose_the_answer():
        handler_answer = hub.server.RequestHandlerClass.answer

        def answer(self, status, body, headers=None):
            type(self).answer = handler_answer
            self.damage = "reset"
            handler_answer(self, status, body, headers)

        hub.server.RequestHandlerClass.answer = answer

    hub.before_commit = lose_the_answer
    where = push()
    assert where.changed and len(hub.repos[REPO].commits) == 2


@pytest.mark.parametrize("method, path, action", [("PUT", "/lfs/", 500), ("POST", "/commit/", "reset")])
def test_lasting_faults_leave_main_as_it_was(hub, push, method, path, action):
    hub.fail(method, path, action, times=1000)
    with pytest.raises((ConnectionError, HfHubHTTPError), match="main is as it was.*[Pp]ublish again"):
        push()
    assert is_untouched(hub)
    hub.faults.clear()
    push()
    assert is_whole(hub.files(REPO))


@pytest.mark.parametrize("token, status, fix", [
    ("hf_" + "x" * 34, 401, "log in with `hf auth login`"),
    (READ_TOKEN, 403, "use one with write permission for org"),
])  # fmt: skip
def test_refused_token_is_not_printed(hub, push, capfd, caplog, token, status, fix):
    with pytest.raises(HfHubHTTPError, match=fix) as caught:
        push(token=token)
    assert caught.value.response.status_code == status and "main is as it was" in str(caught.value)
    shown = "".join(str(part) for part in (caught.getrepr(style="long"), *capfd.readouterr(), caplog.text))
    assert token not in shown and is_untouched(hub)


def test_no_write_permission_on_an_existing_repo(hub, push):
    hub.create(REPO)
    with pytest.raises(HfHubHTTPError, match="use one with write permission for org"):
        push(token=READ_TOKEN)
    assert is_untouched(hub)


def test_no_token_at_all(hub, push):
    with pytest.raises(HfHubHTTPError, match="main is as it was. The token is missing.*hf auth login"):
        push(token=False)
    assert is_untouched(hub)


@pytest.mark.parametrize("action, times", [(500, 1), ("reset", 1)])
def test_collection_survives_passing_faults(hub, push_family, action, times):
    for path in ("/api/collections$", "/items$"):
        hub.fail("POST", path, action, times)
    push_family(collection="Tiny")
    assert not any(fault.times for fault in hub.faults), "a fault did not happen"
    (collection,) = hub.collections.values()
    assert [item["id"] for item in collection["items"]] == [f"{REPO}-float", f"{REPO}-w4"]


@pytest.mark.parametrize("action", [500, "reset"])
def test_collection_is_completed_the_next_time(hub, push_family, action):
    hub.fail("POST", "/items$", action, times=1000)
    with pytest.raises((HfHubHTTPError, ConnectionError), match="are published, the collection 'Tiny' is not"):
        push_family(collection="Tiny")
    assert is_whole(hub.files(f"{REPO}-w4"))
    hub.faults.clear()
    where = push_family(collection="Tiny")
    assert not any(place.changed for place in where.values())
    (collection,) = hub.collections.values()
    assert len(collection["items"]) == 2


@pytest.mark.parametrize("files", [{"data.csv": b"1,2"}, {"config.json": b'{"model_type": "bert"}'}])
def test_other_content_is_refused(hub, push, files):
    hub.put(REPO, files)
    with pytest.raises(ValueError, match="holds something else than a RepVGG model.*overwrite=True"):
        push()
    assert hub.files(REPO).keys() == {".gitattributes", *files}
    push(overwrite=True)
    assert is_whole(hub.files(REPO)) and files.keys() <= hub.files(REPO).keys()


def test_private_repo_is_not_filled_as_public(hub, push):
    push(private=True)
    with pytest.raises(ValueError, match="is private and private=False was asked for.*or say private=True"):
        push(private=False)


def test_public_repo_is_not_filled_as_private(hub, push):
    hub.create(REPO)
    with pytest.raises(ValueError, match="is public and private=True was asked for.*update_repo_settings"):
        push(private=True)
    assert is_untouched(hub)


def test_two_publishers_at_once(hub, push):
    """The second one to commit loses, and says so; main is all of the first."""
    push()
    hub.before_commit = lambda: hub.put(REPO, {"README.md": b"theirs"})
    with pytest.raises(HfHubHTTPError, match="Someone else changed main in the meantime.*publish again"):
        push(bits=8)
    files = hub.files(REPO)
    assert files["README.md"] == b"theirs" and json.loads(files["config.json"])["quantization_config"]["bits"] == 4
    push(bits=8)
    assert json.loads(hub.files(REPO)["config.json"])["quantization_config"]["bits"] == 8


def test_two_publishers_in_two_threads(hub, tiny_model, processor):
    """Whoever loses hears of it; main holds one model whole, and the loser's second attempt works."""
    barrier = threading.Barrier(2)

    def push(bits):
        barrier.wait()
        try:
            return publish(tiny_model(bits), REPO, processor=processor, **PUBLIC)
        except HfHubHTTPError as error:
            assert "Someone else changed main in the meantime" in str(error)

    for bits in (4, 8):
        tiny_model(bits)  # made before, so that only publishing is at once
    with ThreadPoolExecutor(2) as pool:
        places = list(pool.map(push, (4, 8)))
    assert any(places)
    repo = hub.repos[REPO]
    for commit in list(repo.commits.values())[1:]:
        config = json.loads(commit.files["config.json"].content)
        bits = config["quantization_config"]["bits"]
        expected = publish(tiny_model(bits), f"{REPO}-{bits}", processor=processor, **PUBLIC).repo_id
        assert commit.files["model.safetensors"].content == hub.files(expected)["model.safetensors"]
    barrier = threading.Barrier(1)
    assert push(8) and json.loads(hub.files(REPO)["config.json"])["quantization_config"]["bits"] == 8


@pytest.mark.parametrize(
    "repo_id", ["tiny", "org/tiny/4", "org/ti ny", "org/..", "", "org/tiny--4", "https://hf.co/org/t"]
)
def test_bad_repo_id(hub, push, repo_id):
    with pytest.raises(ValueError, match="namespace/name"):
        push(repo_id=repo_id)
    assert hub.requests == []


def test_bad_arguments_before_anything_is_sent(hub, push, tiny_model, processor, results):
    with pytest.raises(ValueError, match="dry_run writes the files and stops: say where"):
        push(dry_run=True)
    with pytest.raises(ValueError, match="private is not given: say private=False for a repository that everybody"):
        push(private=None)
    with pytest.raises(ValueError, match="leave out revision and tag"):
        push(create_pr=True, tag="v1")
    with pytest.raises(ValueError, match="processor must make square images"):
        push(processor=object())
    with pytest.raises(ValueError, match=r"one model with method cluster, 8 bits and \d+ bytes.*it has none"):
        push(bits=8, results=results)
    model = tiny_model()
    with pytest.raises(ValueError, match="takes a RepVGGForImageClassification, got RepVGGModel"):
        publish(model.repvgg, REPO, processor=processor, **PUBLIC)
    with pytest.raises(ValueError, match=r"call quantize\(\) before publishing"):
        publish(copy.deepcopy(model).prepare_qat(bits=4), REPO, processor=processor, **PUBLIC)
    assert hub.requests == []


def test_network_is_forbidden_offline(push, monkeypatch):
    with pytest.raises(OSError, match="offline mode is enabled"):
        push()


def test_stale_files_are_only_ours():
    assert [name for name in (
        "model.safetensors", "model-00001-of-00003.safetensors", "model.safetensors.index.json", "plots/a.png",
    ) if not _STALE.fullmatch(name)] == []  # fmt: skip
    assert not any(map(_STALE.fullmatch, ("onnx/model.onnx", "adapter_model.safetensors", "my_model.py")))


def test_hub_speaks_what_the_client_expects(hub, push):
    """The loopback Hub itself, through other calls of the real client."""
    push()
    api = HfApi(token=WRITE_TOKEN)
    assert api.repo_exists(REPO) and not api.repo_exists("org/none")
    assert api.file_exists(REPO, "config.json") and not api.file_exists(REPO, "none.json")
    assert re.fullmatch("[0-9a-f]{40}", api.model_info(REPO).sha)
    assert api.whoami()["name"] == "org"
    assert len(api.list_repo_commits(REPO)) == 2
