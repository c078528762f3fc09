"""The cells against their equations, written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regnet_flax.models.regulators import REGULATORS, ConvGRU, ConvLSTM, ConvRNN

pytestmark = pytest.mark.core

N, HEIGHT, WIDTH, CHANNELS, STEPS = 2, 5, 4, 3, 3


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def conv3x3(x, kernel):
    """Convolves (N, H, W, inputs) with (3, 3, inputs, outputs), with zero padding."""
    out = np.zeros((*x.shape[:3], kernel.shape[-1]))
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            for di in range(3):
                for dj in range(3):
                    y, z = i + di - 1, j + dj - 1
                    if 0 <= y < x.shape[1] and 0 <= z < x.shape[2]:
                        out[:, i, j] += x[:, y, z] @ kernel[di, dj]
    return out


def gate(params, kernel, index, x, h):
    """Returns W[x, h] + b of one gate."""
    n = CHANNELS
    here = slice(index * n, (index + 1) * n)
    if kernel == "dense":
        return conv3x3(np.concatenate([x, h], -1), params["conv"]["kernel"][..., here]) + params["conv"]["bias"][here]
    pointwise = params["pointwise"]["kernel"][0, 0, :, here]
    depthwise = params["depthwise"]["kernel"][:, :, 0, here]
    out = np.zeros_like(x)
    for c in range(n):
        pair = pointwise[0, c] * x[..., c] + pointwise[1, c] * h[..., c]
        out[..., c] = conv3x3(pair[..., None], depthwise[:, :, c, None, None])[..., 0]
    return out + params["depthwise"]["bias"][here]


def convrnn(w, x, h):
    return (np.tanh(w(0, x, h)),)


def convgru(w, x, h):
    z, r = sigmoid(w(0, x, h)), sigmoid(w(1, x, h))
    candidate = np.tanh(w(2, x, r * h))
    return ((1 - z) * h + z * candidate,)


def convlstm(w, x, h, c):
    i, f, o = sigmoid(w(0, x, h)), sigmoid(w(1, x, h)), sigmoid(w(2, x, h))
    c = f * c + i * np.tanh(w(3, x, h))
    return o * np.tanh(c), c


EQUATIONS = {"convrnn": convrnn, "convgru": convgru, "convlstm": convlstm}


def random_params(cell, rng, dtype=np.float64):
    x = jnp.zeros((1, HEIGHT, WIDTH, CHANNELS))
    shapes = jax.eval_shape(lambda: cell.init(jax.random.key(0), x, cell.initial_state(x.shape)))["params"]
    return jax.tree.map(lambda a: rng.normal(0, 0.5, a.shape).astype(dtype), shapes)


@pytest.mark.parametrize("kernel", ["separable", "dense"])
@pytest.mark.parametrize("name", REGULATORS)
def test_cell_follows_its_equations(name, kernel):
    rng = np.random.default_rng(0)
    cell = REGULATORS[name](CHANNELS, kernel)
    params = random_params(cell, rng)
    shape = (N, HEIGHT, WIDTH, CHANNELS)
    # Not from zeros, so that a dropped state or swapped arrays show.
    state = expected = tuple(rng.normal(size=shape) for _ in cell.state_names)
    for _ in range(STEPS):
        x = rng.normal(size=shape)
        state, _ = cell.apply({"params": params}, jnp.float32(x), tuple(jnp.float32(a) for a in state))
        expected = EQUATIONS[name](lambda g, a, b: gate(params, kernel, g, a, b), x, *expected)
        for array, value in zip(state, expected, strict=True):
            np.testing.assert_allclose(array, value, atol=2e-6)


@pytest.mark.parametrize("cell_type, names", [(ConvRNN, "h"), (ConvGRU, "zrh"), (ConvLSTM, "ifog")])
def test_gates_are_returned_by_name_in_the_kernels_order(cell_type, names):
    rng = np.random.default_rng(1)
    cell = cell_type(CHANNELS)
    params = random_params(cell, rng)
    x, *state = rng.normal(size=(1 + len(cell.state_names), N, HEIGHT, WIDTH, CHANNELS))
    _, gates = cell.apply({"params": params}, jnp.float32(x), tuple(map(jnp.float32, state)))
    assert "".join(gates) == names
    for index, (name, value) in enumerate(gates.items()):
        h = state[0] * np.asarray(gates["r"], np.float64) if name == "h" and len(names) == 3 else state[0]
        sums = gate(params, "separable", index, x, h)
        squashed = np.tanh(sums) if name in "hg" else sigmoid(sums)
        np.testing.assert_allclose(value, squashed, atol=2e-6)


@pytest.mark.parametrize("name", REGULATORS)
def test_parameters_a_gate(name):
    gates = {"convrnn": 1, "convgru": 3, "convlstm": 4}[name]
    n = CHANNELS
    for kernel, count in (("separable", 12 * n), ("dense", 18 * n * n + n)):
        params = random_params(REGULATORS[name](n, kernel), np.random.default_rng(0))
        assert sum(a.size for a in jax.tree.leaves(params)) == gates * count


@pytest.mark.parametrize("shape", [(3, 4, 4, 2), (2, 5, 4, 2), (2, 4, 4, 3)])
def test_unequal_shapes_are_named(shape):
    cell = ConvLSTM(2)
    x = jnp.zeros((2, 4, 4, 2))
    variables = cell.init(jax.random.key(0), x, cell.initial_state(x.shape))
    with pytest.raises(ValueError, match=r"X has shape \(2, 4, 4, 2\)") as error:
        cell.apply(variables, x, cell.initial_state(shape))
    assert str(shape) in str(error.value)


def test_bfloat16_keeps_float32_parameters_and_sums():
    cell, exact = ConvLSTM(CHANNELS, dtype=jnp.bfloat16), ConvLSTM(CHANNELS)
    x = jax.random.normal(jax.random.key(0), (N, HEIGHT, WIDTH, CHANNELS))
    state = cell.initial_state(x.shape)
    variables = cell.init(jax.random.key(1), x, state)
    assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    (h, c), gates = cell.apply(variables, x, state)
    assert h.dtype == c.dtype == jnp.bfloat16
    assert gates["i"].dtype == jnp.float32
    (h32, c32), _ = exact.apply(variables, x, state)
    np.testing.assert_allclose(h.astype(jnp.float32), h32, atol=0.02)
    np.testing.assert_allclose(c.astype(jnp.float32), c32, atol=0.02)


@pytest.mark.parametrize("kernel", ["separable", "dense"])
def test_initial_values(kernel):
    """LeCun normal (variance 1 / fan-in) and no bias."""
    n = 64
    cell = ConvLSTM(n, kernel)
    x = jnp.zeros((1, 2, 2, n))
    params = cell.init(jax.random.key(0), x, cell.initial_state(x.shape))["params"]
    fan_ins = {"pointwise": 2, "depthwise": 9} if kernel == "separable" else {"conv": 18 * n}
    for name, fan_in in fan_ins.items():
        assert np.std(params[name]["kernel"]) == pytest.approx(fan_in**-0.5, rel=0.08)
    assert not np.any(params["depthwise" if kernel == "separable" else "conv"]["bias"])
