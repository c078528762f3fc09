"""Every error that a user can cause or meet, each with its exit code, and functions that format messages."""

from __future__ import annotations


class Error(Exception):
    """The base of all errors here; the message says what is wrong and how to fix it.

    Attributes:
      exit_code: the exit code of the command line.
    """

    exit_code = 1


class InputError(Error, ValueError):
    """The user's input is wrong."""

    exit_code = 2


class UsageError(InputError):
    """The command line is wrong; the message is one line."""


class ConfigError(InputError):
    """Config values are wrong; the message has one line per value, with the field, its value and the fix."""


class DataError(InputError):
    """A data set is missing, unreadable or not the expected one; the message is one line."""

    def __init__(self, message: str):
        super().__init__(printable(message))


class WeightsError(InputError):
    """A file of weights cannot be used; the message is one line."""


class WorkdirError(InputError):
    """The workdir cannot be used; the message is one line."""


class PlaceError(InputError):
    """A bucket cannot be used: no credentials, permission, bucket or network; the message is one line."""


class ProcessError(InputError):
    """The processes disagree about config, workdir or data, or another one failed; the message is one line."""


class RunError(Error, RuntimeError):
    """The run failed although the user's input is right."""


class CheckpointError(RunError):
    """No checkpoint could be written or read; the message is one line."""


class NonFiniteError(RunError):
    """The loss or a gradient is not finite; the message is one line."""


class StreamError(RunError):
    """Reading stopped, for instance because a worker process was killed; the message is one line."""


class HubError(RunError):
    """The Hugging Face Hub refused a request or could not be reached; the message is one line."""


class Interrupted(Error):
    """A signal asked the run to stop, and it has saved.

    Attributes:
      exit_code: 128 + the signal's number.
    """

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signal_number


def printable(text: str) -> str:
    """Returns the text with unprintable characters, such as newlines and stray bytes in a file name, escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def one_line(error: BaseException) -> str:
    """Returns the exception's type and message as one line of bounded length."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else text[:297] + "..."
