"""Batch normalisation's passes over memory as native operations, implemented in cpp/batch_norm.h.

They take float32 and bfloat16 images. Other dtypes, and machines without the library, use the passes of
`cpu_batch_norm`, which has the equations. Sums are float32 within a block of pixels and float64 over all blocks.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from regnet_flax.models.ops import cpu, cpu_batch_norm, native_library, plain
from regnet_flax.models.ops.native_convolution import Convolved, array
from regnet_flax.models.ops.native_library import call, derivable
from regnet_flax.models.ops.plain import over_devices
from regnet_flax.models.ops.varying import undivided

Array = jax.Array


def batch_norm(x: Array | Convolved, scale: Array, bias: Array, **options: Any) -> tuple[cpu.Remade, Array, Array]:
    """`cpu_batch_norm.batch_norm`, with native passes if they take these arrays."""
    x = array(x)
    passes = PASSES if _takes(x, scale, bias, options.get("dtype")) else cpu_batch_norm.PASSES
    return cpu_batch_norm.batch_norm(x, scale, bias, **options, passes=passes)


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
    if isinstance(x, Convolved) and x.job and x.norm is None and takes and mean.dtype == variance.dtype == jnp.float32:
        return Convolved(x.job, (normalizer, vectors))
    x = array(x)
    y = plain.normalize(x, *vectors, epsilon=epsilon, **options)
    return cpu.Remade(y, (x, *vectors), normalizer) if takes else y


def _statistics(x, axis_name):
    own_mean, own_variance = _moments(None, x)
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
