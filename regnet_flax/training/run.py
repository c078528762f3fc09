"""The host's side of a run in its workdir: the order of training, evaluation, logging and saving."""

from __future__ import annotations

import contextlib
import logging
import pathlib
import time
from collections import deque
from collections.abc import Container, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np

from regnet_flax.config.check import eval_batch_size
from regnet_flax.environment import environment
from regnet_flax.errors import Interrupted, NonFiniteError
from regnet_flax.training import parallel, workdir
from regnet_flax.training.checkpoint import Checkpoints
from regnet_flax.training.display import RunDisplay
from regnet_flax.training.logs import MetricsLog, Trace
from regnet_flax.training.optimizer import Schedule
from regnet_flax.training.signals import StopSignals
from regnet_flax.training.trainer import Trainer

logger = logging.getLogger("regnet_flax")


class Plan(NamedTuple):
    """The length and schedule of a config's run.

    Attributes:
      steps_per_epoch: whole batches in the training split.
      total_steps: the run's steps, which `train.max_steps` may limit.
      schedule: learning rate by step.
      drops: the epochs at which the step schedule lowers the rate.
    """

    steps_per_epoch: int
    total_steps: int
    schedule: Schedule
    drops: tuple[float, ...]


class _Stop(Exception):
    """Leaves an evaluation that a signal interrupted."""


class Run:
    """One training run in its workdir, from the step where it resumes to its end.

    Args:
      config: the resolved config.
      path: the workdir.
      trainer: the config's trainer.
      plan: the run's length and schedule.
      dataset: its `evaluated` split is evaluated; only `evaluated` and `size(split)` are used.
      checkpoints: the workdir's checkpoints.
      stop: asks the run to stop.
      profile: whether to trace some steps.

    Attributes:
      state: the training state.
      step: steps taken.
      plan: as given.
      placement: the trainer's.
      seeds: the seeds that train together, or a single one.
      environment: hardware and versions.
      failed: maps each of several seeds whose loss or gradient was not finite to its message.
    """

    def __init__(
        self,
        config: Any,
        path: pathlib.Path,
        trainer: Trainer,
        plan: Plan,
        dataset: Any,
        checkpoints: Checkpoints,
        stop: StopSignals,
        profile: bool = False,
    ):
        self._config, self._path, self._trainer, self.plan = config, path, trainer, plan
        self._dataset, self._checkpoints, self._stop = dataset, checkpoints, stop
        self._trace = Trace(path / workdir.PROFILE if profile and parallel.is_primary() else None)
        self.seeds, self.placement, self.failed = trainer.seeds, trainer.placement, {}
        self.environment = environment(trainer.placement.devices, config.model.overrides.ops or "auto")
        self._began = time.monotonic()
        restored = checkpoints.restore(trainer.like)
        if restored is None:
            self.state, record = trainer.initial_state(), {"logged": True, "seconds": 0.0, "metrics": None}
        else:
            self.state, record = restored
        self.step = int(np.max(self.state.step))
        self._totals: Any = record["metrics"] and {name: np.asarray(value) for name, value in record["metrics"].items()}
        self._logged, self._seconds_before = record["logged"], record["seconds"]
        if restored is not None:
            self._warn_of_changes(record["environment"])
            logger.info("resuming from the checkpoint at step %d of %d", self.step, plan.total_steps)
        self._since, self._timed_from = None, self.step  # for images_per_second
        self._check_finite()

    @property
    def left(self) -> list[int]:
        """The seeds that have not failed."""
        return [seed for seed in self.seeds if seed not in self.failed]

    @property
    def seconds(self) -> float:
        """Wall time of the run, including that of earlier processes."""
        return self._seconds_before + time.monotonic() - self._began

    def _warn_of_changes(self, before: dict[str, Any]) -> None:
        changes = [
            f"{name} {before[part].get(name)} before, {value} now"
            for part in ("hardware", "versions")
            for name, value in self.environment[part].items()
            if (before[part].get(name) or False) != (value or False)  # earlier versions did not store all of them
        ]
        if changes:
            logger.warning(
                "the run began with other hardware or versions (%s): it resumes up to rounding, not bitwise",
                "; ".join(changes),
            )

    def run(self) -> None:
        """Trains to the end, or until a signal arrives."""
        plan = self.plan
        with RunDisplay(
            plan.total_steps,
            self._config.train.epochs,
            plan.steps_per_epoch,
            self._images_per_step,
            self.step,
            self._dataset.evaluated,
        ) as self._display:
            # If a signal caused the checkpoint before its step was logged, the line is still missing.
            step = self.step if self._logged else self.step - 1
            with contextlib.ExitStack() as ends:
                self._metrics, config = None, self._config
                if parallel.is_primary():
                    log = MetricsLog(self._path, step, config.log.trackers, config, self.seeds)
                    self._metrics = ends.enter_context(log)
                ends.callback(self._trace.stop)
                self._loop()

    def _loop(self) -> None:
        trainer, running = self._trainer, deque()
        if not self._logged:
            self._end_of_interval()
        while self.step < self.plan.total_steps:
            count = min(trainer.steps_per_call, self._next_event() - self.step)
            self.state, self._totals, done = trainer.train(self.state, self._totals, self.step, count)
            self.step += count
            running.append((self.step, done))
            self._trace.after_call(done)
            # Two calls in flight keep a device busy; more would only delay the response to a signal.
            if len(running) > 2 or self._since is None:
                finished, array = running.popleft()
                jax.block_until_ready(array)
                self._display.step(finished)
                if self._since is None:
                    self._since, self._timed_from = time.monotonic(), finished
            self._logged = not self._logs_here()
            if self._stop.poll():
                self._interrupt()
            if not self._logged:
                self._end_of_interval()
                running.clear()
            elif self._saves_here():
                self._save()
            if self._stop.take_save():
                self._save()
                logger.info("saved at step %d, as SIGUSR1 asks", self.step)

    @property
    def _images_per_step(self) -> int:
        return self._config.train.batch_size * len(self.seeds)

    @property
    def _save_every(self) -> int:
        return self._config.checkpoint.every_steps or self.plan.steps_per_epoch

    def _is_due(self, every: int) -> bool:
        return bool(every) and (self.step % every == 0 or self.step == self.plan.total_steps)

    def _evaluates_here(self) -> bool:
        return self._is_due(self._config.eval.every_epochs * self.plan.steps_per_epoch)

    def _logs_here(self) -> bool:
        at_the_end = self.step == self.plan.total_steps
        return self._is_due(self._config.log.every_steps) or self._evaluates_here() or at_the_end

    def _saves_here(self) -> bool:
        # It also saves at every evaluation, to keep the best checkpoint.
        return self._is_due(self._save_every) or self._evaluates_here()

    def _next_event(self) -> int:
        """Returns the next step at which a call must end."""
        intervals = [self.plan.steps_per_epoch, self._save_every, self._config.log.every_steps]
        return min(self.plan.total_steps, *(self.step - self.step % n + n for n in intervals if n))

    def _end_of_interval(self) -> None:
        """Evaluates if that is due, and logs."""
        self._check_finite()
        if self._since is not None:
            self._display.step(self.step)
        line: dict[str, Any] = {"step": self.step, "epoch": self.step / self.plan.steps_per_epoch}
        line |= self._training_metrics()
        line["learning_rate"] = float(self.plan.schedule(self.step - 1))
        if self._since is not None and self.step > self._timed_from:
            elapsed = time.monotonic() - self._since
            line["images_per_second"] = (self.step - self._timed_from) * self._images_per_step / elapsed
        names: list[str] = []
        if self._evaluates_here():
            self._display.doing("evaluating")
            metrics = self._evaluate(self.state.variables, self._dataset.evaluated)
            line |= (evaluated := {f"eval_{name}": value for name, value in metrics.items() if name != "count"})
            names = list(evaluated)
        line = averaged(line, self.seeds, self.failed)
        if self._metrics is not None:
            self._metrics.write(line)
        self._display.log(line)
        self._logged, self._totals = True, None
        if self._saves_here():
            self._save({name: line[name] for name in names} or None)
        if self._since is not None:
            self._since, self._timed_from = time.monotonic(), self.step

    def _training_metrics(self) -> dict[str, Any]:
        """Returns "train_<name>" of each metric: its mean over the steps since the last line of the log."""
        totals = dict(jax.device_get(self._totals or {}))
        steps = totals.pop("steps", 0)
        if not np.any(steps):
            return {}
        with np.errstate(invalid="ignore"):  # a failed seed has taken no step
            means = {f"train_{name}": total / steps for name, total in totals.items()}
        return {"train_loss": means["train_loss"]} | means  # people look for the loss first

    def _evaluate(self, variables: Any, split: str, outcomes: np.ndarray | None = None) -> dict[str, Any]:
        size = self._dataset.size(split)
        try:
            return self._trainer.evaluate(variables, split, size, eval_batch_size(self._config), self._poll, outcomes)
        except _Stop:
            self._interrupt()

    def outcomes(self, variables: Any, split: str) -> tuple[dict[str, Any], np.ndarray]:
        """Returns the metrics of a split, and each image's "outcomes" for the first seed that did not fail.

        Returns:
          See Trainer.evaluate; and int32 (size, 3), see step.eval_step.
        """
        several = (len(self.seeds),) if len(self.seeds) > 1 else ()
        outcomes = np.empty((*several, self._dataset.size(split), 3), np.int32)
        metrics = self._evaluate(variables, split, outcomes)
        if not several:
            return metrics, outcomes
        return metrics, outcomes[self.seeds.index(self.left[0])]

    def _poll(self, done: int) -> None:
        if self._stop.poll():
            raise _Stop

    def _check_finite(self) -> None:
        """Ends the run if its loss or gradient was not finite; with several seeds, once all have failed."""
        stopped = np.ravel(jax.device_get(self.state.nonfinite_step)).tolist()
        failed = {seed: step for seed, step in zip(self.seeds, stopped, strict=True) if step >= 0}
        advice = (
            "try a lower optimizer.learning_rate, optimizer.warmup_epochs or optimizer.clip_norm in a new --workdir"
        )
        reasons = {
            seed: f"the loss or a gradient is not finite at step {step + 1}"
            f"{f' of seed {seed}' if len(self.seeds) > 1 else ''}, learning rate {float(self.plan.schedule(step)):.4g}"
            for seed, step in failed.items()
        }
        if len(failed) == len(self.seeds):
            self._checkpoints.wait()
            saved = self._checkpoints.steps()
            last = f"the last good checkpoint is step {saved[-1]}" if saved else "there is no checkpoint yet"
            first = min(failed, key=lambda seed: failed[seed])
            raise NonFiniteError(f"{reasons[first]}; {last}; {advice}")
        found = {seed: reason for seed, reason in reasons.items() if seed not in self.failed}
        for reason in found.values():
            logger.warning("%s: this seed stops here, the others continue; %s", reason, advice)
        self.failed |= found
        if found:
            self._average_again()

    def _average_again(self) -> None:
        """Gives the saved checkpoints the means of the seeds that are left, which decide which one is the best."""
        lines = workdir.read_metrics(self._path) if parallel.is_primary() else []
        evaluations = [workdir.mean_line(line, self.failed) for line in lines if "eval_accuracy" in line]
        saved = self._checkpoints.steps()
        for line in parallel.from_primary([line for line in evaluations if line["step"] in saved]):
            metrics = {name: value for name, value in line.items() if name.startswith("eval_")}
            self._checkpoints.set_metrics(line["step"], metrics)

    def _save(self, metrics: dict[str, float] | None = None) -> None:
        self._check_finite()
        self._display.doing("saving")
        totals = {name: np.asarray(value).tolist() for name, value in jax.device_get(self._totals or {}).items()}
        record = {
            "logged": self._logged,
            "seconds": self.seconds,
            "environment": self.environment,
            "metrics": totals,
        }
        self._checkpoints.save(self.step, self.state, record, metrics)
        self._display.doing("")

    def _interrupt(self) -> NoReturn:
        assert self._stop.received is not None
        self._save()
        self._checkpoints.wait()
        message = f"{self._stop.cause}. Saved at step {self.step}; run the same command to resume."
        raise Interrupted(self._stop.received, message)


def averaged(line: dict[str, Any], seeds: Sequence[int], failed: Container[int] = ()) -> dict[str, Any]:
    """Makes a line of metrics.jsonl: means over the seeds, and each seed's own values under "seeds".

    Args:
      line: numbers, and arrays (seeds,) of values that differ between seeds.
      seeds: the run's seeds, in the arrays' order.
      failed: the seeds to leave out.

    Returns:
      Plain numbers with the names of `line`, and `{"seeds": {"0": {"train_loss": …}, …}}` for several seeds.
    """
    several = {name: np.asarray(value) for name, value in line.items() if np.ndim(value)}
    plain = {n: v.item() if isinstance(v, (np.ndarray, np.generic)) else v for n, v in line.items() if n not in several}
    if not several:
        return plain
    left = [i for i, seed in enumerate(seeds) if seed not in failed]
    own = {str(seeds[i]): {n: float(v[i]) for n, v in several.items() if np.isfinite(v[i])} for i in left}
    means = {name: float(np.mean(values[left])) for name, values in several.items()}
    return {name: plain[name] if name in plain else means[name] for name in line} | {"seeds": own}
