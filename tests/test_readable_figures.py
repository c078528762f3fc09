"""Readable figures: names in any script, plain ticks, labels beside the lines, any backend."""

import os
import sys
import warnings

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot as plt

from regnet_flax.analysis import plots
from regnet_flax.analysis.by_class import write_figures
from regnet_flax.analysis.plots import classes, fonts, training
from regnet_flax.files import dataset_title


def draw(names, path):
    with fonts.readable(names):
        classes.confusion(np.eye(len(names), dtype=int), names, path)


def test_class_names_in_another_script_are_set_in_a_font_that_has_them(tmp_path, monkeypatch, figures, logger, caplog):
    files = matplotlib.get_data_path() + "/fonts/ttf/"
    latin, other = fonts._charmap(files + "DejaVuSans.ttf"), fonts._charmap(files + "STIXGeneral.ttf")
    strange = min(other - latin)
    asked = []
    own = fonts._others
    monkeypatch.setattr(fonts, "_others", lambda: asked.append(1) or own())
    draw(["été", "bee"], tmp_path / "a.png")
    assert not asked and not caplog.text  # fonts are searched only for names that need them
    draw([strange * 3, "bee"], tmp_path / "b.png")
    label = figures[-1].axes[0].get_yticklabels()[0]
    assert asked and label.get_fontfamily()[0] == "DejaVu Sans" and len(label.get_fontfamily()) == 2
    assert not caplog.text


def test_where_no_font_has_them_one_line_says_so(tmp_path, monkeypatch, logger, caplog):
    monkeypatch.setattr(fonts, "_others", lambda: iter([]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(["猫", "कुत्ता", "قطة"], tmp_path / "a.png")
    (record,) = caplog.records
    assert "no installed font has the characters" in record.getMessage() and "猫" in record.getMessage()


def lines(losses):
    return [
        {"epoch": float(e), "train_loss": v, "train_accuracy": 0.5, "eval_loss": v, "eval_accuracy": 0.5}
        for e, v in enumerate(losses, 1)
    ]


@pytest.mark.parametrize("losses", [[2.3, 1.9, 1.7], [2.3, 0.4, 0.03], [9.0, 0.001]])
def test_ticks_are_plain_and_epochs_whole_and_the_last_value_stands_beside_the_axes(losses, tmp_path, figures):
    training.curves(lines(losses), tmp_path / "curves.png")
    figure = figures[0]
    figure.canvas.draw()
    loss, accuracy = figure.axes
    low, high = loss.get_ylim()
    ticks = loss.get_yticks()
    texts = loss.yaxis.get_major_formatter().format_ticks(ticks)
    shown = [text for tick, text in zip(ticks, texts, strict=True) if low <= tick <= high]
    assert len(shown) >= 2 and all(float(text) > 0 and "e" not in text for text in shown)
    assert not any(tick.label1.get_text() for tick in loss.yaxis.get_minor_ticks())
    for axes in (loss, accuracy):
        assert all(tick == int(tick) for tick in axes.get_xticks())
    (text,) = accuracy.texts
    assert text.get_window_extent().x0 >= accuracy.get_window_extent().x1
    assert text.get_window_extent().x1 <= figure.bbox.x1


@pytest.mark.parametrize("backend", ["module://nowhere.backend", "no such backend", "TkAgg", ""])
def test_figures_are_written_whatever_backend_is_named(backend, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", backend)
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot")
    monkeypatch.delattr(matplotlib, "pyplot")
    before = matplotlib.get_backend()
    found = plots.pyplot()
    try:
        assert found is not plt and found.get_backend().lower() == "agg"
        assert os.environ["MPLBACKEND"] == backend
    finally:
        matplotlib.use(before)


def test_a_folder_is_called_by_its_name():
    assert dataset_title({"name": "folder", "data_dir": "/photos/ants-bees/"}) == "ants-bees"
    assert dataset_title({"name": "digits", "data_dir": ""}) == "digits"


def test_mistakes_are_shown_first_and_with_their_probabilities(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(classes, "predictions", lambda *args: drawn.update(zip("ilpntsc", args, strict=False)))
    monkeypatch.setattr(classes, "confusion", lambda *_: None)
    outcomes = np.array([[0, 0, 900_000]] * 30 + [[0, 1, 600_000], [1, 0, 990_000], [-1, -1, -1]], np.int32)

    class Data:
        class_names = ("ant", "bee")

        def images(self, split, indices):
            return indices

    write_figures(tmp_path, Data(), outcomes, "title", seed=0)
    assert drawn["i"][:2] == [31, 30] and len(set(drawn["i"])) == 16 and max(drawn["i"][2:]) < 30
    assert drawn["c"].tolist() == [0.99, 0.6] + [0.9] * 14
    write_figures(tmp_path, Data(), np.tile(outcomes[30:32], (20, 1)), "title", seed=0)
    assert drawn["l"].tolist() == [1] * 16  # the most confident mistakes


def test_predictions_show_probabilities(tmp_path, figures):
    images = np.zeros((2, 4, 4, 3), np.uint8)
    classes.predictions(images, [0, 1], [0, 0], ["ant", "bee"], tmp_path / "p.png", "title", [0.991, 0.5])
    texts = {text.get_text() for text in figures[0].findobj(match=lambda a: hasattr(a, "get_text"))}
    assert {"ant 99%", "ant 50%\ntrue: bee"} <= texts
