"""Initial values: the paper's recipe, and PyTorch's defaults."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer


def _torch_uniform(fan_in: int) -> Initializer:
    bound = 1 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: Any, dtype: Any = None, out_sharding: Any = None) -> jax.Array:
        return jax.random.uniform(key, shape, dtype or jnp.float32, -bound, bound)

    return init


@dataclasses.dataclass(frozen=True)
class Initializers:
    """The initialisers of each kind of weight.

    Attributes:
      conv: for kernels of convolutions before a batch normalisation.
      regulator: for kernels of the regulators' convolutions, which sigmoid or tanh follow.
      dense: for kernels of the head and of squeeze-and-excitation.
      bias: maps a layer's fan-in to the initialiser of its bias.
    """

    conv: Initializer
    regulator: Initializer
    dense: Initializer
    bias: Callable[[int], Initializer]


def identity_of_first(key: jax.Array, shape: Any, dtype: Any = None, out_sharding: Any = None) -> jax.Array:
    """Returns [identity, 0], of shape (1, 1, 2n, n): a 1×1 convolution that copies the first n of 2n channels."""
    del key, out_sharding
    return jnp.eye(*shape[-2:], dtype=dtype or jnp.float32).reshape(shape)


_torch_kernel = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # uniform in ±1/√fan_in

INITIALIZERS = {
    # He et al. 2015 (arXiv 1502.01852), in the fan-out form that torchvision uses for ResNets.
    "paper": Initializers(
        conv=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        regulator=nn.initializers.lecun_normal(),
        dense=nn.initializers.lecun_normal(),
        bias=lambda fan_in: nn.initializers.zeros_init(),
    ),
    # torchvision.models.regnet.RegNet.__init__: the biases of its squeeze-and-excitation keep PyTorch's defaults.
    "torchvision_regnet": Initializers(
        conv=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        regulator=nn.initializers.lecun_normal(),
        dense=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        bias=_torch_uniform,
    ),
    # nn.Conv2d.reset_parameters and nn.Linear.reset_parameters.
    "torch": Initializers(conv=_torch_kernel, regulator=_torch_kernel, dense=_torch_kernel, bias=_torch_uniform),
}
