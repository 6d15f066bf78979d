"""Figures on cards: which there are, that they show the results, and that drawing again gives the same bytes."""

import json
import re
import runpy
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from loopback_store import PUBLIC
from PIL import Image

from repvgg_hf import RepVGGForImageClassification
from repvgg_hf.analysis import kernel_histogram
from repvgg_hf.hub import HistogramResult, ModelCard, Results, publish, write_folder
from repvgg_hf.hub.branch_kernels import branch_histograms
from repvgg_hf.hub.drawing import draw_figures

pytest.importorskip("matplotlib", reason="figures need the extra 'plot'")
CARDS = sorted((Path(__file__).parents[2] / "model_cards").glob("repvgg-*.json"))
SVG = "{http://www.w3.org/2000/svg}"
KINDS = ("accuracy", "kernels")


@pytest.fixture
def full_results(results, tiny_config) -> Results:
    """`results` with histograms of a network with branches."""
    histograms = branch_histograms(RepVGGForImageClassification(tiny_config()))
    return replace(results, histograms=[HistogramResult(**entry) for entry in histograms])


def texts(path: Path) -> set[str]:
    return {"".join(text.itertext()) for text in ElementTree.parse(path).iter(f"{SVG}text")}


def points(path: Path) -> list[tuple[float, float]]:
    uses = ElementTree.parse(path).iter(f"{SVG}use")
    return sorted((float(use.get("x")), float(use.get("y"))) for use in uses if use.get("x"))


@pytest.fixture
def write(tiny_model, processor, tmp_path):
    """`write(results, ...)`: the folder of a 4 bit model."""

    def run(results: Results, **options) -> Path:
        options = {"processor": processor, "license": "mit", "published": "cluster-w4"} | options
        write_folder(tiny_model(4), tmp_path / "repo", "org/tiny", results, **options)
        return tmp_path / "repo"

    return run


def test_card_shows_both_figures(write, full_results):
    folder = write(full_results)
    card = (folder / "README.md").read_text()
    assert re.findall(r"!\[[^]]+\]\((.+?)\)", card) == [f"plots/tiny-{kind}.svg" for kind in KINDS]
    labels = {"float", "uniform, per tensor", "cluster, per tensor with channel scale", "top-1 (%)", "published"}
    assert labels <= texts(folder / "plots/tiny-accuracy.svg")
    shown = texts(folder / "plots/tiny-kernels.svg")
    for name in ("OABN, before fusing (3x3 branch)", "OABN, fused"):
        assert any(text.startswith(name) for text in shown)


def test_nothing_is_drawn_without_figures(write, results):
    folder = write(replace(results, models=results.models[::2]))  # one quantized model: nothing to compare
    assert not (folder / "plots").exists() and "![" not in (folder / "README.md").read_text()


def test_another_process_draws_the_same_bytes(write, full_results, monkeypatch):
    folder = write(full_results)
    before = {kind: (folder / f"plots/tiny-{kind}.svg").read_bytes() for kind in KINDS}
    for path in folder.glob("plots/*"):
        path.unlink()
    command = [sys.executable, "-m", "repvgg_hf.hub", str(folder / "card.json")]
    monkeypatch.setattr(sys, "argv", [*command[2:], "--text_only"])
    runpy.run_module("repvgg_hf.hub", run_name="__main__")
    assert (folder / "card.md").read_bytes() == (folder / "README.md").read_bytes()
    assert not list(folder.glob("plots/*"))
    subprocess.run(command, check=True, timeout=120)
    assert {kind: (folder / f"plots/tiny-{kind}.svg").read_bytes() for kind in KINDS} == before


def test_publishing_again_uploads_no_figure(hub, tiny_model, processor, full_results):
    def push(**options):
        options |= {"processor": processor, "published": "cluster-w4", **PUBLIC}
        return publish(tiny_model(4), "org/tiny", full_results, **options)

    assert push().changed and "plots/tiny-kernels.svg" in hub.files("org/tiny")
    hub.requests.clear()
    assert not push().changed
    assert not [entry for entry in hub.requests if entry.method == "PUT" or "/commit/" in entry.path]
    assert push(draw_plots=False).changed  # a choice to leave them out takes them off the Hub, too
    assert not [path for path in hub.files("org/tiny") if path.startswith("plots/")]


def test_without_matplotlib_the_choice_is_the_users(write, full_results, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'repvgg-hf\[plot\]'.*draw_plots=False.*--draw_plots False"):
        write(full_results)
    folder = write(full_results, draw_plots=False)
    assert "![" not in (folder / "README.md").read_text() and not (folder / "plots").exists()


def test_an_example_is_shown_with_what_the_model_says(write, results, tiny_model, processor, picture):
    folder = write(results, example=picture, draw_plots=False)
    with torch.no_grad():
        logits = tiny_model(4)(**processor(Image.open(picture), return_tensors="pt")).logits[0]
    example = json.loads((folder / "card.json").read_text())["example"]
    assert example["labels"][0] == f"LABEL_{logits.argmax()}" and len(example["labels"]) == 3
    assert example["probabilities"][0] == pytest.approx(logits.softmax(0).max().item(), abs=1e-4)
    assert "![LABEL" in (folder / "README.md").read_text() and Image.open(folder / example["path"]).size == (40, 30)
    with pytest.raises(ValueError, match="The example .*README.md is no picture that PIL reads"):
        write_folder(tiny_model(4), folder.with_name("new"), "org/tiny", processor=processor, license="mit",
                     example=folder / "README.md")  # fmt: skip


def test_own_images_beside_them(write, results, tmp_path):
    for name in ("photo.png", "tiny-accuracy.svg"):
        (tmp_path / name).write_bytes(b"image")
    with pytest.raises(ValueError, match="'Mine' is the second one called tiny-accuracy.svg: rename"):
        write(results, plots={"Mine": tmp_path / "tiny-accuracy.svg"})
    folder = write(results, plots={"A [photo]": tmp_path / "photo.png"})
    assert (folder / "plots/photo.png").read_bytes() == b"image"
    assert r"![A \[photo\]](plots/photo.png)" in (folder / "README.md").read_text()
    assert json.loads((folder / "card.json").read_text())["plots"].keys() == {
        "plots/photo.png", "plots/tiny-accuracy.svg",
    }  # fmt: skip


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_committed_figures_are_drawn_from_the_committed_json(path, tmp_path):
    """To a few pixels: versions of matplotlib measure text differently."""
    card = ModelCard.from_json(path)
    drawn = draw_figures(card.results, card.repo_id, tmp_path, published=card.published)
    assert drawn == card.plots, "the card does not show all that its JSON has the figures for"
    for name in drawn:
        committed, new = path.parent / name, tmp_path / name
        assert committed.stat().st_size < 50_000 and texts(committed) == texts(new)
        np.testing.assert_allclose(points(committed), points(new), atol=3)


def test_histogram_counts_as_numpy_does(generator):
    kernels = [3 + 0.1 * torch.randn(7, 5, generator=generator), torch.randn(40, generator=generator)]
    histogram = kernel_histogram(kernels)
    values = np.concatenate([(k.double().numpy() - k.double().numpy().mean()).ravel() / k.double().numpy().std()
                             for k in kernels])  # fmt: skip
    first, counts = histogram["first"], histogram["counts"]
    expected, _ = np.histogram(values, np.arange(first, first + len(counts) + 1) * 0.5)
    assert expected.tolist() == counts and sum(counts) == 75 and counts[0] and counts[-1]
    assert histogram["largest"] == pytest.approx(np.abs(values).max())


def test_fusing_a_large_identity_shows_in_the_histogram(tiny_config):
    model = RepVGGForImageClassification(tiny_config(oabn=False))
    for name, parameter in model.named_parameters():
        if "identity.norm.weight" in name:
            parameter.data.fill_(30.0)
    before, after = branch_histograms(model)
    assert before["name"] == "BN, before fusing (3x3 branch)" and before["largest"] < 6 < 8 < after["largest"]
    assert sum(before["counts"]) == sum(after["counts"])
    model.reparameterize()
    assert branch_histograms(model, before=False)[0]["counts"] == after["counts"]
