"""The figures hold what they are given: points are read back from the SVG."""

import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
import torch

matplotlib = pytest.importorskip("matplotlib", reason="plots need the extra 'plot'")

from repvgg_hf.analysis.plots import plot_accuracy, plot_kernel_histogram  # noqa: E402

SVG = "{http://www.w3.org/2000/svg}"
ROWS = [
    {"label": "float", "top1": 82.0, "bits_per_weight": 32.0, "bytes": 8_000_000},
    {"label": "cluster, channel", "top1": 81.0, "bits_per_weight": 4.2, "bytes": 1_060_000},
    {"label": "cluster, channel", "top1": 75.5, "bits_per_weight": 3.1, "bytes": 790_000},
    {"label": "cluster, channel", "top1": 81.9, "bits_per_weight": 8.9, "bytes": 2_200_000},
    {"label": "uniform & <tensor>", "top1": 40.0, "bits_per_weight": 4.0, "bytes": 1_000_000},
    {"label": "uniform & <tensor>", "top1": 81.5, "bits_per_weight": 8.0, "bytes": 2_000_000},
]
# in the figure's order: the better at its fewest bits first
LINES = {
    "cluster, channel": [ROWS[2], ROWS[1], ROWS[3]],
    "uniform & <tensor>": ROWS[4:],
}


def read(path) -> ElementTree.Element:
    return ElementTree.fromstring(path.read_text(encoding="utf-8"))


def texts(root) -> list[str]:
    return ["".join(element.itertext()) for element in root.iter(f"{SVG}text")]


def element(root, name: str) -> ElementTree.Element:
    return next(found for found in root.iter() if found.get("id") == name)


def markers(root, index: int) -> list[tuple[float, float]]:
    """Where a line's points are, in the figure's units."""
    return [(float(use.get("x")), float(use.get("y"))) for use in element(root, f"line-{index}").iter(f"{SVG}use")]


def assert_proportional(places: list[float], values: list[float]):
    """Places are a linear function of values."""
    slope = (places[-1] - places[0]) / (values[-1] - values[0])
    for place, value in zip(places, values):
        assert place == pytest.approx(places[0] + slope * (value - values[0]), abs=1e-3)


@pytest.mark.parametrize("x", ["bits", "bytes"])
def test_points_are_where_they_belong(tmp_path, x):
    plot_accuracy(ROWS, tmp_path / "figure.v1", x=x, title="Digits")
    assert (tmp_path / "figure.v1.png").read_bytes().startswith(b"\x89PNG")
    root = read(tmp_path / "figure.v1.svg")
    assert {"float", *LINES, "Digits", "top-1 (%)"} <= set(texts(root))
    found = [markers(root, index) for index in range(2)]
    assert [len(points) for points in found] == [3, 2]
    horizontal, vertical = zip(*(point for points in found for point in points))
    rows = [row for line in LINES.values() for row in line]
    assert_proportional(vertical, [row["top1"] for row in rows])
    assert vertical[0] < vertical[3]  # SVG counts from the top: 75.5 is above 40
    sizes = [row["bits_per_weight"] if x == "bits" else math.log(row["bytes"]) for row in rows]
    assert_proportional(horizontal, sizes)
    dashed = next(element(root, "float").iter(f"{SVG}path"))
    assert "stroke-dasharray" in dashed.get("style")
    height = float(re.match(r"M \S+ (\S+)", dashed.get("d"))[1])
    assert_proportional([vertical[0], vertical[3], height], [75.5, 40.0, 82.0])


def test_bytes_are_named_on_the_axis(tmp_path):
    plot_accuracy(ROWS, tmp_path / "figure", x="bytes")
    assert {"1 MB", "1.5 MB", "2 MB"} <= set(texts(read(tmp_path / "figure.svg")))


def test_axis_begins_where_asked(tmp_path):
    plot_accuracy(ROWS, tmp_path / "figure", lowest=75)
    ticks = [float(text) for text in texts(read(tmp_path / "figure.svg")) if re.fullmatch(r"[\d.]+", text)]
    assert 75 in ticks and not {40, 50, 60, 70} & set(ticks)


def test_many_lines_fit_into_the_legend(tmp_path):
    rows = [row | {"label": f"method {index}"} for index in range(40) for row in ROWS[1:2]]
    plot_accuracy(rows, tmp_path / "figure")
    root = read(tmp_path / "figure.svg")
    height = float(root.get("viewBox").split()[3])
    labels = [found for found in root.iter(f"{SVG}text") if "method" in "".join(found.itertext())]
    assert len(labels) == 40
    for label in labels:
        place = re.search(r"translate\(\S+ (\S+)\)", label.get("transform", "")) or [None, label.get("y")]
        assert 0 < float(place[1]) < height


@pytest.mark.parametrize("label", ["costs $5 or $x_{", "$a$", '<b> & "c"', "50 % \\alpha"])
def test_labels_are_no_formulas(tmp_path, label):
    plot_accuracy([ROWS[0], ROWS[1] | {"label": label}, ROWS[2] | {"label": "_" + label}], tmp_path / "figure")
    assert texts(read(tmp_path / "figure.svg")).count(label) == 2
    plot_kernel_histogram({label: torch.randn(99)}, tmp_path / "kernels")
    assert any(text.startswith(label) for text in texts(read(tmp_path / "kernels.svg")))


def test_styles_tell_lines_apart(tmp_path):
    rows = [row | {"label": f"method {index}"} for index in range(14) for row in ROWS[3:]]
    plot_accuracy(rows, tmp_path / "figure")
    root = read(tmp_path / "figure.svg")
    styles = {next(element(root, f"line-{index}").iter(f"{SVG}path")).get("style") for index in range(14)}
    assert len(styles) == 14


def luminance(color: str) -> float:
    """Relative luminance of `#rrggbb`, as WCAG defines it."""
    shares = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colors_follow_the_dark_mode_of_the_system(tmp_path):
    """Every color of the figure that is not readable on a dark background has another one there."""
    rows = [row | {"label": f"method {index}"} for index in range(7) for row in ROWS[3:]]
    plot_accuracy([ROWS[0], *rows, ROWS[1] | {"mark": "published"}], tmp_path / "figure", x="bytes")
    text = (tmp_path / "figure.svg").read_text()
    rules = text.split("prefers-color-scheme: dark")[1].split("</style>")[0]
    dark = dict(re.findall(r'"stroke: (#\w+)"\]\s*{ stroke: (#\w+) !important', rules))
    background = re.search(r'"fill: #ffffff"\] { fill: (#\w+)', rules)[1]
    strokes = set(re.findall(r'style="[^"]*stroke: (#\w+)', text)) - {"#dddddd"}  # the grid, which stays faint
    assert len(strokes) >= 8 and "#000000" in strokes
    for stroke in strokes:
        contrast = (luminance(dark.get(stroke, stroke)) + 0.05) / (luminance(background) + 0.05)
        assert contrast > 4, stroke
    assert re.search(r"text { fill: #e6edf3 }", rules)
    root = read(tmp_path / "figure.svg")
    assert len(list(element(root, "mark-published").iter(f"{SVG}use"))) == 1
    assert len(list(element(root, "float-point").iter(f"{SVG}use"))) == 1


def test_same_bytes_each_time_whatever_the_users_style(tmp_path):
    def draw(name: str) -> list[bytes]:
        for x in ("bits", "bytes"):
            plot_accuracy(ROWS, tmp_path / name / x, x=x)
        generator = torch.Generator().manual_seed(0)
        plot_kernel_histogram({"BN": torch.randn(99, generator=generator)}, tmp_path / name / "kernels")
        return [path.read_bytes() for path in sorted((tmp_path / name).iterdir())]

    first = draw("first")
    before = matplotlib.rcParams.copy()
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 9, "axes.facecolor": "black"}):
        second = draw("second")
    assert len(first) == 6 and first == second
    assert dict(matplotlib.rcParams.copy()) == dict(before)  # a copy: looking at the backend would choose one


def test_pyplot_and_its_backend_are_left_alone(tmp_path):
    code = f"""
import sys
from repvgg_hf.analysis.plots import plot_accuracy
assert "matplotlib" not in sys.modules
plot_accuracy({ROWS!r}, {str(tmp_path / "figure")!r})
assert "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": "loss"}, "x must be one of bits, bytes, got 'loss'"),
        ({"lowest": 83}, "lowest must be below the best top-1, 82.0, got 83"),
        ({"results": []}, "no quantized model"),
        ({"results": ROWS[:1]}, "no quantized model"),
        ({"results": [{"label": "a", "top1": 50}]}, r"results\[0\] has no 'bits_per_weight'"),
        ({"results": [ROWS[0], ROWS[1] | {"top1": float("nan")}]}, r"results\[1\] \(cluster, channel\) has top1=nan"),
        ({"results": [ROWS[1] | {"top1": 101}]}, r"top1=101, which must be from 0 to 100"),
        ({"results": [ROWS[1] | {"bits_per_weight": 0.0}]}, "bits_per_weight=0.0, which must be positive"),
        ({"results": [ROWS[1] | {"bytes": float("inf")}], "x": "bytes"}, "bytes=inf"),
        ({"path": "figure.png"}, "'figure.png'.*leave out the suffix"),
    ],
)
def test_bad_results(tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        plot_accuracy(**({"results": ROWS, "path": "figure"} | change))
    assert not list(tmp_path.iterdir())


def test_missing_matplotlib_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'repvgg-hf\[plot\]'"):
        plot_accuracy(ROWS, tmp_path / "figure")


def test_kernel_histogram_counts_standardized_entries(tmp_path):
    """Two kernels of other widths and places are counted as one; each step is as high as numpy's count says."""
    base = torch.repeat_interleave(torch.tensor([-1.0, 0.0, 0.9, 2.1]), torch.tensor([50, 120, 60, 7]))
    kernels = [base.view(1, -1, 1, 1), 100 * base + 3]
    plot_kernel_histogram({"BN": kernels, "other": base}, tmp_path / "kernels")
    root = read(tmp_path / "kernels.svg")
    standard = ((base - base.mean()) / base.std(correction=0)).double()
    assert {"entries", f"BN, largest {standard.abs().max():.0f}"} <= set(texts(root))

    counts = [2 * count for count in standard.mul(2).floor().unique(return_counts=True)[1].tolist()]
    path = next(element(root, "line-0").iter(f"{SVG}path")).get("d")
    heights = [float(y) for _, y in re.findall(r"[ML] (\S+) (\S+)", path)]
    drawn = sorted({round(y, 4) for y in heights})[: len(counts)]  # tallest first; the rest falls below the axis
    assert_proportional(drawn, [math.log(count) for count in sorted(counts, reverse=True)])


@pytest.mark.parametrize(
    "kernels, message",
    [
        ({}, "kernels is empty"),
        ({"BN": []}, r"kernels\['BN'\] is empty"),
        ({"BN": [torch.randn(3), torch.ones(4)]}, "Kernel 1 of 'BN'.*all the same"),
        ({"BN": torch.tensor([1.0, float("nan")])}, "Kernel 0 of 'BN'.*NaN"),
        ({"BN": torch.empty(0)}, "Kernel 0 of 'BN' has no entries"),
    ],
)
def test_bad_kernels(tmp_path, kernels, message):
    with pytest.raises(ValueError, match=message):
        plot_kernel_histogram(kernels, tmp_path / "kernels")
    assert not list(tmp_path.iterdir())
