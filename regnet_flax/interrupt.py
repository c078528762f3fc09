"""Ends the program at once on Ctrl-C wherever nothing is to be saved, the seconds of its imports included.

The package imports it before everything else, so it imports next to nothing itself.
"""

import os
import signal
import sys
import threading


def is_program() -> bool:
    """Whether this process is the command line, and not a program of its own that imports the package."""
    started = sys.orig_argv[1:]
    module = "-m" in started and started.index("-m") + 1 < len(started) and started[started.index("-m") + 1]
    return module == "regnet_flax.main" or os.path.basename(sys.argv[0] if sys.argv else "") == "regnet-flax"


def end_at_once() -> None:
    """From now on SIGINT ends the process with exit code 130.

    A KeyboardInterrupt would end in a traceback, or be lost in a library's `except`. A SIGINT that is ignored, as in a
    shell's background, stays ignored.
    """
    main_thread = threading.current_thread() is threading.main_thread()
    if main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))


if is_program():
    end_at_once()
