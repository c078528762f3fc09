"""Every function of every back end against PLAIN: values, derivatives, `vmap`, `pmap`, `jax.shard_map`, bfloat16.

Tests also cover what is not defined: forward mode of "cpu" and "gpu", and second derivatives of "gpu", which is
interpreted here on a CPU.
"""

import dataclasses
import functools
import json
import pathlib
import re
import tarfile
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from regnet_flax import create_model
from regnet_flax.models import ops as ops_lib
from regnet_flax.models.ops import CPU, GPU, PLAIN, plain
from regnet_flax.models.registry import OPTIONS
from regnet_flax.training import workdir

N, SIZE, CHANNELS = 4, 4, 3
IMAGE, WEIGHTS = (N, SIZE, SIZE, CHANNELS), ((2, 4, CHANNELS), (3, 3, 4, CHANNELS), (4, CHANNELS))
SAME = ((1, 1), (1, 1))


def conv(ops, strides, axis_name, x, kernel):
    return ops.array(ops.conv(x, kernel, (strides, strides), SAME))


def conv_of_two(ops, axis_name, x, y, kernel):
    return ops.array(ops.conv(ops.concatenate(x, y), kernel, (1, 1), SAME))


def batch_norm(ops, relu, axis_name, x, scale, bias):
    y, mean, variance = ops.batch_norm(x, scale, bias, relu=relu, axis_name=axis_name)
    return ops.array(y), mean, variance


def conv_of_batch_norm(ops, axis_name, x, scale, bias, kernel):
    y, *_ = ops.batch_norm(x, scale, bias, relu=True, axis_name=axis_name)
    return ops.array(ops.conv(y, kernel, (1, 1), SAME))


def separable(ops, axis_name, x, h, pointwise, depthwise):
    return ops.separable(x, h, pointwise, depthwise)


def step(ops, name, axis_name, x, *rest):
    *state, pointwise, depthwise, bias = rest
    state, gates = getattr(ops, name)(x, tuple(state), (pointwise, depthwise, bias))
    return tuple(a.astype(x.dtype) for a in state), gates


def add_relu(ops, axis_name, x, y):
    return ops.add_relu(x, y)


def gates(count):
    return tuple(tuple(count if size == 4 else size for size in shape) for shape in WEIGHTS)


# The function, its arguments before `axis_name`, and the shapes of its arrays.
CASES = {
    "conv": (conv, (1,), (IMAGE, (3, 3, CHANNELS, 2))),
    "conv_strided": (conv, (2,), (IMAGE, (3, 3, CHANNELS, 2))),
    "conv_of_two": (conv_of_two, (), (IMAGE, IMAGE, (3, 3, 2 * CHANNELS, 2))),
    "batch_norm": (batch_norm, (False,), (IMAGE, (CHANNELS,), (CHANNELS,))),
    "batch_norm_relu": (batch_norm, (True,), (IMAGE, (CHANNELS,), (CHANNELS,))),
    "conv_of_batch_norm": (conv_of_batch_norm, (), (IMAGE, (CHANNELS,), (CHANNELS,), (3, 3, CHANNELS, 2))),
    "add_relu": (add_relu, (), (IMAGE, IMAGE)),
    "separable": (separable, (), (IMAGE, IMAGE, *WEIGHTS[:2])),
    "rnn_step": (step, ("rnn_step",), (IMAGE, IMAGE, *gates(1))),
    "gru_step": (step, ("gru_step",), (IMAGE, IMAGE, *gates(3))),
    "lstm_step": (step, ("lstm_step",), (IMAGE, IMAGE, IMAGE, *gates(4))),
}
ALL = {CPU: tuple(CASES), GPU: ("lstm_step",)}


def normal(seed, *shape, dtype=None):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype or jnp.result_type(float))


def arguments(case, dtype=None):
    return tuple(normal(seed, *shape, dtype=dtype) for seed, shape in enumerate(CASES[case][2]))


def function(ops, case, axis_name=None):
    call, options, _ = CASES[case]
    return functools.partial(call, ops, *options, axis_name)


def loss(ops, case, axis_name=None):
    """Computes a weighted sum over the results, with weights that are a wave over the index in the image.

    It also returns the results.
    """

    def total(*arrays):
        found = function(ops, case, axis_name)(*arrays)
        sums = [a.sum(0) for a in jax.tree.leaves(found)]
        return sum(jnp.vdot(jnp.cos(jnp.arange(s.size)).reshape(s.shape), s) for s in sums), found

    return total


def gradient(ops, case, axis_name=None):
    """Returns the gradients with respect to all arrays, and the value."""
    return jax.grad(loss(ops, case, axis_name), range(len(CASES[case][2])), has_aux=True)


def by_vmap(ops, case, arrays):
    """Returns the gradients and values of two sets of arrays."""
    return jax.vmap(gradient(ops, case))(*(jnp.stack([a, 1 + a / 2]) for a in arrays))


def everything(ops, by_case):
    """Returns for each case: value, gradients, those of two sets of arrays under vmap, and second derivatives."""
    found = {}
    for case, arrays in by_case.items():
        first = found[case, "first"] = gradient(ops, case)(*arrays)
        found[case, "vmap"] = by_vmap(ops, case, arrays)
        found[case, "forward over reverse"] = jax.jvp(gradient(ops, case), arrays, arrays, has_aux=True)[1]
        found[case, "reverse over reverse"] = jax.vjp(gradient(ops, case), *arrays, has_aux=True)[1](first[0])
    return found


def assert_same(found, expected, rtol):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, path
        scale = float(jnp.abs(b.astype(jnp.float32)).max())
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=rtol, atol=rtol * scale, err_msg=str(path)
        )


@pytest.mark.parametrize(
    "cases", [[case for case in CASES if case != "gru_step"][i::2] for i in range(2)] + [["gru_step"]]
)
def test_cpu(cases):
    with jax.enable_x64(True):
        by_case = {case: arguments(case) for case in cases}
        found, expected = (jax.jit(functools.partial(everything, ops))(by_case) for ops in (CPU, PLAIN))
        assert_same(found, expected, 1e-10)


def blocks(ops, x, first, scale, bias, second, third):
    """Two convolutions, each with batch normalisation, once with a ReLU and once with a shortcut, and a third."""
    y, *_ = ops.batch_norm(ops.conv(x, first, (1, 1), SAME), scale, bias, relu=True)
    y, *_ = ops.batch_norm(ops.conv(y, second, (1, 1), SAME), bias, scale)
    y = ops.array(ops.conv(ops.concatenate(y, ops.add_relu(y, x)), third, (1, 1), SAME))
    return jnp.vdot(jnp.cos(jnp.arange(y.size)).reshape(y.shape), y**2)


@pytest.mark.parametrize("dtype, rtol", [(jnp.float32, 1e-4), (jnp.float64, 1e-10)])
def test_second_derivatives_after_some_arguments(dtype, rtol):
    """The first derivative is after one kernel: then only the second one sees the normalisations before it."""

    def replaced(function, arrays, k, a):
        return function(*arrays[:k], a, *arrays[k + 1 :])

    kernel = (3, 3, CHANNELS, CHANNELS)
    shapes = IMAGE, kernel, (CHANNELS,), (CHANNELS,), kernel, (3, 3, 2 * CHANNELS, 2)

    def run(ops, arrays):
        found = {}
        for k in (4, 5):
            gradient = jax.grad(functools.partial(blocks, ops), k)
            along = jnp.cos(arrays[k])
            found[k, "reverse over reverse"] = jax.vjp(gradient, *arrays)[1](along)
            of_one = functools.partial(replaced, gradient, arrays, k)
            found[k, "forward over reverse"] = jax.jvp(of_one, (arrays[k],), (along,))[1]
        return found

    with jax.enable_x64(dtype is jnp.float64):
        arrays = [normal(seed, *shape, dtype=dtype) for seed, shape in enumerate(shapes)]
        assert_same(*(jax.jit(functools.partial(run, ops))(arrays) for ops in (CPU, PLAIN)), rtol)


def test_first_derivatives_compute_nothing_for_the_statistics(monkeypatch):
    """Also where they leave a loop and a checkpoint, as the running ones do."""

    def total(x, scale, bias, kernel):
        def body(x, _):
            y, *statistics = CPU.batch_norm(x, scale, bias)
            return CPU.array(CPU.conv(y, kernel, (1, 1), SAME)), statistics

        y, statistics = lax.scan(jax.checkpoint(body), x, length=2)
        return y.sum(), statistics

    arrays = [normal(0, *shape) for shape in (IMAGE, (CHANNELS,), (CHANNELS,), (3, 3, CHANNELS, CHANNELS))]
    of_statistics = lambda *arrays: sum(jax.tree.leaves(total(*arrays)[1])).sum()  # noqa: E731
    monkeypatch.setattr(plain, "statistics", lambda *_: pytest.fail("it is called"))
    jax.eval_shape(jax.grad(total, range(4), has_aux=True), *arrays)
    with pytest.raises(pytest.fail.Exception, match="it is called"):
        jax.eval_shape(jax.grad(of_statistics), *arrays)


def two_devices():
    return Mesh(np.array(jax.devices()[:2]), ("batch",))


@pytest.mark.thorough
def test_gpu():
    """Only its LSTM is its own: tested under vmap inside shard_map; test_ops_gpu tests it without either."""
    own = [field.name for field in dataclasses.fields(GPU) if getattr(GPU, field.name) != getattr(PLAIN, field.name)]
    assert own == ["name", "lstm_step"]
    arrays = arguments("lstm_step")
    divided = tuple(PartitionSpec("batch") if a.shape == IMAGE else PartitionSpec() for a in arrays)
    sets = tuple(PartitionSpec(None, *spec) for spec in divided)
    specs = {"in_specs": (divided,), "out_specs": (sets, PartitionSpec(None, "batch")), "check_vma": False}

    def run(ops):
        return jax.jit(jax.shard_map(functools.partial(by_vmap, ops, "lstm_step"), mesh=two_devices(), **specs))(arrays)

    assert_same(run(GPU), run(PLAIN), 1e-4)
    arrays = arguments("lstm_step", jnp.bfloat16)
    types, expected = (jax.eval_shape(gradient(ops, "lstm_step"), *arrays) for ops in (GPU, PLAIN))
    assert types == expected


def over_devices(ops, axis_name, by_case):
    """Returns gradients and value of each case, with batch normalisation over two devices."""
    return {case: gradient(ops, case, axis_name)(*arrays) for case, arrays in by_case.items()}


BATCH_NORM = tuple(case for case in CASES if "batch_norm" in case)


@pytest.mark.parametrize(
    "ops, axis_name, cases",
    [
        (CPU, "batch", ALL[CPU]),
        (CPU, None, BATCH_NORM),
        pytest.param(GPU, "batch", ALL[GPU], marks=pytest.mark.thorough),
    ],
    ids=["cpu", "cpu-unsynchronised", "gpu"],
)
def test_shard_map(ops, axis_name, cases):
    """With its default check_vma: images are divided, and the gradients of replicated weights are summed.

    JAX's interpreter of Pallas kernels does not support that check, so "gpu" runs without it here.
    """
    check = {"check_vma": False} if ops is GPU else {}
    by_case = {case: arguments(case) for case in cases}
    specs = jax.tree.map(lambda a: PartitionSpec("batch") if a.shape == IMAGE else PartitionSpec(), by_case)
    outputs = {case: (specs[case], PartitionSpec("batch")) for case in by_case}

    def run(ops):
        call = functools.partial(over_devices, ops, axis_name)
        return jax.jit(jax.shard_map(call, mesh=two_devices(), in_specs=(specs,), out_specs=outputs, **check))(by_case)

    assert_same(run(ops), run(PLAIN), 1e-4)


# The interpreted kernels take most of the time of this file.
WHERE_CHEAP = pytest.mark.parametrize("ops", [CPU, pytest.param(GPU, marks=pytest.mark.thorough)], ids=["cpu", "gpu"])


@pytest.mark.thorough
@WHERE_CHEAP
def test_pmap(ops):
    by_case = {case: arguments(case) for case in ALL[ops]}
    halves = jax.tree.map(
        lambda a: a.reshape(2, N // 2, *a.shape[1:]) if a.shape == IMAGE else jnp.stack([a, a]), by_case
    )

    def run(ops):
        call = functools.partial(over_devices, ops, "batch")
        return jax.pmap(call, axis_name="batch", devices=jax.devices()[:2])(halves)

    assert_same(run(ops), run(PLAIN), 1e-4)


@WHERE_CHEAP
def test_bfloat16(ops):
    """Dtypes equal PLAIN's, and sums over pixels are float32: gradients match float32's up to bfloat16's rounding."""
    by_case = {case: arguments(case, jnp.bfloat16) for case in ALL[ops]}
    found = jax.jit(functools.partial(over_devices, ops, None))(by_case)
    types = jax.eval_shape(functools.partial(over_devices, PLAIN, None), by_case)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), by_case)
    expected = jax.jit(functools.partial(over_devices, PLAIN, None))(wide)
    assert_same(found, jax.tree.map(lambda a, like: a.astype(like.dtype), expected, types), 0.05)


def test_second_derivatives_in_bfloat16():
    """Their dtypes equal PLAIN's, and they match those of float32 up to rounding."""

    def along(ops, arrays):
        return jax.jvp(gradient(ops, "conv_of_batch_norm"), arrays, arrays, has_aux=True)[1]

    arrays = arguments("conv_of_batch_norm", jnp.bfloat16)
    types = jax.eval_shape(functools.partial(along, PLAIN), arrays)
    expected = jax.jit(functools.partial(along, PLAIN))(jax.tree.map(lambda a: a.astype(jnp.float32), arrays))
    found = jax.jit(functools.partial(along, CPU))(arrays)
    assert_same(found, jax.tree.map(lambda a, like: a.astype(like.dtype), expected, types), 0.05)


def test_mesh_with_explicit_axes():
    """`jax.make_mesh` makes such a mesh; the types of arrays then say how they are divided. The first state is not."""
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])

    def divide(case, arrays):
        x, *others = (NamedSharding(mesh, PartitionSpec(*["data"] * (a.shape == IMAGE))) for a in arrays)
        if "step" in case:
            others[0] = None
        return jax.device_put(arrays, (x, *others))

    cases = ("conv_strided", "conv_of_two", "batch_norm_relu", "conv_of_batch_norm", "add_relu", "rnn_step")
    by_case = {case: arguments(case, jnp.float32) for case in cases}
    divided = {case: divide(case, arrays) for case, arrays in by_case.items()}
    found = jax.jit(functools.partial(over_devices, CPU, None))(divided)
    expected = jax.jit(functools.partial(over_devices, PLAIN, None))(by_case)
    assert_same(jax.device_get(found), jax.device_get(expected), 1e-4)
    (state,), _ = found["rnn_step"][1]
    assert state.sharding.spec[0] == "data"
    jax.eval_shape(lambda *a: jax.jvp(gradient(CPU, "conv_of_two"), a, a, has_aux=True), *divided["conv_of_two"])
    with jax.enable_x64(True):  # without native operations
        jax.eval_shape(gradient(CPU, "conv"), *divide("conv", arguments("conv")))
    jax.eval_shape(gradient(GPU, "lstm_step"), *divide("lstm_step", arguments("lstm_step", jnp.float32)))


@pytest.mark.parametrize("ops", ALL, ids=lambda ops: ops.name)
def test_forward_mode_is_refused(ops):
    """PLAIN defines it, and create_model's docstring points to it."""
    for case in ALL[ops]:
        arrays = arguments(case)
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jit(lambda *a, case=case: jax.jvp(function(ops, case), a, a)).lower(*arrays)
        jax.eval_shape(lambda *a, case=case: jax.jvp(function(PLAIN, case), a, a), *arrays)
    assert 'use "plain"' in create_model.__doc__


def test_gpu_has_no_second_derivatives():
    arrays = arguments("lstm_step")
    with pytest.raises(TypeError, match='no second derivatives: give create_model ops="plain"'):
        jax.eval_shape(lambda *a: jax.jvp(gradient(GPU, "lstm_step"), a, a, has_aux=True), *arrays)


def options_of_conv(convolve):
    """Returns one convolution per option of lax.conv_general_dilated."""
    x, kernel = normal(0, 2, 7, 6, 4), normal(1, 3, 3, 4, 6)
    convolve = functools.partial(convolve, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    channels_first = {"dimension_numbers": ("NCHW", "OIHW", "NCHW")}
    return {
        "dilation": convolve(x, kernel, (1, 1), ((2, 2), (2, 2)), rhs_dilation=(2, 2)),
        "dilated input": convolve(x, kernel, (1, 1), SAME, lhs_dilation=(2, 1)),
        "groups": convolve(x, kernel[:, :, :2], (2, 2), SAME, feature_group_count=2),
        "batch groups": convolve(x, kernel, (1, 1), SAME, batch_group_count=2),
        "layout": convolve(x.transpose(0, 3, 1, 2), kernel.transpose(3, 2, 0, 1), (1, 1), SAME, **channels_first),
        "type of sums": convolve(x, kernel, (1, 1), SAME, preferred_element_type=jnp.float32),
        "precision": convolve(x, kernel, (1, 1), SAME, precision=lax.Precision.HIGHEST),
        **{padding: convolve(x, kernel, (2, 2), padding) for padding in ("SAME", "SAME_LOWER", "VALID")},
    }


def test_conv_has_the_options_of_lax():
    """It supports them, or uses lax; also through nn.Conv."""
    found, expected = (jax.jit(functools.partial(options_of_conv, c))() for c in (CPU.conv, lax.conv_general_dilated))
    assert_same(found, expected, 1e-5)
    assert str(jax.make_jaxpr(functools.partial(options_of_conv, CPU.conv))()).count("Precision.HIGHEST") == 2
    layer = nn.Conv(4, (3, 3), kernel_dilation=2, conv_general_dilated=CPU.conv)
    assert jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))[0].shape == (1, 8, 8, 4)


def test_conv_refuses_what_lax_refuses():
    """While it is traced, in the same words."""
    x, kernel, strides = jnp.ones((2, 4, 5, 3)), jnp.ones((3, 3, 3, 2)), (1, 1)
    for case in (
        (x, jnp.ones((3, 3, 5, 2)), strides, SAME),
        (x, kernel[0], strides, SAME),
        (x, kernel, (1, 1, 1), SAME),
        (x, kernel, strides, SAME[:1]),
    ):
        with pytest.raises((TypeError, ValueError)) as expected:
            jax.eval_shape(functools.partial(PLAIN.conv, *case))
        with pytest.raises(expected.type, match=re.escape(str(expected.value))):
            jax.eval_shape(functools.partial(CPU.conv, *case))


@pytest.mark.parametrize(
    "platform, capability, expected",
    [
        ("cpu", None, (CPU, None)),
        ("gpu", "9.0", (GPU, 3)),
        ("gpu", "7.5", (PLAIN, 1)),  # Triton refuses it
        ("gpu", "gfx942", (PLAIN, 1)),
        ("tpu", None, (PLAIN, 1)),
    ],
)
def test_auto_is_decided_by_the_devices_given(monkeypatch, platform, capability, expected):
    device = types.SimpleNamespace(platform=platform)
    if capability:
        device.compute_capability = capability
    model = create_model("regnet8_convlstm", devices=[device])
    assert (model.ops, model.unroll) == expected
    assert create_model("regnet8_convlstm", ops="gpu", unroll=2, devices=[device]).ops is GPU
    monkeypatch.setattr(jax, "local_devices", lambda backend: [device])
    assert create_model("regnet8_convlstm").ops is expected[0]
    mine = dataclasses.replace(PLAIN, name="mine")
    assert create_model("regnety_400mf", ops=mine).ops is mine
    with pytest.raises(ValueError, match="ops is 'fast': it must be one of 'auto', 'plain', 'cpu', 'gpu'"):
        create_model("resnet20", ops="fast")


def test_default_device(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda backend: [types.SimpleNamespace(platform=backend or "tpu")])
    assert ops_lib.kind_of(None) == "other"
    for default in (jax.devices("cpu")[0], "cpu"):
        with jax.default_device(default):
            assert ops_lib.kind_of(None) == "cpu"


def test_options_of_older_configs(tmp_path):
    """A stored run's old options are converted to today's."""
    stored = pathlib.Path(__file__).parent / "stored" / "lone.tar.gz"
    with tarfile.open(stored) as archive:
        archive.extractall(tmp_path, filter="data")
    (config,) = tmp_path.rglob("config.json")
    before = json.loads(config.read_text())["model"]["overrides"]
    overrides = workdir.read_plain_config(config.parent)["model"]["overrides"]
    assert set(before) - set(OPTIONS) and set(overrides) <= set(OPTIONS)
    (gone,) = set(before) - set(OPTIONS)
    assert ops_lib.current_options({gone: False, "width": 4}) == {"ops": "plain", "width": 4}
    assert ops_lib.current_options({gone: True})["ops"] == "cpu"
    assert ops_lib.current_options({"kernel": "pallas"}) == {"kernel": None, "ops": "gpu"}
