"""The networks: exact parameter counts, the scan against the loop, and create_model's options."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ScopeParamShapeError

from regnet_flax import create_model, list_models
from regnet_flax.analysis.summary import count_parameters
from regnet_flax.models.regnet import RegNet, stack_blocks, unstack_blocks

pytestmark = pytest.mark.core

# From the tables of the RegNet paper and He et al. if they have them; otherwise summed by hand.
PARAMETERS = [
    ("resnet20", {}, 272_474),
    ("resnet20", {"shortcut": "A"}, 269_722),
    ("regnet20_convrnn", {}, 307_418),
    ("regnet20_convgru", {}, 310_106),
    ("regnet20_convlstm", {}, 311_450),
    ("regnet20_convrnn", {"kernel": "dense"}, 402_954),
    ("regnet20_convgru", {"kernel": "dense"}, 596_714),
    ("regnet20_convlstm", {"kernel": "dense"}, 693_594),
    ("se_resnet20", {}, 274_847),
    ("se_regnet20_convlstm", {}, 313_823),
    ("resnet50", {"num_classes": 1000}, 25_557_032),
    ("regnet50_convlstm", {"num_classes": 1000}, 28_133_160),
    ("se_resnet50", {"num_classes": 1000}, 28_088_024),
    ("regnet_proj_cifar", {}, 972_250),
    ("regnet_proj_imagenet", {"num_classes": 1000}, 114_873_256),
    ("resnet_rnn20_convrnn", {}, 563_114),
    ("resnet_rnn20_convgru", {}, 1_289_546),
    ("regnety_400mf", {"num_classes": 1000}, 4_344_144),
]


def shapes(model, image_shape=(32, 32, 3)):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *image_shape)), train=False))


def tiny(name="regnet14_convlstm", **options):
    return create_model(name, width=4, **options)


def images(n=4, size=8, channels=3):
    return np.random.default_rng(7).normal(size=(n, size, size, channels)).astype(np.float32)


@pytest.mark.parametrize("name, options, count", PARAMETERS)
def test_parameter_counts(name, options, count):
    assert count_parameters(shapes(create_model(name, **options))["params"]) == count


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_depth_counts_the_layers_with_weights(depth):
    params = shapes(create_model(f"resnet{depth}"))["params"]
    layers = 0
    for path, a in jax.tree_util.tree_leaves_with_path(params):
        path = jax.tree_util.keystr(path)
        if "kernel" in path and "shortcut" not in path:
            layers += a.shape[0] if "'blocks'" in path else 1  # stacked
    assert layers == depth


def test_list_models():
    assert {"resnet110", "se_regnet56_convgru", "regnet101_convrnn", "regnet18_convlstm"} <= set(list_models())
    assert list_models("*56*gru*") == ["regnet56_convgru", "se_regnet56_convgru"]
    for name in list_models():
        model = create_model(name)
        if name.startswith(("wrn", "se_wrn")) or "next" in name:
            assert model.regulator == (name.rpartition("_")[2] if "_conv" in name else None)
            assert model.squeeze_excite == name.startswith("se_")
        elif isinstance(model, RegNet) and "_rnn20" not in name and "_proj" not in name:
            assert (model.regulator or "resnet") in name and model.squeeze_excite == name.startswith("se_")


def test_any_depth_6m_plus_2_any_size_any_channels():
    params = shapes(create_model("regnet26_convgru", num_classes=3, scan=False), (9, 7, 1))["params"]
    assert params["conv1"]["kernel"].shape == (3, 3, 1, 16) and params["head"]["kernel"].shape == (64, 3)
    assert [name for name in params["stage2"] if "block" in name] == ["block1", "block2", "block3", "block4"]


@pytest.mark.parametrize(
    "name, words",
    [
        ("regnet21_convlstm", "6m+2 (nearest: 20 or 26)"),
        ("resnet7", "nearest: 8 or 14"),
        ("regnet20_convlstn", "regnet20_convlstm"),
        ("resnet_20", "resnet20"),
    ],
)
def test_unknown_names_are_answered_with_the_closest(name, words):
    with pytest.raises(ValueError) as error:
        create_model(name)
    assert name in str(error.value) and words in str(error.value)


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("regnet20_convrnn", {"kernal": "dense"}, "kernel"),
        ("regnet20_convrnn", {"kernel": "sparse"}, "separable"),
        ("regnet20_convrnn", {"regulated_stages": (1, 4)}, "1 to 3"),
        ("regnet20_convrnn", {"width": 0}, "width"),
        ("regnet20_convrnn", {"unroll": 1.5}, "unroll"),
        ("regnet50_convrnn", {"bottleneck_stride": "3x3"}, "1x1"),
        ("resnet20", {"shortcut": "C"}, "'A', 'B'"),
        ("resnet20", {"num_classes": -1}, "num_classes"),
    ],
)
def test_wrong_options_name_the_mend(name, options, words):
    with pytest.raises(ValueError, match=words):
        create_model(name, **options)


def randomized(variables, seed=0):
    """Randomizes all values, with positive variances: initial values would hide a swap of equal arrays."""
    rng = np.random.default_rng(seed)

    def draw(path, a):
        values = rng.normal(0, 0.3, a.shape)
        name = path[-1].key
        return np.asarray({"var": 1 + values**2, "scale": 1 + values}.get(name, values), a.dtype)

    return jax.tree_util.tree_map_with_path(draw, variables)


@pytest.mark.parametrize(
    "name, share",
    [
        ("resnet14", True),
        ("regnet14_convlstm", True),
        pytest.param("regnet14_convlstm", False, marks=pytest.mark.thorough),
        pytest.param("se_regnet14_convgru", True, marks=pytest.mark.thorough),
        ("regnet50_convrnn", False),
    ],
)
def test_the_scan_computes_what_the_loop_does(name, share):
    x = images(size=32 if "50" in name else 8)
    scanned, loop = (
        tiny(name, share_regulator=share, **options).clone(stage_sizes=(3, 1))
        for options in ({"unroll": 1}, {"scan": False})
    )
    variables = randomized(shapes(scanned, x.shape[1:]))
    unstacked = unstack_blocks(variables)
    assert jax.tree.map(jnp.shape, unstacked) == jax.tree.map(lambda a: a.shape, dict(shapes(loop, x.shape[1:])))
    assert jax.tree.all(jax.tree.map(np.array_equal, stack_blocks(unstacked), variables))

    def run(model):
        return jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))

    logits, updates = run(scanned)(variables, x)
    expected, expected_updates = run(loop)(unstacked, x)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), unstack_blocks(updates), expected_updates
    )


@pytest.mark.parametrize(
    "variants",
    [
        [{"unroll": 1, "remat": True}],
        pytest.param([{"unroll": 1}, {"unroll": 2, "remat": True}], marks=pytest.mark.thorough),
    ],
    ids=len,
)
def test_unroll_and_remat_change_nothing_but_rounding(variants):
    x = images()
    one_stage = functools.partial(RegNet, stage_sizes=(3,), width=4, regulator="convlstm")
    variables = randomized(shapes(one_stage(), (8, 8, 3)))

    def gradients(**options):
        model = one_stage(**options)

        def loss(params):
            logits, _ = model.apply(variables | {"params": params}, x, train=True, mutable=["batch_stats"])
            return (logits**2).mean()

        return jax.jit(jax.grad(loss))(variables["params"])

    expected = gradients(unroll=2)
    for options in variants:
        worst = jax.tree.map(
            lambda a, b: float(np.linalg.norm(a - b) / (np.linalg.norm(b) + 1e-6)), gradients(**options), expected
        )
        assert max(jax.tree.leaves(worst)) < 1e-3, options


def test_one_regulator_serves_the_stage_or_each_block_has_its_own():
    shared = shapes(tiny(scan=False))["params"]["stage1"]
    assert "regulator" in shared and "regulator" not in shared["block1"] and "regulator" not in shared["block2"]
    own = shapes(tiny(scan=False, share_regulator=False))["params"]["stage1"]
    assert "regulator" not in own and "regulator" in own["block1"] and "regulator" in own["block2"]


def test_the_state_reaches_later_blocks_and_starts_anew_in_each_stage():
    """C exceeds 1 only where the previous block's C is part of it."""
    model = tiny("regnet14_convlstm", scan=False).clone(stage_sizes=(2, 2))
    x = images(1)
    variables = randomized(shapes(model, (8, 8, 3)))

    @jax.jit
    def states(x):
        _, found = model.apply(variables, x, mutable=["intermediates"])
        return {
            stage: [blocks[f"block{b}"]["state"][0] for b in (1, 2)]
            for stage, blocks in found["intermediates"].items()
            if stage.startswith("stage")
        }

    # After one step from zeros, C is i⊙g, so it is bounded by 1; after two steps with gates near 1 it is not.
    found = states(50 * x)
    assert len(found) == 2
    for first, second in found.values():
        assert np.abs(first[1]).max() <= 1 < np.abs(second[1]).max()


@pytest.mark.parametrize("stages, kept", [((), ()), ((1,), (1,)), ((2, 3), (2, 3)), (None, (1, 2, 3))])
def test_regulated_stages(stages, kept):
    params = shapes(tiny(regulated_stages=stages))["params"]
    assert tuple(s for s in (1, 2, 3) if "regulator" in params[f"stage{s}"]) == kept
    if not kept:
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes(tiny("resnet14"))["params"])


def test_shortcut_a_subsamples_and_pads_with_zeros_at_the_end():
    model = tiny("resnet8", shortcut="A", scan=False)
    x = images(2)
    variables = randomized(shapes(model, (8, 8, 3)))
    # If the branch's last scale and bias are zero, a block reduces to its shortcut.
    for stage in ("stage2", "stage3"):
        bn2 = variables["params"][stage]["block1"]["bn2"]
        bn2["scale"], bn2["bias"] = np.zeros_like(bn2["scale"]), np.zeros_like(bn2["bias"])
    out = jax.jit(functools.partial(model.apply, features=True))(variables, x)
    out = jax.tree.map(np.asarray, out)
    np.testing.assert_array_equal(out["stage2"][..., :4], out["stage1"][:, ::2, ::2])
    np.testing.assert_array_equal(out["stage2"][..., 4:], 0)


def test_backbone_outputs():
    x = images(2)
    model = tiny("regnet8_convrnn", num_classes=0)
    variables = randomized(shapes(model, (8, 8, 3)))
    assert "head" not in variables["params"]

    @jax.jit
    def run(variables, x):
        features = tiny("regnet8_convrnn", features=True).apply(variables, x)
        return model.apply(variables, x, features=True), model.apply(variables, x), features

    outputs, pooled, other = jax.tree.map(np.asarray, run(variables, x))
    assert {name: a.shape for name, a in outputs.items()} == {
        "stage1": (2, 8, 8, 4),
        "stage2": (2, 4, 4, 8),
        "stage3": (2, 2, 2, 16),
    }
    np.testing.assert_allclose(pooled, outputs["stage3"].mean((1, 2)), rtol=1e-6)
    np.testing.assert_array_equal(other["stage2"], outputs["stage2"])


def test_bfloat16_keeps_float32_parameters_statistics_and_logits():
    x = images()
    model = tiny(dtype=jnp.bfloat16)
    variables = shapes(model, (8, 8, 3))

    def train(variables, **kwargs):
        return model.apply(variables, x, train=True, mutable=["batch_stats"], **kwargs)

    logits, updates = jax.eval_shape(train, variables)
    assert logits.dtype == jnp.float32
    assert {a.dtype for a in jax.tree.leaves((variables, updates))} == {jnp.dtype("float32")}
    outputs, _ = jax.eval_shape(functools.partial(train, features=True), variables)
    assert outputs["stage1"].dtype == jnp.bfloat16


def test_initial_values():
    """He normal, fan-out, before a batch normalisation; LeCun normal in the head, and no bias."""

    def initial(**options):
        model = RegNet(stage_sizes=(1, 1, 2), scan=False, **options)
        return jax.jit(model.init)(jax.random.key(0), images())["params"]

    params = initial()
    kernel = params["stage3"]["block2"]["conv1"]["kernel"]
    assert np.std(kernel) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)
    assert np.std(params["head"]["kernel"]) == pytest.approx(64**-0.5, rel=0.15)
    assert not np.any(params["head"]["bias"])
    torch_like = initial(initial="torch")
    for kernel, fan_in in (
        (torch_like["stage3"]["block2"]["conv1"]["kernel"], 9 * 64),
        (torch_like["head"]["bias"], 64),
    ):
        assert 0.8 * fan_in**-0.5 < np.abs(kernel).max() <= fan_in**-0.5


def test_weights_of_another_size_are_refused():
    images = jnp.zeros((1, 8, 8, 3))
    narrow, wide = (create_model("regnet8_convgru", width=width) for width in (4, 8))
    narrow_shapes, wide_shapes = (
        jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)
        for model in (narrow, wide)
    )
    for part in narrow_shapes["params"]:
        params = narrow_shapes["params"] | {part: wide_shapes["params"][part]}
        with pytest.raises(ScopeParamShapeError, match=part):
            jax.eval_shape(functools.partial(narrow.apply, train=False), narrow_shapes | {"params": params}, images)
