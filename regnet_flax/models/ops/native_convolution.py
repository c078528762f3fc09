"""Convolutions as native operations: forward, and the gradients of inputs and kernel, implemented in cpp/convolution.h.

A convolution normalises its input, applies the ReLU and joins the channels of two inputs while it reads them. So the
results of batch normalisation and concatenation are never written to memory unless something else needs them. With
running statistics, it also normalises its outputs, adds the shortcut and applies the ReLU before it writes them.

The operations take float32 and bfloat16 images, any kernel without groups or dilation, strides 1 and 2, and padding
that is not negative. Everything else, and machines without the library, use the forms of `cpu`. Sums are float32. Under
vmap one call computes all, each with its own weights. As in `cpu`, forward mode is refused, and derivatives of the
backward pass are JAX's own, of `plain`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import get_opaque_trace_state

from regnet_flax.models.ops import cpu, cpu_batch_norm, native_library, plain
from regnet_flax.models.ops.cpu_batch_norm import Normalizer
from regnet_flax.models.ops.native_library import DTYPES, call, derivable
from regnet_flax.models.ops.varying import undivided, vary_together

Array = jax.Array
Arrays = tuple[Array, ...]


@flax.struct.dataclass
class Concatenated:
    """Two Values joined along the channels; a convolution reads each part in place."""

    parts: tuple[Array | cpu.Remade, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0].shape
        return (*first[:-1], sum(part.shape[-1] for part in self.parts))

    @property
    def dtype(self) -> Any:
        return self.parts[0].dtype


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(eq=False)
class Convolved:
    """A convolution that is computed when it is asked for, together with what follows it.

    JAX's transformations and `nn.remat` see the array.

    Attributes:
      job: the arguments of `_conv`; None if there is only the array.
      norm: how the outputs are normalised, with which mean, variance, scale and bias; None if they are not.
      computed: the outputs, once they are computed where this object was made. An array of an inner trace, such as that
        of a loop's body, would be of no use outside.
    """

    job: Any
    norm: tuple[Normalizer, Arrays] | None = None
    computed: Array | None = None

    def __post_init__(self):
        self._trace = get_opaque_trace_state()

    @property
    def alone(self) -> bool:
        """Whether it is a convolution, not yet computed, that nothing follows."""
        return self.job is not None and self.norm is None and self.computed is None

    @property
    def array(self) -> Array:
        if self.computed is not None:
            return self.computed
        array: Any = _conv(*self.job) if self.norm is None else self.followed()
        if get_opaque_trace_state() == self._trace:
            self.computed = array
        return array

    def followed(self, *added: Array) -> Array:
        """The normalised outputs; with X, ReLU(X + them)."""
        assert self.norm is not None
        (form, *inputs), (normalizer, vectors) = self.job, self.norm
        flat, structure = jax.tree.flatten((inputs, vectors, added))
        return _followed(form, normalizer, *jax.tree.unflatten(structure, vary_together(*flat)))

    @property
    def _type(self) -> Any:
        if self.job is None:
            return self.array
        form, _, operands, kernel = self.job
        return _type(form, operands, kernel)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._type.shape

    @property
    def dtype(self) -> Any:
        return self._type.dtype

    def tree_flatten(self) -> tuple[tuple[Array], None]:
        return (self.array,), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[Array]) -> Convolved:
        return cls(None, computed=children[0])


def concatenate(x: Array | cpu.Remade | Convolved, y: Array | cpu.Remade | Convolved) -> Concatenated | cpu.Remade:
    """Along the channels."""
    x, y = (value.array if isinstance(value, Convolved) else value for value in (x, y))
    alike = x.dtype == y.dtype and x.dtype in DTYPES
    return Concatenated((x, y)) if alike and native_library.available() else cpu.concatenate(x, y)


def array(x: Array | cpu.Remade | Concatenated | Convolved) -> Array:
    """What this module's and `native_batch_norm`'s functions give, as an array."""
    if isinstance(x, Concatenated):
        return plain.concatenate(*map(cpu.array, x.parts))
    return x.array if isinstance(x, Convolved) else cpu.array(x)


def add_relu(x: Any, y: Any) -> Array:
    """`cpu_batch_norm.add_relu`; a convolution that ends in batch normalisation adds X before it writes."""
    x = array(x)
    if isinstance(y, Convolved) and y.computed is None and y.norm and not y.norm[0].relu:
        if (x.shape, x.dtype) == (y.shape, y.dtype):
            return y.followed(x)
    return cpu_batch_norm.add_relu(x, array(y))


class _Form(NamedTuple):
    """Everything about a convolution except its arrays."""

    strides: tuple[int, int]
    padding: cpu.Padding
    makes: tuple[Normalizer | None, ...]  # of each part, from its operands; None: it is the operand

    def geometry(self, kernel_shape: Sequence[int]) -> dict[str, Any]:
        """What the native operations know of it; `kinds` has the rest, of those that read its inputs."""
        (top, _), (left, _) = self.padding
        return {"geometry": np.array([*kernel_shape[:2], self.strides[0], top, left], np.int64)}

    def kinds(self) -> dict[str, Any]:
        kinds = [0 if make is None else 1 + make.relu for make in self.makes]
        epsilons = [0 if make is None else make.epsilon for make in self.makes]
        return {"kinds": np.array(kinds, np.int64), "epsilons": np.array(epsilons, np.float64)}


def conv(
    x: Array | cpu.Remade | Concatenated | Convolved,
    kernel: Array,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> Array | Convolved:
    """`cpu.conv`, with native operations if they take these arrays and options."""
    if isinstance(x, Convolved):
        x = x.array
    if not _takes(x, kernel, strides, padding, **options):
        x = cpu.concatenate(*x.parts) if isinstance(x, Concatenated) else x
        return cpu.conv(x, kernel, strides, padding, **options)
    parts = x.parts if isinstance(x, Concatenated) else (x,)
    arrays, operands, makes = [], [], []
    for part in parts:
        made_from, make = (cpu.array(part),), None
        if isinstance(part, cpu.Remade) and isinstance(part.make, Normalizer) and part.operands[0].dtype == part.dtype:
            made_from, make = part.operands, part.make
        first, *vectors = made_from
        arrays.append(cpu.array(part))
        operands.append((first, *(vector.astype(jnp.float32) for vector in vectors)))
        makes.append(make)
    form = _Form((strides[0], strides[1]), cpu.explicit(padding, x.shape, kernel.shape, strides), tuple(makes))
    flat, structure = jax.tree.flatten((arrays, operands, kernel))
    arrays, operands, kernel = jax.tree.unflatten(structure, vary_together(*flat))
    return Convolved((form, tuple(arrays), tuple(operands), kernel))


def _takes(x, kernel, strides, padding, **options):
    return (
        len(x.shape) == kernel.ndim == 4
        and x.shape[-1] == kernel.shape[2]
        and 0 not in kernel.shape
        and kernel.dtype == x.dtype
        and x.dtype in DTYPES
        and tuple(strides) in ((1, 1), (2, 2))
        and not cpu.asks_for_more(x, kernel, **options)
        and len(pads := cpu.explicit(padding, x.shape, kernel.shape, strides)) == 2
        and min(map(min, pads)) >= 0
        and native_library.available()
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(form: _Form, arrays: Arrays, operands: tuple[Arrays, ...], kernel: Array) -> Array:
    return _outputs(form, operands, kernel)


def _forward(form, arrays, operands, kernel):
    return _outputs(form, operands, kernel), (operands, kernel)


def _backward(form, saved, d):
    operands, kernel = saved
    by_inputs, by_kernel = gradients_apart(form, operands, kernel, d)
    return by_inputs, None, by_kernel.astype(kernel.dtype)


def gradients_apart(form, operands, kernel, d):
    """The gradients of a convolution's inputs, and that of its kernel in float32, from that of its outputs."""
    types = tuple(jax.typeof(part[0]) for part in operands)
    return _input_gradients((form, types), d, kernel), _kernel_gradient((form, kernel.shape), operands, d)


_conv.defvjp(_forward, _backward)


def _plain_outputs(form, operands, kernel):
    parts = [part[0] if make is None else make(*part) for make, part in zip(form.makes, operands, strict=True)]
    return plain.conv(jnp.concatenate(parts, -1), kernel, form.strides, form.padding)


@derivable(_plain_outputs)
def _outputs(form, operands, kernel):
    return _call(form, _type(form, operands, kernel), operands, kernel)


@derivable(lambda form, operands, kernel: _with_moments(_plain_outputs(form, operands, kernel)))
def measured(form, operands, kernel):
    """The outputs, and their means and biased variances on this device."""
    type_ = _type(form, operands, kernel)
    vector = undivided(operands[0][0], type_.shape[-1:])
    return tuple(_call(form, [type_, vector, vector], operands, kernel))


def _with_moments(x):
    return x, *plain.statistics(x, None)


def _type(form, operands, kernel):
    x = jax.typeof(operands[0][0])
    sizes = zip(x.shape[1:3], kernel.shape, form.padding, form.strides, strict=False)
    height, width = (max(0, (size + sum(pads) - length) // stride + 1) for size, length, pads, stride in sizes)
    return x.update(shape=(x.shape[0], height, width, kernel.shape[3]))


def _call(form, results, operands, kernel, normalizer=None, vectors=(), added=()):
    after = [normalizer is not None, len(added), bool(added) or (normalizer is not None and normalizer.relu)]
    attributes = form.geometry(kernel.shape) | form.kinds() | {"after": np.array(after, np.int64)}
    arrays = operands, kernel.astype(jnp.float32), vectors, added
    epsilon = np.float64(normalizer.epsilon if normalizer else 0)
    return call("regnet_flax_convolution", results, *arrays, **attributes, epsilon=epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _followed(form: _Form, normalizer: Normalizer, inputs: Any, vectors: Arrays, added: Arrays) -> Array:
    """The normalised outputs; with `added`, ReLU(added + them)."""
    _, operands, kernel = inputs
    return _call(form, _type(form, operands, kernel), operands, kernel, normalizer, vectors, added)


def _one_by_one(form, normalizer, inputs, vectors, added):
    y = normalizer(_conv(form, *inputs), *vectors)
    return cpu_batch_norm.add_relu(added[0], y) if added else y


_followed.defvjp(
    lambda form, normalizer, *args: jax.vjp(functools.partial(_one_by_one, form, normalizer), *args),
    lambda form, normalizer, vjp, d: vjp(d),
)


def _plain_input_gradients(static, d, kernel):
    form, types = static
    plain_form = form._replace(makes=(None,) * len(types))
    outputs = lambda *parts: _plain_outputs(plain_form, [(part,) for part in parts], kernel)  # noqa: E731
    return jax.linear_transpose(outputs, *types)(d)


@derivable(_plain_input_gradients)
def _input_gradients(static, d, kernel):
    form, types = static
    wide = kernel.astype(jnp.float32)
    return tuple(call("regnet_flax_input_gradient", list(types), d, wide, **form.geometry(kernel.shape)))


def _plain_kernel_gradient(static, operands, d):
    form, shape = static
    wide = [[a.astype(jnp.float32) for a in part] for part in operands]
    makes = tuple(make and dataclasses.replace(make, dtype=jnp.dtype(jnp.float32)) for make in form.makes)
    outputs = functools.partial(_plain_outputs, form._replace(makes=makes), wide)
    return jax.linear_transpose(outputs, undivided(d, shape))(d.astype(jnp.float32))[0]


@derivable(_plain_kernel_gradient)
def _kernel_gradient(static, operands, d):
    form, shape = static
    return call("regnet_flax_filter_gradient", undivided(d, shape), operands, d, **form.geometry(shape), **form.kinds())


def _plain_gradients(static, operands, d, x, kernel, *vectors):
    form, (relu, epsilon) = static
    dx = cpu_batch_norm.input_gradient(d, x, *vectors, relu=relu, epsilon=epsilon)
    types = tuple(jax.typeof(part[0]) for part in operands)
    by_kernel = _plain_kernel_gradient((form, kernel.shape), operands, dx)
    return _plain_input_gradients((form, types), dx, kernel), by_kernel


@derivable(_plain_gradients)
def gradients(static, operands, d, x, kernel, *vectors):
    """All gradients of a convolution whose outputs X are normalised by their own statistics.

    Args:
      static: the convolution's form; and the normalisation's `relu` and `epsilon`.
      operands: of the convolution.
      d: the gradient of the normalised outputs.
      x: the outputs.
      kernel: the kernel.
      *vectors: the arguments of `cpu_batch_norm.input_gradient` that follow X.

    Returns:
      The gradients of the convolution's inputs, and that of the kernel in float32.
    """
    form, (relu, epsilon) = static
    results = [*(jax.typeof(part[0]) for part in operands), undivided(d, kernel.shape)]
    attributes = form.geometry(kernel.shape) | form.kinds() | {"relu": relu, "epsilon": np.float64(epsilon)}
    arrays = operands, d, x, kernel.astype(jnp.float32), vectors
    *by_inputs, by_kernel = call("regnet_flax_convolution_gradients", results, *arrays, **attributes)
    return tuple(by_inputs), by_kernel
