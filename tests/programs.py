"""A trainer and its parts, for tests that take single steps."""

import jax
import jax.numpy as jnp
import numpy as np

from regnet_flax.config.resolve import resolve
from regnet_flax.modes.setup import models, trainers


class Program:
    """The trainer of a config.

    Attributes:
      config: the resolved config.
      totals: the sums of the metrics of all steps taken.
    """

    def __init__(self, config, dataset, devices, seeds=(), start=None):
        self.config, self.dataset, self.totals = resolve(config, dataset), dataset, None
        self.trainer = trainers.make_trainer(self.config, dataset, devices, seeds, start)
        self.model = models.build_model(self.config, devices)

    @property
    def like(self):
        return self.trainer.like

    def initial_state(self):
        return self.trainer.initial_state()

    def in_float64(self):
        """Returns the initial state in float64, and resets the totals."""
        self.totals = None
        return in_float64(self.initial_state())

    def train(self, state, step, count):
        state, self.totals, done = self.trainer.train(state, self.totals, step, count)
        return state, done

    def evaluate(self, state, outcomes=None):
        size = self.dataset.size("test")
        return self.trainer.evaluate(state.variables, "test", size, self.config.eval.batch_size, outcomes=outcomes)

    def close(self):
        self.trainer.close()


def in_float64(state):
    return jax.tree.map(lambda a: a.astype(jnp.float64) if a.dtype == jnp.float32 else a, state)


def relative(a, b):
    """Returns ‖a − b‖ / ‖b‖."""
    return float(np.linalg.norm(np.asarray(a, np.float64) - b) / (np.linalg.norm(b) + 1e-8))
