"""What all tests share: fixed seeds, one thread, and the same hypothesis examples at every run."""

import os
from pathlib import Path

import pytest
import torch
from compatibility import (  # noqa: F401 - hooks and a fixture
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_runtest_call,
    pytest_sessionfinish,
    refusal,
)
from hypothesis import settings

from lightning_selfcompress.cli.main import main

settings.register_profile("same every time", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("same every time")


# What a test needs, by the beginning of its path in this folder; ``make test-fast`` leaves these out.
KINDS = {
    "fits/": "fit",
    "cli/": "fit",
    "demo/": "fit",
    "files/test_bad_checkpoints": "fit",
    "files/test_opening": "fit",
    "reporting/test_report_command": "fit",
    "reporting/test_sweep": "fit",
    "onnx/": "onnx",
    "fits/test_strategies": "process",
    "removal/test_sharding": "process",
    "test_imports": "process",
    "test_documents": "process",
    "packing/test_damage": "long",
}


def pytest_itemcollected(item):
    """Marks a test with what it needs."""
    path = item.path.relative_to(Path(__file__).parent).as_posix()
    for beginning, kind in KINDS.items():
        if path.startswith(beginning):
            item.add_marker(kind)


torch.set_num_threads(1)  # before any fixture of a module: sums over two threads are rounded otherwise


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def said(capsys):
    """Runs a command: its exit status, its lines on stdout, and stderr."""

    def run(*arguments):
        capsys.readouterr()
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as error:
            status = error.code
        out, err = capsys.readouterr()
        return status, out.splitlines(), err

    return run


@pytest.fixture(scope="session")
def mnist_folder():
    """The folder with real MNIST: SELFCOMPRESS_DATA. Skips without it; in CI that is a failure."""
    folder = os.environ.get("SELFCOMPRESS_DATA")
    if folder and Path(folder).is_dir():
        return Path(folder)
    reason = "needs MNIST's four files: set SELFCOMPRESS_DATA to their folder"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
