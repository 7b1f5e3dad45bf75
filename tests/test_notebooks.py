"""The notebooks in the repository are whole, light, in order, and ready to open anywhere.

`make test-notebooks` runs them from an installed wheel.
"""

import ast
import re
from pathlib import Path

import nbformat
import pytest
from fast_notebooks import FAST, make_fast
from IPython.core.inputtransformer2 import TransformerManager

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_they_are_numbered():
    """Names begin with the place in the row, from 1 on without a gap."""
    numbers = [int(re.match(r"(\d+)-[a-z-]+$", path.stem)[1]) for path in NOTEBOOKS]
    assert numbers == list(range(1, 8))


@each_notebook
def test_it_is_kept_with_outputs(path):
    """The notebook was run in order, without errors, and says what it printed."""
    cells = code_of(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(output.output_type != "error" for cell in cells for output in cell.outputs)
    assert any(cell.outputs for cell in cells)


@each_notebook
def test_it_is_light(path):
    """The file with its pictures has fewer than 500 kB."""
    assert path.stat().st_size < 500_000


@each_notebook
def test_it_says_first_what_one_will_have(path):
    """It opens with a title and with what the reader will have at its end."""
    first = read(path).cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")
    assert "At the end of this notebook you will have" in first.source.replace("\n", " ")


@each_notebook
def test_it_installs_where_nothing_is_installed(path):
    """The first code asks for the package, installs it with the notebooks' extra, and says nothing here."""
    first = code_of(read(path))[0]
    assert 'find_spec("lightning_selfcompress")' in first.source
    assert '%pip install --quiet "lightning-selfcompress[notebooks]"' in first.source
    assert not first.outputs


@each_notebook
def test_fast_settings_are_found(path):
    """Each text that a fast run replaces is in the code, which stays code that Python can read."""
    notebook = read(path)
    make_fast(notebook, path.stem)
    for cell in code_of(notebook):
        if not cell.source.startswith("%%"):
            ast.parse(TransformerManager().transform_cell(cell.source))


def test_a_setting_that_is_not_found_is_told():
    """A fast setting of a notebook whose code has changed is an error that names the text."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("epochs = 61")])
    with pytest.raises(ValueError, match="'max_epochs=40' in the code of 1-quickstart"):
        make_fast(notebook, "1-quickstart")
    assert list(FAST) == [path.stem for path in NOTEBOOKS]


@each_notebook
def test_links_lead_to_notebooks(path):
    """Notebooks link to notebooks that there are."""
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    assert all((FOLDER / link).is_file() for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text))
