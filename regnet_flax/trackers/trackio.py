"""Trackio, the extra [trackio]; it writes into a data base of this machine, or where its environment variables say."""

from __future__ import annotations

import contextlib
import contextvars
import io
import os
import secrets
from collections.abc import Mapping
from typing import Any

from regnet_flax.trackers.registry import PROJECT, Start


class Run:
    """A run of the project TRACKIO_PROJECT, or "regnet_flax"."""

    def __init__(self, start: Start):
        self._start, self._run = start, None
        # Trackio resumes by name, so that a name must be no other run's.
        self.id = start.id or f"{start.name} {secrets.token_hex(3)}"

    def config(self, values: Mapping[str, Any]) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        # In a context of its own, since Trackio ends the run before in the same one.
        context = contextvars.copy_context()
        with contextlib.redirect_stdout(io.StringIO()):
            self._run = context.run(
                trackio.init,
                os.environ.get("TRACKIO_PROJECT", PROJECT),
                name=self.id,
                group=self._start.group or None,
                config=dict(values),
                resume="allow" if self._start.id else "never",
                embed=False,
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        assert self._run is not None
        self._run.log(dict(values), step=step)

    def finish(self, error: str) -> None:
        assert self._run is not None
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()
