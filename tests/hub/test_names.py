"""Names under which a publication is sent: branches and tags, licenses, images and results that are none."""

import subprocess

import pytest
from loopback_store import PUBLIC, WRITE_TOKEN

from repvgg_hf.hub import ModelCard, Results, publish, publish_family
from repvgg_hf.hub.names import LICENSES, check_license, check_ref
from repvgg_hf.hub.recipe_figures import benchmark_latency, command_of, qat_models, quantize_models

REFS = [
    "w4", "v1.0", "exp/w4", "a-b_c", 'quote"d', "it's", "ünïcode", "a@b", "{x}", "(x)", "a{", "@a", "a.lockx", "x.b/c",
    "../../x", "a..b", "/x", "x/", "a//b", ".x", "a/.x", "x.lock", "a.lock/b", "x.", "-x", "a@{b", "a b", "a~b",
    "a^b", "a:b", "a?b", "a*b", "a[b", "a\\b", "a\tb", "a\nb", "a\x7fb", "", "..",
]  # fmt: skip


@pytest.mark.parametrize("name", REFS, ids=ascii)
def test_the_same_names_as_git(name):
    accepted = subprocess.run(["git", "check-ref-format", "--branch", name], capture_output=True).returncode == 0
    if accepted:
        check_ref(name, "revision")
    else:
        with pytest.raises(ValueError, match="^revision .* can't be a branch or tag"):
            check_ref(name, "revision")


@pytest.mark.parametrize("name", ["../../x", "/x", "a b", "x.lock"])
def test_a_family_stays_in_its_folder(hub, tiny_model, processor, tmp_path, name):
    models = {"float": tiny_model(), name: tiny_model(4)}
    root = tmp_path / "a" / "b" / "family"
    options = {"processor": processor, **PUBLIC, "folder": root}
    with pytest.raises(ValueError, match="the branch of the model .* can't be a branch or tag"):
        publish_family(models, "org/tiny", as_revisions=True, **options)
    if name != "x.lock":  # which may be the end of a repository's name
        with pytest.raises(ValueError, match="repo_id"):
            publish_family(models, "org/tiny", **options)
    assert hub.requests == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argument", ["revision", "tag"])
def test_branch_and_tag_are_checked_before_anything_is_sent(hub, tiny_model, processor, argument):
    with pytest.raises(ValueError, match=rf"{argument} '../x' can't be a branch or tag with '\.\.' at 0"):
        publish(tiny_model(4), "org/tiny", processor=processor, **PUBLIC, **{argument: "../x"})
    assert hub.requests == []


@pytest.mark.parametrize("revision", ['quote"d', "it's", 'a"); print("b'.replace(" ", ""), "ünïcode", "#{x}"])
def test_the_cards_code_is_python_for_any_revision(tiny_config, revision):
    fields = {"repo_id": "org/tiny", "config": tiny_config().to_dict(), "image_size": 8, "license": "mit"}
    card = ModelCard(**fields, revision=revision)
    code = str(card).split("```python\n")[1].split("```")[0]
    seen = []
    lines = [line for line in code.splitlines() if not line.startswith(("from ", "print"))]
    exec("\n".join(lines), {"pipeline": lambda *args, **kwargs: seen.append(kwargs)})
    assert seen == [{"revision": revision, "trust_remote_code": True}]


@pytest.mark.parametrize("license", ["apache-2.0", "mit", "cc-by-nc-4.0", "other"])
def test_known_licenses(license):
    check_license(license)


@pytest.mark.parametrize(
    ("license", "hint"),
    [("Apache-2.0", "did you mean apache-2.0"), ("apache2", "did you mean apache-2.0"), ("GPLv3", "gpl-3.0"),
     ("mine, all mine", "such as apache-2.0"), ("", "such as apache-2.0")],
)  # fmt: skip
def test_unknown_licenses_are_refused_before_anything_is_sent(hub, tiny_model, processor, license, hint, tmp_path):
    options = {"processor": processor, **PUBLIC, "license": license, "folder": tmp_path / "new"}
    for send in (
        lambda: publish(tiny_model(4), "org/tiny", **options),
        lambda: publish_family({"w4": tiny_model(4)}, "org/tiny", **options),
    ):
        with pytest.raises(ValueError, match=f"license '{license}' is none of the Hub's identifiers: .*{hint}"):
            send()
    assert hub.requests == [] and list(tmp_path.iterdir()) == []


def test_licenses_are_spelled_as_the_hub_does():
    assert len(set(LICENSES)) == len(LICENSES) > 70 and all(
        name == name.lower() and " " not in name for name in LICENSES
    )


@pytest.mark.parametrize("name", ["with space.png", "brack[ets].png", "paren(s).png", "ünï 100%.png", "<tag>.png"])
def test_images_of_any_name_are_shown(tiny_model, processor, results, tmp_path, name):
    """The link in the card is that of the file, by a Markdown parser."""
    from urllib.parse import unquote

    from markdown_it import MarkdownIt

    from repvgg_hf.hub import write_folder

    (tmp_path / name).write_bytes(b"\x89PNG")
    options = {"processor": processor, "license": "mit", "draw_plots": False, "published": "cluster-w4"}
    options["plots"] = {"A [plot] (of mine)": tmp_path / name}
    write_folder(tiny_model(4), tmp_path / "repo", "org/tiny", results, **options)
    tokens = MarkdownIt("commonmark").parse((tmp_path / "repo" / "README.md").read_text(encoding="utf-8"))
    images = [child for token in tokens for child in token.children or [] if child.type == "image"]
    (path,) = [unquote(image.attrs["src"]) for image in images]
    assert path == f"plots/{name}" and (tmp_path / "repo" / path).exists()


ROW = {"method": "float", "bits": 32, "granularity": None, "channel_scale": None, "activation_bits": None}


@pytest.mark.parametrize(
    ("read", "record", "message"),
    [
        (quantize_models, {}, "FILE lacks the list 'results'"),
        (quantize_models, {"results": {}}, "FILE lacks the list 'results'"),
        (quantize_models, {"results": [3]}, r"FILE.results\[0\] is 3, not an object"),
        (quantize_models, {"results": [ROW]}, r"FILE.results\[0\] lacks 'stage'"),
        (quantize_models, {"results": [ROW | {"stage": 4}]}, r"results\[0\].stage must be a str, got 4"),
        (qat_models, {"results": [{"stage": "fused"}]}, r"FILE.results\[0\] lacks 'method'"),
        (command_of, {"results": []}, "FILE lacks 'command'"),
        (command_of, {"command": "python x"}, "FILE.command must be a list, got 'python x'"),
        (benchmark_latency, {}, "FILE.benchmark is None"),
        (benchmark_latency, {"benchmark": "inference"}, "inference` wrote"),
        (benchmark_latency, {"benchmark": "inference", "runs": []}, "FILE lacks 'versions'"),
        (benchmark_latency, {"benchmark": "inference", "versions": {}, "cpu": "x", "threads": 2, "device": "cpu",
                             "runs": [{"setting": "a"}]}, r"FILE.runs\[0\] lacks 'medians'"),
    ],
)  # fmt: skip
def test_files_that_are_no_results_are_named(read, record, message):
    with pytest.raises(ValueError, match=message) as raised:
        read(record, "FILE")
    assert "give " in str(raised.value)


def test_tokens_do_not_get_into_a_card(results):
    token = "hf_" + "a1B2" * 9
    with pytest.raises(
        ValueError, match=r"results.commands\[0\] has what looks like an access token, hf_a1B\.\.\."
    ) as raised:
        Results(results.dataset, results.models, commands=[f"python train.py --hub_token {token}"])
    assert token not in str(raised.value)


def test_interrupted_saves_are_not_uploaded(hub, tiny_model, processor, monkeypatch, tmp_path):
    """Should a folder that is uploaded have what a killed save left."""
    from repvgg_hf.hub import write_folder
    from repvgg_hf.hub.upload import upload

    write_folder(tiny_model(4), tmp_path / "repo", "org/tiny", processor=processor, license="mit")
    stale = tmp_path / "repo" / ".saving-host-1-abc"
    stale.mkdir()
    (stale / "model.safetensors").write_bytes(b"half")
    upload(tmp_path / "repo", "org/tiny", "Publish", token=WRITE_TOKEN)
    files = hub.files("org/tiny")
    assert "model.safetensors" in files and not any(".saving-" in name for name in files)
