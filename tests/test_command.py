"""The command `repvgg-hf`: what it lists, how it ends, and that its errors are one line."""

import importlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMAND = ROOT / "repvgg_hf_command.py"
SPEC = importlib.util.spec_from_file_location("repvgg_hf_command", COMMAND)  # also where it is not installed
command = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(command)


def start(*arguments, **options) -> subprocess.CompletedProcess:
    """Run the command in a process of its own."""
    line = [sys.executable, str(COMMAND), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=240, env=environment(), **options)


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def test_the_list_of_commands_is_quick():
    """Neither PyTorch nor Transformers is imported for it, nor the package itself."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import repvgg_hf_command as command; "
        "assert command.main(['--help']) == 0 and command.main(['trian']) == 2; "
        "print([name for name in ('torch', 'transformers', 'repvgg_hf') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]"
    assert done.stderr == "error: there is no command 'trian', did you mean train?\n"


def test_only_commands_that_are_there_are_listed(tmp_path, monkeypatch, capsys):
    (tmp_path / "train.py").touch()
    monkeypatch.setattr(command, "recipes_folder", lambda: tmp_path)
    assert command.main(["--help"]) == 0
    listed = re.findall(r"^  (\w+) ", capsys.readouterr().out, flags=re.M)
    assert listed == ["train"]
    assert command.main(["predict", "x.jpg"]) == 2
    (tmp_path / "predict.py").touch()
    assert list(command.commands()) == ["train", "predict"]


def test_every_command_is_a_recipe_with_its_own_main():
    there = command.commands()
    assert {"train", "quantize", "qat", "evaluate", "convert", "publish"} <= set(there)
    for name, (module, _) in there.items():
        if name == "benchmark":
            pytest.importorskip("timm", reason="the benchmarks compare with timm")
        assert callable(importlib.import_module(f"repvgg_hf.recipes.{module}").main)


def test_the_entry_point_is_this_module():
    tomllib = pytest.importorskip("tomllib", reason="part of Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["scripts"] == {"repvgg-hf": "repvgg_hf_command:main"}
    assert project["tool"]["setuptools"]["py-modules"] == ["repvgg_hf_command"]


def test_nothing_to_do_shows_the_commands(capsys):
    assert command.main([]) == 2
    assert "train a float classifier" in capsys.readouterr().out


def test_a_command_without_likeness_gets_the_list(capsys):
    assert command.main(["xyz"]) == 2
    assert "there are train, quantize, qat" in capsys.readouterr().err


@pytest.fixture
def failing(monkeypatch):
    """`failing(error)`: the command `train` then raises it."""

    def make(error: BaseException):
        def run(name, arguments):
            raise error

        monkeypatch.setattr(command, "run", run)

    return make


@pytest.mark.parametrize(
    "error", [ValueError("give\nanother  one"), ImportError("pip install x"), FileNotFoundError("x"), ValueError()]
)
def test_expected_errors_are_one_line(error, failing, capsys, monkeypatch):
    monkeypatch.delenv(command.DEBUG, raising=False)
    failing(error)
    assert command.main(["train"]) == 1
    text = capsys.readouterr().err
    assert text == f"error: {' '.join(str(error).split()) or 'ValueError'}\n"
    with pytest.raises(type(error)):
        command.main(["--debug", "train"])
    monkeypatch.setenv(command.DEBUG, "1")
    with pytest.raises(type(error)):
        command.main(["train"])


def test_what_is_not_installed_is_named(failing, capsys):
    failing(ModuleNotFoundError("No module named 'datasets'", name="datasets"))
    assert command.main(["train"]) == 1
    assert capsys.readouterr().err == (
        "error: No module named 'datasets': the commands need pip install \"repvgg-hf[train]\"\n"
    )


def test_a_fault_of_the_code_keeps_its_traceback(failing):
    failing(RuntimeError("shapes do not match"))  # raised by no file of the package
    with pytest.raises(RuntimeError, match="shapes"):
        command.main(["train"])


def test_errors_of_the_package_at_run_time_are_one_line(monkeypatch, capsys):
    import torch

    from repvgg_hf.training.checkpoints import check_finite

    module = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(module.bias, float("nan"))
    monkeypatch.setattr(command, "run", lambda name, arguments: check_finite(module))
    assert command.main(["train"]) == 1
    assert capsys.readouterr().err.startswith("error: bias and 0 other tensors of the model are NaN")


def test_a_mistyped_option_of_a_recipe():
    done = start("evaluate", "--model_name_or_paht", "x")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    done = start("evaluate", "--model_name_or_path", "x", "--sed", "1")
    assert (done.returncode, done.stderr.partition(" (")[0]) == (
        2,
        "error: there is no option --sed, did you mean --seed?",
    )


def test_help_shows_what_matters_and_help_all_the_rest():
    short, whole = (start("train", option).stdout for option in ("--help", "--help-all"))
    assert short.startswith("usage: repvgg-hf train [FOLDER] [--option value ...]")
    options = [set(re.findall(r"^  (--[\w-]+)", text, flags=re.M)) for text in (short, whole)]
    assert {"--learning_rate", "--oabn", "--image_size", "--help-all", "--output_dir", "--seed"} <= options[0]
    assert not options[0] & {"--adam_beta1", "--fsdp", "--hub_token", "--stem_stride"}
    assert options[0] < options[1] and {"--adam_beta1", "--fsdp", "--hub_token", "--stem_stride"} <= options[1]
    assert f"{len(options[1] - options[0])} more options" in short


def test_a_command_prints_its_own_words_alone(tmp_path):
    """No bars of files that are loaded, no warnings of libraries."""
    from repvgg_hf import RepVGGConfig, RepVGGForImageClassification

    names = {index: str(index) for index in range(10)}
    config = RepVGGConfig(stem_hidden_size=8, hidden_sizes=[8], depths=[1], strides=[2], id2label=names)
    RepVGGForImageClassification(config).save_pretrained(tmp_path)
    done = start("evaluate", "--model_name_or_path", tmp_path, "--image_size", 8)
    assert done.returncode == 0 and done.stderr == ""
    assert "on 360 images" in done.stdout


def test_an_interruption_in_the_middle_ends_quietly(tmp_path):
    """As by Ctrl-C, once the training has begun."""
    options = ["--output_dir", tmp_path, "--num_train_epochs", "500", "--max_train_samples", "64"]
    line = [sys.executable, "-u", str(COMMAND), "train", *map(str, options)]
    process = subprocess.Popen(
        line,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    begun = any(text.startswith("epoch") for text in process.stdout)
    assert begun, process.stderr.read()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.strip() == ""
