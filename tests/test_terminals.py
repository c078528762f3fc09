"""The program's output, its encodings and destinations, and signals from a terminal."""

import ast
import io
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from rich.table import Table

import regnet_flax
from helpers import LINE, ROOT, environment, error_of, run_process, run_program
from regnet_flax.errors import Interrupted
from regnet_flax.training import display
from regnet_flax.training.display import COLUMNS, RunDisplay, describe, say_table
from regnet_flax.training.signals import StopSignals


def test_nothing_live_is_written_to_a_file_whatever_the_environment(logger, monkeypatch):
    monkeypatch.setattr(sys, "stdout", out := io.StringIO())
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    display.log_to_console()
    with RunDisplay(total_steps=100, epochs=10, steps_per_epoch=10, batch_size=8, step=0) as shown:
        shown.step(1)
        shown.log({"step": 10, "epoch": 1.0})
    assert out.getvalue() == "epoch 1/10 · step 10/100\n"


def test_a_line_of_the_log_has_at_most_100_columns():
    longest = LINE | {"step": 500_400, "epoch": 99.75, "images_per_second": 123456.7, "learning_rate": 1.23e-5}
    for line, split in ((LINE, "test"), (longest, "validation")):
        text = describe(line, 500_400, 100, 100 * 3600.0, split)
        assert len(text) <= COLUMNS == 100
        short = {"validation": "val"}.get(split, split)
        assert f"train loss 1.2346, acc. 56.78% · {short} loss 1.5000, acc. 43.21%" in text
        assert text.endswith("100 h 00 min left")
    short = {"step": 5, "epoch": 0.25, "learning_rate": 0.1, "images_per_second": 9.0}
    assert describe(short, 10, 1, 3.0) == "epoch 0.25/1 · step 5/10 · rate 0.1 · 9 images/s · 3 s left"


def test_a_table_in_a_pipe_has_one_line_for_each_row(monkeypatch):
    monkeypatch.setattr(sys, "stdout", out := io.StringIO())
    table = Table("image", "1.")
    table.add_row("/a/long/way/" * 20 + "photo.jpg", "a class with a long name 99.9 %")
    say_table(table)
    (line,) = [line for line in out.getvalue().splitlines() if "photo.jpg" in line]
    assert "/a/long/way/" * 20 + "photo.jpg" in line and "99.9 %" in line


def test_a_reader_that_goes_away_does_not_end_a_run(logger, monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Gone())
    display.log_to_console()
    logger.info("nobody hears this")
    monkeypatch.setattr(Gone, "write", lambda self, text: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        logger.info("this is lost")


POOR = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}


@pytest.mark.slow
def test_the_head_of_the_output_and_an_ascii_terminal():
    command = f"{sys.executable} -m regnet_flax.main --mode=models | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], env=environment(), capture_output=True, text=True, timeout=60)
    first, code = done.stdout.splitlines()  # 141 if head ended first
    assert first == "resnet20" and code in ("0", "141") and not done.stderr
    command = f"{sys.executable} -m regnet_flax.main --help >&-"
    subprocess.run(["bash", "-c", command], env=environment(), check=True, timeout=60)
    help_text = run_process("--help", env=POOR, check=0).stdout
    assert "\\u2026" in help_text


def test_files_have_their_encoding_named():
    """So they are UTF-8 in any locale."""
    missing = []
    for path in sorted(pathlib.Path(regnet_flax.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            whose = ast.unparse(node.func)
            text = name in ("read_text", "write_text") and whose not in ("write_text", "files.write_text")
            if whose == "open":
                mode = next((a.value for a in node.args[1:2] if isinstance(a, ast.Constant)), "r")
                text = "b" not in mode
            if text and not any(keyword.arg == "encoding" for keyword in node.keywords):
                missing.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert not missing


def test_all_models_are_listed():
    names = run_program("--mode=models", check=0).stdout.split()
    assert names == regnet_flax.list_models()


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.optimizer.learningrate=1", "no field optimizer.learningrate; did you mean optimizer.learning_rate?"),
        ("--config.learning_rate=1", "no field learning_rate; did you mean optimizer.learning_rate?"),
        ("--config.batch_size=1", "no field batch_size; did you mean train.batch_size or eval.batch_size?"),
        ("--config.lerning_rate=1", "no field lerning_rate; did you mean optimizer.learning_rate?"),
        ("--config.optimizer=sgd", "optimizer is a group of fields: set one of them, such as --config.optimizer.name"),
        ("--noconfig.dataset.strickt", "no field dataset.strickt; did you mean dataset.strict?"),
        ("--config.zzz=1", "no field zzz; --helpfields lists them"),
        ("--config.dataset.data_dir=az://bucket/data", "data_dir is 'az://bucket/data': it must be a local path"),
        ("--config.export.path=hdfs://bucket/w.pth", "export.path is 'hdfs://bucket/w.pth': it must be a local path"),
        ("--config.model.init_from=https://host/w.pth", "init_from is 'https://host/w.pth': it must be a local path"),
        ("--mode=compare --profile", "--profile is for --mode train: leave it out with compare"),
        ("--workdir=https://host/run", "--workdir is 'https://host/run': it must be a local path"),
        ("--workdir=~nobody-of-this-name/run", "there is no such home directory"),
    ],
)
def test_what_is_mistyped_or_far_away_is_one_line(argument, words, tmp_path):
    assert words in error_of(run_program(*argument.split(), cwd=tmp_path), 2)
    assert not list(tmp_path.iterdir())


def test_an_option_of_a_model_that_is_mistyped():
    with pytest.raises(ValueError, match="no option 'num_class': did you mean num_classes"):
        regnet_flax.create_model("resnet20", num_class=10)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"regulated_stages": 1}, "regulated_stages is 1: it must be a tuple"),
        ({"features": 5}, "features is 5: it must be True or names"),
        ({"share_regulator": "False"}, "share_regulator is 'False': it must be True or False"),
        ({"frozen_batch_stats": "x"}, "frozen_batch_stats is 'x': it must be True or False"),
    ],
)
def test_an_option_of_another_type(options, words):
    with pytest.raises(ValueError, match=words):
        regnet_flax.create_model("regnet20_convlstm", **options)


def signalled(*numbers):
    """Sends signals to this process inside a StopSignals context; returns it and the message of its `check`."""
    with StopSignals() as stop:
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.05)  # Python runs handlers between bytecodes
        asked = stop.take_save()
        try:
            stop.check()
        except Interrupted as error:
            return asked, stop.take_save(), error
    return asked, stop.take_save(), None


def test_sighup_stops_and_sigusr1_saves():
    asked, again, error = signalled(signal.SIGUSR1)
    assert asked and not again and error is None
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    try:
        # A closing terminal sends more than one.
        asked, _, error = signalled(signal.SIGHUP, signal.SIGHUP, signal.SIGUSR1)
        assert asked and error.exit_code == 129
        assert str(error) == "Stopped by SIGHUP before the first step; run the same command to start again"
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # like nohup
        assert signalled(signal.SIGHUP)[2] is None
    finally:
        signal.signal(signal.SIGHUP, before)


# Replaces a module that the package imports first, and swallows a KeyboardInterrupt.
SLOW = """
import time
print("importing", flush=True)
try:
    time.sleep(60)
except BaseException:
    pass
"""


def test_sigint_while_it_imports_ends_it_at_once(tmp_path):
    (tmp_path / "jax.py").write_text(SLOW)
    process = subprocess.Popen(
        [sys.executable, "-m", "regnet_flax.main"],
        env=environment(PYTHONPATH=f"{tmp_path}:{ROOT}"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # the tests may run in the background
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and not out and not err
