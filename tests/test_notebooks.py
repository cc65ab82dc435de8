"""The notebook runs from top to bottom and shows pictures."""

import json
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Few synthetic slices, too few for classifiers to learn from in more than an epoch, and pictures of few pixels.
FASTER = """
import phantom, plots, two_sample

phantom.NUM_POSITIONS = 4
two_sample.CLASSIFIER_MAX_EPOCHS = 1
plots.DPI = 40
"""


def test_the_tour_runs_and_shows_pictures(tmp_path, monkeypatch):
    client = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    for name in ("weights", *(path.name for path in ROOT.glob("*") if path.suffix in (".py", ".jinja", ".toml"))):
        os.symlink(ROOT / name, tmp_path / name)  # The notebook writes to runs/ beside them.
    monkeypatch.setenv("TOUR_EPOCHS", "1")
    monkeypatch.setenv("TOUR_SUBJECTS", "6")
    notebook = nbformat.read(ROOT / "notebooks" / "tour.ipynb", as_version=4)
    notebook.cells.insert(2, nbformat.v4.new_code_cell(FASTER))  # after the cell that finds the project
    client.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 9
    assert (tmp_path / "runs" / "tour" / "report.html").exists()


def test_the_tour_comes_with_its_pictures_and_without_paths():
    nbformat = pytest.importorskip("nbformat")
    path = ROOT / "notebooks" / "tour.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 9
    text = path.read_text(encoding="utf-8")
    assert "/tmp" not in text
    assert "/home" not in text
    assert '"stderr"' not in text


def test_the_tour_draws_at_positions_of_the_training_slices():
    config = json.loads((ROOT / "weights" / "oasis192" / "config.json").read_text())
    text = (ROOT / "notebooks" / "tour.ipynb").read_text(encoding="utf-8")
    (positions,) = re.findall(r"positions = (\[[\d, ]+\])", text)
    others = re.findall(r"sample(?:_codes)?\(\[(\d+)\]|position=(\d+)", text)
    drawn = [*json.loads(positions), *(int(a or b) for a, b in others)]
    assert len(drawn) > 6
    assert set(drawn) <= set(config["slice_positions"])
