"""The study at strength: its cells, what runs and what has run, and its report."""

import json

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from scipy import stats

from repvgg_hf.recipes.studies import hold_out
from repvgg_hf.recipes.studies.cells import Cell, read_cells, run_cells
from repvgg_hf.recipes.studies.whole import WholeArguments, choose, plan
from repvgg_hf.recipes.studies.whole_report import write_report
from repvgg_hf.recipes.studies.whole_tables import Difference, Row, drops, frontier, interpolated, rows_of, summary


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of parquet files: 60 images to train on and 20 to test on, each of one gray, which is its number."""
    features = Features({"img": Image(), "label": ClassLabel(names=["even", "odd"])})
    folder = tmp_path_factory.mktemp("pictures")
    for name, numbers in (("train", range(60)), ("test", range(60, 80))):
        images = [np.full((32, 32, 3), number, np.uint8) for number in numbers]
        columns = {"img": images, "label": [number % 2 for number in numbers]}
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{name}.parquet")
    return folder


def numbers(split: Dataset) -> list[int]:
    return [np.asarray(image)[0, 0, 0].item() for image in split["img"]]


def options(pictures, folder, **more) -> list[str]:
    given = {"dataset_name": pictures, "image_column_name": "img", "held_out": 15, "output_dir": folder} | more
    return [str(part) for name, value in given.items() for part in (f"--{name}", value)]


class TestHoldOut:
    def test_every_image_is_in_one_split(self, pictures, tmp_path):
        assert hold_out.main(options(pictures, tmp_path)) == {"train": 45, "validation": 15, "test": 20}
        splits = load_dataset(str(tmp_path))
        assert isinstance(splits, DatasetDict) and set(splits) == {"train", "validation", "test"}
        assert numbers(splits["test"]) == [*range(60, 80)]
        assert sorted(numbers(splits["train"]) + numbers(splits["validation"])) == [*range(60)]
        assert splits["validation"].features["label"].names == ["even", "odd"]

    def test_the_seed_draws_them(self, pictures, tmp_path):
        drawn = []
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            hold_out.main(options(pictures, tmp_path / name, seed=seed))
            drawn.append(numbers(load_dataset(str(tmp_path / name), split="validation")))
        assert drawn[0] == drawn[1] != drawn[2]

    def test_bad_input(self, pictures, tmp_path):
        with pytest.raises(ValueError, match="held_out must be from 1 to 59, the training images less one: 60"):
            hold_out.main(options(pictures, tmp_path / "new", held_out=60))
        alone = tmp_path / "alone"
        load_dataset(str(pictures), split="train").to_parquet(alone / "train.parquet")
        with pytest.raises(ValueError, match="has the splits train: it needs train and one to test on"):
            hold_out.main(options(alone, tmp_path / "new"))
        assert not (tmp_path / "new").exists()


class TestCells:
    def cell(self, name, source, folder, needs=()):
        given = options(source, folder)
        return Cell(name, "studies.hold_out", tuple(given), needs=needs, facts={"kind": "data"})

    def test_what_has_run_is_not_run_again(self, pictures, tmp_path, capfd, monkeypatch):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        first = self.cell("a/first", pictures, "first")
        second = self.cell("a/second", pictures, "second", needs=("a/first",))
        run_cells([second, first], tmp_path, parallel=2)
        records = read_cells(tmp_path)
        assert [record["cell"] for record in records] == ["a/first", "a/second"]
        assert (tmp_path / "second" / "test.parquet").is_file() and records[0]["seconds"] > 0
        assert records[0]["command"][:3] == ["python", "-m", "repvgg_hf.recipes.studies.hold_out"]
        assert records[0]["versions"]["torch"] and records[0]["kind"] == "data"
        assert records[0]["environment"]["ACCELERATE_MIXED_PRECISION"] == "no"
        assert "45 images in train" in (tmp_path / "logs" / "a" / "first.log").read_text()
        capfd.readouterr()
        run_cells([first, second], tmp_path)
        assert capfd.readouterr().out == "" and first.state(tmp_path) == "done"
        other = self.cell("a/first", pictures, "elsewhere")
        run_cells([other, second], tmp_path)  # it would not be what the plan says, and is not what it was
        assert "a/first: done with first, now elsewhere; without its file in" in capfd.readouterr().out
        assert not (tmp_path / "elsewhere").exists()

    def test_others_go_on_where_one_fails(self, pictures, tmp_path):
        broken = self.cell("broken", "./nowhere", "x")
        after, other = self.cell("after", pictures, "y", needs=("broken",)), self.cell("other", pictures, "z")
        with pytest.raises(
            RuntimeError, match=r"(?s)2 cells failed.*broken: exit code 1, .*nowhere.*after: needs broken"
        ):
            run_cells([broken, after, other], tmp_path)
        assert [record["cell"] for record in read_cells(tmp_path)] == ["other"]

    def test_a_cell_that_is_needed_must_be_there(self, pictures, tmp_path):
        with pytest.raises(ValueError, match="^a needs b, which is no cell of the study"):
            run_cells([self.cell("a", pictures, "x", needs=("b",))], tmp_path)


class TestPlan:
    def test_all_that_is_asked(self):
        cells = plan(WholeArguments(cifar10="cifar10", tiny_imagenet="tiny", split="test"))
        names = [cell.name for cell in cells]
        assert len(names) == len(set(names)) and len({cell.result for cell in cells if cell.result}) == len(cells) - 2
        assert all(needed in names for cell in cells for needed in cell.needs)
        trained = [name for name in names if name.endswith("/train")]
        assert len([name for name in trained if name.startswith("cifar10")]) == 2 * 3 + 5
        assert [name for name in trained if name.startswith("tiny")] == [
            f"tiny_imagenet/{norm}-0/train" for norm in ("bn", "oabn-k-24", "oabn-k-6", "oabn-k-48")
        ]
        for cell in cells:  # the test images are for measuring alone
            evaluates = cell.facts.get("kind") in ("ptq", "more", "qat", "further")
            assert (cell.options[4:6] == ("--validation_split_name", "test")) == evaluates, cell

    def test_more_options_go_to_the_commands_that_have_them(self):
        cells = plan(WholeArguments(cifar10="cifar10", options=["bf16=True", "max_train_samples=7"]))
        for cell in cells:
            kind = cell.facts.get("kind")
            assert ("--bf16" in cell.options) == (kind in ("train", "further")), cell
            assert ("--max_train_samples" in cell.options) == (kind in ("train", "further", "qat")), cell

    def test_choosing(self):
        cells = plan(WholeArguments(cifar10="cifar10"))
        chosen = [cell.name for cell in choose(cells, ["bn-1/ptq"])]
        assert chosen == [
            "cifar10/data", "cifar10/bn-1/train", "cifar10/bn-1/ptq-validation",
            "cifar10/oabn-1/train", "cifar10/oabn-1/ptq-validation",
        ]  # fmt: skip
        with pytest.raises(ValueError, match="--only nothing is in the name of no cell"):
            choose(cells, ["nothing"])

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({}, "Nothing to study: give --cifar10"),
            ({"cifar10": "x", "split": "train"}, "--split must be validation or test, got 'train'"),
            ({"cifar10": "x", "options": ["bf16"]}, "--options takes name=value, such as bf16=True, got 'bf16'"),
        ],
    )
    def test_bad_options(self, given, message):
        with pytest.raises(ValueError, match=message):
            WholeArguments(**given)


def test_cells_run(pictures, tmp_path, run):
    """A network is trained, quantized, trained on and trained with quantized weights; then there is nothing to do."""
    given = ["--cifar10", pictures, "--held_out", 15, "--epochs", 1, "--qat_epochs", 1, "--seeds", 3]
    given += ["--options", "max_train_samples=16", "--output_dir", tmp_path, "--split", "test", "--only"]
    given += ["oabn-k-2-3/ptq", "/bn-3/further", "/bn-3/clusterqat-w2"]
    run("studies.whole", *given)
    page, records = (tmp_path / "report.md").read_text(), read_cells(tmp_path)
    assert [record["cell"] for record in records] == [
        "cifar10/bn-3/clusterqat-w2-test", "cifar10/bn-3/further-test", "cifar10/bn-3/train", "cifar10/data",
        "cifar10/oabn-k-2-3/ptq-test", "cifar10/oabn-k-2-3/train",
    ]  # fmt: skip
    assert all(f"{row.top1:.2f}" in page for row in rows_of(records, "test"))
    assert "kurtosis" in page and "What holds, on test images" in page
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").rglob("*.json")}
    assert "cifar10/oabn-k-2-3/ptq-test: done" in run("studies.whole", *given, "--show", "True")
    run("studies.whole", *given)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").rglob("*.json")} == before


def records(drops: dict[str, list[float]]) -> list[dict]:
    """Cells of networks of 90, 91 and 92 percent, whose 4-bit versions lose as much."""
    found = []
    for norm, lost in drops.items():
        tails = {"branches": 4.0, "fused": 90.0 if norm == "BN" else 6.0}
        kernels = {part: [{"shape": [2, 2, 3, 3], "kurtosis": kurtosis}] for part, kurtosis in tails.items()}
        for seed, drop in enumerate(lost):
            where = {"task": "cifar10", "norm": norm, "seed": seed, "split": "test", "seconds": 60}
            rows = {
                "float": {"line": "float", "bits": 32, "bits_per_weight": 32.0, "top1": 90.0 + seed, "kernels": kernels}
            }
            for name, bits, stored, library in (
                ("k-means, tensor and scale, calibrated", 4, 4.1, None),
                ("k-means, channel, tuned", 3, 3.1, None),
                ("mixed precision, tuned, target 2.1", None, 2.1, None),
                ("theirs", 4, 3.6, "nncf"),
            ):
                top1 = 90.0 + seed - drop - (4 - (bits or 2))
                rows[f"{name}|{bits}"] = {"line": name, "bits": bits, "bits_per_weight": stored, "top1": top1}
                rows[f"{name}|{bits}"] |= {"library": library}
            result = {"models": {norm: {key: {"activation_bits": None} | row for key, row in rows.items()}}}
            found.append(where | {"kind": "ptq", "result": result})
            tuned = {"line": "k-means, channel, tuned", "bits": 2, "activation_bits": None, "bits_per_weight": 2.05}
            rows = {"float": result["models"][norm]["float"], "tuned": tuned | {"top1": 88.0 + seed - drop}}
            found.append(where | {"kind": "more", "result": {"models": {norm: rows}}})
            packed = {"stage": "packed", "bits_per_weight": 2.1, "top1": 90.0 + seed - drop}
            line = {"kind": "qat", "line": "ClusterQAT, all switches", "bits": 2}
            found.append(where | line | {"result": {"results": [{"stage": "float", "top1": 90.0 + seed}, packed]}})
            found.append(where | {"kind": "further", "result": {"eval_top1": 90.5 + seed}})
    return found


class TestReport:
    def test_intervals_are_students(self):
        values = [-0.3, 0.1, -0.25]
        difference = Difference.of(values)
        low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert (difference.mean - difference.half, difference.mean + difference.half) == pytest.approx((low, high))
        assert Difference.of([-0.5]) == Difference(-0.5, None, 1) and str(Difference.of([-0.5])) == "-0.50 (one seed)"

    def test_a_training_is_held_against_the_float_network_as_it_measured_it(self):
        common = ("cifar10", "OABN", 0)
        rows = [Row(*common, "float", 32, None, 32.0, 90.0), Row(*common, "tuned", 2, None, 2.0, 89.0)]
        rows += [Row(*common, "trained", 2, None, 2.0, 89.5, base=89.75)]
        assert drops(rows, "cifar10", "OABN", "tuned", 2) == [-1.0]
        assert drops(rows, "cifar10", "OABN", "trained", 2) == [-0.25]

    def test_libraries_without_labels_are_held_against_ours_without_labels_on_the_same_networks(self):
        rows = []
        for seed, more in ((0, 0.0), (1, 5.0)):
            common = ("cifar10", "OABN", seed)
            rows += [Row(*common, "mixed precision, tuned, target 2.1", None, None, 2.0, 80.0 + more)]
            rows += [Row(*common, "k-means, channel, tuned", 3, None, 3.0, 82.0 + more)]
            rows += [Row(*common, "ClusterQAT, bits shared out, target 2.1", None, None, 2.0, 99.0, base=90.0)]
        rows += [Row("cifar10", "OABN", 0, "nncf GPTQ, groups", 2, None, 2.5, 80.5, library="nncf")]
        assert frontier(rows, "cifar10", "OABN")[3:] == ["| nncf GPTQ, groups | 2.50 | 80.50 | 81.00 | +0.50 |"]

    @pytest.mark.parametrize(
        ("values", "bar", "verdict"),
        [
            ([-0.1, -0.2, -0.1], 0.2, "holds"),
            ([-0.1, 0.1, -0.1], 0.0, "holds"),  # the interval includes 0
            ([-0.5, -0.5, -0.5], 0.0, "not"),
            ([-0.2, -0.5, -0.2], 0.2, "partly"),
            ([-0.5, -0.6, -0.5], 0.2, "not"),
            ([-0.3], 0.2, "not"),
        ],
    )
    def test_verdicts(self, values, bar, verdict):
        assert Difference.of(values).verdict(bar) == verdict

    def test_what_it_says(self, tmp_path):
        page = write_report(records({"BN": [5.0, 5.0, 5.0], "OABN": [0.0, 0.05, 0.1]}), tmp_path, "test")
        assert (tmp_path / "report.md").read_text() == page and (tmp_path / "report-cifar10.svg").is_file()
        lines = page.splitlines()
        assert "| CIFAR-10 | k-means, tensor and scale, calibrated, 4 bit | 0.1 | -0.05 ± 0.12 |  | holds |" in lines
        assert "| CIFAR-10 | k-means, channel, tuned, 3 bit | 0.3 | -1.05 ± 0.12 |  | not |" in lines
        assert "| CIFAR-10 | k-means, channel, tuned, 2 bit | 1.5 | -2.05 ± 0.12 |  | not |" in lines
        assert "| CIFAR-10 | mixed precision, tuned, target 2.1 | 1.5 | -2.05 ± 0.12 |  | not |" in lines
        assert "| mixed precision, tuned, target 2.1 | 2.10 | 88.95 ± 0.95 |" in lines
        assert "| CIFAR-10 | ClusterQAT, all switches, 2 bit | 0.7 | -0.05 ± 0.12 | -0.55 ± 0.12 | holds |" in lines
        assert "| CIFAR-10, OABN | 91.00 ± 1.00 | +0.00 ± 0.00 |" in lines
        assert "- Fusing makes outliers: holds (3 of 3 networks)." in lines
        assert "- OABN removes them: holds (3 of 3 networks)." in lines
        assert "- It costs nothing in float on CIFAR-10: holds (+0.00 ± 0.00)." in lines
        assert "| CIFAR-10, BN, seed 1 | 4.0, at most 4 | 90.0, at most 90 |" in lines
        assert lines[lines.index("## What does such a training cost?") + 2] == "Not measured."
        assert "| theirs | 3.60 | 90.95 | 90.45 | -0.50 |" in lines  # half way between 89.95 at 3.1 and 90.95 at 4.1
        rows = json.loads((tmp_path / "report.json").read_text())["rows"]
        assert len(rows) == 6 * (5 + 1 + 1 + 1)

    def test_activations_after_training_are_no_part_of_those_in_training(self, tmp_path):
        found = records({"OABN": [0.0, 0.0]})
        for record in found[:]:
            if record["kind"] == "ptq":
                models = record["result"]["models"]["OABN"]
                row = {"line": "W4A8", "bits": 4, "activation_bits": 8, "bits_per_weight": 4.1, "top1": 50.0}
                models["W4A8"] = row
            if record["kind"] == "qat":
                packed = {"stage": "packed", "bits_per_weight": 4.1, "top1": 89.9 + record["seed"]}
                line = {"line": "ClusterQAT, W4A8", "bits": 4, "activation_bits": 8}
                stages = [{"stage": "float", "top1": 90.0 + record["seed"]}, packed]
                found.append(record | line | {"result": {"results": stages}})
        lines = write_report(found, tmp_path, "test").splitlines()
        further = "-0.60 ± 0.00"
        assert f"| CIFAR-10 | ClusterQAT, W4A8, 4 bit | 0.2 | -0.10 ± 0.00 | {further} | holds |" in lines
        assert any(line.startswith("| W4A8 | 50.00 ± 0.00 |") for line in lines)

    def test_what_a_step_takes(self, tmp_path):
        ratio = {"name": "ClusterQAT 4 bit, fused", "peer": "float, fused", "ratio": 1.032}
        runs = [{"setting": "cifar, 32 px, batch 128", "ratios": [ratio]}]
        found = [*records({"OABN": [0.0]}), {"kind": "overhead", "seconds": 60, "result": {"runs": runs}}]
        lines = write_report(found, tmp_path, "test").splitlines()
        assert "| ClusterQAT 4 bit, fused | float, fused | 1.03 |" in lines

    def test_another_split_is_no_part_of_it(self, tmp_path):
        found = records({"OABN": [0.0]})
        assert rows_of(found, "validation") == []
        assert "91.00" not in write_report(found, tmp_path, "validation")

    def test_interpolation_keeps_the_best(self):
        assert interpolated([(2.0, 80.0), (4.0, 90.0)], 3.0) == 85.0
        assert interpolated([(2.0, 80.0)], 9.0) == 80.0 and interpolated([(2.0, 80.0)], 1.0) is None


def test_the_committed_report_is_made_from_the_committed_cells(recipes, tmp_path):
    folder = recipes / "studies" / "results" / "whole"
    records = read_cells(folder)
    page = write_report(records, tmp_path, "test")
    for name in ("report.md", "report.json"):
        assert (tmp_path / name).read_text() == (folder / name).read_text(), name
    assert page.count("](report-") == len(list(folder.glob("report-*.svg"))) > 0
    table = summary(rows_of(records, "test"))
    assert f"<!-- whole -->\n{table}<!-- /whole -->" in (recipes.parent / "README.md").read_text()
