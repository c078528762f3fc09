"""The figures, checked by matplotlib's artists."""

import pathlib

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from regnet_flax.analysis import plots
from regnet_flax.analysis.plots import classes, comparison, probes, training

LINES = [
    {"step": 5, "epoch": 0.5, "train_loss": 2.0, "train_accuracy": 0.2, "learning_rate": 0.1},
    {"step": 10, "epoch": 1.0, "train_loss": 1.0, "train_accuracy": 0.5, "eval_loss": 1.5, "eval_accuracy": 0.4},
    {"step": 20, "epoch": 2.0, "train_loss": 0.5, "train_accuracy": 0.8, "eval_loss": 0.7, "eval_accuracy": 0.75},
]


def test_curves(tmp_path, figures):
    path = tmp_path / "curves.png"
    training.curves(LINES, path, "a model", drops=[1.5, 9.0])
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
    training.curves(lines, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists()


def test_compared_curves(tmp_path, figures):
    epochs = np.array([1.0, 2.0, 3.0])
    values = np.array([[30.0, 8.0, 4.0], [50.0, 10.0, 2.0]])
    runs = {
        "two seeds": {"train_loss": (epochs, values / 10), "error": (epochs, values)},
        "one seed": {"train_loss": (epochs, values[:1] / 10), "error": (epochs, values[:1] + 1)},
    }
    comparison.compared_curves(runs, tmp_path / "curves.png")
    loss, error = figures[0].axes
    found = {line.get_label(): line.get_ydata().tolist() for line in error.lines}
    assert found == {"two seeds": [40, 9, 3], "one seed": [31, 9, 5]}
    np.testing.assert_allclose(loss.lines[0].get_ydata(), [4, 0.9, 0.3])
    (band,) = error.collections
    corners = {tuple(point) for point in band.get_paths()[0].vertices.tolist()}
    assert corners == {(e, v) for seed in values for e, v in zip(epochs, seed, strict=True)}
    assert 9 < error.get_ylim()[1] < 40, "the end must be visible"
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["two seeds", "one seed"]


def test_compared_costs(tmp_path, figures):
    runs = {"a": (2000, 3_000_000, [1.0, 2.0, 6.0]), "b": (5000, 7_000_000, [4.0])}
    for dark in (False, True):
        comparison.compared_costs(runs, tmp_path / "costs.png", dark=dark)
    parameters, multiply_adds = figures[0].axes
    points = {c.get_label(): c.lines[0].get_xydata()[0].tolist() for c in parameters.containers}
    assert points == {"a": [2, 3], "b": [5, 4]}
    assert [c.lines[0].get_xydata()[0].tolist() for c in multiply_adds.containers] == [[3, 3], [7, 4]]
    (bar,) = parameters.containers[0].lines[2]
    np.testing.assert_allclose(bar.get_segments()[0][:, 1], [3 - 7**0.5, 3 + 7**0.5])
    assert not parameters.containers[1].has_yerr
    light, dark = (figure.get_facecolor() for figure in figures)
    assert min(light[:3]) > 0.9 > 0.2 > max(dark[:3])


NAMES = ["ants", "bees", "Staffordshire bullterrier, Staffordshire bull terrier, pit_bull"]


@pytest.mark.parametrize("channels", [1, 3])
def test_predictions(channels, tmp_path, figures):
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, channels), dtype=np.uint8)
    classes.predictions(images, [0, 1, 2, 2, 0, 1], [0, 0, 2, 1, 2, 1], NAMES, tmp_path / "p.png", "a model")
    (axes,) = figures[0].axes
    assert len(axes.images) == len(axes.texts) == 6
    for drawn, image, text in zip(axes.images, images, axes.texts, strict=True):
        np.testing.assert_array_equal(np.asarray(drawn.get_array()).reshape(8, 8, channels), image)
        left, right, bottom, top = drawn.get_extent()
        assert text.get_position()[0] == pytest.approx((left + right) / 2) and text.get_position()[1] < top < bottom
    titles = [text.get_text() for text in axes.texts]
    assert titles[:2] == ["ants", "ants\ntrue: bees"]
    assert titles[2] == "Staffordshire\nbullterrier,…" and "true: ants" in titles[4]
    colors = [text.get_color() for text in axes.texts]
    assert colors == [classes.RIGHT, classes.WRONG, classes.RIGHT, classes.WRONG, classes.WRONG, classes.RIGHT]
    assert np.asarray(Image.open(tmp_path / "p.png")).std() > 0


def test_more_images_than_fit_in_a_row_and_fewer(tmp_path, figures):
    for count in (1, 16):
        classes.predictions(np.zeros((count, 4, 6, 3), np.uint8), [0] * count, [1] * count, NAMES, tmp_path / "p.png")
    assert [len(figure.axes[0].images) for figure in figures] == [1, 16]
    corners = {tuple(image.get_extent()[::3]) for image in figures[1].axes[0].images}
    assert len(corners) == 16 and len({x for x, _ in corners}) == len({y for _, y in corners}) == 4


def test_confusion_of_few_classes(tmp_path, figures):
    matrix = np.array([[8, 2, 0], [0, 0, 0], [1, 0, 3]])
    classes.confusion(matrix, NAMES, tmp_path / "c.png", "a model")
    axes = figures[0].axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.8, 0.2, 0], [0, 0, 0], [0.25, 0, 0.75]])
    assert {(text.get_position(), text.get_text()) for text in axes.texts} == {
        ((0, 0), "8"),
        ((1, 0), "2"),
        ((0, 2), "1"),
        ((2, 2), "3"),
    }
    assert [label.get_text() for label in axes.get_yticklabels()][:2] == ["ants  80%", "bees  –"]
    assert [label.get_text() for label in axes.get_xticklabels()][:2] == ["ants", "bees"]
    assert "square-root scale" in figures[0].axes[1].get_ylabel() and "recall" in axes.get_ylabel()
    assert not figures[0].texts[1:]


def test_confusion_of_many_classes_names_the_pairs_confused_most(tmp_path, figures):
    for count in (60, 1000):
        matrix = np.diag(np.full(count, 40))
        matrix[3, 5], matrix[7, 1] = 9, 12
        classes.confusion(matrix, [f"class {i}" for i in range(count)], tmp_path / "c.png")
        axes = figures[-1].axes[0]
        assert not axes.texts
        (listed,) = [text.get_text() for text in figures[-1].texts if "→" in text.get_text()]
        assert listed.splitlines()[1:] == ["class 7 → class 1: 12 of 52", "class 3 → class 5: 9 of 49"]
    assert "class 3  82%" in [label.get_text() for label in figures[0].axes[0].get_yticklabels()]
    assert not any("class 3" in label.get_text() for label in figures[1].axes[0].get_yticklabels())


def test_probabilities(tmp_path, figures):
    images = [np.full((10 + i, 20, 3), i, np.uint8) for i in range(5)]
    tops = [[("ants", 0.5 + i / 10), ("bees", 0.5 - i / 10)] for i in range(5)]
    classes.probabilities(images, ["a" * 50 + ".jpg", "b", "c", "d", "e", "not drawn"], tops, tmp_path / "p.png", "x")
    pictures = [axes for axes in figures[0].axes if axes.images]
    charts = [axes for axes in figures[0].axes if axes.patches]
    assert [axes.images[0].get_array().shape[0] for axes in pictures] == [10, 11, 12, 13, 14]
    assert pictures[1].get_title() == "b" and pictures[0].get_title() == "a" * 15 + "…" + "a" * 12 + ".jpg"
    assert [round(bar.get_width(), 3) for bar in charts[3].patches] == [0.8, 0.2]
    assert [text.get_text() for text in charts[3].texts] == ["ants", "80.0%", "bees", "20.0%"]


@pytest.mark.parametrize("name, shown", [("b\ne", r"b\ne"), ("caf\udce9", r"caf\udce9"), ("a$5_$10", "a$5")])
def test_names_are_drawn_as_they_are(name, shown, tmp_path, figures):
    image, line = np.zeros((4, 4, 3), np.uint8), name.replace("\n", r"\n")
    classes.predictions(np.stack([image] * 2), [0, 1], [0, 0], [name, "other"], tmp_path / "predictions.png", line)
    classes.confusion(np.eye(2, dtype=int), [name, "other"], tmp_path / "confusion.png")
    classes.probabilities([image], [name], [[(name, 1.0)]], tmp_path / "probabilities.png")
    training.curves(LINES, tmp_path / "curves.png", title=line)
    probes.grad_cam(image[None], {}, [line], tmp_path / "grad_cam.png")
    assert len(figures) == 5
    for figure in figures:
        texts = [text for text in figure.findobj(Text) if shown in text.get_text()]
        assert texts and not any(text.get_parse_math() for text in texts)


def test_one_function_writes_every_figure():
    files = pathlib.Path(plots.__file__).parent.glob("*.py")
    assert [path.name for path in files if ".savefig(" in path.read_text(encoding="utf-8")] == ["__init__.py"]


def test_compared_curves_of_one_evaluation_are_seen(tmp_path, figures):
    one = {"train_loss": ([1.0], np.array([[2.0], [1.5]])), "error": ([1.0], np.array([[50.0], [40.0]]))}
    comparison.compared_curves({"a": one}, tmp_path / "curves.png")
    for axes in figures[0].axes:
        assert axes.lines[0].get_marker() == "o" and len(axes.collections) == 1
