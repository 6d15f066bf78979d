"""Results on disk and on the screen."""

import json

from repvgg_hf import ClusterConfig
from repvgg_hf.training.report import print_table, quantization_fields, write_json


def test_json_is_written_at_once(tmp_path):
    path = tmp_path / "new" / "results.json"
    write_json(path, {"top1": 1.5})
    write_json(path, {"top1": 2.5})
    assert json.loads(path.read_text()) == {"top1": 2.5} and list(path.parent.iterdir()) == [path]


def test_rows_say_how_a_model_is_quantized():
    config = ClusterConfig(bits=3, method="uniform", granularity="per_group", group_size=2, activation_bits=8)
    assert quantization_fields(config) == {
        "method": "uniform", "bits": 3, "granularity": "per_group", "group_size": 2, "channel_scale": False,
        "activation_bits": 8,
    }  # fmt: skip
    plain = quantization_fields(None)
    assert plain.keys() == quantization_fields(config).keys() and plain["method"] == "float" and plain["bits"] == 32


def test_table_shows_every_value(capsys):
    print_table("Figures", [{"model": "a", "top1": 81.234, "bytes": 12345, "seconds": None, "error": 4.5e-8}])
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("Figures", "81.23", "12,345", " - ", "4.5e-08"))
