"""The examples in docstrings run, and every public name has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import lightning_selfcompress

FILES = [m.name for m in pkgutil.walk_packages(lightning_selfcompress.__path__, "lightning_selfcompress.")]
NO_EXAMPLE = {"CheckpointError", "PackedFileError", "RunError", "SelfCompressError"}  # which nobody makes


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith("__main__")])
def test_examples_run(name, tmp_path, monkeypatch):
    """What an example shows is what it prints."""
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("name", sorted(set(lightning_selfcompress.__all__) - NO_EXAMPLE))
def test_public_names_have_an_example(name):
    """A public docstring says what it does in one line, and shows it."""
    text = inspect.getdoc(getattr(lightning_selfcompress, name))
    assert text.splitlines()[0].endswith((".", ":"))
    assert ">>> " in text
