"""Wrong configs, strange image folders and files from strangers, given on the command line."""

import ast
import json
import math
import os
import pathlib
import shutil

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from configs import digits
from faults import POWERLESS, ROOT, error_of, run
from helpers import bomb
from regnet_flax import main
from regnet_flax.config.check import check_config, flatten
from regnet_flax.config.fields import FIELDS
from regnet_flax.data.sources import load_dataset
from regnet_flax.errors import ConfigError, DataError
from regnet_flax.modes import train as loop

DEFAULTS = dict(flatten(digits.get_config()))
NOT_FINITE = st.sampled_from([math.nan, math.inf, -math.inf])
NEGATIVE = st.floats(max_value=-1e-6) | st.integers(max_value=-1)
OTHER_TYPES = st.none() | st.binary() | st.text(max_size=9) | st.lists(st.none(), min_size=1, max_size=2) | NOT_FINITE
WORDS = st.text(st.sampled_from("abcdefgxyz_0123456789. -"), min_size=1, max_size=12)


def wrong_values(field):
    """Yields values that are wrong for the field, whatever the other fields are."""
    default = DEFAULTS[field]
    if isinstance(default, bool):
        return st.integers(2) | OTHER_TYPES
    if isinstance(default, (int, float)):
        return NEGATIVE | OTHER_TYPES
    if isinstance(default, tuple):
        return (
            st.tuples(NEGATIVE.filter(lambda n: n < -10) | NOT_FINITE | st.none()) | st.integers() | st.text(max_size=5)
        )
    if FIELDS[field].check("any text"):
        return WORDS.filter(lambda text: bool(FIELDS[field].check(text))) | st.floats() | st.none() | st.binary()
    return st.none() | st.floats() | st.binary() | st.lists(st.text(), max_size=2)


CHECKED = sorted(field for field in FIELDS if not field.startswith("model."))
WRONG = st.sampled_from(CHECKED).flatmap(lambda field: st.tuples(st.just(field), wrong_values(field)))


def changed(values):
    config = digits.get_config().to_dict()
    for field, value in values.items():
        section, _, name = field.rpartition(".")
        (config[section] if section else config)[name] = value
    return config


@pytest.mark.fault("wrong values of several fields at once")
def test_all_wrong_fields_are_named_with_value_and_mend():
    counted = []

    @settings(deadline=None, max_examples=150, derandomize=True)
    @given(st.dictionaries(st.sampled_from(CHECKED), st.none(), min_size=1, max_size=4), st.data())
    def check(fields, data):
        values = {field: data.draw(wrong_values(field)) for field in fields}
        with pytest.raises(ConfigError) as caught:
            check_config(changed(values))
        lines = str(caught.value).split("\n")
        assert len(lines) == len(values)
        for field, value in values.items():
            shown = tuple(value) if isinstance(value, list) else value
            (line,) = [line for line in lines if line.startswith(f"{field} is ")]
            assert line.startswith(f"{field} is {shown!r}: it must be ")
        counted.append(len(values))

    check()
    assert len(counted) >= 150


NUMBERS = [field for field in CHECKED if type(DEFAULTS[field]) in (int, float)]
CHOICES = [field for field in CHECKED if isinstance(DEFAULTS[field], str) and FIELDS[field].check("no such")]
FLAGS = [field for field in CHECKED if isinstance(DEFAULTS[field], bool)]
TUPLES = [field for field in CHECKED if isinstance(DEFAULTS[field], tuple)]
BAD_NUMBERS = st.sampled_from(["nan", "-1", "-inf", "1e400", "--5", "1,5", "", "None", "()", "0x", "9" * 30, "-0.5"])


def arguments():
    """Yields (argument, parts of its line) for overrides that are wrong, whatever the other fields are."""

    def override(fields, values):
        pairs = st.tuples(st.sampled_from(fields), values)
        return pairs.map(lambda pair: (f"--config.{pair[0]}={pair[1]}", pair[0]))

    misspelt = st.sampled_from(sorted(FIELDS)).map(lambda f: (f"--config.{f[:-1]}=1", f[:-1].rpartition(".")[2]))
    return st.one_of(
        override(NUMBERS, BAD_NUMBERS | WORDS.filter(lambda text: not _is_number(text))),
        override(CHOICES, WORDS.filter(lambda text: text.strip() not in ("best", "last") and not text.isdecimal())),
        override(FLAGS, st.sampled_from(["maybe", "2", "-1", "nan", "tru"])),
        override(TUPLES, st.sampled_from(["(-99,)", "(nan,)", "('x',)", "(None,)", "(1", "((1,),)"])),
        misspelt,
        st.sampled_from(
            [
                (
                    "--config.optimizer.schedule=step --config.optimizer.boundaries=(9,3)",
                    "optimizer.boundaries is (9, 3)",
                ),
                ("--config.train.batch_size=100000", "train.batch_size is 100000"),
                ("--config.model.name=regnet21_convlstm", "6m+2"),
                ("--config.model.name=regnet20_convlsmt", "regnet20_convlstm"),
                ("--config.model.overrides.width=-3", "width is -3"),
                ("--config.optimizer.nesterov=True --config.optimizer.momentum=0.0", "optimizer.momentum above 0"),
                ("--config.dataset.augment=('crop','crp')", "dataset.augment is ('crop', 'crp')"),
            ]
        ),
    )


def _is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


@pytest.mark.fault("wrong values on the command line")
def test_a_wrong_value_on_the_command_line_is_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "make_trainer", None)  # a value that gets this far was not refused
    counted = []

    @settings(deadline=None, max_examples=150, derandomize=True)
    @given(arguments())
    @example(("--config.train.batch_size=9\n9", "train.batch_size"))
    @example(("--config.seed=" + "9" * 30, "2147483647"))
    def check(argument):
        text, expected = argument
        given_arguments = text.split(" --") if " --config" in text else [text]
        given_arguments = [part if part.startswith("--") else f"--{part}" for part in given_arguments]
        capfd.readouterr()
        assert main.main(given_arguments) == 2, text
        (line,) = capfd.readouterr().err.strip().split("\n")
        assert line.startswith("error: ") and expected in line, (text, line)
        for part in given_arguments:
            field, _, value = part.removeprefix("--config.").partition("=")
            if expected == field and value.strip().isalpha():
                assert value.strip() in line and "must be" in line, (text, line)
        assert not list(tmp_path.iterdir())
        counted.append(text)

    check()
    assert len(counted) >= 150


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.train.batch_size=many"], ["train.batch_size is 'many'", "a whole number of at least 1"]),
        (["--config.optimizer.learning_rate=nan"], ["optimizer.learning_rate is nan", "above 0"]),
        (["--config.train.batch_size=30"], ["train.batch_size is 30", "4 devices", "28"]),
        (["--config.dataset.augment=('crop',)", "--config.dataset.image_size=9000"], ["image_size is 9000", "8192"]),
        (["--config.model.name=regnet20_convlsmt"], ["regnet20_convlsmt", "regnet20_convlstm"]),
        (["--config.optimizr.decay=1"], ["optimizr", "optimizer"]),
    ],
)
def test_wrong_input_in_a_process_of_its_own(arguments, words, tmp_path, fault):
    environment = {"JAX_NUM_CPU_DEVICES": "4"}
    done = run(*arguments, "--workdir", tmp_path / "run", cwd=tmp_path, env=environment)
    line = error_of(done, 2)
    assert all(word in line for word in words) and not list(tmp_path.iterdir())
    fault("wrong values, in a separate process")


# Image folders


def draw(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path, format="PNG")


@pytest.fixture
def folder(tmp_path):
    """A folder with two classes of four train and two test images."""
    root = tmp_path / "data"
    for split, count in (("train", 4), ("test", 2)):
        for number in range(count):
            draw(root / split / "ant" / f"{number}.png", (250, 9 * number, 0))
            draw(root / split / "bee" / f"{number}.png", (0, 9 * number, 250))
    return root


def spoil(root, how):
    path = root / "train/ant/3.png"
    path.unlink()
    if how == "zero bytes":
        path.write_bytes(b"")
    elif how == "not an image":
        path.write_bytes(b"#!/bin/sh\n" * 99)
    elif how == "20,000 × 20,000 pixels":
        bomb(path, 20_000)
    elif how == "10,000 × 10,000 pixels":
        bomb(path, 10_000)
    elif how == "a symbolic link to itself":
        path.symlink_to(path)
    elif how == "a dangling symbolic link":
        path.symlink_to(root / "nowhere.png")
    elif how == "a named pipe":
        os.mkfifo(path)
    elif how == "unreadable":
        draw(path, (250, 0, 0))
        path.chmod(0)
    elif how == "a name with a newline":
        path = path.with_name("3\n4.png")
        path.write_bytes(b"no image")
    elif how == "a name that is not UTF-8":
        path = pathlib.Path(os.fsdecode(os.fsencode(path.parent) + b"/caf\xe9.png"))
        path.write_bytes(b"no image")
    return path


SPOILT = ["zero bytes", "not an image", "20,000 × 20,000 pixels", "10,000 × 10,000 pixels", "a symbolic link to itself"]
SPOILT += ["a dangling symbolic link", "a named pipe", "a name with a newline", "a name that is not UTF-8"]


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_image_is_listed_and_left_out(how, folder, fault):
    path = spoil(folder, how)
    dataset = load_dataset("folder", data_dir=str(folder), image_size=8)
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 1] and dataset.train.images.shape == (7, 8, 8, 3)
    (skipped,) = dataset.skipped
    assert str(path.parent) in skipped and skipped.isprintable()
    with pytest.raises(DataError) as caught:
        load_dataset("folder", data_dir=str(folder), image_size=8, strict=True)
    assert str(caught.value).isprintable() and "dataset.strict=False" in str(caught.value)
    fault(f"an image file: {how}")


TRAIN = ["--config=configs/rnn_photos.py:resnet8", "--config.model.overrides.width=4"]
TRAIN += ["--config.dataset.image_size=8", "--config.train.batch_size=4", "--config.train.epochs=1"]
TRAIN += ["--config.dataset.augment=()"]
TRAIN += ["--config.optimizer.boundaries=(0.5,)"]


@pytest.mark.slow
def test_a_run_on_a_strange_folder(folder, tmp_path, fault):
    """All of these at once, and classes with unprintable names."""
    (folder / "train/bee").rename(folder / "train/b\ne")
    (folder / "test/bee").rename(folder / "test/b\ne")
    name = os.fsdecode(b"caf\xe9")
    for split in ("train", "test"):
        for number in range(2):
            draw(folder / split / name / f"{number}.png", (9, 250, number))
    for number, how in enumerate([*SPOILT, "unreadable"]):
        draw(folder / "train/ant/3.png", (250, 0, 0))
        spoilt = spoil(folder, how)
        spoilt.rename(spoilt.with_name(f"x{number}-{spoilt.name}"))
        fault(f"training on a folder with an image file: {how}")
    fault("training on classes whose names have newlines or are not UTF-8")
    workdir = tmp_path / "run"
    command = [*TRAIN, f"--config.dataset.data_dir={folder}", "--workdir", workdir]
    done = run(*command, before=POWERLESS, check=0, env={"PYTHONUTF8": "1"})
    left_out = [line for line in done.stdout.splitlines() if line.startswith("warning: left out ")]
    assert len(left_out) == len(SPOILT) + 1
    assert json.loads((workdir / "config.json").read_text())["class_names"] == ["ant", "b\ne", name]
    assert "finished run" in run(*command, before=POWERLESS, check=0).stdout
    run("--mode=eval", "--workdir", workdir, before=POWERLESS, check=0)


@pytest.mark.parametrize("where", ["train/loop", "train/ant/loop", "test/ant/loop"])
def test_loops_of_symbolic_links(where, folder, fault):
    (folder / where).symlink_to(folder)
    if where == "train/loop":  # it looks like a class
        with pytest.raises(DataError, match="has no images"):
            load_dataset("folder", data_dir=str(folder))
    else:
        dataset = load_dataset("folder", data_dir=str(folder))
        assert len(dataset.train.labels) == 8 and len(dataset.test.labels) == 4 and not dataset.skipped
    fault("a loop of symbolic links in a folder")
    (folder / where).unlink()
    (folder / where).symlink_to(folder / where)
    assert len(load_dataset("folder", data_dir=str(folder)).train.labels) == 8


@pytest.mark.slow
def test_folders_that_cannot_be_used(folder, tmp_path, fault):
    def refused(what, change, words):
        copy = shutil.copytree(folder, tmp_path / "copy")
        change(copy)
        command = [*TRAIN, f"--config.dataset.data_dir={copy}", "--workdir", tmp_path / "run"]
        line = error_of(run(*command, before=POWERLESS), 2)
        assert words in line and not (tmp_path / "run").exists()
        for path in (copy, *copy.rglob("*")):
            path.chmod(0o755)
        shutil.rmtree(copy)
        fault(f"a folder: {what}")

    def empty(copy):
        for file in (copy / "train/ant").iterdir():
            file.unlink()

    def spoil_all(copy):
        for file in (copy / "train/ant").iterdir():
            file.write_bytes(b"")

    refused("an empty class", empty, "train/ant has no images")
    refused(
        "one class only", lambda copy: [shutil.rmtree(copy / s / "ant") for s in ("train", "test")], "only one class"
    )
    refused("one class to train on", lambda c: shutil.rmtree(c / "train/ant"), "only one class (bee)")
    refused("no class with an image that decodes", spoil_all, "none of its 4 image files decodes")
    refused("unreadable", lambda copy: (copy / "train").chmod(0), "cannot be listed")
    refused("a class that is unreadable", lambda copy: (copy / "train/ant").chmod(0), "cannot be listed")
    refused("no test split", lambda copy: shutil.rmtree(copy / "test"), "has no directory test")


# Files from strangers


def test_nothing_unpickles_or_runs_what_a_file_says():
    """Except torch.load with weights_only=True, and the config files that the user names."""
    forbidden = {
        "pickle",
        "cPickle",
        "dill",
        "cloudpickle",
        "marshal",
        "shelve",
        "joblib",
        "yaml",
        "tarfile",
        "zipfile",
    }
    loads = 0
    for file in sorted((ROOT / "regnet_flax").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not forbidden & {name.partition(".")[0] for name in names}, file
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert called not in ("eval", "exec", "compile", "__import__", "os.system"), (file, called)
            assert options.get("allow_pickle", "False") == "False", file
            if called.endswith("torch.load"):
                assert options.get("weights_only") == "True", file
                loads += 1
    assert loads, "torch.load is called otherwise"


@pytest.mark.slow
def test_a_strangers_workdir_writes_nothing_elsewhere(tmp_path, fault):
    """Its config.json names an export path; its directory of checkpoints leads outside."""
    command = ["--config.model.name=resnet8", "--config.model.overrides.width=4", "--config.train.max_steps=2"]
    run(*command, "--workdir", tmp_path / "run", check=0)
    stored = json.loads((tmp_path / "run/config.json").read_text())
    mine = tmp_path / "mine.safetensors"
    mine.write_text("mine")
    stored["export"]["path"] = str(mine)
    (tmp_path / "run/config.json").write_text(json.dumps(stored))
    run("--mode=export", "--workdir", tmp_path / "run", check=0)
    assert mine.read_text() == "mine" and (tmp_path / "run/weights.safetensors").exists()
    fault("a stranger's workdir: export.path")

    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").write_text("mine")
    checkpoints = tmp_path / "run/checkpoints"
    more = ["--config.train.max_steps=6", "--config.checkpoint.every_steps=1", "--workdir", tmp_path / "run"]
    for name in ("1", "9", "7.orbax-checkpoint-tmp"):
        (checkpoints / name).symlink_to(outside)
        line = error_of(run(*command, *more), 2)
        assert f"checkpoints/{name} is a symbolic link" in line
        (checkpoints / name).unlink()
    run(*command, *more, check=0)
    assert (outside / "keep").read_text() == "mine" and [path.name for path in outside.iterdir()] == ["keep"]
    fault("a stranger's workdir: steps that are symbolic links")


def test_a_file_of_weights_names_no_path(tmp_path):
    """Names of arrays stay names: no file of that name is written or read."""
    from safetensors.numpy import save_file

    from regnet_flax.port.weights import read_weights

    save_file({"../../outside": np.zeros(2, np.float32)}, tmp_path / "w.safetensors")
    before = sorted(tmp_path.rglob("*"))
    assert list(read_weights(tmp_path / "w.safetensors")[0]) == ["../../outside"]
    assert sorted(tmp_path.rglob("*")) == before
