"""The command line from a user's point of view."""

import json
import signal
import subprocess
import sys
import time

import pytest

from helpers import checksums, environment, metrics, run_process, run_program
from regnet_flax import main
from regnet_flax.config.fields import FIELDS

pytestmark = pytest.mark.core

TINY = [
    "--config.model.name=resnet8",
    "--config.model.overrides.width=4",
    "--config.train.batch_size=128",
    "--config.train.epochs=2",
]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--config.train.batchsize=64"], ["batchsize", "batch_size"]),
        (["--config.optimizer.learning_rate=fast"], ["learning_rate", "fast"]),
        (["--config.train.batch_size=0"], ["train.batch_size is 0", "at least 1"]),
        (["--config.optimizer.learning_rate=nan"], ["optimizer.learning_rate is nan"]),
        (["--config.optimizer.boundaries=(100,50)"], ["boundaries is (100, 50)", "in order"]),
        (["--config.model.name=regnet20_lstm"], ["regnet20_lstm", "regnet20_convlstm"]),
        (["--config", "configs/cifar10.py:regnet21_convrnn"], ["6m+2"]),
        (["--config", "nowhere.py"], ["nowhere.py", "configs/cifar10.py"]),
        (["--config"], ["needs a file"]),
        (["--mode", "dream"], ["mode", "train"]),
        (["--wrkdir=x"], ["wrkdir"]),
        (["cifar10"], ["'cifar10'"]),
        (["--config", "configs/folder.py"], ["dataset.data_dir is ''"]),
        (["--config", "configs/folder.py", "--config.dataset.data_dir=nowhere"], ["nowhere"]),
        (["--mode", "eval"], ["no checkpoint"]),
        (["--mode", "summary", "--distributed=auto"], ["--distributed", "train and eval"]),
    ],
)
@pytest.mark.fault("wrong arguments")
def test_wrong_input_is_one_line_and_exit_code_2(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if not any(arg.startswith("--config.train.batch_size") for arg in arguments):
        arguments = [*arguments, "--config.train.batch_size=8"] if arguments != ["--config"] else arguments
    assert main.main(arguments) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: "), errors
    for word in words:
        assert word in errors[0]
    assert not list(tmp_path.iterdir())


def test_several_wrong_values_are_told_at_once(capsys):
    assert main.main(["--config.train.epochs=0", "--config.dtype=float16"]) == 2
    errors = capsys.readouterr().err
    assert "train.epochs is 0" in errors and "dtype is 'float16'" in errors


def test_summary(capsys):
    assert main.main(["--mode", "summary", "--config", "configs/cifar10.py:regnet20_convgru"]) == 0
    out = capsys.readouterr().out
    assert "310,106" in out and "8×8×64" in out


def test_help(capsys):
    assert main.main(["--help"]) == 0
    assert "--workdir" in capsys.readouterr().out
    assert main.main(["--helpfields"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(FIELDS)
    assert any("over all devices" in line for line in lines)


def test_any_directory_and_a_config_of_ones_own(tmp_path, program):
    (tmp_path / "mine.py").write_text(
        "from configs import digits\n"
        "def get_config():\n"
        "    config = digits.get_config('resnet8')\n"
        "    config.seed = 5\n"
        "    return config\n"
    )
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").touch()  # an unrelated package of that name
    out = program("--config", "mine.py", "--mode=summary", cwd=tmp_path, check=0).stdout
    assert "resnet8, images of 8×8×1" in out


@pytest.mark.parametrize("body", ["1 / 0", "return undefined", "raise TypeError('no\\nway')", "import nothing_such"])
@pytest.mark.fault("a config file that ends in an error")
def test_an_error_in_a_config_is_one_line(body, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(f"def get_config():\n    {body}\n")
    assert main.main(["--config", "mine.py"]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("error: ") and "mine.py" in error and "Traceback" not in error


def test_a_model_for_a_config_that_takes_none(capsys):
    assert main.main(["--config", "configs/base.py:resnet20"]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("error: ") and "configs/base.py" in error and "Traceback" not in error


def test_summary_of_a_folder_needs_no_folder(capsys):
    assert main.main(["--mode", "summary", "--config", "configs/folder.py:resnet20"]) == 0
    assert "272,474" in capsys.readouterr().out


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """An uninterrupted run in the default workdir, and its output."""
    cwd = tmp_path_factory.mktemp("uninterrupted")
    done = run_process(*TINY, cwd=cwd, check=0)
    return cwd / "runs" / "digits-resnet8-0", done.stdout


def test_output_in_a_file_is_plain_lines(uninterrupted):
    _, out = uninterrupted
    assert "\x1b" not in out and "\r" not in out
    epochs = [line for line in out.splitlines() if line.startswith("epoch ")]
    assert len(epochs) == 2
    for part in ("epoch 1/2", "train loss", "test loss", "left"):
        assert part in epochs[0]


def test_eval_takes_the_config_from_the_workdir(uninterrupted, tmp_path):
    workdir, _ = uninterrupted
    arguments = ["--mode", "eval", "--workdir", workdir, "--config.eval.checkpoint=last", "--config.eval.batch_size=77"]
    out = run_program(*arguments, cwd=tmp_path, check=0).stdout
    accuracy = json.loads((workdir / "results.json").read_text())["last"]["eval_accuracy"]
    assert f"accuracy {100 * accuracy:.2f} %" in out and "over 360 images" in out


def stop(workdir, number, step):
    """Starts or resumes the run, and sends the signal once there is a checkpoint of that step."""
    process = subprocess.Popen(
        [sys.executable, "-m", "regnet_flax.main", *TINY, f"--workdir={workdir}", "--config.checkpoint.every_steps=4"],
        cwd=workdir.parent,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not (workdir / "checkpoints" / str(step)).exists():
        time.sleep(0.005)
    process.send_signal(number)
    out, _ = process.communicate(timeout=100)
    assert not (workdir / "results.json").exists(), "the run ended before the signal came"
    return process.returncode, out


@pytest.mark.thorough
def test_stopped_by_two_signals_in_turn_it_ends_as_if_by_none(uninterrupted, tmp_path, program, fault):
    workdir, going_on = tmp_path / "run", "resuming from the checkpoint"
    code, out = stop(workdir, signal.SIGTERM, 4)
    assert code == 143 and "Saved at step" in out, out
    code, out = stop(workdir, signal.SIGKILL, 12)
    assert code == -signal.SIGKILL and going_on in out, out
    arguments = [*TINY, f"--workdir={workdir}", "--config.checkpoint.every_steps=4"]
    assert going_on in program(*arguments, cwd=tmp_path, check=0).stdout
    for _ in range(2):
        fault("SIGTERM or SIGKILL after a checkpoint, fast suite")
    expected, _ = uninterrupted
    assert checksums(workdir, 22) == checksums(expected, 22)
    assert metrics(workdir) == metrics(expected)
