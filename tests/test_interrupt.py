"""The workdir's lock, and the signals that stop a run."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from regnet_flax.errors import Interrupted, WorkdirError
from regnet_flax.training import signals
from regnet_flax.training.signals import StopSignals
from regnet_flax.training.workdir import workdir_lock

ROOT = pathlib.Path(__file__).parents[1]

HOLD = """
import pathlib, sys, time
from regnet_flax.training.workdir import workdir_lock
with workdir_lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.fault("the lock's holder killed")
def test_the_lock_keeps_another_process_out_until_its_holder_is_gone(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            for _ in range(2):  # a refusal leaves the holder's number in place
                with (
                    pytest.raises(WorkdirError, match=f"process {holder.pid}") as caught,
                    workdir_lock(tmp_path / "run"),
                ):
                    pass
            assert "\n" not in str(caught.value)
            with workdir_lock(tmp_path / "other"):
                pass
        finally:
            holder.kill()
            holder.wait()
    assert holder.returncode == -signal.SIGKILL
    with workdir_lock(tmp_path / "run"):
        assert (tmp_path / "run/.lock").read_text() == str(os.getpid())


def test_the_lock_is_free_after_use_and_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), workdir_lock(tmp_path):
        raise RuntimeError
    with workdir_lock(tmp_path), pytest.raises(WorkdirError), workdir_lock(tmp_path):
        pass


def test_a_workdir_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(WorkdirError, match="is a file: name a directory") as caught, workdir_lock(tmp_path / "run"):
        pass
    assert "\n" not in str(caught.value) and str(tmp_path / "run") in str(caught.value)
    assert (tmp_path / "run").read_text() == "mine"


def test_a_workdir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file/run", tmp_path / ("x" * 300)):
        with pytest.raises(WorkdirError, match="cannot be written to: .*; name another") as caught, workdir_lock(path):
            pass
        assert "\n" not in str(caught.value)


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_said_and_the_handlers_come_back(number, monkeypatch):
    said = []
    monkeypatch.setattr(signals.logger, "info", lambda text, *values: said.append(text % values))
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with StopSignals() as stop:
        assert stop.received is None
        assert signal.getsignal(number) not in before
        os.kill(os.getpid(), number)
        assert stop.received == number
    again = "; a second signal stops at once, without saving"
    assert said == [f"{number.name}: stopping after this step, then saving{again}"]
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    assert Interrupted(number, "stopped").exit_code == 128 + number


def test_a_signal_that_a_run_leaves_stops_the_comparison_around_it():
    with StopSignals() as outer:
        with StopSignals():
            os.kill(os.getpid(), signal.SIGTERM)  # after the run's last look
        assert outer.received == signal.SIGTERM
        with StopSignals() as stop, pytest.raises(Interrupted):
            stop.check()


@pytest.mark.fault("a second SIGTERM")
def test_a_second_signal_ends_the_process_at_once():
    code = (
        "import os, signal\nfrom regnet_flax.training.signals import StopSignals\n"
        "with StopSignals():\n    for _ in range(2): os.kill(os.getpid(), signal.SIGTERM)\n    print('still here')"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (143, "")
