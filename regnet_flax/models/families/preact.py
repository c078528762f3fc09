"""Pre-activation blocks (He et al., arXiv 1603.05027), which wide networks use too (arXiv 1605.07146).

The RegNet paper has no such block: the regulator's position in it is our choice.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from regnet_flax.models.blocks import Block, zero_padded
from regnet_flax.models.ops import Value
from regnet_flax.models.regulators import State

Array = jax.Array


class PreactBlock(Block):
    """Batch normalisation and ReLU before each of two 3×3 convolutions; see Block.

    A = ReLU(BN(X1)); X2 = ReLU(BN(W12 * A)); H from X2; X3 = ReLU(BN(W23 * [X2, H])); X1' = shortcut + W34 * X3.
    Nothing follows the addition. If the shape changes, the shortcut is a 1×1 convolution of A, without a BN.
    """

    preactivated = True

    @nn.compact
    def __call__(self, carry: tuple[Value, State], shared: Any = None) -> tuple[tuple[Array, State], None]:
        """Runs the block; see Block."""
        x, state = carry
        a = self.norm(name="bn1", relu=True).value(self.ops.array(x))
        y, state = self.branch(a, state, shared)
        y, state = self.rescale(y, state, shared)
        y = self._around(x, a) + self.ops.array(y)
        self.sow("intermediates", "output", y)
        return (y, state), None

    def branch(self, x: Value, state: State, shared: Any) -> tuple[Array, State]:
        n, (before, after) = self.features, self.dilations
        x = self.conv_bn_relu(x, n, 3, self.strides, "conv1", "bn2", before)
        if self.regulated:
            state = self.regulate(x, state, shared)
            x = self.fuse(x, state[0])
        return self.conv(x, n, 3, 1, "conv2", after), state

    def _around(self, x: Value, a: Value) -> Array:
        """Computes the shortcut from X1 and A."""
        if self.strides == 1 and x.shape[-1] == self.width:
            return self.ops.array(x)
        if self.shortcut == "A":
            return zero_padded(self.ops.array(x), self.strides, self.width)
        return self.conv(a, self.width, 1, self.strides, "shortcut_conv")
