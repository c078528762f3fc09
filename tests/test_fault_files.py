"""Damaged files, full disks and unusable workdirs, tested on the program in a subprocess."""

import json
import os
import shutil

import pytest

from configs import digits
from faults import (
    POWERLESS,
    STEPS,
    TINY,
    Started,
    arrays,
    assert_ends_alike,
    chance,
    error_of,
    fill,
    limited,
    metrics,
    run,
    small_disk,  # noqa: F401
    uninterrupted,  # noqa: F401
)
from regnet_flax import main
from regnet_flax.training.optimizer import changed_rate


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped after two epochs, with checkpoints at steps 16, 20 and 22."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    settings = ["--config.train.max_steps=22", "--config.checkpoint.keep=3", "--config.checkpoint.keep_best=0"]
    run(*TINY, *settings, "--workdir", workdir, check=0)
    return workdir


@pytest.fixture
def workdir(stopped, tmp_path):
    copy = shutil.copytree(stopped, tmp_path / "run")
    (copy / "results.json").unlink()
    return copy


def steps(path):
    return sorted(int(entry.name) for entry in (path / "checkpoints").iterdir() if entry.name.isdigit())


def files(path):
    return sorted(file for file in path.rglob("*") if file.is_file())


# Damaged checkpoints


def arrays_of(path):
    """Returns the file that holds most of the newest checkpoint's arrays."""
    return max(files(path / "22/state"), key=lambda file: file.stat().st_size)


def truncate(path, random):
    file = arrays_of(path)
    os.truncate(file, random.randrange(file.stat().st_size))


def flip(path, random):
    file = arrays_of(path)
    content = bytearray(file.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    file.write_bytes(content)


def empty_files(path, random):
    for file in files(path / "22"):
        file.write_bytes(b"")


def empty_directory(path, random):
    shutil.rmtree(path / "22")
    (path / "22").mkdir()


def stray_step(path, random):
    (path / "60").mkdir()


def take_permissions(path, random):
    (path / "22").chmod(0)


def take_permissions_of_files(path, random):
    for file in files(path / "22"):
        file.chmod(0)


def spoil_record(path, random):
    record = json.loads((path / "22/record/metadata").read_text())
    record["seconds"] += 1
    (path / "22/record/metadata").write_text(json.dumps(record))


DAMAGE = {
    truncate: "the newest checkpoint truncated at a random byte",
    flip: "a random bit of the newest checkpoint flipped",
    empty_files: "every file of the newest checkpoint emptied",
    empty_directory: "the newest checkpoint's directory emptied",
    stray_step: "a stray empty step directory",
    take_permissions: "no permission for the newest checkpoint",
    take_permissions_of_files: "no permission for the newest checkpoint's files",
    spoil_record: "the newest checkpoint's record changed",
}
CASES = [(how, case) for how in DAMAGE for case in range(3 if how in (truncate, flip) else 1)]


@pytest.mark.slow
@pytest.mark.parametrize(("how", "case"), CASES, ids=[f"{how.__name__}-{case}" for how, case in CASES])
def test_a_damaged_checkpoint(how, case, workdir, uninterrupted, fault):  # noqa: F811
    how(workdir / "checkpoints", chance(how.__name__, case))
    done = run(*TINY, "--workdir", workdir, check=0, before=POWERLESS)
    fault(DAMAGE[how])
    named = [line for line in done.stdout.splitlines() if "is damaged and is skipped: " in line]
    if how in (truncate, flip) and not named:  # no array depends on these bytes, as the checksums show
        assert "resuming from the checkpoint at step 22" in done.stdout
    else:
        (line,) = named
        step = 60 if how is stray_step else 22
        assert line.startswith(f"warning: checkpoint {step} is damaged and is skipped: ")
        assert f"resuming from the checkpoint at step {22 if how is stray_step else 20} of" in done.stdout
        assert (workdir / f"checkpoints/damaged/{step}").is_dir()
    assert_ends_alike(workdir, uninterrupted)


@pytest.mark.slow
def test_what_is_no_checkpoint_is_left_alone(workdir, uninterrupted, fault):  # noqa: F811
    path = workdir / "checkpoints"
    shutil.copytree(path / "22", path / "24.orbax-checkpoint-tmp")
    (path / "28.orbax-checkpoint-tmp").write_text("a file")
    foreign = [path / "notes.txt", path / "999", path / ".hidden/x", path / "best/metrics/metrics"]
    for file in foreign:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    done = run(*TINY, "--workdir", workdir, check=0)
    fault("a half-written save in the directory")
    fault("foreign files in the directory of checkpoints")
    assert "resuming from the checkpoint at step 22" in done.stdout
    assert all(file.read_text() == "mine" for file in foreign)
    assert not (path / "24.orbax-checkpoint-tmp").exists() and (workdir / "config.json").exists()
    (path / "28.orbax-checkpoint-tmp").unlink(missing_ok=True)  # named like an unfinished save
    assert_ends_alike(workdir, uninterrupted)


@pytest.mark.slow
@pytest.mark.fault("every checkpoint damaged")
def test_where_no_checkpoint_is_whole_the_run_stops(workdir):
    for step in steps(workdir):
        for file in files(workdir / f"checkpoints/{step}/state"):
            file.write_bytes(b"")
    before = {file: file.read_bytes() for file in files(workdir / "checkpoints")}
    line = error_of(run(*TINY, "--workdir", workdir), 1)
    assert "none of the checkpoints in" in line and "step 22" in line and "--workdir" in line
    assert {file: file.read_bytes() for file in files(workdir / "checkpoints")} == before


# Other files of the workdir


@pytest.mark.slow
@pytest.mark.fault("a damaged results.json or metrics.jsonl")
def test_damaged_results_and_metrics_are_mended(uninterrupted, tmp_path):  # noqa: F811
    copy = shutil.copytree(uninterrupted, tmp_path / "run")
    (copy / "results.json").write_text('{"last": ')
    with open(copy / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 9\xff\n[]\n{"ste')
    done = run(*TINY, "--workdir", copy, check=0)
    assert "results.json is damaged and is ignored" in done.stdout
    assert done.stdout.count("metrics.jsonl has a damaged line") >= 3
    results = json.loads((copy / "results.json").read_text())
    expected = json.loads((uninterrupted / "results.json").read_text())
    assert results["last"] == expected["last"] and results["best"] == expected["best"]
    assert_ends_alike(copy, uninterrupted)


def tiny(workdir, *more):
    """Runs in this process: the program refuses before it compiles anything."""
    return main.main([*TINY, "--workdir", str(workdir), *more])


DAMAGED_CONFIGS = [
    b"",
    b'{"train": ',
    b"[]",
    b"3",
    b"{}",
    b"\xff\xfe",
    b'{"train": {"epochs": 6}}',
    b'{"train": 3}',
    None,
]


@pytest.mark.fault("a damaged config.json")
@pytest.mark.parametrize("content", DAMAGED_CONFIGS)
def test_a_damaged_config_is_one_line(content, tmp_path, capsys):
    (tmp_path / "run/checkpoints/20").mkdir(parents=True)
    if content is not None:
        (tmp_path / "run/config.json").write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    for arguments in ([], ["--mode=eval"], ["--mode=export"]):
        assert tiny(tmp_path / "run", *arguments) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ") and str(tmp_path / "run") in line and "--workdir" in line
    assert sorted(tmp_path.rglob("*")) == before


# Changed config


def config_of(epochs, schedule, boundaries=(), warmup=0.0):
    config = digits.get_config()
    config.train.epochs, config.optimizer.schedule = epochs, schedule
    config.optimizer.boundaries, config.optimizer.warmup_epochs = boundaries, warmup
    return config


@pytest.mark.fault("another number of epochs, where a rate already used depends on it")
@pytest.mark.parametrize(
    ("config", "step", "first"),
    [
        (config_of(30, "constant"), 500, None),
        (config_of(30, "step", (10, 20)), 500, None),
        (config_of(30, "step", (0.5,)), 125, None),  # half of 25 epochs of 10 steps has not been reached
        (config_of(30, "step", (0.5,)), 126, 126),
        (config_of(20, "step", (0.5,)), 101, 101),
        (config_of(30, "cosine"), 1, None),
        (config_of(30, "cosine"), 2, 2),
        (config_of(30, "cosine", warmup=2.0), 21, None),
        (config_of(30, "cosine", warmup=2.0), 30, 22),
        (config_of(25, "cosine"), 250, None),
        (config_of(30, "constant"), 10**12, None),  # a stray directory with such a number
    ],
)
def test_epochs_may_change_where_no_rate_already_used_does(config, step, first):
    message = changed_rate(config, 25, 10, step)
    assert message == "" if first is None else f"step {first} was" in message


@pytest.mark.slow
def test_a_run_that_goes_on_with_other_epochs(workdir, tmp_path, uninterrupted, fault):  # noqa: F811
    fault("resumed with other epochs under a cosine")
    line = error_of(run(*TINY, "--config.train.epochs=9", "--workdir", workdir), 2)
    assert "train.epochs=6, now 9: the learning rate of step 13 was" in line
    fault("resumed with other epochs under constant rates")
    constant = [*TINY, "--config.optimizer.schedule=constant"]
    longer = [*constant, "--config.train.epochs=7", "--workdir"]
    run(*constant, "--workdir", tmp_path / "short", check=0)
    done = run(*longer, tmp_path / "short", check=0)
    assert f"resuming from the checkpoint at step {STEPS} of 77" in done.stdout
    run(*longer, tmp_path / "long", check=0)
    assert metrics(tmp_path / "short") == metrics(tmp_path / "long")
    resumed, expected = (arrays(tmp_path / name, 77) for name in ("short", "long"))
    assert all(resumed[name].tobytes() == expected[name].tobytes() for name in expected)


# Full disks


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["save", "evaluate", "figures"])
def test_a_full_disk(phase, small_disk, uninterrupted, fault):  # noqa: F811
    disk = small_disk(3000)
    with Started(*TINY, "--workdir", disk / "run") as started:
        assert started.until(f"+{phase}", 1 if phase == "figures" else 3)
        ballast = fill(disk)
        code, out = started.end(timeout=60)
    fault(f"a full disk: {phase}")
    assert code == 1, out
    line = out.strip().splitlines()[-1]
    assert line.startswith("error: ") and "No space left on device" in line and "make room" in line
    done = run("--mode=eval", "--workdir", disk / "run", "--config.eval.checkpoint=last", check=0)
    assert "test loss" in done.stdout  # while the disk is still full
    ballast.unlink()
    run(*TINY, "--workdir", disk / "run", check=0)
    assert_ends_alike(disk / "run", uninterrupted)


@pytest.mark.slow
def test_a_full_disk_while_it_logs(small_disk, fault):  # noqa: F811
    """Only metrics.jsonl, TensorBoard's events and train.log grow."""
    disk = small_disk(3000)
    settings = ["--config.log.every_steps=1", "--config.checkpoint.every_steps=1000", "--config.eval.every_epochs=0"]
    with Started(*TINY, *settings, "--workdir", disk / "run") as started:
        assert started.until("+train", 3)
        ballast = fill(disk)
        code, out = started.end(timeout=60)
    fault("a full disk: metrics")
    line = out.strip().splitlines()[-1]
    assert code == 1 and line.startswith("error: ") and "No space left on device" in line, out
    ballast.unlink()
    run(*TINY, *settings, "--workdir", disk / "run", check=0)
    assert [line["step"] for line in metrics(disk / "run")] == list(range(1, STEPS + 1))


@pytest.mark.thorough
@pytest.mark.fault("files that may not grow beyond 8 KiB")
def test_a_limit_on_the_size_of_files(tmp_path):
    short = [*TINY, "--config.train.max_steps=11"]
    run(*short, "--workdir", tmp_path / "uninterrupted", check=0)  # afterwards the compilation cache need not grow
    line = error_of(run(*short, "--workdir", tmp_path / "run", before=limited(8192)), 1)
    assert "File too large" in line and "make room" in line
    run(*short, "--workdir", tmp_path / "run", check=0)
    assert_ends_alike(tmp_path / "run", tmp_path / "uninterrupted", step=11)


@pytest.mark.slow
@pytest.mark.fault("the directory of checkpoints removed during a run")
def test_a_failed_save_does_not_delay_the_end(tmp_path):
    """Otherwise its threads would wait for each other for five minutes."""
    with Started(*TINY, "--workdir", tmp_path / "run") as started:
        assert started.until("+save", 2)
        (tmp_path / "run/checkpoints").rename(tmp_path / "run/taken")
        (tmp_path / "run/checkpoints").write_text("a file in its place")
        code, out = started.end(timeout=100)
    assert code == 1 and out.strip().splitlines()[-1].startswith("error: a checkpoint cannot be written"), out


# Workdirs that cannot be used


@pytest.mark.fault("a workdir that is a file, or below one")
def test_a_workdir_that_is_a_file_or_below_one(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file/run"):
        assert tiny(path) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"error: --workdir {path} ") and "name a" in line
    assert (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_a_read_only_workdir(workdir, tmp_path, fault):
    (tmp_path / "parent").mkdir()
    for path in (workdir, tmp_path / "parent"):
        path.chmod(0o555)
    for path in (workdir, tmp_path / "parent/run"):
        before = {file: file.read_bytes() for file in files(workdir)}
        line = error_of(run(*TINY, "--workdir", path, before=POWERLESS), 2)
        fault("a read-only workdir")
        assert f"--workdir {path} cannot be written to" in line
        assert {file: file.read_bytes() for file in files(workdir)} == before
    os.chmod(workdir / "checkpoints", 0o555)
    done = run("--mode=eval", "--workdir", workdir, "--config.eval.checkpoint=last", before=POWERLESS, check=0)
    assert "step 22:" in done.stdout
    for path in (workdir, workdir / "checkpoints", tmp_path / "parent"):
        path.chmod(0o755)
