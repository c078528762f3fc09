"""The command line: python -m regnet_flax.main --config configs/cifar10.py --mode train --workdir DIR."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib
import io
import logging
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from regnet_flax import command_line, places, xla_flags
from regnet_flax.errors import Error, Interrupted, UsageError
from regnet_flax.training.display import log_to_console, outlive_output, working

# Maps --mode to the module whose `run(config, options)` does the work; only that module is imported.
MODES = {
    "train": "regnet_flax.modes.train",
    "eval": "regnet_flax.modes.evaluate",
    "predict": "regnet_flax.modes.predict",
    "summary": "regnet_flax.modes.summary",
    "models": "regnet_flax.modes.summary",
    "benchmark": "regnet_flax.modes.benchmark",
    "analyze": "regnet_flax.modes.analyze",
    "demo": "regnet_flax.demo.server",
    "compare": "regnet_flax.modes.compare",
    "export": "regnet_flax.modes.export",
}
_DISTRIBUTED = ("train", "eval")
_COMPUTING = ("train", "eval", "predict", "compare", "benchmark", "analyze", "demo")
_PARALLEL = "regnet_flax.training.parallel"


def parse(argv: Sequence[str]) -> tuple[Any, command_line.Options]:
    """Returns the config and the other options of a command line; see `command_line.parse`."""
    return command_line.parse(argv, list(MODES))


def run(argv: Sequence[str]) -> None:
    """Runs the command line; errors propagate to the caller."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed, as in a daemon
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):  # a file's name may have characters that the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    if any(arg in ("-h", "--help", "-help", "--helpfull") for arg in argv):
        print(command_line.usage(list(MODES)), end="")
        return
    if "--helpfields" in argv:
        from regnet_flax.config import fields

        print(fields.describe(), end="")
        return
    working("starting", log=False)
    xla_flags.set_defaults()
    xla_flags.keep_compiled()
    config, options = parse(argv)

    level = logging.INFO
    if options.profile and options.mode != "train":
        raise UsageError(f"--profile is for --mode train: leave it out with {options.mode}")
    if options.distributed:
        if options.mode not in _DISTRIBUTED:
            raise UsageError(
                f"--distributed is for --mode {' and '.join(_DISTRIBUTED)}: leave it out with {options.mode}"
            )
        from regnet_flax.training import parallel

        parallel.initialize(options.distributed)
        level = logging.INFO if parallel.is_primary() else logging.WARNING
    log_to_console(level, "stderr" if options.mode == "predict" and config.predict.json else "stdout")
    mode = importlib.import_module(MODES[options.mode])
    if options.mode in _COMPUTING:
        from regnet_flax.models.ops import native_library

        native_library.prepare()  # while the data set is read
    with places.local_workdir(options.workdir, hold=options.mode in command_line.BEGIN) as workdir:
        mode.run(config, dataclasses.replace(options, workdir=str(workdir)))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0 done, 1 failed, 2 wrong input, 128 + n stopped by signal n."""
    try:
        code = _exit_code(argv)
    except Exception:
        if not _parallel_joined():
            raise
        traceback.print_exc()
        code = 1
    if code in (1, 2) and _parallel_joined():
        sys.modules[_PARALLEL].end(code)
    return code


def _parallel_joined() -> bool:
    # Importing it imports JAX, and a mistyped flag should not wait for that.
    return _PARALLEL in sys.modules and sys.modules[_PARALLEL].joined()


def _exit_code(argv: Sequence[str] | None) -> int:
    try:
        try:
            run(sys.argv[1:] if argv is None else argv)
            sys.stdout.flush()
        finally:
            working("")  # clear the status line before any message
    except Interrupted as stopped:
        _say(places.shown(stopped))
        return stopped.exit_code
    except Error as error:
        for line in places.shown(error).splitlines():
            _say(f"error: {line}")
        return error.exit_code
    except BrokenPipeError as error:  # `| head` has read enough
        outlive_output(error)
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno is None:
            raise
        place = f" ({error.filename})" if error.filename else ""
        if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            _say(f"error: {error.strerror}{place}: name another place, or move what is there")
            return 2
        _say(f"error: {error.strerror}{place}: make room or fix it, and run the same command again")
        return 1
    return 0


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be closed
        print(text, file=sys.stderr, flush=True)


def console() -> NoReturn:
    """Runs the command line and ends the process with its exit code."""
    code = main()
    if code == 1:
        # After a failed save, threads wait minutes for each other, and Python would wait for them.
        for child in multiprocessing.active_children():
            child.terminate()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    console()
