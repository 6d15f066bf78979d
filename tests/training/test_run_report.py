"""The report of a training: what is counted, the page and the picture."""

import re
from dataclasses import replace

import numpy as np
import pytest

from repvgg_hf.training import report_files
from repvgg_hf.training.report_page import page_of, ticks
from repvgg_hf.training.report_picture import draw_report
from repvgg_hf.training.run_report import MATRIX_CLASSES, Evaluation, make_report, most_confused

HISTORY = [
    {"step": 6, "epoch": 1.0, "loss": 1.5},
    {"step": 6, "epoch": 1.0, "eval_top1": 40.0},
    {"step": 12, "epoch": 2.0, "loss": 0.5},
    {"step": 12, "epoch": 2.0, "train_runtime": 3.0},
]


@pytest.fixture
def report(split_of):
    """Of five ants and five bees, of which the second and third are taken for others, and the last with most doubt."""
    logits = np.array(
        [[9, 0], [0, 2], [0, 4], [9, 0], [9, 0], [0, 9], [0, 9], [0, 9], [0, 9], [1, 0]], dtype=np.float32
    )
    return make_report("Right & <well>", ["a fact"], HISTORY, split_of(10, (60, 90)), logits)


def test_what_it_counts(report):
    assert report.course == [Evaluation(1.0, 1.5, 40.0), Evaluation(2.0, 0.5, None)]
    assert report.matrix.tolist() == [[3, 2], [1, 4]]
    assert [(guess.label, guess.guess, guess.file) for guess in report.worst] == [
        ("ant", "bee", "ant/2.png"), ("ant", "bee", "ant/1.png"), ("bee", "ant", "bee/4.png"),
    ]  # fmt: skip
    assert [guess.confidence for guess in report.worst] == pytest.approx([1 / (1 + np.exp(-x)) for x in (4, 2, 1)])
    assert [(pair.label, pair.guess, pair.count, pair.images, len(pair.guesses)) for pair in report.pairs] == [
        ("ant", "bee", 2, 5, 2), ("bee", "ant", 1, 5, 1),
    ]  # fmt: skip
    assert report.worst[0].image.size == (128, 85)


def test_the_page_needs_no_other_file(report):
    page = page_of(report)
    assert "Right &amp; &lt;well&gt;" in page and "ant taken for bee: 2 of 5" in page
    assert set(re.findall(r'(?:src|href)="([^,"]*)', page)) == {"data:image/jpeg;base64"}
    assert "http" not in page and "@import" not in page and "prefers-color-scheme: dark" in page


def test_the_picture(report, tmp_path, recwarn):
    pytest.importorskip("matplotlib")
    report = replace(report, classes=["蚂蚁", "bee"])  # which matplotlib's font lacks
    for name in ("a.png", "b.png"):
        draw_report(report, tmp_path / name)
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["a.png", "b.png"]


def test_without_errors_there_are_no_pictures(split_of, tmp_path):
    report = make_report("All right", [], [], split_of(4), np.array([[1, 0], [1, 0], [0, 1], [0, 1]], dtype=np.float32))
    assert "None: all validation images are right." in page_of(report) and "<img" not in page_of(report)
    pytest.importorskip("matplotlib")
    draw_report(report, tmp_path / "report.png")


def test_of_many_classes_the_most_confused_ones_are_shown():
    matrix = np.diag(np.full(MATRIX_CLASSES + 5, 9))
    matrix[3, 14] = matrix[16, 2] = 4
    chosen = most_confused(matrix)
    assert len(chosen) == MATRIX_CLASSES and {2, 3, 14, 16} <= set(chosen) and chosen == sorted(chosen)


def test_without_matplotlib_there_is_a_page(monkeypatch, split_of, tmp_path):
    def missing(report, path):
        raise ImportError

    class Trainer:
        class args:
            output_dir = tmp_path

        class state:
            log_history, global_step = HISTORY, 12

        class model:
            num_parameters = staticmethod(lambda: 1234)

    monkeypatch.setattr(report_files, "draw_report", missing)
    line = report_files.write_report(Trainer, split_of(4), np.eye(4, 2, dtype=np.float32), 50.0)
    assert line == f"Report: {tmp_path}/report.html; report.png needs matplotlib (pip install 'repvgg-hf[plot]')."
    assert "1,234 parameters, 12 steps" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(("low", "high"), [(0.3, 2.1), (100, 100), (33.3, 99.7), (0, 0.5), (0, 600)])
def test_ticks_are_round_and_around_the_values(low, high):
    found = ticks(low, high)
    steps = np.diff(found)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 7 and np.allclose(steps, steps[0])
    assert f"{steps[0]:.0e}"[0] in "125"
