"""Regulators: the convolutional RNN cells that run beside the shortcuts (Xu et al., arXiv 2101.00590).

A cell takes the feature map X and its state, with H first, all of shape (N, height, width, n), and returns the new
state and its gates. A cell computes its gates together: their kernels are stacked gate-major, so that output g·n + c is
channel c of gate g.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import InvalidRngError

from regnet_flax.errors import InputError
from regnet_flax.models.initializers import INITIALIZERS, Initializers
from regnet_flax.models.layers import parameter
from regnet_flax.models.ops import PLAIN, Ops, cells
from regnet_flax.models.ops.cells import Gates, State

Array = jax.Array


class GateWeights(nn.Module):
    """Holds the kernel, and the bias if there is one, of a convolution that its owner applies.

    Attributes:
      shape: (height, width, input channels per group, output channels).
      use_bias: whether there is a bias of shape (output channels,).
      initial: initial values.
    """

    shape: tuple[int, int, int, int]
    use_bias: bool
    initial: Initializers

    @nn.compact
    def __call__(self) -> tuple[Array, ...]:
        kernel = parameter(self, "kernel", self.initial.regulator, self.shape)
        if not self.use_bias:
            return (kernel,)
        fan_in = self.shape[0] * self.shape[1] * self.shape[2]
        return kernel, parameter(self, "bias", self.initial.bias(fan_in), self.shape[-1:])


class Regulator(nn.Module):
    """The base of all cells. Your own cell defines `gate_names`, `state_names` and `step`, which calls `convolve`.

    Attributes:
      features: n, the channels of X and of the state.
      kernel: "separable", the paper's efficient form with 12n parameters per gate, or "dense", one 3×3 convolution from
        2n to n channels, with 18n² + n parameters per gate.
      dtype: the dtype of the new state and of the arithmetic up to the gates' sums, which are float32 or wider.
      initial: initial values, a name in INITIALIZERS.
      dilation: the distance between the taps of its 3×3 convolutions.
      grouping: how the separable form's grouped 1×1 convolution groups channels: "pairs", X[c] with H[c], or
        "contiguous", neighbours in [X, H], so X[2c] with X[2c + 1], and then H with H.
      ops: the arithmetic.

    Raises:
      ValueError: X and a state array differ in shape; the message names both.
    """

    features: int
    kernel: str = "separable"
    dtype: Any = jnp.float32
    initial: str = "paper"
    dilation: int = 1
    grouping: str = "pairs"
    ops: Ops = PLAIN

    gate_names: ClassVar[tuple[str, ...]] = ()
    state_names: ClassVar[tuple[str, ...]] = ("H",)

    @classmethod
    def initial_state(cls, shape: tuple[int, ...], dtype: Any = jnp.float32) -> State:
        """Returns zeros of `shape`, one array for each of `state_names`."""
        return tuple(jnp.zeros(shape, dtype) for _ in cls.state_names)

    @nn.compact
    def __call__(self, x: Array, state: State) -> tuple[State, Gates]:
        """Runs one step.

        Args:
          x: X, (N, height, width, n).
          state: H, and C for the LSTM, each of x's shape.

        Returns:
          The new state, and the gates by name, (N, height, width, n) in float32 or wider.
        """
        for name, array in zip(self.state_names, state, strict=True):
            if array.shape != x.shape:
                raise ValueError(f"{type(self).__name__}: X has shape {x.shape} but {name} has shape {array.shape}")
        x = x.astype(self.dtype)
        state = tuple(array.astype(self.dtype) for array in state)
        new_state, gates = self.step(x, state, self._weights())
        return tuple(array.astype(self.dtype) for array in new_state), gates

    def step(self, x: Array, state: State, weights: tuple[Array, ...]) -> tuple[State, Gates]:
        """Computes the cell's equations.

        Args:
          x: X, (N, height, width, n), in `dtype`.
          state: one array of x's shape for each of `state_names`, H first.
          weights: the gates' weights in the order of `gate_names`, for `convolve`.

        Returns:
          The new state, and the gates by name, each of x's shape, in float32 or wider.
        """
        raise NotImplementedError

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of one step per pixel, for a cell with variables: it uses each weight except biases once."""
        weights = jax.tree.leaves(self.variables.get("params", {}))
        return sum(math.prod(weight.shape) for weight in weights if len(weight.shape) > 1)

    def _weights(self) -> tuple[Array, ...]:
        n, gates, init = self.features, len(self.gate_names), INITIALIZERS[self.initial]
        if self.kernel == "separable":
            (pointwise,) = GateWeights((1, 1, 2, gates * n), False, init, name="pointwise")()
            depthwise, bias = GateWeights((3, 3, 1, gates * n), True, init, name="depthwise")()
            return pointwise.reshape(2, gates, n), depthwise.reshape(3, 3, gates, n), bias.reshape(gates, n)
        if self.kernel == "dense":
            kernel, bias = GateWeights((3, 3, 2 * n, gates * n), True, init, name="conv")()
            return kernel.reshape(3, 3, 2 * n, gates, n), bias.reshape(gates, n)
        raise ValueError(f"kernel is {self.kernel!r}: it must be 'separable' or 'dense'")

    @property
    def in_one_step(self) -> bool:
        """Whether `ops` has this cell's whole step as one function."""
        return self.kernel == "separable" and self.grouping == "pairs"

    def dilated(self, function: Callable[..., Any], *images: Any) -> Any:
        """Calls a function that convolves images of one size, and dilates its convolutions.

        A convolution with dilation d equals d² convolutions without, each of every d-th row and column. Where the size
        is not a multiple of d, these are padded with zeros. So the function may be a whole step only if everything it
        convolves is 0 wherever X and the state are 0.
        """
        if self.dilation == 1:
            return function(*images)
        shape, d = jax.tree.leaves(images)[0].shape, self.dilation
        found = function(*jax.tree.map(lambda array: _apart(array, d), images))
        return jax.tree.map(lambda array: _together(array, shape, d), found)

    def conv3x3(self, x: Array, kernel: Array) -> Array:
        """Convolves in the cell's dtype, at stride 1 with its dilation, and with padding that keeps the size."""
        kernel = kernel.astype(self.dtype)
        if isinstance(x, jax.Array):  # X may be a value that only a convolution can read
            x = x.astype(self.dtype)
        return self.dilated(lambda x: self.ops.array(self.ops.conv(x, kernel, (1, 1), ((1, 1), (1, 1)))), x)

    def convolve(self, x: Array, h: Array, weights: tuple[Array, ...], first: int, last: int) -> list[Array]:
        """Computes W[x, h] + b for the gates from `first` up to, but not including, `last`, in float32 or wider."""
        h = h.astype(self.dtype)  # a gate's product with the state may be wider
        if self.kernel == "separable":
            if self.grouping == "contiguous":
                both = jnp.concatenate([x, h], -1)
                x, h = both[..., 0::2], both[..., 1::2]
            return self.dilated(lambda x, h: cells.separable_sums(self.ops.separable, x, h, weights, first, last), x, h)
        kernel, bias = (w[..., first:last, :] for w in weights)
        kernel = kernel.astype(self.dtype).reshape(3, 3, 2 * self.features, -1)
        sums = self.conv3x3(jnp.concatenate([x, h], -1), kernel)
        sums = sums.reshape(*x.shape[:-1], last - first, self.features)
        sums = sums + bias.astype(jnp.promote_types(self.dtype, jnp.float32))
        return [sums[..., gate, :] for gate in range(last - first)]


def _apart(x: Array, d: int) -> Array:
    """Splits (N, height, width, n) into d² images of every d-th row and column, zero-padded: (d² N, …, n)."""
    batch, height, width, n = x.shape
    x = jnp.pad(x, ((0, 0), (0, -height % d), (0, -width % d), (0, 0)))
    height, width = x.shape[1] // d, x.shape[2] // d
    return x.reshape(batch, height, d, width, d, n).transpose(2, 4, 0, 1, 3, 5).reshape(-1, height, width, n)


def _together(x: Array, shape: tuple[int, ...], d: int) -> Array:
    """Inverts `_apart`, for images of this batch, height and width."""
    (batch, height, width, _), (rows, columns, n) = shape, x.shape[1:]
    x = x.reshape(d, d, batch, rows, columns, n).transpose(2, 3, 0, 4, 1, 5)
    return x.reshape(batch, rows * d, columns * d, n)[:, :height, :width]


class ConvRNN(Regulator):
    """H' = tanh(W[X, H] + b)."""

    gate_names = ("h",)

    def step(self, x: Array, state: State, weights: tuple[Array, ...]) -> tuple[State, Gates]:
        if self.in_one_step:
            return self.dilated(lambda x, state: self.ops.rnn_step(x, state, weights), x, state)
        return cells.rnn(lambda h, *gates: self.convolve(x, h, weights, *gates), state)


class ConvGRU(Regulator):
    """z, r = σ(W[X, H] + b); H̃ = tanh(Wh[X, r⊙H] + bh); H' = (1 − z)⊙H + z⊙H̃."""

    gate_names = ("z", "r", "h")

    def step(self, x: Array, state: State, weights: tuple[Array, ...]) -> tuple[State, Gates]:
        if self.in_one_step:
            return self.dilated(lambda x, state: self.ops.gru_step(x, state, weights), x, state)
        return cells.gru(lambda h, *gates: self.convolve(x, h, weights, *gates), state)


class ConvLSTM(Regulator):
    """i, f, o = σ(W[X, H] + b); g = tanh(Wg[X, H] + bg); C' = f⊙C + i⊙g; H' = o⊙tanh(C').

    There are no peepholes, and nothing is added to the forget gate's bias.
    """

    gate_names = ("i", "f", "o", "g")
    state_names = ("H", "C")

    def step(self, x: Array, state: State, weights: tuple[Array, ...]) -> tuple[State, Gates]:
        if self.in_one_step:
            return self.dilated(lambda x, state: self.ops.lstm_step(x, state, weights), x, state)
        return cells.lstm(lambda h, *gates: self.convolve(x, h, weights, *gates), state)


class ReplacingConvGRU(Regulator):
    """a, b = σ(W[X, H] + b); y = tanh(Wy[X, H, b⊙H] + by); H' = a⊙H + (1 − a)⊙y.

    The cell of a public project in which H replaces the features; dense only.
    """

    gate_names = ("a", "b", "y")

    def _weights(self) -> tuple[Array, ...]:
        n, initial = self.features, INITIALIZERS[self.initial]
        if self.kernel != "dense":
            raise ValueError(f"kernel is {self.kernel!r}: this cell has only 'dense'")
        return (
            *GateWeights((3, 3, 2 * n, 2 * n), True, initial, name="conv_x")(),
            *GateWeights((3, 3, 3 * n, n), True, initial, name="conv_y")(),
        )

    def step(self, x: Array, state: State, weights: tuple[Array, ...]) -> tuple[State, Gates]:
        (h,) = state
        wide = jnp.promote_types(self.dtype, jnp.float32)
        kernel_x, bias_x, kernel_y, bias_y = weights
        sums = self.conv3x3(jnp.concatenate([x, h], -1), kernel_x.astype(self.dtype)) + bias_x.astype(wide)
        a, b = jnp.split(nn.sigmoid(sums), 2, axis=-1)
        inputs = jnp.concatenate([x, h, (b * h).astype(self.dtype)], -1)
        y = jnp.tanh(self.conv3x3(inputs, kernel_y.astype(self.dtype)) + bias_y.astype(wide))
        return (a * h + (1 - a) * y,), {"a": a, "b": b, "y": y}


REGULATORS: dict[str, type[Regulator]] = {"convrnn": ConvRNN, "convgru": ConvGRU, "convlstm": ConvLSTM}


def check_cell(cell: Regulator, state: State, *, shared: bool) -> None:
    """Raises InputError if a custom cell needs something that its stage cannot provide; computes nothing."""

    def init_and_apply() -> Any:
        variables = cell.init(jax.random.key(0), state[0], state)
        cell.apply(variables, state[0], state, mutable=list(variables))
        return variables

    name = type(cell).__name__
    try:
        variables = jax.eval_shape(init_and_apply)
    except InvalidRngError as error:
        raise InputError(
            f"the regulator {name} draws random numbers, as for dropout, but gets none, because results would depend "
            "on the number of devices: leave them out"
        ) from error
    if others := sorted(variables.keys() - {"params", "batch_stats"}):
        raise InputError(f"the regulator {name} keeps {', '.join(others)}: it can keep only params and batch_stats")
    if shared and "batch_stats" in variables:
        raise InputError(
            f"the regulator {name} keeps batch_stats, but one that all blocks of a stage share can keep only params: "
            "give each block its own with share_regulator=False"
        )
