"""Ends the program at once on Ctrl-C whenever there is nothing to save, even during the seconds of its imports.

The package imports this module before everything else, so it imports next to nothing itself.
"""

import os
import signal
import sys
import threading


def is_program() -> bool:
    """Whether this process is the command line, rather than another program that imports the package."""
    started = sys.orig_argv[1:]
    module = "-m" in started and started.index("-m") + 1 < len(started) and started[started.index("-m") + 1]
    return module == "regnet_flax.main" or os.path.basename(sys.argv[0] if sys.argv else "") == "regnet-flax"


def end_at_once() -> None:
    """Makes SIGINT end the process with exit code 130.

    A KeyboardInterrupt would end in a traceback or be lost in a library's `except`. If SIGINT is ignored, as for a
    background job of a shell, it stays ignored.
    """
    main_thread = threading.current_thread() is threading.main_thread()
    if main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))


if is_program():
    end_at_once()
