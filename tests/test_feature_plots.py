"""The figures of a model's activations, checked by matplotlib's artists."""

import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image

from regnet_flax.analysis import features
from regnet_flax.analysis.plots import features as plots


@pytest.fixture
def figures(monkeypatch):
    """Collects the figures instead of closing them."""
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    return drawn


def blocks(regulated=True):
    random = np.random.default_rng(0)
    made = []
    for stage, block, size in ((1, 1, 4), (1, 2, 4), (2, 1, 2)):
        shape = (3, size, size, 5)
        draw = lambda shape=shape: random.random(shape, np.float32)  # noqa: E731
        gates = {"i": draw(), "g": 2 * draw() - 1} if regulated else {}
        state = {"H": draw(), "C": draw()} if regulated else {}
        made.append(features.BlockFeatures(stage, block, draw(), state, gates))
    return made


def images_of(figure):
    return [axes.images[0].get_array() for axes in figure.axes if axes.images]


def test_feature_maps_of_consecutive_blocks(tmp_path, figures):
    made = blocks()
    plots.feature_maps({"a": made, "b": made[:2]}, tmp_path / "maps.png", stage=1, image=2, channels=3)
    drawn = images_of(figures[0])
    assert len(drawn) == 2 * 2 * 3
    first, second = made[0].output[2], made[1].output[2]
    kept = np.sort(np.argsort(first.std((0, 1)))[::-1][:3])
    for column, channel in enumerate(kept):
        np.testing.assert_array_equal(drawn[column], first[..., channel])
        np.testing.assert_array_equal(drawn[3 + column], second[..., channel])
    alike = features.cosine_similarity(first[None], second[None])
    assert f"{alike:.2f}" in figures[0].axes[3].get_ylabel() and "1.2" in figures[0].axes[3].get_ylabel()
    assert np.asarray(Image.open(tmp_path / "maps.png")).std() > 0


def test_similarity_matrices_leave_out_what_is_not_defined(tmp_path, figures):
    made = blocks()
    matrices = {"cka": features.similarity(made), "cosine": features.similarity(made, "cosine")}
    plots.similarity(matrices, [block.name for block in made], tmp_path / "similarity.png", "title")
    cka, cosine, _ = figures[0].axes
    assert len(cka.texts) == 9 and len(cosine.texts) == 5
    assert cosine.texts[1].get_text() == f"{matrices['cosine'][0, 1]:.2f}".removeprefix("0")
    assert cka.images[0].get_clim() == cosine.images[0].get_clim()
    assert [label.get_text() for label in cka.get_xticklabels()] == ["1.1", "1.2", "2.1"]


def test_gates_through_the_blocks_break_where_the_state_starts_anew(tmp_path, figures):
    made = blocks()
    plots.gates(made, tmp_path / "gates.png")
    i, g = figures[0].axes
    medians = [line.get_xydata() for line in i.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(medians[0], [(n, np.median(made[n].gates["i"])) for n in (0, 1)])
    np.testing.assert_allclose(medians[1], [(2, np.median(made[2].gates["i"]))])
    assert i.get_ylim()[0] > -0.1 and g.get_ylim()[0] < -1


def test_state_over_time(tmp_path, figures):
    made = blocks()
    plots.state(made, tmp_path / "state.png", image=1)
    drawn = images_of(figures[0])
    assert len(drawn) == 6
    np.testing.assert_allclose(drawn[4], np.sqrt((made[1].state["C"][1] ** 2).mean(-1)))


@pytest.mark.parametrize("draw", [plots.gates, plots.state])
def test_a_resnet_has_no_regulator_to_draw(draw, tmp_path):
    with pytest.raises(ValueError, match="no block has a regulator"):
        draw(blocks(regulated=False), tmp_path / "x.png")
