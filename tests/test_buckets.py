"""Workdirs, data and exports in buckets: by fsspec's memory://, and thoroughly by emulators of S3 and GCS."""

import importlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys

import fsspec
import numpy as np
import pytest
from PIL import Image

import regnet_flax
from helpers import checksums, environment, error_of, few_digits, metrics, run_program, wait_until
from regnet_flax import places
from regnet_flax.errors import DataError, PlaceError, UsageError, WorkdirError
from regnet_flax.files import read_json_lines
from regnet_flax.places import lease, mirror
from regnet_flax.places.bucket import Bucket, filesystem
from regnet_flax.places.lease import Lease
from regnet_flax.places.local import Local, update
from regnet_flax.places.mirror import Mirror

RUN = ["--config.model.name=resnet8", "--config.model.overrides.width=4", "--config.train.batch_size=32"]
RUN += ["--config.train.epochs=3", "--config.eval.batch_size=25", "--config.log.every_steps=5"]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """`machine(name)`: from now on this is a machine of that name, with what it has on its disk; an empty memory://."""

    def be(name):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))

    monkeypatch.setattr(mirror, "POLL", 0.05)
    filesystem.cache_clear()
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    be("first")
    yield be
    memory.store.clear()


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# The order in which things are sent


class Killed(BaseException):
    pass


def write(folder, contents):
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")


def step(number, version):
    return {f"{number}/state": f"{number} {version}", f"{number}/d/{version}": "arrays", f"{number}/last": version}


# From the number of a step to the contents that it has in the course of a run.
METRICS = ("{}", '{"a": 1}')
WHOLE = {10: [step(10, "a")], 20: [step(20, "a"), step(20, "b"), *(step(20, "b") | {"20/metrics": m} for m in METRICS)]}


def course(run):
    """A run's life, in which its second checkpoint is damaged and taken again: yields whenever things are sent."""
    steps = run / "checkpoints"
    write(run, {"config.json": "{}", "train.log": "began", "metrics.jsonl": '{"step": 5}\n', ".lock": "1"})
    yield
    write(run, {"metrics.jsonl": '{"step": 5}\n{"step": 10}\n'})
    write(steps, step(10, "a"))
    yield
    write(run, {"metrics.jsonl": '{"step": 10}\n{"step": 20}\n', "train.log": "went on"})
    write(steps, step(20, "a"))
    write(steps, {"30.orbax-checkpoint-tmp/state": "half"})
    yield
    (steps / "damaged").mkdir()
    (steps / "20").rename(steps / "damaged/20")
    write(steps, step(20, "b"))
    yield
    shutil.rmtree(steps / "10")
    shutil.rmtree(steps / "30.orbax-checkpoint-tmp")
    yield
    write(steps, {"20/metrics": METRICS[0]})
    yield
    write(steps, {"20/metrics": METRICS[1]})
    write(run, {"figures/a.png": "a", "results.json": "{}"})
    yield


def check_readable(found, sent):
    """What another machine finds when `sent` of the course's stages were sent whole."""
    steps = found / "checkpoints"
    numbers = [int(path.name) for path in steps.iterdir()] if steps.exists() else []
    for number in numbers:
        contents = {f"{number}/{name}": content.decode() for name, content in files(steps / str(number)).items()}
        assert contents in WHOLE[number]
    if numbers:
        assert (found / "config.json").exists()
        assert max(numbers) <= max(line["step"] for line in read_json_lines(found / "metrics.jsonl"))
    assert bool(numbers) >= (sent >= 2)
    assert not (found / "results.json").exists() or files(steps) == {n: c.encode() for n, c in WHOLE[20][3].items()}


def test_killed_at_any_moment_what_is_in_the_bucket_is_whole(machine, monkeypatch):
    """Each object that is written or deleted is a moment; then the run goes on here, or is read elsewhere."""
    count, moment = 0, 0

    def tick():
        nonlocal count
        count += 1
        if count == moment:
            raise Killed

    def one_by_one(name):
        whole = getattr(Bucket, name)

        def each(self, items):
            for item in list(items):
                tick()
                whole(self, {item: items[item]} if isinstance(items, dict) else [item])

        return each

    for name in ("write", "send", "delete"):
        monkeypatch.setattr(Bucket, name, one_by_one(name))
    monkeypatch.setattr(Mirror, "_run", lambda self: None)
    monkeypatch.setattr(lease, "_ended_here", lambda owner: True)
    ended = False
    while not ended:
        moment += 1
        count, sent, url = 0, 0, f"memory://bucket/run{moment}"
        machine(f"first{moment}")
        local = Local.of(Bucket(url))
        stages = course(local.files)
        try:
            held = Lease(local.bucket, "first")
            local.note("first", unsent=True)
            sender = Mirror(local.files, local.bucket, held, local.links, fetched=True)
            for _ in stages:
                sender._send()
                sent += 1
            ended = True
        except Killed:
            machine(f"second{moment}")
            elsewhere = Local.of(Bucket(url))
            update(elsewhere)
            check_readable(elsewhere.files, sent)
            machine(f"first{moment}")
            held = Lease(local.bucket, "first again")
            assert held.previous in ("first", "")
            sender = Mirror(local.files, local.bucket, held, local.links, fetched=False)
            sender._send()
            for _ in stages:
                sender._send()
        machine(f"third{moment}")
        elsewhere = Local.of(Bucket(url))
        update(elsewhere)
        left = {n: c for n, c in files(local.files).items() if "damaged" not in n and not n.startswith(".")}
        assert files(elsewhere.files) == left
    assert moment > 25


def test_a_checkpoint_that_is_deleted_while_it_is_sent_is_sent_whole(machine, monkeypatch):
    """As where a network is slower than the run, which keeps one checkpoint."""
    monkeypatch.setattr(Mirror, "_run", lambda self: None)
    local = Local.of(Bucket("memory://bucket/run"))
    write(local.files / "checkpoints", step(10, "a"))
    sender = Mirror(local.files, local.bucket, Lease(local.bucket, "here"), local.links, fetched=False)
    send = Bucket.send

    def slowly(self, items):
        shutil.rmtree(local.files / "checkpoints/10", ignore_errors=True)
        send(self, items)

    monkeypatch.setattr(Bucket, "send", slowly)
    sender._send()
    machine("second")
    update(elsewhere := Local.of(local.bucket))
    assert files(elsewhere.files / "checkpoints") == {n: c.encode() for n, c in WHOLE[10][0].items()}


def test_a_run_that_was_copied_into_a_bucket(machine, monkeypatch):
    """There is no list of whole checkpoints, so that all of them count."""
    bucket = Bucket("memory://bucket/copied")
    copied = {f"checkpoints/{name}": text for name, text in step(10, "a").items()} | {"config.json": "{}"}
    bucket.write({name: text.encode() for name, text in copied.items()})
    monkeypatch.setattr(Bucket, "send", lambda self, items: {} == items or pytest.fail(f"sent again: {items}"))
    with places.local_workdir(bucket.url, hold=True) as run:
        assert {name: content.decode() for name, content in files(run).items()} == copied
    assert json.loads(bucket.read("checkpoints/committed.json")).keys() == step(10, "a").keys()
    monkeypatch.undo()


def test_one_run_at_a_time(machine, monkeypatch):
    monkeypatch.setattr(lease, "LEASE", 0.4)
    bucket = Bucket("memory://bucket/run")
    first = Lease(bucket, "first")
    with pytest.raises(
        WorkdirError, match=r"another run \(machine .*, process \d+\) is training in memory://bucket/run"
    ):
        Lease(bucket, "second")
    first.release()
    second = Lease(bucket, "second")
    assert second.previous == "first"
    second.release(tell=False)  # as if its machine were gone
    last_owner_before = lease._last_owner(bucket.below(lease.LOCK))
    third = Lease(bucket, "third")
    assert not second.holds() and third.holds()
    # Of two that have seen the same, one comes first.
    last_owner, seen = lease._last_owner, [last_owner_before]
    monkeypatch.setattr(lease, "_last_owner", lambda objects: seen.pop() if seen else last_owner(objects))
    with pytest.raises(WorkdirError, match="another run"):
        Lease(bucket, "fourth")
    assert not seen and third.holds()
    third.release()


# Whole runs


def same_end(found, expected, step=12):
    assert checksums(found, step) == checksums(expected, step)
    assert metrics(found) == metrics(expected)


@pytest.mark.thorough
def test_a_run_in_a_bucket_goes_on_on_another_machine(machine, tmp_path, monkeypatch):
    url, reference, run = "memory://bucket/runs/a", tmp_path / "reference", [*RUN, "--config.eval.every_epochs=0"]
    with few_digits():
        run_program(*run, f"--workdir={reference}", check=0)
        monkeypatch.setattr("regnet_flax.training.run.Run._logs_here", stop_at(6))
        done = run_program(*run, f"--workdir={url}", check=128 + signal.SIGTERM)
        assert "Saved at step 6" in done.stderr
        monkeypatch.undo()
        machine("second")
        done = run_program(*run, f"--workdir={url}", check=0)
        assert f"results: {url}/results.json" in done.stdout and str(tmp_path) not in done.stdout
        assert "resuming from the checkpoint at step 6" in done.stdout
    machine("third")
    same_end(places.fetch(url), reference)


def stop_at(step):
    from regnet_flax.training.run import Run

    logs_here = Run._logs_here

    def logs(self):
        if self.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return logs_here(self)

    return logs


@pytest.mark.thorough
def test_every_mode_on_a_run_in_a_bucket(machine, tmp_path):
    url, memory = "memory://bucket/runs/a", fsspec.filesystem("memory")
    images, path = tmp_path / "digit.png", "memory://bucket/exported/w.pth"
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(images)
    memory.put(str(images), "/bucket/images/digit.png")
    predict = ["--mode=predict", "--config.predict.json", "--config.predict.images=memory://bucket/images"]
    with few_digits():
        run_program(*RUN, f"--workdir={url}", check=0)
        machine("second")
        run_program("--mode=eval", f"--workdir={url}", check=0)
        run_program("--mode=analyze", f"--workdir={url}", check=0)
        run_program("--mode=export", f"--workdir={url}", f"--config.export.path={path}", check=0)
        first = json.loads(run_program(*predict, f"--workdir={url}", check=0).stdout)
    assert first["workdir"] == url and first["picture"] == f"{url}/figures/predict.png"
    (prediction,) = first["predictions"]
    assert prediction["file"] == "memory://bucket/images/digit.png"
    names = "runs/a/eval.json runs/a/analysis.json runs/a/figures/predict.png exported/w.pth exported/README.md"
    assert {f"/bucket/{name}" for name in names.split()} <= set(memory.find("/bucket"))
    machine("third")
    trained = regnet_flax.load(url)
    assert trained.predict(images)[0].argmax() == trained.class_names.index(prediction["top"][0]["class"])
    # What is beside a file of PyTorch's says which classes it has.
    weights = [*RUN[:2], "--workdir=memory://bucket/none", f"--config.model.init_from={path}"]
    again = json.loads(run_program(*predict, *weights, check=0).stdout)
    assert again["predictions"] == first["predictions"]


def test_the_network_goes_during_a_run(machine, monkeypatch, logger, caplog):
    url = "memory://bucket/run"
    local, write = Local.of(Bucket(url)), Bucket.write

    def fail(self, items):
        raise PlaceError(f"{self.url} cannot be used (gone): check the network and the disk")

    with pytest.raises(PlaceError) as caught, places.local_workdir(url, hold=True) as run:
        (run / "config.json").write_text("{}")
        wait_until(lambda: Bucket(url).read("config.json"))
        monkeypatch.setattr(Bucket, "write", fail)
        (run / "metrics.jsonl").write_text("1")
        wait_until(lambda: f"(gone): check the network and the disk; training continues in {run}" in caplog.text)
        (run / "metrics.jsonl").write_text("12")
    assert f"the unsent files are in {run}, and the same command on this machine sends them" in str(caught.value)
    assert places.shown(caught.value) == str(caught.value) and places.shown(f"{run}/a") == f"{url}/a"
    assert Bucket(url).read("metrics.jsonl") is None
    monkeypatch.setattr(Bucket, "write", write)
    assert (places.fetch(url) / "metrics.jsonl").read_text() == "12"
    with places.local_workdir(url, hold=True) as run:
        (run / "results.json").write_text("{}")
        assert run == local.files and (run / "metrics.jsonl").read_text() == "12"
    assert Bucket(url).read("metrics.jsonl") == b"12"
    with places.local_workdir(url, hold=True) as run:  # a finished run that goes on is not finished
        (run / "results.json").unlink()
        wait_until(lambda: Bucket(url).read("results.json") is None)
    # If the run continued on another machine meanwhile, unsent files are kept.
    (run / "metrics.jsonl").write_text("123")
    local.note(local.place, unsent=True)
    machine("second")
    with places.local_workdir(url, hold=True) as run:
        (run / "metrics.jsonl").write_text("124")
    machine("first")
    with places.local_workdir(url, hold=True) as run:
        assert (run / "metrics.jsonl").read_text() == "124"
    (aside,) = run.parent.glob("run-*")
    assert (aside / "metrics.jsonl").read_text() == "123" and f"is kept in {aside}" in caplog.text


def test_a_folder_of_images_in_a_bucket(machine, tmp_path):
    from regnet_flax.modes.setup.datasets import open_dataset

    config = regnet_flax.main.parse(["--config=configs/folder.py", "--config.dataset.data_dir=memory://bucket/photos"])[
        0
    ]
    with pytest.raises(DataError, match="there is nothing in memory://bucket/photos"):
        open_dataset(config)
    memory = fsspec.filesystem("memory")
    for number, name in enumerate(
        f"{split}/{kind}/{i}.png" for split in ("train", "test") for kind in "ab" for i in "12"
    ):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 40, 3), 9 * number, np.uint8)).save(path)
        memory.put(str(path), f"/bucket/photos/{name}")
    found = open_dataset(config).fingerprint()
    config.dataset.data_dir = str(tmp_path / "photos")
    assert found == open_dataset(config).fingerprint()
    memory.rm("/bucket/photos/train/a/1.png")  # as it is then, and not as it was
    config.dataset.data_dir = "memory://bucket/photos"
    assert open_dataset(config).size("train") == 3


class NoCredentialsError(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ImportError("Install s3fs"), "needs the extra [s3]: pip install 'regnet-flax[s3]'"),
        (
            NoCredentialsError("Unable to locate"),
            "cannot be used without credentials: log in, for example with `aws configure`",
        ),
        (PermissionError("Access Denied"), "cannot be used without permission (PermissionError: Access Denied)"),
        (FileNotFoundError("The bucket does not exist"), "check that there is a bucket bucket"),
        (TimeoutError("it took\ntoo long"), "cannot be used (TimeoutError: it took too long): check the network"),
    ],
)
def test_what_is_missing_is_one_line(error, words, machine, monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(fsspec, "filesystem", refuse)
    for arguments in (["--workdir=s3://bucket/run"], ["--mode=eval", "--workdir=s3://bucket/run"]):
        line = error_of(run_program(*arguments, cwd=tmp_path), 2)
        assert "s3://bucket/run" in line and words in line


def test_what_is_refused_before_anything_is_made(machine, tmp_path, monkeypatch):
    for arguments, words in (
        (["--workdir=s3://"], "names no bucket"),
        (
            ["--workdir=memory://bucket/run", "--distributed=node1:1234,2,0"],
            "must be a directory that all machines see",
        ),
    ):
        assert words in error_of(run_program(*arguments, cwd=tmp_path), 2)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="must be a local path"), places.local_workdir("https://host/run", hold=True):
        pass
    assert not list(tmp_path.glob("http*"))
    bucket, store = Bucket("memory://bucket/run"), fsspec.filesystem("memory").store
    bucket.write({"a": b""})
    store["/bucket/run/../../escaped"] = store["/bucket/run/a"]
    with pytest.raises(PlaceError, match="whose name no file can have"):
        places.fetch(bucket.url)


# Emulators


@pytest.fixture(scope="module", params=["s3", "gs"])
def emulator(request):
    """A bucket's URL, and the variables by which a process finds the server that pretends to be the cloud."""
    if request.param == "s3":
        pytest.importorskip("s3fs")
        server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        server.start()
        host, port = server.get_host_and_port()
        env = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
        env |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    else:
        pytest.importorskip("gcsfs")
        create = pytest.importorskip("gcp_storage_emulator.server").create_server
        server = create("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
        server.start()
        port = server._api._httpd.socket.getsockname()[1]
        env = {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        filesystem.cache_clear()
        if request.param == "s3":
            importlib.import_module("boto3").client("s3").create_bucket(Bucket="bucket")
        yield f"{request.param}://bucket", env
    filesystem.cache_clear()
    server.stop()


# Looks for what is new all the time; after "killed N" it is killed once a checkpoint of a step above N is in the list.
PROGRAM = """
import os, re, signal, sys, time
from regnet_flax import main
from regnet_flax.places import bucket, mirror
from regnet_flax.training.checkpoint import Checkpoints

mirror.POLL, after = 0.1, int(sys.argv[1])
write, save = bucket.Bucket.write, Checkpoints.save

def save_slowly(self, *arguments):
    save(self, *arguments)
    time.sleep(0.5)

def write_and_die(self, contents):
    write(self, contents)
    steps = [int(n) for n in re.findall(rb'"(\\d+)/state', contents.get(mirror.COMMITTED, b""))]
    if steps and max(steps) > after:
        os.kill(os.getpid(), signal.SIGKILL)

bucket.Bucket.write, Checkpoints.save = write_and_die, save_slowly
sys.exit(main.main(sys.argv[2:]))
"""


@pytest.mark.thorough
def test_killed_and_resumed_on_other_machines_it_ends_bitwise_the_same(emulator, tmp_path, monkeypatch):
    url, env = emulator
    url += "/runs/digits"

    def train(machine, workdir, after, code):
        arguments = [*RUN, "--config.checkpoint.every_steps=10", f"--workdir={workdir}"]
        command = [sys.executable, "-c", PROGRAM, str(after), *arguments]
        more = environment(XDG_CACHE_HOME=str(tmp_path / machine), **env)
        done = subprocess.run(command, env=more, capture_output=True, text=True, timeout=600)
        assert done.returncode == code and "Traceback" not in done.stderr, done.stdout + done.stderr
        return done.stdout

    train("reference", tmp_path / "reference", 1000, 0)
    train("first", url, 0, -signal.SIGKILL)
    assert "resuming from the checkpoint" in train("second", url, 20, -signal.SIGKILL)
    assert "resuming from the checkpoint" in train("second", url, 60, -signal.SIGKILL)
    assert "resuming from the checkpoint" in train("third", url, 1000, 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "fourth"))
    same_end(places.fetch(url), tmp_path / "reference", 132)
    # What the clouds' own libraries say.
    missing = url.replace("bucket", "no-such-bucket")
    with pytest.raises(PlaceError, match="check that there is a bucket no-such-bucket"):
        with places.local_workdir(missing, hold=True):
            pass
    bucket = Bucket(url)
    if url.startswith("s3"):  # GCS's emulator ignores preconditions
        assert bucket.create("new", b"1") and not bucket.create("new", b"2")
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        filesystem.cache_clear()
        with pytest.raises(PlaceError, match="without credentials"):
            Bucket(url).list()
