"""A run's log lines and live display."""

import io
import logging
import sys
import time

import pytest

from helpers import LINE
from regnet_flax.files import duration
from regnet_flax.training import display as progress
from regnet_flax.training.display import RunDisplay, describe


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (42.4, "42 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.7, "1 h 00 min"),
        (7645, "2 h 07 min"),
        (100 * 3600, "100 h 00 min"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_a_line_as_a_person_reads_it():
    assert describe(LINE, 78000, 200, 7645) == (
        "epoch 3/200 · train loss 1.2346, acc. 56.78% · test loss 1.5000, acc. 43.21% · 2 h 07 min left"
    )
    assert describe({"step": 5, "epoch": 0.25}, 10, 1, None) == "epoch 0.25/1 · step 5/10"


def test_the_display_estimates_what_is_left_from_the_second_call_on(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    display = RunDisplay(total_steps=100, epochs=10, steps_per_epoch=10, batch_size=8, step=40)
    assert display.seconds_left() is None
    now[0] += 50  # compiling
    display.step(42)
    assert display.seconds_left() is None
    now[0] += 3
    display.step(48)
    assert display.seconds_left() == pytest.approx(3 / 6 * 52)
    display.step(100)
    assert display.seconds_left() == 0


def test_nothing_live_is_written_to_a_file(logger, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    progress.log_to_console()
    progress.log_to_console()  # a second call changes nothing
    with RunDisplay(total_steps=100, epochs=10, steps_per_epoch=10, batch_size=8, step=0) as display:
        display.step(1)
        display.doing("evaluating")
        display.log({"step": 10, "epoch": 1.0})
        logger.warning("look")
    assert out.getvalue() == "epoch 1/10 · step 10/100\nwarning: look\n"


def test_a_file_hears_of_what_takes_long_before_the_first_step(logger, monkeypatch):
    out, timers = io.StringIO(), []

    class Timer:
        def __init__(self, seconds, function, arguments):
            assert seconds == progress.PATIENCE
            self.fire, self.pending = lambda: self.pending and function(*arguments), False
            timers.append(self)

        def start(self):
            self.pending = True

        def cancel(self):
            self.pending = False

    def pass_time():
        for timer in timers:
            timer.fire()
            timer.cancel()

    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(progress.threading, "Timer", Timer)
    progress.log_to_console()
    progress.working("starting", log=False)
    pass_time()
    progress.working("reading digits")
    progress.working("reading cifar10")
    pass_time()
    progress.working("compiling")
    progress.working("")
    pass_time()
    assert out.getvalue() == "reading cifar10\n"


def test_the_tracebacks_of_orbax_are_not_shown(logger, monkeypatch):
    from absl import logging as absl_logging

    monkeypatch.setattr(sys, "stdout", io.StringIO())
    before = absl_logging.get_verbosity()
    try:
        absl_logging.set_verbosity(absl_logging.WARNING)  # an earlier test may have left it off
        progress.log_to_console()
        assert not logging.getLogger("absl").isEnabledFor(logging.ERROR)
    finally:
        absl_logging.set_verbosity(before)


def test_lines_scroll_above_a_live_display(logger, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    progress.log_to_console()
    handlers = list(logger.handlers)
    with pytest.raises(RuntimeError), RunDisplay(100, 10, 10, 8, 0) as display:
        display.step(1)
        display.log({"step": 10, "epoch": 1.0})
        logger.warning("a [bold] word")
        raise RuntimeError
    text = out.getvalue()
    assert text.count("epoch 1/10 · step 10/100") == 1
    assert "a [bold] word" in text
    assert "\x1b[" in text and "images/s" not in text.split("step 10/100")[0]
    assert logger.handlers == handlers
