"""The native operations against the plain equations, in float64 where precision matters."""

import functools
import hashlib
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from helpers import close, halves
from regnet_flax.models.ops import CPU, PLAIN, native_library

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAYERS = str(ROOT / "tests/test_ops_native_layers.py")
CELLS = {"rnn": 1, "gru": 3, "lstm": 4}
pytestmark = pytest.mark.core
needs_library = pytest.mark.skipif(not native_library.available(), reason="there is no C++ compiler here")

# Images, height, width, channels: one pixel, odd sizes, blocks of 16 channels, no image, more images than parts.
SIZES = [(1, 1, 1, 1), (3, 5, 7, 3), (2, 9, 4, 20), (2, 8, 17, 32), (0, 4, 4, 3), (70, 3, 2, 2)]


def arguments(cell, size, seed=0):
    """Returns X, the state, the weights; and directions for the new state."""
    rng, gates, n = np.random.default_rng(seed), CELLS[cell], size[-1]
    states = 2 if cell == "lstm" else 1
    shapes = [size] * (1 + states) + [(2, gates, n), (3, 3, gates, n), (gates, n)]
    scales = [1.0] * (1 + states) + [0.5] * 3
    arrays = tuple((rng.normal(size=s) * scale).astype(np.float32) for s, scale in zip(shapes, scales, strict=True))
    return arrays, tuple(rng.normal(size=size).astype(np.float32) for _ in range(states))


def step(ops, cell, x, *rest):
    """Returns only the new state."""
    *state, pointwise, depthwise, bias = rest
    new_state, _ = getattr(ops, f"{cell}_step")(x, tuple(state), (pointwise, depthwise, bias))
    return tuple(a.astype(x.dtype) for a in new_state)


def value_and_gradients(ops, cell, arrays, directions):
    value, vjp = jax.vjp(functools.partial(step, ops, cell), *arrays)
    return value, vjp(directions)


def of_all(ops, cell, cases):
    return [value_and_gradients(ops, cell, *case) for case in cases]


@needs_library
@pytest.mark.parametrize("cell", CELLS)
def test_values_and_gradients(cell):
    """Compares float32 and, for bfloat16 images, also the weights' gradients: sums are float32."""
    cases = [arguments(cell, size) for size in SIZES]
    states = len(cases[0][1])
    images = slice(0, 1 + states)

    def narrow(case):
        arrays, directions = case
        return (*(a.astype(jnp.bfloat16) for a in arrays[images]), *arrays[1 + states :]), tuple(
            d.astype(jnp.bfloat16) for d in directions
        )

    narrow_cases = [narrow(case) for case in cases]
    found, narrow_found = (jax.jit(functools.partial(of_all, CPU, cell))(c) for c in (cases, narrow_cases))
    assert "regnet_flax_" in str(jax.make_jaxpr(functools.partial(of_all, CPU, cell))(narrow_cases[:1]))
    with jax.enable_x64(True):
        reference = jax.jit(functools.partial(of_all, PLAIN, cell))
        wide = [jax.tree.map(lambda a: np.asarray(a, np.float64), c) for c in (cases, narrow_cases)]
        expected, narrow_expected = (reference(c) for c in wide)
    close(found, expected, 1e-6)
    for (value, gradients), (wide_value, wide_gradients) in zip(narrow_found, narrow_expected, strict=True):
        assert all(a.dtype == jnp.bfloat16 for a in (*value, *gradients[images]))
        close((value, gradients[images]), (wide_value, wide_gradients[images]), 2**-8)
        close(gradients[1 + states :], wide_gradients[1 + states :], 1e-6)


@needs_library
@pytest.mark.parametrize("cell", [c if c == "lstm" else pytest.param(c, marks=pytest.mark.thorough) for c in CELLS])
def test_second_derivatives_and_transformations(cell):
    arrays, directions = arguments(cell, (4, 3, 5, 3))
    others, other_directions = arguments(cell, (4, 3, 5, 3), seed=1)
    states = len(directions)
    divided = jax.tree.map(halves, (arrays[: 1 + states], directions))
    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), (arrays, directions), (others, other_directions))

    def everything(ops):
        both = functools.partial(value_and_gradients, ops, cell)
        x, *state, pointwise, depthwise, bias = arrays
        weights = (pointwise, depthwise, bias)

        def gradients(*arrays):
            return both(arrays, directions)[1]

        def blocks(x, weights):
            block = jax.checkpoint(lambda state, _: (step(ops, cell, x, *state, *weights), None))
            last, _ = lax.scan(block, tuple(state), length=2)
            return sum(jnp.vdot(a, d) for a, d in zip(last, directions, strict=True))

        def by_image(images, directions):
            return both((*images, *weights), directions)

        return {
            "forward over reverse": jax.jvp(gradients, arrays, others)[1],
            "reverse over reverse": jax.vjp(gradients, *arrays)[1](gradients(*others)),
            "all by vmap": jax.vmap(both)(*stacked),
            "images by vmap": jax.vmap(by_image)(*divided),
            "weights by vmap of vmap": jax.vmap(jax.vmap(lambda b: both((*arrays[:-1], b), directions)))(
                jnp.stack([jnp.stack([bias, -bias, bias / 2])] * 2)
            ),
            "scan and checkpoint": jax.grad(blocks, (0, 1))(x, weights),
        }

    close(jax.jit(everything, static_argnums=0)(CPU), jax.jit(everything, static_argnums=0)(PLAIN), 2e-5)


@needs_library
@pytest.mark.parametrize("cell", [c if c == "lstm" else pytest.param(c, marks=pytest.mark.thorough) for c in CELLS])
def test_devices(cell):
    """With pmap, and with shard_map and its default check_vma, which sums the devices' gradients of weights."""
    devices = jax.devices()[:2]
    arrays, directions = arguments(cell, (4, 3, 5, 3))
    images = 1 + len(directions)
    mesh, one, all_ = Mesh(np.array(devices), ("batch",)), PartitionSpec("batch"), PartitionSpec()
    specs = (one,) * images + (all_,) * 3

    def run(ops):
        both = functools.partial(value_and_gradients, ops, cell)
        by_device = jax.pmap(lambda a, d, w: both((*a, *w), d), in_axes=(0, 0, None), devices=devices)
        outputs = (one,) * len(directions), specs
        sharded = jax.shard_map(both, mesh=mesh, in_specs=(specs, (one,) * len(directions)), out_specs=outputs)
        return by_device(*jax.tree.map(halves, (arrays[:images], directions)), arrays[images:]), jax.jit(sharded)(
            arrays, directions
        )

    close(run(CPU), run(PLAIN), 1e-5)


@needs_library
@pytest.mark.parametrize("cell", CELLS)
def test_nan_and_infinities_spread_as_in_the_plain_form(cell):
    """They reach the same pixels. XLA's versions also differ in NaN or infinity."""
    inputs = 3 if cell == "lstm" else 2
    count = 2 * inputs - 1
    (arrays, directions), rng = arguments(cell, (3 * count + 1, 4, 10, 3)), np.random.default_rng(1)
    weights, images = arrays[inputs:], [a.copy() for a in (*arrays[:inputs], *directions)]
    for place in range(3 * count):  # one in each image but the last
        pixel = rng.integers(4), rng.choice([0, 5, 9]), 1
        images[place // 3][(place, *pixel)] = [np.nan, np.inf, -np.inf][place % 3]

    def run(ops, images, weights):
        return value_and_gradients(ops, cell, (*images[:inputs], *weights), tuple(images[inputs:]))

    found, expected = (jax.jit(functools.partial(run, ops))(images, weights) for ops in (CPU, PLAIN))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        finite = np.isfinite(b)
        assert finite.any() and not finite.all()
        np.testing.assert_array_equal(np.isfinite(a), finite)
        np.testing.assert_allclose(np.where(finite, a, 0), np.where(finite, b, 0), rtol=1e-4, atol=1e-4)
    weights = (*weights[:-1], weights[-1].copy())
    weights[-1][0, 1] = np.nan
    value, gradients = jax.jit(functools.partial(run, CPU))([*arrays[:inputs], *directions], weights)
    for a in (value[0], gradients[0]):
        assert np.isnan(a[..., 1]).all() and np.isfinite(a[..., ::2]).all()


def units(found, expected):
    """Returns the largest error in ULPs; XLA flushes products to 0 that matter for results below 1e-30."""
    tiny = np.abs(expected) < 1e-30
    np.testing.assert_allclose(found[tiny], expected[tiny], rtol=1e-6, atol=2 * np.finfo(np.float32).tiny)
    found, expected = found[~tiny].astype(np.float64), expected[~tiny]
    return (np.abs(found - expected) / np.spacing(np.abs(expected).astype(np.float32))).max()


@needs_library
def test_sigmoid_and_tanh_over_the_whole_range():
    """Tests every 2048th float32, and more near 0: a cell of one pixel, whose weights pass X through."""
    bits = np.arange(0, 2**32, 2048, dtype=np.uint64).astype(np.uint32)
    x = np.concatenate([bits.view(np.float32), np.linspace(-20, 20, 2**20, dtype=np.float32)])
    x = np.concatenate([x[np.isfinite(x)], np.array([np.nan, np.inf, -np.inf], np.float32)]).reshape(-1, 1, 1, 1)
    center = np.zeros((3, 3, 1, 1), np.float32)
    center[1, 1] = 1
    h = np.zeros_like(x)
    one = np.array([[[1.0]], [[0.0]]], np.float32)
    ((tanh,), _) = CPU.rnn_step(x, (h,), (one, center, np.zeros((1, 1), np.float32)))
    with np.errstate(invalid="ignore", over="ignore"):
        wide = x.astype(np.float64)
        exact_tanh, exact_sigmoid = np.tanh(wide), 1 / (1 + np.exp(-wide))
    # Only f sees X; i·g is 0 because g is.
    gates = np.zeros((2, 4, 1), np.float32)
    gates[0, 1] = 1
    weights = (gates, np.repeat(center, 4, 2), np.zeros((4, 1), np.float32))
    ((_, sigmoid), _) = CPU.lstm_step(x, (h, np.ones_like(x)), weights)
    tanh, sigmoid = np.asarray(tanh), np.asarray(sigmoid)
    finite = np.isfinite(x)
    assert units(tanh[finite], exact_tanh[finite]) < 2.6
    assert units(sigmoid[finite], exact_sigmoid[finite]) < 2.6
    np.testing.assert_array_equal(tanh[~finite], [np.nan, 1, -1])
    gates[0] = 1  # if X is infinite, all gates see it; otherwise 0 · ∞ is NaN
    ((_, sums), _) = CPU.lstm_step(x[-3:], (h[-3:], np.ones_like(h[-3:])), weights)
    np.testing.assert_array_equal(np.ravel(sums), [np.nan, 2, 0])


# Prints a digest of all results of one cell. Its second argument is how many cores the process may use.
DIGEST = """
import os, sys
if sys.argv[2] == "1":
    os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
import functools, jax, test_ops_native as here
print(here.digest(sys.argv[1]))
"""


def digest(cell):
    arrays, directions = arguments(cell, (67, 8, 8, 33))
    found = jax.jit(functools.partial(value_and_gradients, CPU, cell))(arrays, directions)
    return hashlib.sha256(b"".join(np.asarray(a).tobytes() for a in jax.tree.leaves(found))).hexdigest()


@needs_library
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux alone pins a process")
def test_bits_depend_on_neither_timing_nor_threads():
    here = {digest(cell) for cell in ["gru"] * 3}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    alone = subprocess.run(
        [sys.executable, "-c", DIGEST, "gru", "1"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert alone.returncode == 0, alone.stderr
    assert here == {alone.stdout.strip()}


@needs_library
def test_float64_is_computed_by_the_plain_form():
    with jax.enable_x64(True):
        arrays, directions = jax.tree.map(lambda a: a.astype(np.float64), arguments("lstm", (2, 3, 3, 2)))
        program = jax.make_jaxpr(functools.partial(value_and_gradients, CPU, "lstm"))(arrays, directions)
    assert "regnet_flax_" not in str(program)


@pytest.mark.slow
def test_with_sanitizers(tmp_path):
    """Runs these tests again with the address and undefined-behaviour sanitizers."""
    if os.environ.get("LD_PRELOAD"):
        pytest.skip("this is that run")
    # The sanitizer intercepts libstdc++'s exceptions, and jaxlib throws some.
    compiler = os.environ.get("CXX", "c++")
    find = [[compiler, f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so")]
    preloaded = [subprocess.run(command, capture_output=True, text=True).stdout.strip() for command in find]
    if not all(pathlib.Path(path).is_absolute() for path in preloaded):
        pytest.skip("the compiler has no sanitizers")
    environment = os.environ | {
        "CXXFLAGS": "-fsanitize=address,undefined -fno-sanitize-recover=all -g -O1",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself leaks
        "XDG_CACHE_HOME": str(tmp_path),
    }
    run = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    build = "from regnet_flax.models.ops import native_library as n; n.TIME_LIMIT = 900; n._library()"
    run([sys.executable, "-c", build], env=environment, check=True)
    names = "values or second or devices or nan or sigmoid"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "0",
        "-q",
        "-s",
        "-p",
        "no:cacheprovider",
        "--thorough",
        "-k",
        names,
        __file__,
        LAYERS,
    ]
    done = run(command, env=environment | {"LD_PRELOAD": " ".join(preloaded)})
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout + done.stderr
