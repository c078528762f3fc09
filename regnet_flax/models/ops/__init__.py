"""The arithmetic of the networks: one interface, three back ends. No network, stage or block knows which one it has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from regnet_flax.models.ops import cells, cpu, native, native_batch_norm, native_convolution, plain

Array = jax.Array
# An array, or what a back end hands from one of its functions to another in its place; `shape` and `dtype` are its own.
Value = Any
Step = Callable[[Array, cells.State, tuple[Array, ...]], tuple[cells.State, cells.Gates]]


@dataclasses.dataclass(frozen=True)
class Ops:
    """A back end: the functions that networks are made of. They make it hashable, as a field of a module must be.

    `dataclasses.replace(ops.PLAIN, name="mine", lstm_step=…)` makes one of your own.

    Attributes:
      name: its name in messages.
      conv: (x, kernel, strides, padding, **options) → a Value of shape (N, height, width, outputs). x is a Value of
        shape (N, height, width, inputs), kernel (height, width, inputs, outputs); padding and options are those of
        `jax.lax.conv_general_dilated`, in NHWC and HWIO unless they say otherwise.
      batch_norm: (x, scale, bias, *, relu, epsilon, dtype, axis_name) → (y, mean, variance). x and y are Values of one
        shape (N, height, width, n), y in `dtype`, normalised over all axes but the last and over the devices of
        `axis_name`, with a ReLU if `relu`; scale, bias, mean and the biased variance have the shape (n,), in float32 or
        wider.
      normalize: (x, mean, variance, scale, bias, *, relu, epsilon, dtype) → y, the same with given statistics.
      add_relu: (x, y) → ReLU(x + y), two Values of one shape.
      concatenate: two Values → a Value, along the channels.
      array: a Value → the array.
      separable: (x, h, pointwise, depthwise) → (N, height, width, gates, n) in float32 or wider, from x and h
        (N, height, width, n), pointwise (2, gates, n), which weighs the pairs (x[c], h[c]), and depthwise
        (3, 3, gates, n), a 3×3 convolution of each result, zeros around the image.
      rnn_step, gru_step, lstm_step: (x, state, weights) → (new state, gates by name), one step of a separable cell by
        the equations in `cells`. The state's arrays are like x; weights are pointwise and depthwise as above and the
        bias (gates, n), of any float dtype; gates are (N, height, width, n), in float32 or wider.
    """

    name: str
    conv: Callable[..., Value] = dataclasses.field(repr=False)
    batch_norm: Callable[..., tuple[Value, Array, Array]] = dataclasses.field(repr=False)
    normalize: Callable[..., Value] = dataclasses.field(repr=False)
    add_relu: Callable[[Value, Value], Array] = dataclasses.field(repr=False)
    concatenate: Callable[[Value, Value], Value] = dataclasses.field(repr=False)
    array: Callable[[Value], Array] = dataclasses.field(repr=False)
    separable: cells.Separable = dataclasses.field(repr=False)
    rnn_step: Step = dataclasses.field(repr=False)
    gru_step: Step = dataclasses.field(repr=False)
    lstm_step: Step = dataclasses.field(repr=False)


def _gpu_lstm_step(x: Array, state: cells.State, weights: tuple[Array, ...]) -> tuple[cells.State, cells.Gates]:
    from regnet_flax.models.ops import gpu  # Pallas is experimental, and there may be none for a platform

    return gpu.lstm_step(x, state, weights)


PLAIN = Ops(
    name="plain",
    conv=plain.conv,
    batch_norm=plain.batch_norm,
    normalize=plain.normalize,
    add_relu=plain.add_relu,
    concatenate=plain.concatenate,
    array=plain.array,
    separable=plain.separable,
    rnn_step=plain.rnn_step,
    gru_step=plain.gru_step,
    lstm_step=plain.lstm_step,
)
CPU = Ops(
    name="cpu",
    separable=cpu.separable,
    # C++ where there is a library, otherwise those of cpu.py and cpu_batch_norm.py.
    batch_norm=native_batch_norm.batch_norm,
    normalize=native_batch_norm.normalize,
    conv=native_convolution.conv,
    add_relu=native_convolution.add_relu,
    concatenate=native_convolution.concatenate,
    array=native_convolution.array,
    rnn_step=native.rnn_step,
    gru_step=native.gru_step,
    lstm_step=native.lstm_step,
)
GPU = dataclasses.replace(PLAIN, name="gpu", lstm_step=_gpu_lstm_step)
BACK_ENDS = {ops.name: ops for ops in (PLAIN, CPU, GPU)}
CHOICES = ("auto", *BACK_ENDS)


def kind_of(devices: Sequence[Any] | None) -> str:
    """The kind of the devices that will run a model; None stands for JAX's default device.

    Returns:
      "cpu"; "gpu" for one by NVIDIA, of compute capability 8.0 or later, for which Triton compiles Pallas kernels; or
      "other".
    """
    if devices is None:
        default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
        devices = [default] if hasattr(default, "platform") else jax.local_devices(backend=default)
    if devices[0].platform == "cpu":
        return "cpu"
    try:  # AMD's is a name, and a TPU has none
        return "gpu" if float(devices[0].compute_capability) >= 8 else "other"
    except (AttributeError, ValueError):
        return "other"


def choose(ops: str | Ops, kind: str) -> Ops:
    """The back end that a choice stands for on devices of a kind, as kind_of returns it."""
    if isinstance(ops, Ops):
        return ops
    return BACK_ENDS.get(kind, PLAIN) if ops == "auto" else BACK_ENDS[ops]


def current_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Converts the options in a config of any version to the names and values of this one.

    Before "ops" there were a flag "tuned" and a kernel "pallas".
    """
    now = dict(options)
    tuned = now.pop("tuned", None)
    if tuned is not None:
        now["ops"] = "cpu" if tuned else "plain"
    if now.get("kernel") == "pallas":
        now |= {"kernel": None, "ops": "gpu"}
    return now
