"""Results on disk and on the screen."""

import json
import platform
import subprocess
import sys

import pytest

from repvgg_hf import ClusterConfig
from repvgg_hf.training.report import masked, masked_text, print_table, quantization_fields, write_json


def test_json_is_written_at_once(tmp_path):
    path = tmp_path / "new" / "results.json"
    write_json(path, {"top1": 1.5})
    write_json(path, {"top1": 2.5})
    assert json.loads(path.read_text()) == {"top1": 2.5} and list(path.parent.iterdir()) == [path]


def test_what_a_killed_process_left_is_removed(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host, path = platform.node(), tmp_path / "results.json"
    left = [tmp_path / f"results.json.{host}-{gone.pid}.tmp", tmp_path / f"results.json.another-{gone.pid}.tmp"]
    for file in (*left, tmp_path / f"results.json.{host}-1.tmp"):  # process 1 is always there
        file.write_text("{")
    write_json(path, {})
    assert {file.name for file in tmp_path.iterdir()} == {path.name, left[1].name, f"results.json.{host}-1.tmp"}


TOKEN = "hf_" + "aB3" * 11 + "x"


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (["--hub_token", "abc", "--seed", "1"], ["--hub_token", "***", "--seed", "1"]),
        (["--push_to_hub_token", "abc"], ["--push_to_hub_token", "***"]),
        (["--hub-token=abc"], ["--hub-token=***"]),
        (["--token=a=b", "x"], ["--token=***", "x"]),
        (["--api_key", "-secret"], ["--api_key", "***"]),
        (["--hub_token", "--seed", "1"], ["--hub_token", "--seed", "1"]),
        (["--note", f"with {TOKEN}."], ["--note", "with ***."]),
        ([f"--dataset_name=https://me:{TOKEN}@huggingface.co/x"], ["--dataset_name=https://me:***@huggingface.co/x"]),
        (["--dataset_name", "https://me:pass@host/x"], ["--dataset_name", "https://me:***@host/x"]),
        (["outputs/hf_cifar10", "--max_tokens", "5"], ["outputs/hf_cifar10", "--max_tokens", "5"]),
    ],
)
def test_secrets_are_masked(command, shown):
    assert masked(command) == shown


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("python train.py --hub_token abc --seed 1", "python train.py --hub_token '***' --seed 1"),
        ("python train.py '--hub_token=a b'", "python train.py '--hub_token=***'"),
        (f"python train.py --note 'with {TOKEN}'", "python train.py --note 'with ***'"),
        ("cd x && python  train.py \\\n    --seed 1", "cd x && python  train.py \\\n    --seed 1"),  # as it is written
    ],
)
def test_secrets_are_masked_in_a_line(command, shown):
    assert masked_text(command) == shown


def test_a_line_with_an_open_quote_is_named():
    with pytest.raises(ValueError, match="python 'a b.* can't be read .*close its quotes"):
        masked_text("python 'a b")


def test_rows_say_how_a_model_is_quantized():
    config = ClusterConfig(bits=3, method="uniform", granularity="per_group", group_size=2, activation_bits=8)
    assert quantization_fields(config) == {
        "method": "uniform", "bits": 3, "granularity": "per_group", "group_size": 2, "channel_scale": True,
        "activation_bits": 8,
    }  # fmt: skip
    plain = quantization_fields(None)
    assert plain.keys() == quantization_fields(config).keys() and plain["method"] == "float" and plain["bits"] == 32


def test_table_shows_every_value(capsys):
    print_table("Figures", [{"model": "a", "top1": 81.234, "bytes": 12345, "seconds": None, "error": 4.5e-8}])
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("Figures", "81.23", "12,345", " - ", "4.5e-08"))
