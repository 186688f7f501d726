"""The notebook in examples/ runs, and its recorded outputs are those of a whole run."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from small_llama import save_byte_llama

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def notebook():
    return nbformat.read(EXAMPLES / "quick-start.ipynb", as_version=4)


def outputs(notebook):
    """What each code cell printed, and the number of its plots."""
    cells = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    printed = ["".join(output.text for output in cell if output.get("name") == "stdout") for cell in cells]
    return printed, [sum("image/png" in output.get("data", {}) for output in cell) for cell in cells]


def states(text):
    return {name: float(value) for name, value in re.findall(r"^([\w ]+): ([\d.]+)$", text, re.MULTILINE)}


def kept(printed):
    """The lines of the report on layers that stay dense, each with the reason."""
    return re.findall(r"^ *kept .*", "".join(printed), re.MULTILINE)


def test_the_notebook_runs_on_another_chat_model(notebook, tmp_path, monkeypatch):
    save_byte_llama(tmp_path / "model", chat=True, tied=True)  # as SmolLM2
    for name, value in {"MODEL": tmp_path / "model", "STEPS": 3, "OUT": tmp_path, "OMP_NUM_THREADS": 1}.items():
        monkeypatch.setenv(name, str(value))
    recorded, plots = outputs(notebook)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    printed, plots_again = outputs(notebook)
    assert plots_again == plots
    assert kept(printed) == kept(recorded) != [], "execute the notebook again"
    found = states(printed[-2])
    assert list(found) == ["quantized", "adapted", "merged", "merged into 8 bits"]
    assert found["adapted"] < found["quantized"]
    assert (tmp_path / "merged" / "config.json").exists()


def test_the_recorded_outputs_are_whole(notebook):
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    printed, plots = outputs(notebook)
    assert sum(plots) == 2
    found = states(printed[-2])
    assert found["adapted"] < found["merged into 8 bits"] < found["merged"]
    assert not [cell for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "error"]


def test_the_page_of_the_site_shows_text_code_outputs_and_plots(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES.parent / "docs")
    page = importlib.import_module("hooks").notebook_page(
        {
            "cells": [
                {"cell_type": "markdown", "source": ["# Title\n", "text"]},
                {
                    "cell_type": "code",
                    "source": "print(1)",
                    "outputs": [
                        {"output_type": "stream", "name": "stderr", "text": ["a progress bar"]},
                        {"output_type": "stream", "name": "stdout", "text": ["1\n"]},
                        {"output_type": "display_data", "data": {"image/png": "QUJD\n", "text/plain": ["<Figure>"]}},
                    ],
                },
            ]
        }
    )
    assert page == (
        "# Title\ntext\n\n```python\nprint(1)\n```\n\n```text\n1\n```\n\n![plot](data:image/png;base64,QUJD)\n"
    )
