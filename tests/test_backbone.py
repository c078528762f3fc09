"""A network as a backbone: features by name, frozen statistics, dilation, and other ways to run it."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from helpers import close
from regnet_flax import create_model
from regnet_flax.models.regulators import Regulator

IMAGES = np.random.default_rng(0).normal(size=(4, 9, 9, 3)).astype(np.float32)


def variables_of(model, images=IMAGES):
    """Draws random variables, so that no statistic has its initial value."""
    shapes = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)
    rng = np.random.default_rng(1)

    def draw(path, a):
        values = rng.normal(0, 0.3, a.shape)
        return np.asarray({"var": 1 + values**2, "scale": 1 + values}.get(path[-1].key, values), a.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.mark.parametrize(
    "name, size", [("regnet8_convgru", 32), ("regnet_proj_cifar", 32), ("regnet50_convrnn", 64), ("regnety_400mf", 64)]
)
def test_stage_info_is_what_comes_out(name, size):
    model = create_model(name)
    images = jnp.zeros((1, size, size, 3))
    names = tuple(info.name for info in model.stage_info)
    outputs, variables = jax.eval_shape(
        lambda key: model.init_with_output(key, images, features=names), jax.random.key(0)
    )
    assert {name: a.shape[1:] for name, a in outputs.items()} == {
        info.name: (size // info.stride, size // info.stride, info.channels) for info in model.stage_info
    }
    assert names == ("stem", *(f"stage{n}" for n in range(1, len(names))))
    assert "head" not in variables["params"]


def test_chosen_features_are_all_that_is_computed():
    model = create_model("regnet8_convrnn", width=4)
    variables = variables_of(model)
    chosen = create_model("regnet8_convrnn", width=4, features=["stage2", "stem"])
    names = []

    @jax.jit
    def run(variables):
        every = model.apply(variables, IMAGES, features=True)
        found, updated = chosen.apply(variables, IMAGES, mutable=["intermediates"])
        names.append([*every, *found])  # here, because jit sorts the dicts that it returns
        return every, found, updated

    every, found, updated = run(variables)
    assert names == [["stage1", "stage2", "stage3", "stem", "stage2"]]
    np.testing.assert_array_equal(found["stage2"], every["stage2"])
    assert "stage3" not in updated["intermediates"]
    first = jax.eval_shape(functools.partial(model.apply, features="stage1"), variables, IMAGES)
    assert first.keys() == {"stage1"}
    for call in (
        lambda: create_model("regnet8_convrnn", features=("stage2", "stage4")),
        lambda: create_model("regnety_400mf", features=("stage5",)),
        lambda: model.apply(variables, IMAGES, features=("stage4",)),
    ):
        with pytest.raises(ValueError, match="features has 'stage.': it must be True or some of 'stem', 'stage1'"):
            call()


@pytest.mark.parametrize("name", ["regnet8_convlstm", "regnety_400mf"])
def test_frozen_statistics(name):
    small = {"width": 4} if name.startswith("regnet8") else {}
    model = create_model(name, **small, frozen_batch_stats=True)
    if not small:
        model = model.clone(depth=4, w0=8, wa=8, wm=2.0, group_width=4)
    variables = variables_of(model)
    run = functools.partial(model.apply, mutable=["batch_stats"])
    trained, updates = jax.jit(functools.partial(run, train=True))(variables, IMAGES)
    evaluated, _ = jax.jit(functools.partial(run, train=False))(variables, IMAGES)
    close(trained, evaluated, 1e-5)  # on a CPU, evaluation rounds otherwise
    assert jax.tree.all(jax.tree.map(np.array_equal, updates["batch_stats"], variables["batch_stats"]))


class Twice(Regulator):
    """A custom cell that knows nothing of dilation."""

    gate_names, state_names = ("a", "b"), ("H", "memory")

    def step(self, x, state, weights):
        h, memory = state
        a, b = self.convolve(x, h, weights, 0, 2)
        return (jnp.tanh(a + memory), jnp.tanh(b) * memory + x), {"a": a, "b": b}


@pytest.mark.parametrize(
    "name, options",
    [
        ("regnet8_convlstm", {"width": 4, "output_stride": 1}),
        pytest.param(
            "regnet8_convgru",
            {"width": 4, "output_stride": 2, "kernel": "dense", "ops": "plain"},
            marks=pytest.mark.thorough,
        ),
        pytest.param("regnet50_convrnn", {"width": 4, "output_stride": 8}, marks=pytest.mark.thorough),
        pytest.param(
            "resnet50", {"width": 4, "output_stride": 4, "bottleneck_stride": "3x3"}, marks=pytest.mark.thorough
        ),
        ("own", {"width": 4, "output_stride": 1}),
    ],
)
def test_dilation_sees_what_strides_saw(monkeypatch, name, options):
    """With the same weights, every n-th pixel of a dilated stage equals the strided stage's."""
    if name == "own":
        from regnet_flax.models import regnet

        monkeypatch.setitem(regnet.CELLS, "convrnn", Twice)
        name = "regnet8_convrnn"
    bottleneck = "50" in name
    images = np.random.default_rng(0).normal(size=(2, 33, 33, 3)).astype(np.float32) if bottleneck else IMAGES
    strided = create_model(name, **options | {"output_stride": None})
    dilated = create_model(name, **options)
    if bottleneck:
        strided, dilated = (model.clone(stage_sizes=(1, 1, 2, 1)) for model in (strided, dilated))
    variables = variables_of(strided, images)
    shapes = jax.tree.map(jnp.shape, variables)
    assert shapes == jax.tree.map(jnp.shape, jax.eval_shape(dilated.init, jax.random.key(0), images))
    run = functools.partial(jax.jit, static_argnames="features")
    expected = run(strided.apply)(variables, images, features=True)
    found = run(dilated.apply)(variables, images, features=True)
    bound = options["output_stride"]
    for info, dense in zip(strided.stage_info[1:], dilated.stage_info[1:], strict=True):
        assert (dense.stride, dense.dilation) == (min(info.stride, bound), max(1, info.stride // bound))
        every = dense.dilation
        scale = np.abs(expected[info.name]).max()
        np.testing.assert_allclose(
            found[info.name][:, ::every, ::every], expected[info.name], rtol=1e-4, atol=1e-5 * scale
        )


class Cosine(Regulator):
    """A custom cell that convolves something other than 0 where H is 0."""

    gate_names = ("a",)

    def step(self, x, state, weights):
        (a,) = self.convolve(x, jnp.cos(state[0]), weights, 0, 1)
        return (a,), {"a": a}


@pytest.mark.parametrize("options", [{}, {"kernel": "dense"}])
def test_a_dilated_cell_does_not_see_the_padding_of_uneven_images(options):
    random = np.random.default_rng(0)
    x, h = (random.normal(size=(2, 5, 3, 4)).astype(np.float32) for _ in range(2))
    cell, dilated = Cosine(4, **options), Cosine(4, dilation=2, **options)
    variables = cell.init(jax.random.key(0), x, (h,))
    (found,), _ = dilated.apply(variables, x, (h,))
    for rows, columns in itertools.product((slice(0, None, 2), slice(1, None, 2)), repeat=2):
        (expected,), _ = cell.apply(variables, x[:, rows, columns], (h[:, rows, columns],))
        np.testing.assert_allclose(found[:, rows, columns], expected, atol=1e-6)


def test_dia_ignores_what_it_does_not_have():
    """Like a plain network, so that a comparison may set these options for all of its models."""
    images = jnp.zeros((1, 8, 8, 3))
    small = {"width": 4, "stage_sizes": (1, 2)}
    model = create_model("dia_resnet20", output_stride=1, features=True, share_state_norm=True).clone(**small)
    assert jax.eval_shape(model.init, jax.random.key(0), images)


def test_wrong_output_strides():
    for wrong in (3, 6, 2):
        with pytest.raises(ValueError, match=f"output_stride is {wrong}: it must be 4, the stem's, or 4 × 2"):
            create_model("resnet18", output_stride=wrong)
    with pytest.raises(ValueError, match="whole number"):
        create_model("resnet20", output_stride=0)


def test_under_jit_shard_map_and_nnx():
    """Gradients are equal on arrays sharded with jit and with shard_map, and as an nnx module."""
    model = create_model("regnet8_convlstm", width=4, frozen_batch_stats=True, features=("stage2",))
    variables = variables_of(model)
    mesh = Mesh(np.array(jax.devices()[:2]), ("batch",))
    divided = PartitionSpec("batch")

    def loss(params, images):
        found = model.apply(variables | {"params": params}, images, train=True)
        return (found["stage2"] ** 2).sum()

    gradient = jax.grad(loss)
    expected = jax.jit(gradient)(variables["params"], IMAGES)
    sharded = jax.device_put(IMAGES, NamedSharding(mesh, divided))
    by_jit = jax.jit(gradient)(variables["params"], sharded)
    specs = {"in_specs": (PartitionSpec(), divided), "out_specs": PartitionSpec()}
    by_shard_map = jax.jit(jax.shard_map(gradient, mesh=mesh, **specs))(variables["params"], sharded)

    bridge = nnx.jit(lambda: nnx.bridge.lazy_init(nnx.bridge.ToNNX(model, rngs=nnx.Rngs(params=0)), IMAGES))
    bridged = bridge()
    flat = {"params": {}, "batch_stats": {}}
    for path, variable in nnx.to_flat_state(nnx.state(bridged, nnx.Any(nnx.Param, nnx.BatchStat))):
        flat["params" if isinstance(variable, nnx.Param) else "batch_stats"][path] = variable.get_value()
    linen = {collection: unflatten_dict(values) for collection, values in flat.items()}

    def of_nnx(bridged):
        found = bridged(IMAGES)["stage2"]
        return (found**2).sum(), found

    def of_linen(params):
        found = model.apply(linen | {"params": params}, IMAGES)["stage2"]
        return (found**2).sum(), found

    by_nnx, found = nnx.jit(nnx.grad(of_nnx, has_aux=True))(bridged)
    by_linen, expected_of_nnx = jax.jit(jax.grad(of_linen, has_aux=True))(linen["params"])
    np.testing.assert_allclose(found, expected_of_nnx, rtol=1e-4, atol=1e-5)
    norms = (sum(float((np.asarray(a) ** 2).sum()) for a in jax.tree.leaves(leaves)) for leaves in (by_nnx, by_linen))
    assert next(norms) == pytest.approx(next(norms), rel=1e-3)

    for found in (by_jit, by_shard_map):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * (np.abs(b).max() + 1e-3))
