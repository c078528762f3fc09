"""The networks' convolution and batch normalisation, on top of a back end's arithmetic."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import ScopeParamShapeError
from jax import lax
from jax.nn.initializers import Initializer

from regnet_flax.models.ops import PLAIN, Ops, Value

Array = jax.Array


def parameter(module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...]) -> Array:
    """Makes or returns a float32 parameter, like `module.param`, which traces the initialiser at each use.

    Raises:
      ScopeParamShapeError: the parameter has another shape.
    """
    if not module.has_variable("params", name):
        return module.param(name, init, shape, jnp.float32)
    value = module.get_variable("params", name)
    if value.shape != shape:
        assert module.scope is not None
        raise ScopeParamShapeError(name, module.scope.path_text, value.shape, shape)
    return value


class Conv(nn.Module):
    """A convolution without bias, padded by half the kernel on each side ("SAME" pads unevenly at stride 2).

    Attributes:
      features: channels of the output.
      kernel_size: height and width, odd.
      kernel_init: initial values.
      strides: stride in height and width.
      dilation: the distance between the kernel's taps.
      feature_group_count: the number of channel groups.
      dtype: dtype of the arithmetic; the kernel is float32.
      ops: the arithmetic.
    """

    features: int
    kernel_size: tuple[int, int]
    kernel_init: Initializer
    strides: int = 1
    dilation: int = 1
    feature_group_count: int = 1
    dtype: Any = jnp.float32
    ops: Ops = PLAIN

    def __call__(self, x: Value) -> Array:
        """Maps (N, height, width, channels) to (N, ⌈height/strides⌉, ⌈width/strides⌉, features)."""
        return self.ops.array(self.value(x))

    @nn.compact
    def value(self, x: Value) -> Value:
        """Computes the same as `__call__`, but as an input for a batch normalisation of the same `ops`."""
        shape = (*self.kernel_size, x.shape[-1] // self.feature_group_count, self.features)
        kernel = parameter(self, "kernel", self.kernel_init, shape)
        return self.ops.conv(
            x,
            kernel.astype(self.dtype),
            (self.strides, self.strides),
            tuple((size // 2 * self.dilation,) * 2 for size in self.kernel_size),
            rhs_dilation=(self.dilation, self.dilation),
            feature_group_count=self.feature_group_count,
        )


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, with PyTorch's momentum 0.1 (Flax's 0.9) and epsilon.

    Attributes:
      use_running_average: use the running statistics, and do not change them.
      train: whether gradients follow, also with running statistics.
      relu: whether a ReLU follows.
      momentum: the share of the running statistics that a step keeps.
      epsilon: added to the variance.
      dtype: the result's dtype; parameters and statistics are float32.
      axis_name: the axis of devices over which statistics are computed; None means this device's batch.
      ops: the arithmetic.
    """

    use_running_average: bool
    train: bool = False
    relu: bool = False
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    axis_name: str | None = None
    ops: Ops = PLAIN

    def __call__(self, x: Value) -> Array:
        """Maps (N, height, width, n) to the same shape, in `dtype`."""
        return self.ops.array(self.value(x))

    @nn.compact
    def value(self, x: Value) -> Value:
        """Computes the same as `__call__`, but as an input for a convolution, or for `add_relu`, of the same `ops`."""
        shape = x.shape[-1:]
        running = {
            "mean": self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32),
            "var": self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32),
        }
        scale = parameter(self, "scale", nn.initializers.ones, shape)
        bias = parameter(self, "bias", nn.initializers.zeros, shape)
        options: Any = {"relu": self.relu, "epsilon": self.epsilon, "dtype": self.dtype}
        if self.is_initializing() and not self.use_running_average:  # init may run outside the axis
            return PLAIN.batch_norm(self.ops.array(x), scale, bias, **options)[0]
        if self.use_running_average:
            if self.train:  # a gradient needs X, and would keep the result beside it
                x = self.ops.array(x)
            return self.ops.normalize(x, running["mean"].value, running["var"].value, scale, bias, **options)
        y, mean, variance = self.ops.batch_norm(x, scale, bias, axis_name=self.axis_name, **options)
        for statistic, value in ((running["mean"], mean), (running["var"], variance)):
            value = lax.stop_gradient(value)
            statistic.value = self.momentum * statistic.value + (1 - self.momentum) * value
        return y


def norm_of(network: Any, train: bool) -> functools.partial[BatchNorm]:
    """Returns a function that makes a network's batch normalisations, with its dtype, axis and arithmetic."""
    return functools.partial(
        BatchNorm,
        use_running_average=network.frozen_batch_stats or not train,
        train=train,
        dtype=network.dtype,
        axis_name=network.axis_name,
        ops=network.ops,
    )
