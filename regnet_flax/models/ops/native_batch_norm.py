"""Batch normalisation's passes over memory as native operations, implemented in cpp/batch_norm.h.

They take float32 and bfloat16 images. Other dtypes, and machines without the library, use the passes of
`cpu_batch_norm`, which has the equations. Sums are float32 within a block of pixels and float64 over all blocks.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from regnet_flax.models.ops import cpu, cpu_batch_norm, native_convolution, native_library, plain
from regnet_flax.models.ops.native_convolution import Convolved, array
from regnet_flax.models.ops.native_library import call, derivable
from regnet_flax.models.ops.plain import over_devices
from regnet_flax.models.ops.varying import undivided, vary_together

Array = jax.Array


def batch_norm(x: Array | Convolved, scale: Array, bias: Array, **options: Any) -> tuple[cpu.Remade, Array, Array]:
    """`cpu_batch_norm.batch_norm`, with native passes if they take these arrays, or by the convolution that makes X."""
    takes = _takes(x, scale, bias, options.get("dtype"))
    if takes and isinstance(x, Convolved) and x.alone:
        return _after_convolution(x.job, scale, bias, **options)
    return cpu_batch_norm.batch_norm(
        array(x), scale, bias, **options, passes=PASSES if takes else cpu_batch_norm.PASSES
    )


def _takes(x, scale, bias, dtype):
    alike = scale.dtype == bias.dtype == jnp.float32 and (dtype or x.dtype) == x.dtype
    return alike and x.dtype in native_library.DTYPES and native_library.available()


def normalize(
    x: Array | Convolved,
    mean: Array,
    variance: Array,
    scale: Array,
    bias: Array,
    *,
    epsilon: float = 1e-5,
    **options: Any,
) -> Array | cpu.Remade | Convolved:
    """`plain.normalize`, computed by the convolution that makes X, or by the one that reads the result."""
    vectors = mean, variance, scale, bias
    takes = _takes(x, scale, bias, options.get("dtype"))
    normalizer = cpu_batch_norm.Normalizer(options.get("relu", False), jnp.dtype(x.dtype), epsilon)
    if isinstance(x, Convolved) and x.alone and takes and mean.dtype == variance.dtype == jnp.float32:
        return Convolved(x.job, (normalizer, vectors))
    x = array(x)
    y = plain.normalize(x, *vectors, epsilon=epsilon, **options)
    return cpu.Remade(y, (x, *vectors), normalizer) if takes else y


def _after_convolution(job, scale, bias, *, relu=False, epsilon=1e-5, dtype=None, axis_name=None):
    """Batch normalisation of a convolution's outputs, whose moments it takes, and whose gradients it passes on."""
    form, *inputs = job
    normalizer = cpu_batch_norm.Normalizer(relu, jnp.dtype(dtype or inputs[-1].dtype), epsilon)
    flat, structure = jax.tree.flatten((*inputs, scale, bias))
    inputs = jax.tree.unflatten(structure, vary_together(*flat))
    results: Any = _convolution_and_norm((form, normalizer, axis_name), *inputs)
    y, x, mean, variance = results
    return cpu.Remade(y, (x, mean, variance, *inputs[-2:]), normalizer), mean, variance


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolution_and_norm(static, arrays, operands, kernel, scale, bias):
    return _forward(static, operands, kernel, scale, bias)[0]


def _forward(static, operands, kernel, scale, bias):
    form, normalizer, axis_name = static
    x, own_mean, own_variance = native_convolution.measured(form, operands, kernel)
    mean, variance = _over_devices(own_mean, own_variance, axis_name)
    y = normalizer(x, mean, variance, scale, bias)
    return (y, x, mean, variance), (operands, kernel, scale, bias, x, mean, variance)


def _backward(static, saved, gradients):
    (form, normalizer, axis_name), (d, *others) = static, gradients
    operands, kernel, scale, bias, x, mean, variance = saved
    d = jnp.zeros_like(x) if isinstance(d, SymbolicZero) else d
    values, options = (x, mean, variance, scale, bias), {"relu": normalizer.relu, "epsilon": normalizer.epsilon}
    by_bias, by_scale = local = PASSES.gradient_sums(d, *values, **options)
    sums = (over_devices(s, axis_name) for s in local)
    if all(isinstance(gradient, SymbolicZero) for gradient in others):
        static = form, tuple(options.values())
        by_inputs, by_kernel = native_convolution.gradients(static, operands, d, x, kernel, *values[1:], *sums)
    else:  # see cpu_batch_norm
        by_x, *by_statistics = others
        dx = PASSES.input_gradient(d, *values, *sums, **options)
        dx += cpu_batch_norm.through_statistics(x, axis_name, *by_statistics)
        dx += 0 if isinstance(by_x, SymbolicZero) else by_x
        by_inputs, by_kernel = native_convolution.gradients_apart(form, operands, kernel, dx)
    return by_inputs, None, by_kernel.astype(kernel.dtype), by_scale, by_bias


_convolution_and_norm.defvjp(
    lambda static, *primals: _forward(static, *jax.tree.map(lambda primal: primal.value, primals[1:])),
    _backward,
    symbolic_zeros=True,
)


def _statistics(x, axis_name):
    own_mean, own_variance = _moments(None, x)
    return _over_devices(own_mean, own_variance, axis_name)


def _over_devices(own_mean, own_variance, axis_name):
    if axis_name is None:
        return own_mean, own_variance
    mean = over_devices(own_mean, axis_name)
    return mean, over_devices(own_variance + jnp.square(own_mean - mean), axis_name)


@derivable(lambda _, x: plain.statistics(x, None))
def _moments(_, x):
    return tuple(call("regnet_flax_moments", [undivided(x, x.shape[-1:])] * 2, x))


def _gradient_sums(*values, relu, epsilon):
    return _sums((relu, epsilon), *values)


@derivable(lambda form, *values: cpu_batch_norm.gradient_sums(*values, relu=form[0], epsilon=form[1]))
def _sums(form, d, x, *vectors):
    numbers = [undivided(x, x.shape[-1:])] * 2
    relu, epsilon = form
    return tuple(
        call("regnet_flax_norm_gradient_sums", numbers, d, x, *vectors, relu=relu, epsilon=np.float64(epsilon))
    )


def _input_gradient(*values, relu, epsilon):
    return _gradient((relu, epsilon), *values)


@derivable(lambda form, *values: cpu_batch_norm.input_gradient(*values, relu=form[0], epsilon=form[1]))
def _gradient(form, d, x, *vectors):
    relu, epsilon = form
    return call("regnet_flax_norm_gradient", jax.typeof(x), d, x, *vectors, relu=relu, epsilon=np.float64(epsilon))


PASSES = cpu_batch_norm.Passes(_statistics, _gradient_sums, _input_gradient)
