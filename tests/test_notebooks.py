"""The notebooks run from top to bottom, and their stored outputs are what a reader should see."""

import os
import pathlib
import re

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [
    "01_quickstart",
    "02_inside_the_regulator",
    "03_reproducing_the_paper",
    "04_your_own_photos",
    "05_detection",
    "06_super_resolution",
    "07_your_own_cell_and_loop",
]
LOCAL = re.compile(r"/(home|root|tmp|work|Users|mnt|var|opt)/|[A-Z]:\\\\|\.ipython|ipykernel_")


def pictures(cell):
    return sum("image/png" in output.get("data", {}) for output in cell.get("outputs", []))


def test_all_are_there():
    assert [path.stem for path in NOTEBOOKS] == NAMES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_kept(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    first, *_ = notebook.cells
    assert first.cell_type == "markdown" and "You will learn" in first.source
    assert "## Exercises" in [cell for cell in notebook.cells if cell.cell_type == "markdown"][-1].source
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum(map(pictures, code)) >= 1
    assert not LOCAL.search(path.read_text())
    assert path.stat().st_size < 1_000_000


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::RuntimeWarning")
def test_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    kept = nbformat.read(path, as_version=4)
    notebook = nbformat.from_dict({**kept, "cells": [{**cell} for cell in kept.cells]})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS", raising=False)  # they train for as long as they compile
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])))
    nbclient.NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        coalesce_streams=True,
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    assert not list(tmp_path.iterdir())  # everything is written to a temporary directory
    for ran, was in zip(notebook.cells, kept.cells, strict=True):
        assert pictures(ran) == pictures(was), ran.get("source")
        assert [o.output_type for o in ran.get("outputs", [])] == [o.output_type for o in was.get("outputs", [])]
        assert not [o for o in ran.get("outputs", []) if o.get("name") == "stderr"], ran.outputs
