"""The figures, by what matplotlib was asked to draw."""

import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image

from regnet_flax.analysis import compare_plots, plots


@pytest.fixture
def figures(monkeypatch):
    """The figures that would have been closed."""
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    return drawn


LINES = [
    {"step": 5, "epoch": 0.5, "train_loss": 2.0, "train_accuracy": 0.2, "learning_rate": 0.1},
    {"step": 10, "epoch": 1.0, "train_loss": 1.0, "train_accuracy": 0.5, "eval_loss": 1.5, "eval_accuracy": 0.4},
    {"step": 20, "epoch": 2.0, "train_loss": 0.5, "train_accuracy": 0.8, "eval_loss": 0.7, "eval_accuracy": 0.75},
]


def test_curves(tmp_path, figures):
    path = tmp_path / "curves.png"
    plots.curves(LINES, path, "a model", drops=[1.5, 9.0])
    loss, accuracy = figures[0].axes
    curves = {line.get_label(): line.get_xydata().tolist() for line in loss.lines}
    assert curves["training"] == [[0.5, 2.0], [1.0, 1.0], [2.0, 0.5]]
    assert curves["test"] == [[1.0, 1.5], [2.0, 0.7]]
    assert [x for x, _ in curves["learning rate drops"]] == [1.5, 1.5] and len(loss.lines) == 3
    curves = {line.get_label(): line.get_xydata().tolist() for line in accuracy.lines}
    assert curves["test"] == [[1.0, 0.4], [2.0, 0.75]]
    assert [text.get_text() for text in accuracy.texts] == ["75.00%"]
    assert figures[0].get_suptitle() == "a model"
    assert np.asarray(Image.open(path)).std() > 0


@pytest.mark.parametrize("lines", [[], LINES[:1]])
def test_curves_of_a_run_that_measured_little(lines, tmp_path):
    plots.curves(lines, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists()


def test_compared_curves(tmp_path, figures):
    epochs = np.array([1.0, 2.0, 3.0])
    values = np.array([[30.0, 8.0, 4.0], [50.0, 10.0, 2.0]])
    runs = {
        "two seeds": {"train_loss": (epochs, values / 10), "test_error": (epochs, values)},
        "one seed": {"train_loss": (epochs, values[:1] / 10), "test_error": (epochs, values[:1] + 1)},
    }
    compare_plots.compared_curves(runs, tmp_path / "curves.png")
    loss, error = figures[0].axes
    found = {line.get_label(): line.get_ydata().tolist() for line in error.lines}
    assert found == {"two seeds": [40, 9, 3], "one seed": [31, 9, 5]}
    np.testing.assert_allclose(loss.lines[0].get_ydata(), [4, 0.9, 0.3])
    (band,) = error.collections
    corners = {tuple(point) for point in band.get_paths()[0].vertices.tolist()}
    assert corners == {(e, v) for seed in values for e, v in zip(epochs, seed, strict=True)}
    assert 9 < error.get_ylim()[1] < 40, "the end is what is to be seen"
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["two seeds", "one seed"]


def test_compared_costs(tmp_path, figures):
    runs = {"a": (2000, 3_000_000, [1.0, 2.0, 6.0]), "b": (5000, 7_000_000, [4.0])}
    for dark in (False, True):
        compare_plots.compared_costs(runs, tmp_path / "costs.png", dark=dark)
    parameters, multiply_adds = figures[0].axes
    points = {c.get_label(): c.lines[0].get_xydata()[0].tolist() for c in parameters.containers}
    assert points == {"a": [2, 3], "b": [5, 4]}
    assert [c.lines[0].get_xydata()[0].tolist() for c in multiply_adds.containers] == [[3, 3], [7, 4]]
    (bar,) = parameters.containers[0].lines[2]
    np.testing.assert_allclose(bar.get_segments()[0][:, 1], [3 - 7**0.5, 3 + 7**0.5])
    assert not parameters.containers[1].has_yerr
    light, dark = (figure.get_facecolor() for figure in figures)
    assert min(light[:3]) > 0.9 > 0.2 > max(dark[:3])
