"""A run in its workdir on the host's side: the order of training, evaluation, logging and saving."""

from __future__ import annotations

import logging
import pathlib
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import numpy as np

from regnet_flax.analysis import summary
from regnet_flax.environment import environment
from regnet_flax.errors import Interrupted, NonFiniteError
from regnet_flax.files import duration
from regnet_flax.training import parallel, workdir
from regnet_flax.training.checkpoint import Checkpoints
from regnet_flax.training.display import RunDisplay
from regnet_flax.training.logs import MetricsLog, Trace
from regnet_flax.training.seeds import averaged
from regnet_flax.training.signals import StopSignals
from regnet_flax.training.trainer import Program

logger = logging.getLogger("regnet_flax")


class _Stop(Exception):
    """Leaves an evaluation that a signal interrupted."""


class Run:
    """One training run in its workdir, from where it goes on to its end.

    Attributes:
      state: of training.
      step: steps taken.
      seeds: that train together, or one.
      environment: hardware and versions.
    """

    def __init__(
        self,
        config: Any,
        path: pathlib.Path,
        program: Program,
        checkpoints: Checkpoints,
        stop: StopSignals,
        profile: bool = False,
    ):
        self._config, self._path, self._program = config, path, program
        self._checkpoints, self._stop = checkpoints, stop
        self._trace = Trace(path / workdir.PROFILE if profile and parallel.is_primary() else None)
        self.seeds = program.seeds
        self.environment = environment(program.devices)
        self._began = time.monotonic()
        restored = checkpoints.restore(program.like)
        if restored is None:
            self.state, record = program.initial_state(), {"logged": True, "seconds": 0.0}
        else:
            self.state, record = restored
        self.step = int(np.max(self.state.step))
        self._logged, self._seconds_before = record["logged"], record["seconds"]
        if restored is not None:
            self._warn_of_changes(record["environment"])
            logger.info("going on from the checkpoint at step %d of %d", self.step, program.total_steps)
        self._since, self._timed_from = None, self.step  # for images_per_second
        self._fetch_sums()

    @property
    def seconds(self) -> float:
        """Wall time of the run, earlier processes' included."""
        return self._seconds_before + time.monotonic() - self._began

    def _warn_of_changes(self, before: dict[str, Any]) -> None:
        changes = [
            f"{name} {before[part].get(name)} before, {value} now"
            for part in ("hardware", "versions")
            for name, value in self.environment[part].items()
            if before[part].get(name) != value
        ]
        if changes:
            logger.warning("the run began elsewhere (%s): it goes on to rounding, not bitwise", "; ".join(changes))

    def run(self) -> None:
        """Trains to the end, or until a signal."""
        program, train = self._program, self._config.train
        with RunDisplay(
            program.total_steps, train.epochs, program.steps_per_epoch, self._images_per_step, self.step
        ) as self._display:
            # A checkpoint that a signal made before its step was logged: the line is still to come.
            step = self.step if self._logged else self.step - 1
            self._metrics = MetricsLog(self._path, step) if parallel.is_primary() else None
            try:
                self._loop()
            finally:
                self._trace.stop()
                if self._metrics is not None:
                    self._metrics.close()
                program.close()

    def _loop(self) -> None:
        program, running = self._program, deque()
        if not self._logged:
            self._end_of_interval()
        while self.step < program.total_steps:
            count = min(program.steps_per_call, self._next_event() - self.step)
            self.state, done = program.train(self.state, self.step, count)
            self.step += count
            running.append((self.step, done))
            self._trace.after_call(done)
            # Two calls in flight keep a device busy; more would only delay what a signal asks for.
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

    @property
    def _images_per_step(self) -> int:
        return self._config.train.batch_size * len(self.seeds)

    @property
    def _save_every(self) -> int:
        return self._config.checkpoint.every_steps or self._program.steps_per_epoch

    def _is_due(self, every: int) -> bool:
        return bool(every) and (self.step % every == 0 or self.step == self._program.total_steps)

    def _evaluates_here(self) -> bool:
        return self._is_due(self._config.eval.every_epochs * self._program.steps_per_epoch)

    def _logs_here(self) -> bool:
        at_the_end = self.step == self._program.total_steps
        return self._is_due(self._config.log.every_steps) or self._evaluates_here() or at_the_end

    def _saves_here(self) -> bool:
        # Where it evaluates as well, since the best checkpoint is to be kept.
        return self._is_due(self._save_every) or self._evaluates_here()

    def _next_event(self) -> int:
        """The next step at which a call must end."""
        intervals = [self._program.steps_per_epoch, self._save_every, self._config.log.every_steps]
        return min(self._program.total_steps, *(self.step - self.step % n + n for n in intervals if n))

    def _end_of_interval(self) -> None:
        """Evaluates where that is due, and logs."""
        sums = self._fetch_sums()
        if self._since is not None:
            self._display.step(self.step)
        line: dict[str, Any] = {"step": self.step, "epoch": self.step / self._program.steps_per_epoch}
        if np.all(sums["steps"]):
            line["train_loss"] = sums["loss"] / sums["steps"]
            line["train_accuracy"] = sums["accuracy"] / sums["steps"]
        line["learning_rate"] = float(self._program.schedule(self.step - 1))
        if self._since is not None and self.step > self._timed_from:
            elapsed = time.monotonic() - self._since
            line["images_per_second"] = (self.step - self._timed_from) * self._images_per_step / elapsed
        metrics = None
        if self._evaluates_here():
            self._display.doing("evaluating")
            try:
                metrics = self._program.evaluate(self.state, self._poll)
            except _Stop:
                self._interrupt()
            metrics = {f"eval_{name}": value for name, value in metrics.items() if name != "count"}
            line |= metrics
        line = averaged(line, self.seeds)
        if self._metrics is not None:
            self._metrics.write(line)
        self._display.log(line)
        self._logged = True
        self.state = self.state.replace(sums=self._program.zero_sums())
        if self._saves_here():
            self._save(metrics and {name: line[name] for name in metrics})
        if self._since is not None:
            self._since, self._timed_from = time.monotonic(), self.step

    def outcomes(self, size: int) -> np.ndarray:
        """Label and predicted class of each of the `size` test images, by the state as it is: int32 (size, 2)."""
        outcomes = np.empty((size, 2), np.int32)
        try:
            self._program.evaluate(self.state, self._poll, outcomes)
        except _Stop:
            self._interrupt()
        return outcomes

    def _poll(self, done: int) -> None:
        if self._stop.poll():
            raise _Stop

    def _fetch_sums(self) -> dict[str, Any]:
        """The sums since the last line of the log, once the state is known to be sound."""
        sums, found = jax.device_get((self.state.sums, self.state.nonfinite_step))
        if np.any(found >= 0):
            seeds = self.seeds
            nonfinite, seed = min((n, seed) for n, seed in zip(np.ravel(found), seeds, strict=True) if n >= 0)
            of_seed = f" of seed {seed}" if len(seeds) > 1 else ""
            self._checkpoints.wait()
            saved = self._checkpoints.steps()
            last = f"the last good checkpoint is step {saved[-1]}" if saved else "there is no checkpoint yet"
            raise NonFiniteError(
                f"the loss or a gradient is not finite at step {nonfinite + 1}{of_seed}, learning rate "
                f"{float(self._program.schedule(int(nonfinite))):.4g}; {last}; try a lower optimizer.learning_rate, "
                "optimizer.warmup_epochs or optimizer.clip_norm in a new --workdir"
            )
        return sums

    def _save(self, metrics: dict[str, float] | None = None) -> None:
        self._fetch_sums()
        self._display.doing("saving")
        record = {"logged": self._logged, "seconds": self.seconds, "environment": self.environment}
        self._checkpoints.save(self.step, self.state, record, metrics)
        self._display.doing("")

    def _interrupt(self) -> NoReturn:
        assert self._stop.received is not None
        self._save()
        self._checkpoints.wait()
        message = f"stopped by signal {self._stop.received} saved at step {self.step}; the same command goes on from it"
        raise Interrupted(self._stop.received, message)


def collect_results(run: Run, config: Any, path: pathlib.Path) -> dict[str, Any]:
    """What results.json holds of a finished run."""
    lines = workdir.read_metrics(path)
    rates = [line["images_per_second"] for line in lines if "images_per_second" in line]
    return {
        "model": config.model.name,
        "dataset": config.dataset.name,
        "seed": config.seed,
        "step": run.step,
        **_last_and_best(lines),
        "parameters": summary.count_parameters(run.state.params) // len(run.seeds),
        "wall_time_seconds": round(run.seconds, 1),
        "images_per_second": round(float(np.median(rates)), 1) if rates else None,
        **_of_seeds(lines, run.seeds),
        **run.environment,
    }


def _last_and_best(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The evaluations of a run's end and of its highest test accuracy, from lines of metrics.jsonl."""
    evals = [{k: v for k, v in line.items() if k in ("step", "epoch") or k.startswith("eval_")} for line in lines]
    evals = [line for line in evals if "eval_accuracy" in line]
    return {
        "last": evals[-1] if evals else None,
        # The later of two equal ones, as Orbax keeps them.
        "best": max(reversed(evals), key=lambda line: line["eval_accuracy"]) if evals else None,
    }


def _of_seeds(lines: list[dict[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    """Each seed's own, where there are several; the run's "best" is of the highest mean."""
    if len(seeds) < 2:
        return {}
    own = {str(seed): [line | line.get("seeds", {}).get(str(seed), {}) for line in lines] for seed in seeds}
    return {"seeds": {seed: _last_and_best(lines) for seed, lines in own.items()}}


def report(results: dict[str, Any], path: pathlib.Path) -> None:
    """Says how a finished run ended, and where the rest is."""
    if results["last"]:
        logger.info(
            "%s: test accuracy %.2f %% at the end, %.2f %% at best (step %d)%s; %s parameters, %s",
            results["model"],
            100 * results["last"]["eval_accuracy"],
            100 * results["best"]["eval_accuracy"],
            results["best"]["step"],
            f", means of {len(results['seeds'])} seeds" if "seeds" in results else "",
            f"{results['parameters']:,}",
            duration(results["wall_time_seconds"]),
        )
    logger.info("results: %s, pictures: %s", path / workdir.RESULTS, path / workdir.FIGURES)
