"""The figures, by what matplotlib was asked to draw."""

import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image

from regnet_flax.analysis import plots


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
