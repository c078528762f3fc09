"""Recorded activations against the model's own results; similarities against their definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import random_variables
from regnet_flax import create_model
from regnet_flax.analysis import features
from regnet_flax.models.regnet import CELLS, unstack_blocks


def made(name, size=8, stage_sizes=(2, 1), **options):
    """Makes a small model of the kind with random parameters and statistics, and images for it."""
    model = create_model(name, num_classes=5, **options)
    model = model.clone(depth=3) if name.startswith("regnety") else model.clone(stage_sizes=stage_sizes, width=4)
    images = np.random.default_rng(1).normal(size=(3, size, size, 3)).astype(np.float32)
    return model, random_variables(model, images), images


MODELS = {
    "resnet20": {},
    "regnet20_convrnn": {},
    "regnet20_convgru": {"share_regulator": False},
    "regnet20_convlstm": {"unroll": 1, "stage_sizes": (3, 2)},
    "se_regnet50_convlstm": {"remat": True},
    "regnet_proj_cifar": {},
    "resnet_rnn20_convgru": {},
    "regnety_400mf": {"size": 16},
}


# Those left to --thorough are put together of what others have.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.thorough if n in ("regnet20_convrnn", "regnet_proj_cifar") else ())
        for n in MODELS
    ],
)
def test_every_block_in_order(name):
    model, variables, images = made(name, **MODELS[name])
    blocks = features.inspect(model, variables, images)
    names = [(block.stage, block.block) for block in blocks]
    assert names == sorted(names) and len(set(names)) == len(names)
    if hasattr(model, "stage_sizes"):
        sizes = enumerate(model.stage_sizes, start=1)
        assert names == [(stage, block + 1) for stage, size in sizes for block in range(size)]
    else:
        assert len(names) == model.depth
    # The output of a stage's last block is the stage's output.
    stages = jax.jit(functools.partial(model.apply, train=False, features=True))(variables, images)
    for stage, expected in enumerate(stages.values(), start=1):
        output = [block.output for block in blocks if block.stage == stage][-1]
        assert output.dtype == np.float32 and np.std(output) > 0
        np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-4)
    cell = CELLS.get(getattr(model, "regulator", None))
    for block in blocks:
        assert tuple(block.gates) == (cell.gate_names if cell else ())
        assert tuple(block.state) == (cell.state_names if cell else ())


def test_blocks_under_a_scan_are_those_of_a_loop():
    model, variables, images = made("regnet20_convlstm", stage_sizes=(3, 1))
    plain = model.clone(scan=False)
    for a, b in zip(
        features.inspect(model, variables, images),
        features.inspect(plain, unstack_blocks(variables), images),
        strict=True,
    ):
        assert a.name == b.name
        for one, other in zip(jax.tree.leaves(vars(a)), jax.tree.leaves(vars(b)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_gates_and_state_satisfy_the_equations():
    """C' = f⊙C + i⊙g holds for the recorded arrays, and each gate is in its range."""
    model, variables, images = made("regnet20_convlstm")
    blocks = features.inspect(model, variables, images)
    assert len(blocks) == 3
    before = None
    for block in blocks:
        assert list(block.gates) == ["i", "f", "o", "g"] and list(block.state) == ["H", "C"]
        i, f, o, g = block.gates.values()
        c = 0 if block.block == 1 else before.state["C"]
        np.testing.assert_allclose(block.state["C"], f * c + i * g, rtol=1e-5, atol=1e-6)
        assert all(0 <= gate.min() and gate.max() <= 1 for gate in (i, f, o))
        # H is recorded as the next block's input: batch-normalised, then through a ReLU.
        bn = unstack_blocks(variables)
        params = bn["params"][f"stage{block.stage}"][f"block{block.block}"]["bn_h"]
        stats = bn["batch_stats"][f"stage{block.stage}"][f"block{block.block}"]["bn_h"]
        h = (o * np.tanh(block.state["C"]) - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
        np.testing.assert_allclose(
            block.state["H"], np.maximum(h * params["scale"] + params["bias"], 0), rtol=1e-4, atol=1e-5
        )
        before = block


def test_a_stage_without_a_regulator_has_no_gates():
    blocks = features.inspect(*made("regnet20_convgru", regulated_stages=(2,)))
    assert [block.name for block in blocks if block.gates] == ["2.1"]


def test_bfloat16_comes_out_as_float32():
    model, variables, images = made("regnet20_convgru", dtype=jnp.bfloat16)
    blocks = features.inspect(model, variables, images)
    assert len(blocks) == 3
    for block in blocks:
        assert {leaf.dtype for leaf in (block.output, *block.state.values(), *block.gates.values())} == {np.dtype("f4")}


def cka_by_definition(x, y):
    """Computes ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖), Frobenius norms, for centred columns: Kornblith et al., equation 5."""
    x, y = (a.reshape(len(a), -1) - a.reshape(len(a), -1).mean(axis=0) for a in (x, y))

    def squared_norm(a, b):
        return sum(float(column_a @ column_b) ** 2 for column_a in a.T for column_b in b.T)

    return squared_norm(y, x) / np.sqrt(squared_norm(x, x) * squared_norm(y, y))


def test_cka_is_what_it_is_defined_to_be():
    random = np.random.default_rng(1)
    x, y = random.normal(2, 1, (40, 3, 2, 2)), random.normal(-1, 3, (40, 5))
    y[:, 0] += 2 * x[:, 0, 0, 0]
    expected = cka_by_definition(x, y)
    assert 0.05 < expected < 0.95
    np.testing.assert_allclose(features.linear_cka(x, y), expected, rtol=1e-10)
    np.testing.assert_allclose(features.linear_cka(x, y.astype(np.float32)), expected, rtol=1e-5)
    rotation, _ = np.linalg.qr(random.normal(size=(5, 5)))
    np.testing.assert_allclose(features.linear_cka(y, 3 * y @ rotation + 7), 1)
    assert np.isnan(features.linear_cka(x, np.ones((40, 2))))


def test_cosine_is_what_it_is_defined_to_be():
    random = np.random.default_rng(2)
    x, y = random.random((4, 2, 3)), random.random((4, 2, 3))
    expected = [
        sum(a * b for a, b in zip(p.flat, q.flat, strict=True)) / (np.linalg.norm(p) * np.linalg.norm(q))
        for p, q in zip(x, y, strict=True)
    ]
    np.testing.assert_allclose(features.cosine_similarity(x, y), np.mean(expected))
    np.testing.assert_allclose(features.cosine_similarity(x, -2 * x), -1)
    with pytest.raises(ValueError, match=r"\(4, 2, 3\) and \(4, 6\)"):
        features.cosine_similarity(x, y.reshape(4, 6))


def block(stage, number, output):
    return features.BlockFeatures(stage, number, output, {}, {})


def test_similarities_of_blocks():
    random = np.random.default_rng(3)
    a, b, c = random.random((6, 4, 4, 2)), random.random((6, 4, 4, 2)), random.random((6, 2, 2, 4))
    blocks = [block(1, 1, a), block(1, 2, b), block(2, 1, c), block(2, 2, 2 * c)]
    cka = features.similarity(blocks)
    np.testing.assert_allclose(np.diag(cka), 1)
    np.testing.assert_allclose(cka, cka.T)
    np.testing.assert_allclose(cka[1, 2], cka_by_definition(b, c))
    cosine = features.similarity(blocks, "cosine")
    assert np.isnan(cosine[:2, 2:]).all() and not np.isnan(cosine[:2, :2]).any()
    np.testing.assert_allclose(cosine[0, 1], features.cosine_similarity(a, b))

    neighbours = features.neighbour_similarity(blocks, "cosine")
    assert list(neighbours) == ["1.1–1.2", "2.1–2.2"]
    np.testing.assert_allclose(list(neighbours.values()), [cosine[0, 1], 1])
    np.testing.assert_allclose(list(features.neighbour_similarity(blocks).values()), [cka[0, 1], 1])
    with pytest.raises(ValueError, match="'cka', 'cosine'"):
        features.similarity(blocks, "angle")
