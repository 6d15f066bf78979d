"""Command lines, and `.json` files in their place."""

import json
from dataclasses import dataclass, field

import pytest

from repvgg_hf.training.arguments import RunArguments, parse_arguments


@dataclass
class Colors:
    """Options of this test."""

    color: str = field(default="red", metadata={"help": "A color."})


def test_options_and_a_file_are_the_same(tmp_path):
    path = tmp_path / "options.json"
    path.write_text(json.dumps({"color": "blue", "seed": 3}))
    given = ["--color", "blue", "--seed", "3"]
    assert parse_arguments((Colors, RunArguments), given) == ((Colors("blue"), RunArguments(seed=3)), given)
    assert parse_arguments((Colors, RunArguments), [str(path)]) == ((Colors("blue"), RunArguments(seed=3)), [str(path)])


def test_the_process_has_arguments_too(monkeypatch):
    monkeypatch.setattr("sys.argv", ["recipe.py", "--color", "green"])
    (colors,), arguments = parse_arguments((Colors,), None)
    assert colors.color == "green" and arguments == ["--color", "green"]


def test_secrets_are_not_recorded_however_short_the_option():
    @dataclass
    class Upload:
        hub_token: str | None = None
        place: str = ""

    given = ["--hub_tok", "s3cret", "--place", "at/s3cret"]
    (upload,), recorded = parse_arguments((Upload,), given)
    assert upload.hub_token == "s3cret" and recorded == ["--hub_tok", "***", "--place", "at/***"]


def test_an_unknown_key_of_a_file_is_named(tmp_path):
    (tmp_path / "options.json").write_text('{"colour": "blue"}')
    with pytest.raises(ValueError, match="colour"):
        parse_arguments((Colors,), [str(tmp_path / "options.json")])
