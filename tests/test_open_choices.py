"""The choices that the paper leaves open, as options of the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from test_networks import compare, network

from configs import compare_open_choices
from regnet_flax import create_model
from regnet_flax.config.check import check_config
from torch_networks import OpenNet


def images(size=8):
    return jax.random.normal(jax.random.key(7), (4, size, size, 3))


def initial(name, x, **options):
    """Makes a small model, and its initial variables with the flat names of `scan=False`."""
    model = create_model(name, width=4, scan=False, **options).clone(stage_sizes=(2,))
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
        jax.jit(net.apply)(traverse_util.unflatten_dict(variables, sep="/"), x)
        for net, variables in ((model, found), (plain, shared))
    ]
    # Epsilon turns the fusing batch normalisation's variance, 1, into 1.00001.
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-5)
    assert jnp.abs(logits[1]).max() > 0.1


def test_fuse_init_is_refused_where_nothing_is_fused():
    with pytest.raises(ValueError, match="fuse_init .* nothing is fused"):
        create_model("resnet_rnn20_convrnn", fuse_init="identity")
    with pytest.raises(ValueError, match="'he', 'identity'"):
        create_model("regnet20_convrnn", fuse_init="zero")


CHOICES = [("convlstm", "hc", True, "contiguous"), ("convgru", "none", False, "contiguous")]
ALL = [
    (c, n, s, g)
    for c in ("convrnn", "convgru", "convlstm")
    for n in ("h", "hc", "none")
    for s in (False, True)
    for g in ("pairs", "contiguous")
    if not (n == "none" and s)
]


@pytest.mark.parametrize(
    "cell, normalize, share, grouping",
    [*CHOICES, *(pytest.param(*case, marks=pytest.mark.thorough) for case in ALL if case not in CHOICES)],
)
def test_every_choice_is_the_references(cell, normalize, share, grouping, parity):
    options = {"normalize_state": normalize, "share_state_norm": share, "regulator_grouping": grouping}
    model = network(f"regnet20_{cell}", width=5, stage_sizes=(3,), **options)

    def make(classes):
        more = {"counts": (3,), "width": 5, "stem": (3, 1, False)}
        return OpenNet(classes, cell=cell, normalize=normalize, share_norm=share, grouping=grouping, **more)

    compare(model, make, 8, parity)


def test_the_choices_say_what_is_wrong():
    for options, words in (
        ({"normalize_state": "c"}, "'h', 'hc', 'none'"),
        ({"regulator_grouping": "thirds"}, "'pairs', 'contiguous'"),
        ({"normalize_state": "none", "share_state_norm": True}, "nothing to share"),
    ):
        with pytest.raises(ValueError, match=words):
            create_model("regnet20_convlstm", **options)
    with pytest.raises(ValueError, match="normalize_state .* always 'none'"):
        create_model("regnet_proj_cifar", normalize_state="h")


def test_the_comparison_of_the_choices_is_sound():
    check_config(compare_open_choices.get_config())
