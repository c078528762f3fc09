"""The choices that the paper leaves open, as options of the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from regnet_flax import create_model


def images(size=8):
    return jax.random.normal(jax.random.key(7), (4, size, size, 3))


def initial(name, x, **options):
    """A small model, and its initial variables as the flat names that `scan=False` gives them."""
    model = create_model(name, width=4, scan=False, **options)
    init = jax.jit(lambda key: model.init(key, x, train=False))
    return model, traverse_util.flatten_dict(init(jax.random.key(0)), sep="/")


def test_fuse_init_identity_changes_the_fusing_kernels_alone_and_starts_as_the_plain_network():
    x = images()
    _, he = initial("regnet14_convlstm", x)
    model, found = initial("regnet14_convlstm", x, fuse_init="identity")
    assert he.keys() == found.keys()
    for name, value in found.items():
        if name.endswith("conv_fuse/kernel"):
            n = value.shape[-1]
            np.testing.assert_array_equal(value[0, 0], np.concatenate([np.eye(n), np.zeros((n, n))]))
            assert not np.array_equal(value, he[name])
        else:
            np.testing.assert_array_equal(value, he[name])

    plain, expected = initial("resnet14", x)
    shared = {name: found[name] for name in expected}
    logits = [
        net.apply(traverse_util.unflatten_dict(variables, sep="/"), x, train=False)
        for net, variables in ((model, found), (plain, shared))
    ]
    # Of the fusing batch normalisation's variance, 1, epsilon makes 1.00001.
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-5)
    assert jnp.abs(logits[1]).max() > 0.1


def test_fuse_init_is_refused_where_nothing_is_fused():
    with pytest.raises(ValueError, match="fuse_init .* fuses nothing"):
        create_model("resnet_rnn20_convrnn", fuse_init="identity")
    with pytest.raises(ValueError, match="'he', 'identity'"):
        create_model("regnet20_convrnn", fuse_init="zero")
