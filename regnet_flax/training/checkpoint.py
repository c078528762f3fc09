"""Checkpoints: Orbax's CheckpointManager, with a checksum per array and a fallback from damaged steps."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import logging
import os
import pathlib
import re
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from orbax.checkpoint import checkpoint_manager

from regnet_flax.errors import CheckpointError, WorkdirError
from regnet_flax.files import write_json
from regnet_flax.training import parallel
from regnet_flax.training.step import TrainState
from regnet_flax.training.workdir import CHECKPOINTS

DAMAGED = "damaged"
METRIC = "eval_accuracy"
METRICS = checkpoint_manager.METRIC_ITEM_NAME

logger = logging.getLogger("regnet_flax")


def _checksums(tree: Any) -> dict[str, int]:
    """Returns the CRC-32 of every array by its path, because Orbax restores a flipped bit silently."""
    return {
        jax.tree_util.keystr(path): zlib.crc32(np.ascontiguousarray(np.asarray(leaf)).tobytes())
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _with_record(checksums: dict[str, int], record: dict[str, Any]) -> dict[str, int]:
    return checksums | {"record": zlib.crc32(json.dumps(record, sort_keys=True).encode())}


def _reason(error: Exception) -> str:
    """Returns one line from an exception of Orbax or TensorStore, whose messages may have many."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    if found := re.search(r"os_error_code='(\d+)'", str(cause)):
        return os.strerror(int(found[1]))
    return str(cause).strip().partition("\n")[0][:300] or type(cause).__name__


class _DamagedError(Exception):
    """A checkpoint is damaged; the message is one line."""


def _compare(found: Mapping[str, int], expected: Mapping[str, int | None]) -> None:
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise _DamagedError(f"the checksum of {wrong[0]} does not match")


# Version 0.1.0 kept the sums of loss, accuracy and steps in the state; now the record has all metrics by name.
class _StateWithSums(TrainState):
    sums: Any


def _has_sums(state: pathlib.Path) -> bool:
    with contextlib.suppress(OSError, ValueError, KeyError):
        return "('sums', 'loss')" in json.loads((state / "_METADATA").read_text(encoding="utf-8"))["tree_metadata"]
    return False


def _with_sums(like: TrainState) -> _StateWithSums:
    def scalar(dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(like.step.shape, dtype, sharding=like.step.sharding)

    sums = {"loss": scalar(np.float32), "accuracy": scalar(np.float32), "steps": scalar(np.int32)}
    return _StateWithSums(**{field.name: getattr(like, field.name) for field in dataclasses.fields(like)}, sums=sums)


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      workdir: holds `checkpoints/<step>/`.
      keep: how many of the newest to keep.
      keep_best: how many of those with the highest eval accuracy to keep as well.

    Raises:
      WorkdirError: a step is a symbolic link.
    """

    def __init__(self, workdir: pathlib.Path, keep: int = 1, keep_best: int = 1):
        policies = ocp.checkpoint_managers
        self.directory = workdir.absolute() / CHECKPOINTS
        for path in self.directory.glob("[0-9]*"):
            if path.is_symlink():  # deleting or moving it would affect files elsewhere
                raise WorkdirError(
                    f"{path} is a symbolic link, which no run creates: remove it, or name another --workdir"
                )
        if parallel.is_primary():
            self._drop_damaged_metrics()
        parallel.wait_for_all("metrics")
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                best_fn=lambda metrics: metrics[METRIC],
                # best_fn with max_to_keep would delete the newest, and a resumed run would go back.
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(keep),
                        policies.BestN(
                            get_metric_fn=lambda metrics: metrics[METRIC],
                            n=keep_best,
                            keep_checkpoints_without_metrics=False,
                        ),
                    ]
                ),
            ),
            item_names=("state", "record"),
        )

    def _drop_damaged_metrics(self) -> None:
        # Orbax reads every step's metrics when it starts, and would fail at the first error.
        for path in self.directory.glob(f"[0-9]*/{METRICS}/{METRICS}"):
            try:
                float(json.loads(path.read_text(encoding="utf-8"))[METRIC])
            except (OSError, ValueError, KeyError, TypeError):
                logger.warning("checkpoint %s has damaged metrics, and cannot be chosen as the best", path.parts[-3])
                path.rename(path.with_name(DAMAGED))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise nearly anything on a full disk.
            raise CheckpointError(
                f"a checkpoint cannot be written to {self.directory} ({_reason(error)}): "
                "make room or fix it, and run the same command again"
            ) from error

    def steps(self) -> list[int]:
        """Returns the saved steps, oldest first, damaged ones included."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, record: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        """Saves in the background.

        Args:
          step: above every saved step, or the newest one itself, which then stays as it is.
          state: a tree of arrays.
          record: other facts to store, as JSON.
          metrics: of an evaluation at this step, with "eval_accuracy".

        Raises:
          CheckpointError: nothing was saved, or an earlier save in the background failed.
        """
        if self.steps()[-1:] == [step]:
            if metrics is not None and parallel.from_primary(self._manager.metrics(step) is None):
                self.set_metrics(step, metrics)
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            record=ocp.args.JsonSave(record | {"checksums": _with_record(_checksums(jax.device_get(state)), record)}),
        )
        with self._writing():
            saved = self._manager.save(step, args=args, metrics=metrics)
        if not saved:
            raise CheckpointError(f"no checkpoint was saved at step {step}: {self.directory} holds a later one")

    def set_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Sets or replaces the metrics of a saved step, which Orbax cannot do.

        A step whose evaluation a signal interrupted was saved without; those of several seeds change when one fails.

        Raises:
          CheckpointError: they cannot be written.
        """
        self.wait()
        if parallel.from_primary(self._manager.metrics(step) == metrics):
            return
        folder = self.directory / str(step) / METRICS
        with self._writing(), parallel.together():
            if parallel.is_primary():
                folder.mkdir(exist_ok=True)
                write_json(folder / METRICS, metrics)
        self._manager.reload()

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """Restores the newest undamaged checkpoint, and moves newer ones to `checkpoints/damaged/` with a warning each.

        Only the process that holds the workdir may call it: it deletes unfinished saves.

        Args:
          like: a state of the same structure, which gives the result's shapes, dtypes and placement.

        Returns:
          The state and its record; None if nothing was ever saved.

        Raises:
          CheckpointError: there are checkpoints, but all are damaged.
        """
        self.wait()
        if parallel.is_primary():
            for unfinished in self.directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                if unfinished.is_dir():  # a save creates only directories
                    shutil.rmtree(unfinished)
        parallel.wait_for_all("unfinished")
        steps, reasons = self.steps(), {}
        for step in reversed(steps):
            try:
                found = self._read(step, like)
            except _DamagedError as error:
                reasons[step] = str(error)
                logger.warning("checkpoint %d is damaged and is skipped: %s", step, reasons[step])
                continue
            for damaged in reasons:
                self._set_aside(damaged)
            return found
        if steps:
            raise CheckpointError(
                f"none of the checkpoints in {self.directory} can be read (newest, step {steps[-1]}: "
                f"{reasons[steps[-1]]}); restore one from a copy, or choose another --workdir to start over"
            )
        return None

    def read_variables(self, which: str, sharding: Any) -> tuple[int, dict[str, Any]]:
        """Reads the variables of one checkpoint for evaluation, whatever the run's optimiser and averages.

        Args:
          which: "best" (the newest if none was evaluated), "last" or a step.
          sharding: the sharding of the arrays.

        Returns:
          The step; and "params" and "batch_stats", the averages if the run keeps them, with a leading seed axis if the
          run has several seeds.

        Raises:
          WorkdirError: there is no such checkpoint.
          CheckpointError: the checkpoint is damaged.
        """
        step = self._choose(which)
        try:
            with self._reading():
                variables = self._read_variables(step, sharding)
        except _DamagedError as error:
            others = ", ".join(str(other) for other in self.steps() if other != step)
            hint = f", or name another step to use, such as with --config.eval.checkpoint ({others})" if others else ""
            raise CheckpointError(
                f"checkpoint {step} in {self.directory} is damaged ({error}): restore it from a copy{hint}"
            ) from error
        return step, variables

    def _choose(self, which: str) -> int:
        steps = self.steps()
        if not steps:
            raise WorkdirError(f"there is no checkpoint in {self.directory}: train first, or name another --workdir")
        if which == "last":
            return steps[-1]
        if which == "best":
            best = parallel.from_primary(self._manager.best_step())
            return steps[-1] if best is None else best
        step = int(which)
        if step not in steps:
            known = ", ".join(map(str, steps))
            raise WorkdirError(f"eval.checkpoint is {which}: {self.directory} has the steps {known}")
        return step

    def _read_variables(self, step: int, sharding: Any) -> dict[str, Any]:
        state = self.directory / str(step) / "state"
        with ocp.PyTreeCheckpointer() as reader:
            verbosity = absl_logging.get_verbosity()
            absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax warns that an item has no own metadata
            try:
                tree: Any = reader.metadata(state).item_metadata.tree  # pyright: ignore[reportOptionalMemberAccess]
            finally:
                absl_logging.set_verbosity(verbosity)
            top = "ema" if tree.get("ema") else ""
            like = tree["ema"] if top else {name: tree[name] for name in ("params", "batch_stats") if tree.get(name)}
            like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), like)
            wanted = {top: like} if top else like
            arguments = ocp.checkpoint_utils.construct_restore_args(wanted)
            args = ocp.args.PyTreeRestore(wanted, restore_args=arguments, partial_restore=True)
            found: Any = reader.restore(state, args=args)
        restored: Any = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))
        expected = restored.record["checksums"]
        for name, tree in jax.device_get(found).items():
            sums = {f".{name}{path}": value for path, value in _checksums(tree).items()}
            _compare(sums, {path: expected.get(path) for path in sums})
        return {"batch_stats": {}} | (found[top] if top else found)

    def _read(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        with self._reading():
            legacy = _has_sums(self.directory / str(step) / "state")
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _with_sums(like) if legacy else like)
            args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), record=ocp.args.JsonRestore())
            restored: Any = self._manager.restore(step, args=args)
            record = dict(restored.record)
            expected, state = record.pop("checksums"), restored.state
            _compare(_with_record(_checksums(jax.device_get(state)), record), expected)
            if legacy:
                record["metrics"] = {name: np.asarray(value).tolist() for name, value in state.sums.items()}
                state = type(like)(**{field.name: getattr(state, field.name) for field in dataclasses.fields(like)})
        return state, record

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        reason, hook = "", sys.unraisablehook
        sys.unraisablehook = lambda unraisable: None
        try:
            with parallel.together():
                yield
        except Exception as error:  # Orbax and TensorStore raise nearly anything on a damaged file.
            reason = _reason(error)
        finally:
            if reason:  # Each read that Orbax leaves unfinished would print a page of traceback.
                gc.collect()
            sys.unraisablehook = hook
        if reason:
            raise _DamagedError(reason)

    def _set_aside(self, step: int) -> None:
        # While a damaged step is there, Orbax refuses saves at or below it.
        target = self.directory / DAMAGED / str(step)
        if parallel.is_primary():
            target.parent.mkdir(exist_ok=True)
            if target.exists():
                shutil.rmtree(target)
            path = self.directory / str(step)
            if not os.access(path, os.W_OK):
                path.chmod(0o700)  # without write permission it cannot be moved
            path.rename(target)
            logger.warning("moved damaged checkpoint %d to %s", step, target)
        parallel.wait_for_all(f"damaged {step}")
        self._manager.reload()

    def wait(self) -> None:
        """Waits for background saves.

        Raises:
          CheckpointError: one of them failed.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for background saves, raises their errors like `wait`, and ends Orbax's threads."""
        with self._writing():
            self._manager.close()
