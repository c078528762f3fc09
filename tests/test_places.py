"""Where runs are kept and read: other folders, homes, read-only workdirs, containers, file systems without locks."""

import fcntl
import json
import os
import pathlib
import re
import shlex
import shutil
import socket
import sys
import tempfile
import unicodedata

import pytest
from PIL import Image

from faults import POWERLESS
from helpers import ROOT, error_of, run_process, run_program
from regnet_flax import main
from regnet_flax.config.check import check_config, eval_batch_size
from regnet_flax.data.folder import container_memory
from regnet_flax.errors import ConfigError, UsageError, WorkdirError
from regnet_flax.files import expanded
from regnet_flax.modes.predict import find_images
from regnet_flax.training.workdir import workdir_lock

TINY = ["--config=configs/rnn_photos.py:resnet8", "--config.model.overrides.width=4", "--config.dataset.image_size=8"]
TINY += ["--config.train.batch_size=4", "--config.train.max_steps=2", "--config.dataset.augment=()"]


def draw_folder(root, shade=0, splits=("train", "test")):
    for split in splits:
        for name, colour in (("abeille été", (250, shade, 0)), ("guêpe", (0, shade, 250))):
            for number in range(4):
                path = root / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), colour).save(path)
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run on a folder called bees, in the default workdir; the directory where the program started."""
    cwd = tmp_path_factory.mktemp("trained")
    draw_folder(cwd / "bees")
    run_program(*TINY, "--config.dataset.data_dir=bees", cwd=cwd, check=0)
    return cwd


def test_a_finished_run_is_reported_for_its_own_data_only(trained, tmp_path):
    """After a finished run on one folder, the same command on another folder must not report its results."""
    workdir = trained / "runs/rnn_photos-bees-resnet8-0"
    assert workdir.is_dir()
    here = [*TINY, "--workdir", workdir]
    draw_folder(tmp_path / "other", shade=9)
    shutil.copytree(trained / "bees", tmp_path / "moved")
    for place, words in (("other", "was trained on other images"), ("missing", "missing is not a directory")):
        line = error_of(run_program(*here, f"--config.dataset.data_dir={tmp_path / place}"), 2)
        assert words in line
    for place in (trained / "bees", tmp_path / "moved"):
        done = run_program(*here, f"--config.dataset.data_dir={place}", check=0)
        assert "holds a finished run" in done.stdout


def test_a_model_is_evaluated_on_a_folder_with_nothing_to_train_on(trained, tmp_path):
    """The folder's class names have another Unicode form, as a Mac writes them."""
    draw_folder(tmp_path, splits=("test",))
    for path in list((tmp_path / "test").iterdir()):
        path.rename(path.with_name(unicodedata.normalize("NFD", path.name)))
    workdir = trained / "runs/rnn_photos-bees-resnet8-0"
    command = ["--mode=eval", "--workdir", workdir]
    expected = run_program(*command, cwd=trained, check=0).stdout
    command.append("--config.dataset.validation=0.1")  # of images that the run trains on; here are none
    found = run_program(*command, f"--config.dataset.data_dir={tmp_path}", check=0).stdout
    (expected, found) = ([line for line in out.splitlines() if "test loss" in line] for out in (expected, found))
    assert found == expected and "over 8 images" in found[0]


@pytest.mark.slow
def test_a_workdir_that_cannot_be_written_to(trained, tmp_path):
    workdir = shutil.copytree(trained / "runs/rnn_photos-bees-resnet8-0", tmp_path / "run")
    for path in (workdir, *workdir.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)
    image = next(trained.rglob("*.png"))
    predict = ["--mode=predict", f"--config.predict.images={image}", "--config.predict.json=True"]
    done = run_process(*predict, "--workdir", workdir, before=POWERLESS, check=0)
    assert json.loads(done.stdout)["picture"] is None and "predict.png cannot be written" in done.stderr
    line = error_of(run_process("--mode=export", "--workdir", workdir, before=POWERLESS), 2)
    assert "cannot be written" in line and "--config.export.path" in line
    out = tmp_path / "w.safetensors"
    export = ["--mode=export", f"--config.export.path={out}", "--workdir", workdir]
    run_process(*export, before=POWERLESS, check=0)
    assert out.exists()
    for path in (workdir, *workdir.rglob("*")):
        path.chmod(0o755)


def test_predict_says_which_checkpoint_it_uses_in_any_encoding(trained):
    workdir = trained / "runs/rnn_photos-bees-resnet8-0"
    image = trained / "bees/test/guêpe/0.png"
    predict = ["--mode=predict", "--workdir", workdir, f"--config.predict.images={image}"]
    done = run_program(*predict, "--config.predict.json=True", check=0)
    assert done.stdout.isascii()
    result = json.loads(done.stdout)
    assert {entry["class"] for entry in result["predictions"][0]["top"]} == {"abeille été", "guêpe"}
    assert result["chosen"] == "step 2, the best of 1 evaluations of the test split"
    done = run_program(*predict, "--config.eval.checkpoint=last", check=0)
    assert f"resnet8, step 2, the last checkpoint: {image}\n" in done.stdout


def test_a_best_checkpoint_that_is_gone_is_not_said_to_be_the_best(trained, tmp_path):
    workdir = shutil.copytree(trained / "runs/rnn_photos-bees-resnet8-0", tmp_path / "run")
    with open(workdir / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 1, "epoch": 0.5, "eval_accuracy": 1.0, "eval_loss": 0.1}\n')
    image = next(trained.rglob("*.png"))
    done = run_program("--mode=predict", "--workdir", workdir, f"--config.predict.images={image}", check=0)
    assert "step 2, the best of the checkpoints that are left, by the test split" in done.stdout
    run_program("--mode=export", "--workdir", workdir, check=0)
    assert "the best of the run's" not in (workdir / "README.md").read_text()


def test_other_modes_use_the_run_of_a_config_that_starts_from_weights():
    folder = ["--config=configs/folder.py", "--config.dataset.data_dir=photos"]
    config, begun = main.parse(folder)
    assert config.model.init_from == "regnet20_convlstm.cifar10" and config.model.new_head
    for mode in ("eval", "predict", "export", "analyze"):
        config, options = main.parse([*folder, f"--mode={mode}"])
        assert options.workdir == begun.workdir and (config.model.init_from, config.model.new_head) == ("", False)
        config, options = main.parse([*folder, f"--mode={mode}", "--config.model.init_from=w.pth"])
        assert options.workdir == "runs/w" and (config.model.init_from, config.model.new_head) == ("w.pth", False)


def test_home_directories(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text("from configs.digits import get_config\n")
    given = ["--config.model.init_from=~/w.pth", "--config.export.path=~/out.pth", "--config.dataset.data_dir=~"]
    config, options = main.parse(["--config=~/mine.py", "--workdir=~/run", *given])
    assert options.workdir == f"{tmp_path}/run" and config.model.init_from == f"{tmp_path}/w.pth"
    assert config.export.path == f"{tmp_path}/out.pth" and config.dataset.data_dir == str(tmp_path)

    def homeless(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.expanduser", homeless)
    with pytest.raises(UsageError, match="--workdir is '~/run', and there is no such home directory: write the whole"):
        expanded("~/run", "--workdir")


@pytest.mark.slow
def test_no_home_no_user_name():
    env = {"HOME": None, "USER": None, "LOGNAME": None}
    before = ["env", *(f"-u{name}" for name in env), "setpriv", "--reuid=54321", "--clear-groups"]
    if os.geteuid() or not shutil.which("setpriv"):
        pytest.skip("needs root and setpriv, to become a user without a name")
    command = ["--config.model.name=resnet8", "--config.model.overrides.width=4", "--config.train.max_steps=2"]
    with tempfile.TemporaryDirectory() as name:  # only this user can access pytest's
        path = pathlib.Path(name)
        path.chmod(0o777)
        cache = {"JAX_COMPILATION_CACHE_DIR": str(path / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
        run_process(*command, "--workdir", path / "run", before=before, env=cache, check=0)
        assert (path / "run/figures/curves.png").exists()


def test_boundaries_beyond_the_run_name_what_works(tmp_path):
    config, _ = main.parse([*TINY, "--config.train.epochs=15", "--config.dataset.data_dir=x"])
    for boundaries in ((80,), (30, 60), (30, 60, 90)):
        config.optimizer.boundaries = boundaries
        config.optimizer.warmup_epochs = 20.0
        with pytest.raises(ConfigError) as caught:
            check_config(config)
        advice = [shlex.split(line.partition("such as ")[2])[0] for line in str(caught.value).splitlines()]
        assert len(advice) == 2
        fixed, _ = main.parse([*TINY, "--config.train.epochs=15", "--config.dataset.data_dir=x", *advice])
        check_config(fixed)
        assert len(fixed.optimizer.boundaries) == len(boundaries)


def test_evaluation_takes_as_many_images_as_training():
    config, _ = main.parse([*TINY, "--config.train.batch_size=64"])
    assert eval_batch_size(config) == 64
    config.optimizer.accumulate_steps = 4
    assert eval_batch_size(config) == 16
    config.eval.batch_size = 7
    assert eval_batch_size(config) == 7


def limit(directory, names, limit, used, cache):
    directory.mkdir(parents=True, exist_ok=True)
    for name, value in (*zip(names, (limit, used), strict=True), ("stat", f"anon 5\ninactive_file {cache}\n")):
        (directory / f"memory.{name}").write_text(f"{value}\n")


def test_the_memory_of_a_container(tmp_path):
    proc, root = tmp_path / "cgroup", tmp_path / "fs"
    assert container_memory(str(proc), str(root)) == sys.maxsize
    proc.write_text("0::/pod/job\n")
    two = ("max", "current")
    limit(root / "pod/job", two, "max", 10, 0)
    assert container_memory(str(proc), str(root)) == sys.maxsize
    limit(root / "pod", two, 1000, 300, 100)
    assert container_memory(str(proc), str(root)) == 800
    limit(root / "pod/job", two, 500, 450, 0)
    assert container_memory(str(proc), str(root)) == 50
    proc.write_text("5:cpu:/elsewhere\n4:memory:/docker/1\n0::/\n")  # version 1, as seen inside a container
    limit(root / "memory", ("limit_in_bytes", "usage_in_bytes"), 700, 100, 50)
    assert container_memory(str(proc), str(root)) == 650


def test_a_file_system_without_locks(tmp_path, monkeypatch, logger, caplog):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    owner = tmp_path / ".owner"
    with workdir_lock(tmp_path):
        assert "has no locks (No locks available)" in caplog.text
        assert owner.read_text() == f"{socket.gethostname()} {os.getpid()}"
        with pytest.raises(WorkdirError, match=f"machine and process .* {os.getpid()}"), workdir_lock(tmp_path):
            pass
    assert not owner.exists()
    owner.write_text(f"{socket.gethostname()} {2**22 + 1}")  # a killed process
    with workdir_lock(tmp_path):
        pass
    owner.write_text("another-machine 1")
    with pytest.raises(WorkdirError, match="another-machine 1.*delete"), workdir_lock(tmp_path):
        pass


def test_what_predict_finds(tmp_path):
    for name in ("trip [2024]/a.png", "trip [2024]/.ipynb_checkpoints/b.png", "trip [2024]/below/c.jpg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    folder = tmp_path / "trip [2024]"
    assert find_images(str(folder)) == [folder / "a.png", folder / "below/c.jpg"]
    assert find_images(f"{folder}/*.png") == [folder / "a.png"]
    assert find_images(f"{folder}/**/*.jpg") == [folder / "below/c.jpg"]
    assert find_images(f"{tmp_path}/*/a.png") == [folder / "a.png"]


def test_the_table_of_situations_names_tests_that_there_are():
    table = (ROOT / "docs/situations.md").read_text(encoding="utf-8")
    named = re.findall(r"(?:(test_\w+\.py)(?:::(test_\w+))?)|`(test_\w+)`", table)
    assert len(named) > 40
    file = ""
    for found, test, alone in named:
        file = found or file
        text, name = (ROOT / "tests" / file).read_text(encoding="utf-8"), test or alone
        assert not name or f"def {name}(" in text, (file, name)
